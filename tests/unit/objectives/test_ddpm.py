"""The discrete process and its loss: numbers worked out by hand, and scalar formulas."""

import math

import pytest
import torch
from torch import Tensor

from torchtitan_mixtures.objectives.ddpm import (
    DDPM,
    NoiseTables,
    decoder_nll,
    gaussian_kl,
    linear_betas,
    spaced_steps,
    squared_cosine_betas,
)
from torchtitan_mixtures.objectives.patches import patchify

# step, beta, alpha_bar, posterior variance and its clipped logarithm, weights of data and noised
GOLDEN = [
    (0, 1.0000e-4, 0.999900000, 0, -9.816725, 1.0, 0.0),
    (1, 1.19920e-4, 0.999780092, 5.453188e-5, -9.816725, 0.5452915, 0.454708),
    (10, 2.9920e-4, 0.997806573, 2.584636e-4, -8.260756, 0.1362779, 0.863722),
    (100, 2.09199e-3, 0.895141591, 2.054554e-3, -6.187697, 1.889546e-2, 0.981076),
    (500, 1.005996e-2, 7.77966584e-2, 1.005134e-2, -4.600050, 3.058057e-3, 0.994104),
    (999, 2.0e-2, 4.03582977e-5, 1.999998e-2, -3.912024, 1.283515e-4, 0.989949),
]


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"step {row[0]}")
def test_tables_of_the_linear_schedule(row):
    step, beta, alpha_bar, variance, log_variance, clean_weight, noised_weight = row
    tables = NoiseTables.of(linear_betas(1000))
    assert tables.betas[step].item() == pytest.approx(beta, rel=4e-6)
    assert tables.alpha_bars[step].item() == pytest.approx(alpha_bar, rel=2e-9)
    assert tables.variances[step].item() == pytest.approx(variance, rel=5e-7)
    assert tables.log_variances[step].item() == pytest.approx(log_variance, abs=6e-7)
    assert tables.clean_weights[step].item() == pytest.approx(clean_weight, rel=4e-7)
    assert tables.noised_weights[step].item() == pytest.approx(noised_weight, abs=6e-7)


def test_the_linear_schedule_adds_as_much_noise_in_any_number_of_steps():
    betas = linear_betas(250)
    assert betas.dtype == torch.float64
    assert betas[[0, -1]].tolist() == pytest.approx([4e-4, 8e-2])
    for steps in (250, 4000):
        left = NoiseTables.of(linear_betas(steps)).alpha_bars[-1].log().item()
        assert left == pytest.approx(math.log(4.03582977e-5), rel=0.05)


def test_the_cosine_schedule_leaves_a_squared_cosine():
    steps = 1000

    def level(t: int) -> float:
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = squared_cosine_betas(steps).tolist()
    naive = [min(1 - level(t + 1) / level(t), 0.999) for t in range(steps)]
    assert betas == pytest.approx(naive, rel=1e-9)
    alpha_bar = NoiseTables.of(squared_cosine_betas(steps)).alpha_bars
    assert alpha_bar[499].item() == pytest.approx(level(500) / level(0), rel=1e-9)


def test_250_steps_are_spread_from_the_first_to_the_last():
    for spacing in (250, "250"):
        steps = spaced_steps(1000, spacing)
        assert len(set(steps)) == 250
        assert steps[:6] == [0, 4, 8, 12, 16, 20]
        assert steps[-4:] == [987, 991, 995, 999]


def test_ddim_steps_have_a_whole_stride():
    assert spaced_steps(1000, "ddim50") == list(range(0, 981, 20))
    assert spaced_steps(1000, "ddim1000") == list(range(1000))


@pytest.mark.parametrize("num_steps", [2, 10, 1000])
def test_every_number_of_steps_gives_so_many_ascending_ones(num_steps):
    for count in range(2, num_steps + 1):
        steps = spaced_steps(num_steps, count)
        assert (steps[0], steps[-1], len(steps)) == (0, num_steps - 1, count)
        assert steps == sorted(set(steps))


@pytest.mark.parametrize("spacing", [1, "1", "ddim1"])
def test_a_single_step_starts_from_noise(spacing):
    assert spaced_steps(1000, spacing) == [999]
    tables = NoiseTables.of(linear_betas(1000)).respaced([999])
    assert tables.betas.item() == pytest.approx(1 - 4.03582977e-5)
    assert all(value.isfinite().all() for value in vars(tables).values())


