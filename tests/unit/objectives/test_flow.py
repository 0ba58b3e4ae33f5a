"""Rectified flow: numbers worked out by hand, densities, and the way to DDPM and back."""

import math

import pytest
import torch
from torch import Tensor

from torchtitan_mixtures.objectives.ddpm import DDPM
from torchtitan_mixtures.objectives.flow import (
    RectifiedFlow,
    cosmap_density,
    cosmap_times,
    ddpm_to_flow,
    flow_to_ddpm,
    logit_normal_density,
    logit_normal_times,
    mode_times,
    noise_of_velocity,
    shift_times,
    velocity_of_noise,
)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slope(function, points: Tensor) -> Tensor:
    points = points.clone().requires_grad_()
    return torch.autograd.grad(function(points).sum(), points)[0]


def test_density_of_logit_normal_times():
    density = logit_normal_density(numbers(0.05, 0.1, 0.25, 0.5), 0, 1)
    assert density.tolist() == pytest.approx([0.110055, 0.396575, 1.163652, 1.595769], abs=6e-7)
    mirrored = logit_normal_density(numbers(0.95, 0.9, 0.75, 0.5), 0, 1)
    torch.testing.assert_close(mirrored, density)


def test_mode_times():
    times = mode_times(numbers(0, 0.1, 0.25, 0.5, 0.75, 0.9, 1), 1.29)
    expected = [1, 0.802569, 0.616416, 0.5, 0.383584, 0.197431, 0]
    assert times.tolist() == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize("scale", [-1, 0, 1.29, 2 / (math.pi - 2)])
def test_mode_times_fall_with_the_uniform_number(scale):
    times = mode_times(torch.linspace(0, 1, 201, dtype=torch.float64), scale)
    assert (times.diff() < 0).all()


def test_cosmap_times_and_their_density():
    times = cosmap_times(numbers(0.1, 0.25, 0.5, 0.75, 0.9))
    expected = [0.136729, 0.292893, 0.5, 0.707107, 0.863271]
    assert times.tolist() == pytest.approx(expected, abs=6e-7)
    density = cosmap_density(numbers(0, 0.5))
    assert density.tolist() == pytest.approx([0.636620, 1.273240], abs=6e-7)


@pytest.mark.parametrize(
    ("times_of", "density_of"),
    [
        (cosmap_times, cosmap_density),
        (lambda u: logit_normal_times(u, 0, 1), lambda t: logit_normal_density(t, 0, 1)),
        (lambda u: logit_normal_times(u, 0.7, 0.4), lambda t: logit_normal_density(t, 0.7, 0.4)),
    ],
    ids=["cosmap", "logit normal", "logit normal of another mean"],
)
def test_times_have_their_density(times_of, density_of):
    uniform = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    torch.testing.assert_close(1 / slope(times_of, uniform), density_of(times_of(uniform)))


def test_shifted_times():
    times = shift_times(numbers(0.1, 0.25, 0.5, 0.75, 0.9), 3)
    assert times.tolist() == pytest.approx([0.25, 0.5, 0.75, 0.9, 0.964286], abs=6e-7)
    times = shift_times(numbers(0.1, 0.5, 0.9), 2)
    assert times.tolist() == pytest.approx([0.181818, 0.666667, 0.947368], abs=6e-7)
    assert torch.equal(shift_times(times, 1), times)
    assert shift_times(numbers(0, 1), 3).tolist() == [0, 1]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode", "cosmap"])
def test_training_times_follow_the_settings(density, shift):
    flow = RectifiedFlow(density, logit_mean=0.3, logit_std=0.8, mode_scale=-0.5, shift=shift)
    uniform = torch.linspace(0, 1 - 2**-24, 101)
    expected = {
        "uniform": lambda u: u,
        "logit_normal": lambda u: logit_normal_times(u, 0.3, 0.8),
        "mode": lambda u: mode_times(u, -0.5),
        "cosmap": cosmap_times,
    }[density](uniform.double())
    times = flow.times(uniform)
    assert times.dtype == torch.float32
    assert ((times >= 0) & (times <= 1)).all()
    expected = shift_times(expected, shift).float()
    torch.testing.assert_close(times, expected, rtol=1e-4, atol=1e-6)


def test_fixed_levels_are_in_the_middle_of_equal_parts_for_every_density():
    for flow in (RectifiedFlow(), RectifiedFlow("cosmap", shift=3)):
        assert flow.level_times(4).tolist() == [0.125, 0.375, 0.625, 0.875]


