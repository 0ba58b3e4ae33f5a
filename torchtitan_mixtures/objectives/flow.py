"""Rectified flow: the velocity of a straight path from data to noise is predicted.

Source: Liu, Gong, Liu 2022 (arXiv 2209.03003), equation 1; densities of training times and the
shift for large images: Esser et al. 2024 (arXiv 2403.03206), 3.1 and equation 23.

Convention: time 1 is noise, `latents = (1 - time) clean + time noise`, and the velocity, what the
model predicts, is `noise - clean`. The model's embedding is fed 1000 times the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchtitan_mixtures.objectives.process import Process, at_least_float32, per_sample


def logit_normal_times(uniform: Tensor, mean: float, std: float) -> Tensor:
    """Times whose logit is normal, from uniform numbers in [0, 1]."""
    return (mean + std * torch.special.ndtri(uniform)).sigmoid()


def logit_normal_density(times: Tensor, mean: float, std: float) -> Tensor:
    """Density of `logit_normal_times`."""
    normal = torch.exp(-0.5 * ((times.logit() - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    return normal / (times * (1 - times))


def mode_times(uniform: Tensor, scale: float) -> Tensor:
    """Times that are drawn more often in the middle (`scale > 0`) or at the ends (`scale < 0`)."""
    bump = (math.pi / 2 * uniform).cos().square() - 1 + uniform
    return 1 - uniform - scale * bump


def cosmap_times(uniform: Tensor) -> Tensor:
    """Times that give the noise levels of the cosine schedule."""
    return 1 - 1 / ((math.pi / 2 * uniform).tan() + 1)


def cosmap_density(times: Tensor) -> Tensor:
    """Density of `cosmap_times`."""
    return 2 / (math.pi - 2 * math.pi * times + 2 * math.pi * times.square())


def shift_times(times: Tensor, shift: float) -> Tensor:
    """Move times towards noise: larger images need more of it to be as hard to see.

    Args:
        times: From 0 to 1, of any shape.
        shift: Square root of the ratio of pixels; 1 = none.
    """
    return shift * times / (1 + (shift - 1) * times)


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """Rectified flow with its loss, the squared error of the velocity; times are float32.

    Attributes:
        density: Density that training times are drawn from.
        logit_mean: For `logit_normal`: mean of the normal distribution.
        logit_std: Its standard deviation.
        mode_scale: For `mode`: from -1 to 2 / (pi - 2).
        shift: Shift of training and sampling times towards noise.
    """

    density: Literal["uniform", "logit_normal", "mode", "cosmap"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0

    def times(self, uniform: Tensor) -> Tensor:
        """See `Process`."""
        times = uniform.float()
        if self.density == "logit_normal":
            times = logit_normal_times(times, self.logit_mean, self.logit_std)
        elif self.density == "mode":
            times = mode_times(times, self.mode_scale)
        elif self.density == "cosmap":
            times = cosmap_times(times)
        return shift_times(times, self.shift).clamp(0, 1)

    def level_times(self, levels: int) -> Tensor:
        """See `Process`; neither density nor shift apply, so that losses can be compared."""
        return (torch.arange(levels, dtype=torch.float32, device="cpu") + 0.5) / levels

    def fraction(self, times: Tensor) -> Tensor:
        """See `Process`."""
        return times.float()

    def model_times(self, times: Tensor) -> Tensor:
        """See `Process`."""
        return 1000 * times.float()

    def corrupt(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """See `Process`."""
        clean, noise = at_least_float32(clean), at_least_float32(noise)
        times = per_sample(times.to(clean.dtype), clean)
        return (1 - times) * clean + times * noise

    def loss_terms(
        self, prediction: Tensor, clean: Tensor, noise: Tensor, times: Tensor
    ) -> dict[str, Tensor]:
        """See `Process`: `mse`, of the velocity."""
        prediction, clean, noise = map(at_least_float32, (prediction, clean, noise))
        return {"mse": (prediction - (noise - clean)).square().mean(-1)}


def ddpm_to_flow(noised: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Read noised data of `DDPM` as latents of a rectified flow.

    Args:
        noised: `(batch, ...)`.
        alpha_bar: Share of the data's variance in it, `(batch,)`.

    Returns:
        Latents `(batch, ...)` and their times `(batch,)`.
    """
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    total = signal + sigma
    return noised / per_sample(total, noised), sigma / total


def flow_to_ddpm(latents: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `ddpm_to_flow`: noised data `(batch, ...)` and `alpha_bar` `(batch,)`."""
    length = ((1 - times).square() + times.square()).sqrt()
    return latents / per_sample(length, latents), ((1 - times) / length).square()


def velocity_of_noise(noised: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Velocity that a prediction of the noise in `noised` of `DDPM` amounts to.

    Args:
        noised: `(batch, ...)`.
        noise: The prediction, `(batch, ...)`.
        alpha_bar: Share of the data's variance in `noised`, `(batch,)`, above 0.
    """
    signal = per_sample(alpha_bar.sqrt(), noised)
    sigma = per_sample((1 - alpha_bar).sqrt(), noised)
    return noise - (noised - sigma * noise) / signal


def noise_of_velocity(latents: Tensor, velocity: Tensor, times: Tensor) -> Tensor:
    """Noise that a prediction of the velocity at `latents` of a rectified flow amounts to.

    Args:
        latents: `(batch, ...)`.
        velocity: The prediction, `(batch, ...)`.
        times: `(batch,)`.
    """
    return latents + (1 - per_sample(times, latents)) * velocity