@pytest.mark.parametrize("spacing", [0, -5, 1001, "1001", "ddim", "ddim0", "ddim2000", "1.5", ""])
def test_a_spacing_that_cannot_be_is_named(spacing):
    with pytest.raises(ValueError, match=f"^num_steps = {spacing!r}: must be .* 1 to 1000"):
        spaced_steps(1000, spacing)


def test_a_stride_that_is_not_whole_names_what_is_possible():
    with pytest.raises(ValueError, match=r"^num_steps = 'ddim600': .*; ddim500 or ddim1000 is"):
        spaced_steps(1000, "ddim600")


def test_too_few_noise_steps_are_named():
    with pytest.raises(ValueError, match=r"^objective.noise_steps = 20: must be more than 20 with"):
        DDPM(4, num_steps=20)
    DDPM(4, num_steps=21)
    DDPM(4, num_steps=2, schedule="squared_cosine")


@pytest.mark.parametrize("spacing", [7, "ddim50", 250, 1000])
def test_a_respaced_process_keeps_the_noise_levels_that_it_visits(spacing):
    tables = NoiseTables.of(linear_betas(1000))
    steps = spaced_steps(1000, spacing)
    respaced = tables.respaced(steps)
    torch.testing.assert_close(respaced.alpha_bars, tables.alpha_bars[steps], rtol=1e-12, atol=0)
    before = [0.0, *tables.alpha_bars[steps[:-1]].tolist()]
    for i, step in list(enumerate(steps))[1:]:
        expected = 1 - tables.alpha_bars[step].item() / before[i]
        assert respaced.betas[i].item() == pytest.approx(expected, rel=1e-12)


