"""Canvases drawn with tiny real models, and with toys whose blend is written out."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.data.image_jobs import save_tiny_vae
from tests.unit.sampling.canvases import (
    canvas_of,
    condition_of,
    draw,
    process_of,
    region,
    settings_of,
    tiny_mixture,
    tiny_mmdit,
    tiny_mom,
)
from torchtitan_mixtures.data.vae import load_vae
from torchtitan_mixtures.objectives.outputs import DenoiserOutput
from torchtitan_mixtures.objectives.patches import patchify
from torchtitan_mixtures.sampling.canvas import (
    Rectangle,
    ReferenceImage,
    Reroll,
    blending_weights,
)
from torchtitan_mixtures.sampling.canvas_drawing import (
    canvas_noise,
    compose,
    draw_canvas,
    impose_references,
    predict_with,
)
from torchtitan_mixtures.sampling.conditions import class_condition
from torchtitan_mixtures.sampling.images import draw_images, draw_latents

KINDS = [("ddpm", 0.0), ("ddim", 0.5), ("euler", 0.0)]


def models_of(sampler):
    is_ddpm = sampler != "euler"
    return tiny_mom(is_ddpm), tiny_mmdit(is_ddpm)


# --- one region -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "eta"), KINDS)
@pytest.mark.parametrize("guidance", [1.0, 2.3])
@pytest.mark.parametrize("kernel", ["gaussian", "constant"])
def test_a_region_that_covers_the_canvas_is_an_ordinary_image(sampler, eta, guidance, kernel):
    for model in models_of(sampler):
        canvas = canvas_of(16, 16, region(0, 0, subject=5, guidance=guidance, kernel=kernel))
        settings = settings_of(sampler, guidance, eta=eta, guided_channels=2)
        expected = draw_images(
            model, model.model_args, process_of(sampler), condition_of(model, canvas)([0]), [0],
            settings, "cpu",
        )  # fmt: skip
        assert torch.equal(draw(model, canvas, settings), expected)


def test_a_model_of_any_shape_draws_a_canvas_that_is_no_square():
    model, settings = tiny_mmdit(), settings_of("euler")
    canvas = canvas_of(24, 8, region(0, 0, 24, 8))
    expected = draw_images(
        model, model.model_args, process_of("euler"), condition_of(model, canvas)([0]), [0],
        settings, "cpu", size=(8, 24),
    )  # fmt: skip
    assert torch.equal(draw(model, canvas, settings), expected)


# --- several regions ------------------------------------------------------------------------------

FIVE = canvas_of(
    32,
    24,
    region(0, 0, subject=1, guidance=2.0),
    region(16, 0, subject=2, guidance=1.0),
    region(0, 8, subject=3, guidance=3.5, weight=2.0),
    region(16, 8, subject=4, guidance=1.0, kernel="constant"),
    region(8, 4, subject=5, guidance=2.0, kernel="quartic", seed=9),
)


@pytest.mark.parametrize(("sampler", "eta"), KINDS)
def test_regions_together_are_as_one_by_one(sampler, eta):
    for model in models_of(sampler):
        settings = settings_of(sampler, eta=eta)
        together = draw(model, FIVE, settings)
        for batch_size in (1, 2):
            apart = draw(model, FIVE, settings, batch_size=batch_size)
            torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_the_model_sees_regions_of_equal_shape_at_once_and_only_those_with_weight():
    model = tiny_mmdit()
    canvas = canvas_of(
        32, 16, *[region(x, 0, guidance=g) for x, g in ((0, 2.0), (8, 3.0), (16, 1.0))],
        region(0, 0, 32, 16, guidance=4.0, weight=0.5), region(8, 0, weight=0.0),
    )  # fmt: skip
    calls = []

    def predict(rows, latents, times, inputs):
        calls.append((list(rows), tuple(latents.shape), len(times)))
        return model(latents, times, **inputs)

    draw(model, canvas, settings_of("euler", num_steps=1), predict)
    assert calls == [
        ([0, 1], (4, 3, 16, 16), 4),
        ([2], (1, 3, 16, 16), 1),
        ([3], (2, 3, 16, 32), 2),
    ]
    calls.clear()
    draw(model, canvas, settings_of("euler", num_steps=1), predict, batch_size=1)
    assert [rows for rows, *_ in calls] == [[0], [1], [2], [3]]


def test_predictions_are_blended_as_by_hand_also_a_learned_variance():
    """A toy: the noise is the class times the latents, the variance the class and the place."""
    args = SimpleNamespace(patch_size=1, in_channels=1, out_channels=2)
    canvas = canvas_of(
        6, 4, region(0, 0, 4, 4, 2, kernel="quartic"), region(2, 0, 4, 4, 3, weight=0.5)
    )
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)

    def predict(rows, latents, times, inputs):
        label = inputs["class_labels"].reshape(-1, 1, 1, 1).float()
        both = torch.cat([label * latents + times.reshape(-1, 1, 1, 1), label + ramp], 1)
        return DenoiserOutput(patchify(both, 1))

    def of(rows):
        return class_condition([canvas.regions[row].subject for row in rows], 8, "cpu")

    denoiser = compose(predict, args, canvas, 1, of, settings_of(), 16, "cpu")
    latents = torch.randn(1, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    found = denoiser(latents, torch.tensor([7.0]))
    first, second = blending_weights(canvas, 1)
    for y in range(4):
        for x in range(6):
            noise = variance = 0.0
            if x < 4:
                noise += first[y, x] * (2 * latents[0, 0, y, x] + 7)
                variance += first[y, x] * (2 + x)
            if x >= 2:
                noise += second[y, x - 2] * (3 * latents[0, 0, y, x] + 7)
                variance += second[y, x - 2] * (3 + x - 2)
            assert found[0, 0, y, x].item() == pytest.approx(float(noise), rel=1e-5)
            assert found[0, 1, y, x].item() == pytest.approx(float(variance), rel=1e-5)


@pytest.mark.parametrize("routing", ["step", "once"])
def test_experts_are_weighed_for_each_region_and_alike_in_both_halves_of_guidance(routing):
    model = tiny_mixture()
    canvas = canvas_of(48, 32, *[region(x, 0, 32, 32, x, guidance=2.0) for x in (0, 8, 16)])
    seen = []

    def predict(rows, latents, times, inputs):
        output = model(latents, times, **inputs)
        seen.append(output.gates)
        return output

    draw(model, canvas, settings_of("euler", routing=routing), predict)
    assert [tuple(gates.shape) for gates in seen] == [(6, 3)] * 4
    for gates in seen:
        assert torch.equal(*gates.chunk(2))
        assert not torch.equal(gates[0], gates[1])
    is_kept = [torch.equal(gates, seen[0]) for gates in seen]
    assert is_kept == [True] * 4 if routing == "once" else not all(is_kept)


def test_each_region_has_its_own_guidance():
    """Each half of a canvas is what it would be with that guidance everywhere."""
    model = tiny_mom(learned_variance=False)
    settings = settings_of("euler")

    def of(left, right):
        return draw(
            model,
            canvas_of(32, 16, region(0, 0, guidance=left), region(16, 0, guidance=right)),
            settings,
        )

    mixed, low, high = of(1.7, 4.0), of(1.7, 1.7), of(4.0, 4.0)
    torch.testing.assert_close(mixed[..., :16], low[..., :16])
    torch.testing.assert_close(mixed[..., 16:], high[..., 16:])
    assert not torch.allclose(low, high, atol=1e-2)


def test_seams_are_weaker_where_regions_overlap():
    model, settings = tiny_mmdit(), settings_of("euler", num_steps=8)
    apart = canvas_of(32, 16, region(0, 0, subject=1), region(16, 0, subject=30))
    overlapping = canvas_of(
        32, 16, region(0, 0, 20, 16, subject=1), region(12, 0, 20, 16, subject=30)
    )

    def jump(canvas):
        noise = draw(model, canvas_of(32, 16, region(0, 0, 32, 16)), settings)
        change = draw(model, canvas, settings) - noise
        return change.diff(dim=-1)[..., 15].abs().mean()

    assert jump(overlapping) < jump(apart)


# --- noise ----------------------------------------------------------------------------------------


def test_noise_is_that_of_the_seeds_and_rectangles():
    canvas = canvas_of(
        32,
        16,
        region(0, 0, seed=5),
        region(8, 0, seed=6),
        rerolls=(Reroll(Rectangle(24, 0, 8, 8), 1), Reroll(Rectangle(0, 8, 4, 4), 2, 0.5)),
    )
    plain = canvas_of(32, 16, region(0, 0), region(8, 0))
    state = torch.get_rng_state()
    found, without = (canvas_noise(c, 1, 3, 3, "cpu")(0) for c in (canvas, plain))
    assert torch.equal(found, canvas_noise(canvas, 1, 3, 3, "cpu")(0))
    assert not torch.equal(found, canvas_noise(canvas, 1, 3, 4, "cpu")(0))
    alone = canvas_noise(canvas_of(16, 16, region(0, 0, seed=5)), 1, 3, 99, "cpu")(0)
    assert torch.equal(found[..., :8, :8], alone[..., :8, :8])  # on whatever canvas
    later = canvas_noise(canvas_of(16, 16, region(0, 0, seed=6)), 1, 3, 99, "cpu")(0)
    assert torch.equal(found[..., 8:24], later), "later regions win"
    assert torch.equal(found[..., 8:, 24:], without[..., 8:, 24:])
    assert not (found[..., :8, 24:] == without[..., :8, 24:]).any()
    moved = found[..., 8:12, :4] - alone[..., 8:12, :4] / 1.25**0.5
    assert 0.2 < moved.std() < 0.8  # half of a standard normal over the square root
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("epsilon", [None, 0.3, 2.0])
def test_rerolled_noise_is_standard_normal_at_every_step(epsilon):
    place = Rectangle(0, 0, 128, 128)
    rerolls = (Reroll(place, 3, epsilon), Reroll(place, 3, epsilon))
    canvas = canvas_of(128, 128, region(0, 0), rerolls=rerolls)
    noise = canvas_noise(canvas, 1, 3, 3, "cpu")
    for step in (0, 2):
        values = noise(step)
        assert values.var().item() == pytest.approx(1, abs=0.02)
        assert values.mean().item() == pytest.approx(0, abs=0.02)
    correlation = (noise(0) * noise(2)).mean().item()
    assert correlation == pytest.approx(0, abs=0.02)


def test_a_seed_decides_all_that_is_drawn_in_its_rectangle():
    model, settings = tiny_mom(), settings_of("ddpm")
    one = canvas_of(16, 16, region(0, 0, seed=5))
    two = canvas_of(32, 16, region(0, 0, seed=5), region(16, 0))
    expected = draw(model, one, settings)
    torch.testing.assert_close(draw(model, two, settings)[..., :16], expected)
    assert torch.equal(draw(model, one, replace(settings, seed=8)), expected)


# --- reference images -----------------------------------------------------------------------------


def picture_of(width=8, height=8, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def reference(strength, picture=None, place=(8, 4, 8, 8)):
    return ReferenceImage(Rectangle(*place), Path("x.png"), picture or picture_of(), strength)


@pytest.mark.parametrize(("sampler", "eta"), KINDS)
def test_a_strength_of_zero_changes_nothing_and_of_one_gives_the_picture(sampler, eta):
    model = tiny_mom(sampler != "euler")
    settings = settings_of(sampler, num_steps=10, eta=eta)
    plain = canvas_of(16, 16, region(0, 0))
    expected = draw(model, plain, settings)
    weak = draw(model, replace(plain, images=(reference(0.0),)), settings)
    assert torch.equal(weak, expected)
    pixels = torch.from_numpy(np.array(picture_of(), np.float32)).permute(2, 0, 1) / 127.5 - 1
    distances = []
    for strength in (0.0, 0.5, 1.0):
        images = draw(model, replace(plain, images=(reference(strength),)), settings)
        distances.append((images[0, :, 4:12, 8:] - pixels).abs().mean().item())
    assert distances[2] < 0.5 * distances[0]
    assert distances[2] < distances[1] < distances[0]


@pytest.mark.parametrize(("sampler", "eta"), KINDS)
def test_samplers_let_latents_be_edited_before_each_step(sampler, eta):
    process, edits, seen = process_of(sampler), [], []

    def edit(done, time, latents):
        edits.append((done, time))
        return torch.full_like(latents, float(done))

    def denoiser(latents, times):
        seen.append((latents.unique().item(), times.item()))
        return torch.cat([latents, latents], 1) if sampler != "euler" else latents

    def noise(step):
        return torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(step))

    draw_latents(denoiser, process, noise, settings_of(sampler, eta=eta), edit=edit)
    times = [1.0, 0.75, 0.5, 0.25] if sampler == "euler" else [99, 66, 33, 0]
    assert edits == list(enumerate(times))
    scale = 1000 if sampler == "euler" else 1
    assert seen == [(done, scale * time) for done, time in enumerate(times)]


@pytest.mark.parametrize("sampler", ["ddpm", "euler"])
def test_references_replace_latents_after_each_of_the_first_steps_only(sampler):
    process = process_of(sampler)
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    canvas = canvas_of(16, 16, region(0, 0), images=(reference(0.5),))
    edit = impose_references(canvas, 1, process, 4, noise)
    clean = torch.from_numpy(np.array(picture_of(), np.float32)).permute(2, 0, 1) / 127.5 - 1
    latents = torch.zeros(1, 3, 16, 16)
    for done in range(4):
        time = 60 if sampler == "ddpm" else 0.6
        found = edit(done, time, latents)
        expected = latents.clone()
        if done in (1, 2):
            signal, sigma = 0.4, 0.6
            if sampler == "ddpm":
                alpha_bar = process.tables.alpha_bars[60].item()
                signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
            expected[0, :, 4:12, 8:] = signal * clean + sigma * noise[0, :, 4:12, 8:]
        torch.testing.assert_close(found, expected)
        assert not latents.any()
    assert impose_references(canvas_of(16, 16, region(0, 0)), 1, process, 4, noise) is None


def test_references_are_resized_and_put_where_they_belong():
    white = Image.new("RGB", (50, 20), "white")
    canvas = canvas_of(16, 16, region(0, 0), images=(reference(1.0, white, (4, 0, 12, 8)),))
    edit = impose_references(canvas, 1, process_of("euler"), 4, torch.zeros(1, 3, 16, 16))
    found = edit(1, 0.0, torch.zeros(1, 3, 16, 16))
    expected = torch.zeros(1, 3, 16, 16)
    expected[..., :8, 4:] = 1
    torch.testing.assert_close(found, expected)


def test_latents_have_places_in_cells_and_pictures_go_through_the_vae(tmp_path):
    vae = load_vae(str(save_tiny_vae(tmp_path / "vae")), "cpu")
    model = tiny_mom(learned_variance=False, image_size=8, in_channels=vae.channels)
    side = 8 * vae.factor
    picture = picture_of(side, side)
    canvas = canvas_of(
        2 * side,
        side,
        region(0, 0, side, side, guidance=2.0),
        region(side, 0, side, side),
        images=(reference(1.0, picture, (0, 0, side, side)),),
    )
    settings = settings_of("euler")
    found = draw_canvas(
        predict_with(model), model.model_args, process_of("euler"), canvas,
        condition_of(model, canvas), settings, "cpu", vae,
    )  # fmt: skip
    assert found.shape == (1, 3, side, 2 * side)
    pixels = torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    latents = torch.zeros(1, vae.channels, 8, 16)
    edit = impose_references(canvas, vae.factor, process_of("euler"), 4, latents, vae)
    expected = torch.cat([vae.encode(pixels), latents[..., 8:]], -1)
    torch.testing.assert_close(edit(1, 0.0, latents), expected)
