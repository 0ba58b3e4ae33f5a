"""Samplers: numbers worked out by hand, exact denoisers of Gaussian data, other schedulers."""

import math

import pytest
import torch
from torch import Tensor

from torchtitan_mixtures.objectives.ddpm import DDPM, spaced_steps
from torchtitan_mixtures.objectives.flow import RectifiedFlow
from torchtitan_mixtures.sampling.denoise import (
    ancestral_step,
    ddim_step,
    guide,
    noise_of_samples,
    predicted_clean,
    sample_ddim,
    sample_ddpm,
    sample_euler,
)


def no_noise(step: int) -> Tensor:
    raise AssertionError("this sampler adds no noise")


def standard_normal(count: int, seed: int) -> Tensor:
    """Numbers with mean 0 and variance 1 exactly, `(count, 1, 1, 1)`."""
    numbers = torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    return (numbers - numbers.mean()) / numbers.std(correction=0)


def toy_denoiser(out_channels: int):
    """Some smooth function of latents of 2 channels and time."""

    def denoise(latents: Tensor, times: Tensor) -> Tensor:
        phase = times.reshape(-1, 1, 1, 1) / 300
        outputs = [(0.7 * latents + phase).sin(), (latents.flip(1) - phase).cos()]
        return torch.cat(outputs, dim=1)[:, :out_channels]

    return denoise