def constant_losses(
    step: int,
    noise_hat: float,
    learned_variance: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Loss of data 0.5 and noise 1 everywhere, 4 channels, patches of 2 x 2."""
    process = DDPM(4, learned_variance=learned_variance)
    clean = torch.full((1, 3, 16), 0.5, dtype=dtype)
    noise = torch.ones_like(clean)
    prediction = torch.zeros(1, 3, 4, 8 if learned_variance else 4, dtype=dtype)
    prediction[..., :4] = noise_hat
    terms = process.loss_terms(prediction.flatten(2), clean, noise, torch.tensor([step]))
    assert all(term.shape == (1, 3) and term.dtype == dtype for term in terms.values())
    return {name: term.mean().item() for name, term in terms.items()}


@pytest.mark.parametrize(("step", "vb"), [(0, 2.418681), (500, 0.00795238)])
def test_loss_of_a_model_that_puts_out_zeros(step, vb):
    terms = constant_losses(step, noise_hat=0)
    assert terms["mse"] == 1
    assert terms["vb"] == pytest.approx(vb, rel=4e-6)  # the golden number is of float32
    process = DDPM(4)
    total = process.losses(
        torch.zeros(1, 1, 32), torch.full((1, 1, 16), 0.5), torch.ones(1, 1, 16),
        torch.tensor([step]),
    )  # fmt: skip
    assert total.item() == pytest.approx({0: 3.418681, 500: 1.00795233}[step], rel=2e-6)


@pytest.mark.parametrize(("step", "vb"), [(0, 1.507144), (500, 6.6314e-8)])
def test_loss_of_perfect_noise(step, vb):
    # In float64: at step 500 the bound is the difference of two nearly equal numbers, of which
    # float32 has no digit right (the specification's 8.599e-8 is of float32). By hand: with x =
    # log(beta / posterior variance) / 2, it is (exp(-x) - 1 + x) / (2 log 2).
    terms = constant_losses(step, noise_hat=1, dtype=torch.float64)
    assert terms["mse"] == 0
    assert terms["vb"] == pytest.approx(vb, rel=2e-5)
    if step == 500:
        tables = DDPM(4).tables
        x = 0.5 * float((tables.betas[500] / tables.variances[500]).log())
        exact = (math.exp(-x) - 1 + x) / (2 * math.log(2))
        assert terms["vb"] == pytest.approx(exact, rel=1e-6)


def test_without_learned_variance_the_loss_is_the_squared_error():
    assert constant_losses(500, noise_hat=0.25, learned_variance=False) == {"mse": 0.5625}


def naive_bound(step: int, clean: float, noise: float, noise_hat: float, value: float) -> float:
    """Bound of one element in bits, from the textbook's means and variances."""
    betas = [1e-4 + (2e-2 - 1e-4) * t / 999 for t in range(1000)]
    left = [math.prod(1 - beta for beta in betas[: t + 1]) for t in (step - 1, step)]
    before, after = left if step else (1.0, left[1])
    noised = math.sqrt(after) * clean + math.sqrt(1 - after) * noise
    clean_hat = (noised - math.sqrt(1 - after) * noise_hat) / math.sqrt(after)

    def mean(data: float) -> float:
        return (
            betas[step] * math.sqrt(before) / (1 - after) * data
            + (1 - before) * math.sqrt(1 - betas[step]) / (1 - after) * noised
        )

    if step:
        variance = betas[step] * (1 - before) / (1 - after)
    else:
        variance = betas[1] * betas[0] / (1 - (1 - betas[0]) * (1 - betas[1]))
    share = (value + 1) / 2
    model = math.exp(share * math.log(betas[step]) + (1 - share) * math.log(variance))
    if step:
        distance = (mean(clean) - mean(clean_hat)) ** 2
        nats = 0.5 * (math.log(model / variance) + (variance + distance) / model - 1)
        return nats / math.log(2)

    def cdf(x: float) -> float:
        x = (x - mean(clean_hat)) / math.sqrt(model)
        return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    low = 0.0 if clean < -0.999 else cdf(clean - 1 / 255)
    high = 1.0 if clean > 0.999 else cdf(clean + 1 / 255)
    return -math.log(max(high - low, 1e-12)) / math.log(2)


@pytest.mark.parametrize("step", [0, 1, 3, 250, 999])
def test_loss_equals_scalar_formulas(step):
    generator = torch.Generator().manual_seed(step)
    clean, noise = torch.randn(2, 2, 2, 8, generator=generator, dtype=torch.float64)
    clean = clean.clamp(-1, 1)  # some exactly at the ends, where bins are open
    prediction = torch.randn(2, 2, 16, generator=generator, dtype=torch.float64)
    terms = DDPM(2).loss_terms(prediction, clean, noise, torch.full((2,), step))
    for b in range(2):
        for token in range(2):
            parts = prediction[b, token].reshape(4, 4)  # (pixel, noise of 2 channels and variances)
            elements = list(
                zip(
                    clean[b, token].tolist(), noise[b, token].tolist(),
                    parts[:, :2].flatten().tolist(), parts[:, 2:].flatten().tolist(), strict=True,
                )
            )  # fmt: skip
            mse = sum((e[1] - e[2]) ** 2 for e in elements) / 8
            vb = sum(naive_bound(step, *e) for e in elements) / 8
            assert terms["mse"][b, token].item() == pytest.approx(mse, rel=1e-12)
            assert terms["vb"][b, token].item() == pytest.approx(vb, rel=1e-7)


def test_the_loss_of_patches_is_that_of_pictures():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    output = torch.randn(3, 8, 8, 8, generator=generator)
    times = torch.tensor([0, 10, 900])
    process = DDPM(4)
    found = process.losses(*(patchify(x, 2) for x in (output, clean, noise)), times).mean(1)
    # Whole pictures as one token, with the channels of each pixel last.
    pictures = (x.permute(0, 2, 3, 1).flatten(1)[:, None] for x in (output, clean, noise))
    torch.testing.assert_close(found, process.losses(*pictures, times)[:, 0])
    error = (output[:, :4] - noise).square().mean((1, 2, 3))
    patches = [patchify(x, 2) for x in (output, clean, noise)]
    torch.testing.assert_close(process.loss_terms(*patches, times)["mse"].mean(1), error)


def test_the_bound_trains_the_variance_only():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 2, 2, 16, generator=generator)
    prediction = torch.randn(2, 2, 32, generator=generator, requires_grad=True)
    terms = DDPM(4).loss_terms(prediction, clean, noise, torch.tensor([0, 400]))
    bound = torch.autograd.grad(terms["vb"].sum(), prediction, retain_graph=True)[0]
    error = torch.autograd.grad(terms["mse"].sum(), prediction)[0]
    for gradient, trained in ((bound, slice(4, 8)), (error, slice(0, 4))):
        pixels = gradient.unflatten(-1, (4, 8))
        assert (pixels[..., trained] != 0).all()
        assert pixels.count_nonzero() == pixels[..., trained].numel()