def test_the_model_is_told_a_thousand_times_the_time():
    times = torch.tensor([0.0, 0.25, 1.0])
    assert RectifiedFlow().model_times(times).tolist() == [0, 250, 1000]
    assert torch.equal(RectifiedFlow().fraction(times), times)


def test_time_one_is_noise_and_the_target_points_to_it():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 2, 8, generator=generator)
    times = torch.tensor([0.0, 0.25, 1.0])
    flow = RectifiedFlow()
    noised = flow.corrupt(clean, noise, times)
    assert torch.equal(noised[0], clean[0])
    torch.testing.assert_close(noised[1], 0.75 * clean[1] + 0.25 * noise[1])
    assert torch.equal(noised[2], noise[2])
    assert flow.losses(noise - clean, clean, noise, times).abs().max() == 0
    # The path is straight: the velocity leads from any point of it to data and to noise.
    rest = (1 - times)[:, None, None]
    torch.testing.assert_close(noised + rest * (noise - clean), noise)


def test_the_loss_is_the_mean_squared_error_of_each_token():
    generator = torch.Generator().manual_seed(0)
    prediction, clean, noise = torch.randn(3, 2, 3, 4, generator=generator)
    losses = RectifiedFlow().losses(prediction, clean, noise, torch.tensor([0.1, 0.9]))
    for b in range(2):
        for token in range(3):
            errors = [
                (p - (n - c)) ** 2
                for p, c, n in zip(
                    *(x[b, token].tolist() for x in (prediction, clean, noise)), strict=True
                )
            ]
            assert losses[b, token].item() == pytest.approx(sum(errors) / 4, rel=1e-5)


def test_all_is_computed_in_float32_under_autocast():
    prediction, clean, noise = torch.randn(3, 2, 2, 8).bfloat16()
    times = torch.tensor([0.3, 0.7])
    flow = RectifiedFlow()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        noised = flow.corrupt(clean, noise, times)
        losses = flow.losses(prediction, clean, noise, times)
    assert torch.equal(noised, flow.corrupt(clean.float(), noise.float(), times))
    assert losses.dtype == torch.float32
    plain = flow.losses(prediction.float(), clean.float(), noise.float(), times)
    assert torch.equal(losses, plain)


def test_nothing_waits_for_the_device():
    prediction, clean, noise = torch.randn(3, 2, 2, 8, device="meta")
    times = torch.zeros(2, device="meta")
    assert RectifiedFlow().corrupt(clean, noise, times).shape == clean.shape
    assert RectifiedFlow().losses(prediction, clean, noise, times).shape == (2, 2)


def test_half_the_variance_of_ddpm_is_the_middle_of_the_flow():
    noised = torch.randn(1, 3, dtype=torch.float64)
    latents, times = ddpm_to_flow(noised, numbers(0.5))
    torch.testing.assert_close(times, numbers(0.5))
    torch.testing.assert_close(latents, noised / math.sqrt(2))


def test_noised_data_of_ddpm_are_latents_of_the_flow_and_back():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, 2, 3, generator=generator, dtype=torch.float64)
    steps = torch.tensor([0, 100, 500, 999])
    process = DDPM(1)
    alpha_bar = process.tables.alpha_bars[steps]
    noised = process.corrupt(clean, noise, steps)
    latents, times = ddpm_to_flow(noised, alpha_bar)
    torch.testing.assert_close(latents, RectifiedFlow().corrupt(clean, noise, times))
    back = flow_to_ddpm(latents, times)
    torch.testing.assert_close(back[0], noised)
    torch.testing.assert_close(back[1], alpha_bar)
    # True noise is the true velocity, and back; so it is for wrong predictions.
    velocity = velocity_of_noise(noised, noise, alpha_bar)
    torch.testing.assert_close(velocity, noise - clean)
    torch.testing.assert_close(noise_of_velocity(latents, velocity, times), noise)
    wrong = noise + 0.3
    velocity = velocity_of_noise(noised, wrong, alpha_bar)
    torch.testing.assert_close(noise_of_velocity(latents, velocity, times), wrong)


def test_both_ends_of_the_flow_are_those_of_ddpm():
    latents = torch.randn(2, 3, dtype=torch.float64)
    noised, alpha_bar = flow_to_ddpm(latents, numbers(0, 1))
    assert torch.equal(noised, latents)
    assert alpha_bar.tolist() == [1, 0]