@pytest.mark.parametrize(
    ("index", "clean", "mean", "variance", "following"),
    [
        (25, 0.759735, 0.490062, 0.1782809, 0.519419),
        (1, 0.477754, 0.478108, 7.789340e-4, 0.480730),
        (0, 0.497025, 0.497025, 9.920361e-5, 0.497025),
    ],
)
def test_single_steps_of_50(index, clean, mean, variance, following):
    tables = DDPM(1).tables.respaced(spaced_steps(1000, "ddim50"))
    latents = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    prediction = torch.tensor([0.3, 0.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    noise = prediction[:, :1]
    assert predicted_clean(tables, index, latents, noise).item() == pytest.approx(clean, abs=6e-7)
    found = ancestral_step(tables, index, latents, prediction)
    assert found[0].item() == pytest.approx(mean, abs=6e-7)
    assert found[1].exp().item() == pytest.approx(variance, rel=2e-6)
    latents, std = ddim_step(tables, index, latents, prediction, eta=0)
    assert latents.item() == pytest.approx(following, abs=6e-7)
    assert std == 0


@pytest.mark.parametrize("index", [0, 1, 25, 49])
def test_ddim_with_all_noise_is_an_ancestral_step_with_the_posteriors_variance(index):
    tables = DDPM(1).tables.respaced(spaced_steps(1000, "ddim50"))
    latents, noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    mean, log_variance = ancestral_step(tables, index, latents, noise)
    found, std = ddim_step(tables, index, latents, noise, eta=1)
    torch.testing.assert_close(found, mean)
    assert std == pytest.approx(0 if index == 0 else log_variance.exp().sqrt()[0, 0, 0, 0].item())


def test_the_model_is_told_the_steps_of_training():
    told = []

    def denoise(latents: Tensor, times: Tensor) -> Tensor:
        assert times.shape == (2,)
        assert times.dtype == latents.dtype == torch.float32
        told.append(times.unique().item())
        return torch.zeros_like(latents)

    latents = torch.zeros(2, 1, 2, 2)
    sample_ddim(denoise, latents, DDPM(1), "ddim50", no_noise)
    assert told == list(range(980, -1, -20))
    told.clear()
    asked = []

    def noise(step: int) -> Tensor:
        asked.append(step)
        return torch.zeros(2, 1, 2, 2)

    sample_ddpm(denoise, latents, DDPM(1), 4, noise)
    assert told == [999, 666, 333, 0]
    assert asked == [1, 2, 3]
    told.clear()
    sample_euler(denoise, latents, RectifiedFlow(shift=3), 4)
    assert told == pytest.approx([1000, 900, 750, 500])


def test_progress_is_told_after_every_step():
    latents, denoise = torch.zeros(1, 2, 2, 2), toy_denoiser(2)
    told = []

    def progress(done: int, total: int) -> None:
        told.append((done, total))

    noise = noise_of_samples(0, torch.tensor([0]), (2, 2, 2), "cpu")
    sample_ddpm(denoise, latents, DDPM(2), 3, noise, progress)
    sample_ddim(denoise, latents, DDPM(2), 3, noise, 0.5, progress)
    sample_euler(denoise, latents, RectifiedFlow(), 3, progress)
    assert told == [(1, 3), (2, 3), (3, 3)] * 3


def test_a_sample_does_not_depend_on_its_batch():
    def samples(numbers: list[int]) -> Tensor:
        noise = noise_of_samples(3, torch.tensor(numbers), (2, 4, 4), "cpu")
        return torch.stack(
            [
                sample_ddpm(toy_denoiser(4), noise(0), DDPM(2), 5, noise),
                sample_ddim(toy_denoiser(4), noise(0), DDPM(2), 5, noise, eta=0.7),
                sample_euler(toy_denoiser(2), noise(0), RectifiedFlow(), 5),
            ]
        )

    together = samples([5, 0, 9])
    torch.testing.assert_close(samples([9, 5]), together[:, [2, 0]])
    assert (together[:, 0] - together[:, 1]).abs().min() > 0


def test_noise_of_steps_differs():
    noise = noise_of_samples(0, torch.tensor([0, 1]), (3, 4, 4), "cpu")
    assert noise(0).shape == (2, 3, 4, 4)
    assert torch.equal(noise(1), noise(1))
    assert len({noise(step)[0, 0, 0, 0].item() for step in range(5)}) == 5


MEAN, STD = 0.4, 0.6


def gaussian_denoiser(process: DDPM, steps: list[int]):
    """Exact noise and variance of data that are normal with `MEAN` and `STD`.

    The true reverse step of such data is normal; its variance lies between those that the model's
    second half chooses from.
    """
    level = {step: process.tables.alpha_bars[step].item() for step in range(process.num_steps)}
    before = dict(zip(steps, [None, *steps[:-1]], strict=True))

    def denoise(latents: Tensor, times: Tensor) -> Tensor:
        step = int(times[0])
        a, b = math.sqrt(level[step]), math.sqrt(1 - level[step])
        total = a**2 * STD**2 + b**2
        noise = b * (latents - a * MEAN) / total
        previous = level[before[step]] if before[step] is not None else 1.0
        beta = 1 - level[step] / previous
        posterior = beta * (1 - previous) / b**2
        weight = beta * math.sqrt(previous) / b**2
        exact = posterior + weight**2 * STD**2 * b**2 / total
        if before[step] is None:
            return torch.cat([noise, torch.zeros_like(noise)], dim=1)  # no noise follows
        share = (math.log(exact) - math.log(posterior)) / (math.log(beta) - math.log(posterior))
        assert 0 <= share <= 1
        return torch.cat([noise, torch.full_like(noise, 2 * share - 1)], dim=1)

    return denoise


@pytest.mark.parametrize("num_steps", [12, 100])
def test_ancestral_steps_reach_gaussian_data_in_any_number_of_steps(num_steps):
    process = DDPM(1)
    denoise = gaussian_denoiser(process, spaced_steps(1000, num_steps))
    noise = [standard_normal(20_000, seed) for seed in range(num_steps)]
    samples = sample_ddpm(denoise, noise[0], process, num_steps, lambda step: noise[step])
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert samples.std().item() == pytest.approx(STD, abs=0.015)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_reaches_gaussian_data(eta):
    process = DDPM(1)
    denoise = gaussian_denoiser(process, list(range(1000)))
    generator = torch.Generator().manual_seed(9)
    latents = standard_normal(10_000, 0)
    samples = sample_ddim(
        lambda x, t: denoise(x, t)[:, :1], latents, process, 1000,
        lambda step: torch.randn(latents.shape, generator=generator), eta,
    )  # fmt: skip
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert samples.std().item() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_reaches_gaussian_data(shift):
    def denoise(latents: Tensor, times: Tensor) -> Tensor:
        t = times.reshape(-1, 1, 1, 1) / 1000
        error = (latents - (1 - t) * MEAN) / ((1 - t) ** 2 * STD**2 + t**2)
        noise, clean = t * error, MEAN + (1 - t) * STD**2 * error
        return noise - clean

    latents = standard_normal(100, 0)
    errors = []
    for num_steps in (100, 200):
        samples = sample_euler(denoise, latents, RectifiedFlow(shift=shift), num_steps)
        assert samples.mean().item() == pytest.approx(MEAN, abs=1e-5)
        errors.append(abs(samples.std(correction=0).item() - STD))
    assert errors[0] < 0.02
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)  # of first order


def test_a_single_euler_step_goes_from_noise_to_the_mean():
    latents = torch.randn(3, 1, 2, 2)
    samples = sample_euler(lambda x, t: x - MEAN, latents, RectifiedFlow(), 1)
    torch.testing.assert_close(samples, torch.full_like(samples, MEAN))


def test_a_single_step_goes_from_noise_to_predicted_data():
    latents = torch.randn(3, 2, 4, 4)
    process = DDPM(2)
    alpha_bar = 4.03582977e-5
    noise = toy_denoiser(2)(latents, torch.full((3,), 999.0))
    expected = (latents - math.sqrt(1 - alpha_bar) * noise) / math.sqrt(alpha_bar)
    for sample in (sample_ddpm, sample_ddim):
        found = sample(toy_denoiser(4), latents, process, 1, no_noise)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_guidance_of_the_first_channels_leaves_the_others_conditional():
    conditional, unconditional = torch.randn(2, 3, 8, 4, 4)
    for guided_channels, guided in ((3, 3), (1, 1), (4, 4), (0, 4)):
        found = guide(conditional, unconditional, 2.5, 4, guided_channels)
        for channel in range(8):
            scale = 2.5 if channel < guided else 1
            expected = scale * conditional[:, channel] - (scale - 1) * unconditional[:, channel]
            torch.testing.assert_close(found[:, channel], expected)
    torch.testing.assert_close(guide(conditional, unconditional, 1, 4, 0), conditional)
    found = guide(conditional, unconditional, 0, 4, 0)
    assert torch.equal(found[:, :4], unconditional[:, :4])
    assert torch.equal(found[:, 4:], conditional[:, 4:])


def test_guidance_of_a_model_in_bfloat16_is_computed_in_float32():
    halves = torch.randn(2, 1, 8, 4, 4).bfloat16()
    found = guide(halves[0], halves[1], 4.3, 4, 3)
    assert found.dtype == torch.float32
    assert torch.equal(found, guide(halves[0].float(), halves[1].float(), 4.3, 4, 3))


@pytest.mark.parametrize("guided_channels", [-1, 5])
def test_more_guided_channels_than_there_are_is_an_error(guided_channels):
    message = rf"^guided_channels = {guided_channels}: must be from 0 \(all\) to 4"
    with pytest.raises(ValueError, match=message):
        guide(torch.zeros(1, 8, 2, 2), torch.zeros(1, 8, 2, 2), 2, 4, guided_channels)


def test_a_number_of_steps_that_cannot_be_is_named():
    latents, denoise = torch.zeros(1, 2, 2, 2), toy_denoiser(2)
    for sample in (sample_ddpm, sample_ddim):
        with pytest.raises(ValueError, match=r"^num_steps = 1001: must be .* from 1 to 1000"):
            sample(denoise, latents, DDPM(2), 1001, no_noise)
    with pytest.raises(ValueError, match=r"^num_steps = 0: must be 1 or more"):
        sample_euler(denoise, latents, RectifiedFlow(), 0)


def test_latents_stay_float32_under_autocast_and_for_models_in_bfloat16():
    noise = noise_of_samples(0, torch.tensor([0, 1]), (2, 4, 4), "cpu")
    exact = toy_denoiser(4)

    def denoise(latents: Tensor, times: Tensor) -> Tensor:
        return exact(latents, times).bfloat16()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sample_ddpm(denoise, noise(0), DDPM(2), 5, noise)
    assert found.dtype == torch.float32
    assert torch.equal(found, sample_ddpm(denoise, noise(0), DDPM(2), 5, noise))


@pytest.mark.parametrize("spacing", ["ddim50", 7, 250])
@pytest.mark.parametrize("learned_variance", [True, False])
def test_ancestral_steps_are_those_of_diffusers(spacing, learned_variance):
    module = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    scheduler = module.DDPMScheduler(
        beta_start=1e-4, beta_end=2e-2, clip_sample=False,
        variance_type="learned_range" if learned_variance else "fixed_small",
    )  # fmt: skip
    scheduler.set_timesteps(timesteps=spaced_steps(1000, spacing)[::-1])
    denoise = toy_denoiser(4 if learned_variance else 2)
    latents = first = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    theirs, ours = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    for t in scheduler.timesteps:
        prediction = denoise(latents, t.float().expand(3))
        latents = scheduler.step(prediction, t, latents, generator=theirs).prev_sample
    process = DDPM(2, learned_variance=learned_variance)
    found = sample_ddpm(
        denoise, first, process, spacing, lambda step: torch.randn(first.shape, generator=ours)
    )
    torch.testing.assert_close(found, latents, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [10, 50])
def test_ddim_steps_are_those_of_diffusers(count, eta):
    module = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    scheduler = module.DDIMScheduler(
        beta_start=1e-4, beta_end=2e-2, clip_sample=False, timestep_spacing="leading"
    )
    scheduler.set_timesteps(count)
    denoise = toy_denoiser(2)
    latents = first = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    theirs, ours = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    for t in scheduler.timesteps:
        prediction = denoise(latents, t.float().expand(3))
        latents = scheduler.step(prediction, t, latents, eta=eta, generator=theirs).prev_sample
    found = sample_ddim(
        denoise, first, DDPM(2), f"ddim{count}",
        lambda step: torch.randn(first.shape, generator=ours), eta,
    )  # fmt: skip
    torch.testing.assert_close(found, latents, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_steps_are_those_of_diffusers(shift):
    module = pytest.importorskip("diffusers.schedulers.scheduling_flow_match_euler_discrete")
    scheduler = module.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / 20 for i in range(20)])
    denoise = toy_denoiser(2)
    latents = first = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    for t in scheduler.timesteps:
        latents = scheduler.step(denoise(latents, t.expand(3)), t, latents).prev_sample
    found = sample_euler(denoise, first, RectifiedFlow(shift=shift), 20)
    torch.testing.assert_close(found, latents)


@pytest.mark.parametrize("schedule", ["linear", "squared_cosine"])
def test_the_schedules_are_those_of_diffusers(schedule):
    module = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    name = {"linear": "linear", "squared_cosine": "squaredcos_cap_v2"}[schedule]
    theirs = module.DDPMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule=name)
    found = DDPM(1, schedule=schedule).tables.betas.float()
    torch.testing.assert_close(found, theirs.betas, rtol=1e-4, atol=1e-7)