def test_the_bound_is_least_at_the_true_variance():
    process = DDPM(1)
    clean = noise = torch.full((1, 1, 1), 0.3)
    bounds = []
    for value in (-1.5, -1.0, -0.5):
        prediction = torch.tensor([[[0.3, value]]])
        bounds.append(process.loss_terms(prediction, clean, noise, torch.tensor([2]))["vb"].item())
    assert bounds[1] == pytest.approx(0, abs=1e-6)
    assert min(bounds[0], bounds[2]) > 0.004


def test_the_256_values_have_all_the_probability():
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in ((0.1, 0.02), (0.97, 0.1), (-1.3, 0.3), (0.0, 2.0)):
        log_variance = torch.tensor(2 * math.log(std), dtype=torch.float64)
        mass = (-decoder_nll(values, mean - values, log_variance)).exp()
        assert mass.sum().item() == pytest.approx(1, abs=1e-9)


def test_the_divergence_is_that_of_torch_distributions():
    normal = torch.distributions.Normal
    true, model = normal(torch.tensor(0.3), 0.5), normal(torch.tensor(-0.4), 1.7)
    expected = torch.distributions.kl_divergence(true, model)
    log_variances = (torch.tensor(2 * math.log(std)) for std in (1.7, 0.5))
    torch.testing.assert_close(gaussian_kl(torch.tensor(-0.7), *log_variances), expected)


def test_data_and_noise_are_mixed_by_each_samples_own_step():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 2, 4, 4, generator=generator)
    times = torch.tensor([0, 500, 999])
    noised = DDPM(2).corrupt(clean, noise, times)
    for i, alpha_bar in enumerate((0.9999, 7.77966584e-2, 4.03582977e-5)):
        expected = math.sqrt(alpha_bar) * clean[i] + math.sqrt(1 - alpha_bar) * noise[i]
        torch.testing.assert_close(noised[i], expected)


@pytest.mark.parametrize("num_steps", [21, 1000, 1001, 4000])
def test_uniform_numbers_become_steps_all_alike(num_steps):
    process = DDPM(1, num_steps=num_steps)
    middles = (torch.arange(num_steps) + 0.5) / num_steps
    assert process.times(middles).tolist() == list(range(num_steps))
    ends = torch.tensor([0, 1 - 2**-24])
    assert process.times(ends).tolist() == [0, num_steps - 1]
    assert process.times(ends).dtype == torch.int64


def test_fixed_levels_are_in_the_middle_of_equal_parts():
    process = DDPM(1)
    assert process.level_times(4).tolist() == [125, 375, 625, 875]
    assert process.level_times(8).tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    levels = process.fraction(process.level_times(8)) * 8
    assert levels.long().tolist() == list(range(8))


def test_the_model_is_told_the_step():
    times = torch.tensor([0, 7, 999])
    process = DDPM(1)
    assert torch.equal(process.model_times(times), torch.tensor([0.0, 7.0, 999.0]))
    torch.testing.assert_close(process.fraction(times), torch.tensor([0.0005, 0.0075, 0.9995]))


def random_batch(dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    tensors = torch.randn(2, 2, 16, device=device), torch.randn(2, 2, 16, device=device)
    return torch.randn(2, 2, 32, device=device).to(dtype), *(x.to(dtype) for x in tensors)


def test_all_is_computed_in_float32_under_autocast():
    prediction, clean, noise = random_batch(torch.bfloat16)
    times = torch.tensor([0, 700])
    process = DDPM(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        noised = process.corrupt(clean, noise, times)
        losses = process.losses(prediction, clean, noise, times)
    assert torch.equal(noised, process.corrupt(clean.float(), noise.float(), times))
    plain = process.losses(prediction.float(), clean.float(), noise.float(), times)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, plain)


def test_nothing_waits_for_the_device():
    # A tensor on the meta device has no values: whatever asks for one fails.
    prediction, clean, noise = random_batch(torch.float32, "meta")
    times = torch.zeros(2, dtype=torch.int64, device="meta")
    process = DDPM(4)
    assert process.corrupt(clean, noise, times).shape == clean.shape
    assert process.losses(prediction, clean, noise, times).shape == (2, 2)


def test_validation_in_inference_mode_may_come_before_training():
    prediction, clean, noise = random_batch(torch.float32)
    times = torch.tensor([0, 700])
    process = DDPM(4)
    with torch.inference_mode():
        process.losses(prediction, clean, noise, times)
    process.losses(prediction.requires_grad_(), clean, noise, times).sum().backward()
    assert prediction.grad.isfinite().all()
