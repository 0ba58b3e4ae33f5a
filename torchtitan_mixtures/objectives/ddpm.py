"""Denoising diffusion in discrete steps: the noise is predicted, and the variance of each step.

Source: Ho, Jain, Abbeel 2020 (arXiv 2006.11239), equations 4 to 12; learned variance, its loss,
the squared-cosine schedule and fewer steps than in training: Nichol and Dhariwal 2021 (arXiv
2102.09672), equations 15 to 17 and 19; together the recipe of DiT (Peebles and Xie 2022, arXiv
2212.09748). Step 0 has the least noise. With `a = sqrt(alpha_bar)`, `b = sqrt(1 - alpha_bar)`:
`noised = a clean + b noise`.

Deviations: a single step starts from the last noise level, where the original's formula would
give the first. Without learned variance, samples take that of the posterior (`fixed small`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchtitan_mixtures.objectives.process import Process, at_least_float32, per_sample


def linear_betas(num_steps: int) -> Tensor:
    """Variances that grow linearly, those of Ho et al. for 1000 steps, `(num_steps,)` float64."""
    scale = 1000 / num_steps
    if scale * 2e-2 >= 1:
        raise ValueError(
            f"objective.noise_steps = {num_steps}: must be more than 20 with the linear "
            "noise_schedule."
        )
    return torch.linspace(scale * 1e-4, scale * 2e-2, num_steps, dtype=torch.float64, device="cpu")


def squared_cosine_betas(num_steps: int) -> Tensor:
    """Variances that make `alpha_bar` a squared cosine, at most 0.999, `(num_steps,)` float64."""
    ends = torch.arange(num_steps + 1, dtype=torch.float64, device="cpu") / num_steps
    alpha_bar = ((ends + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": linear_betas, "squared_cosine": squared_cosine_betas}


def spaced_steps(num_steps: int, spacing: int | str) -> list[int]:
    """Choose the noise levels that samples are drawn with.

    Args:
        num_steps: Noise levels of the process.
        spacing: How many to take (a number or its digits), from the first to the last, at a stride
            that need not be whole; or `"ddimN"`: N of them at a whole stride, from the first on.

    Returns:
        Steps in ascending order.

    Raises:
        ValueError: There are not so many, or none of equal distance.
    """
    match = re.fullmatch(r"(ddim)?([0-9]+)", str(spacing))
    count = int(match[2]) if match else 0
    if match is None or not 1 <= count <= num_steps:
        raise ValueError(
            f"num_steps = {spacing!r}: must be a number from 1 to {num_steps}, the noise steps of "
            "the model, or ddimN for N of them at a whole stride."
        )
    if count == 1:
        return [num_steps - 1]
    if match[1]:
        stride = math.ceil(num_steps / count)
        if len(range(0, num_steps, stride)) != count:
            raise ValueError(
                f"num_steps = {spacing!r}: no whole stride takes {count} of {num_steps} noise "
                f"steps; ddim{len(range(0, num_steps, stride))} or ddim"
                f"{len(range(0, num_steps, stride - 1))} is possible, or any number without ddim."
            )
        return list(range(0, num_steps, stride))
    steps, position = [], 0.0
    for _ in range(count):
        steps.append(round(position))
        position += (num_steps - 1) / (count - 1)  # a sum, as in DiT, so that ties fall as there
    return steps


@dataclass(frozen=True)
class NoiseTables:
    """What is known of each step before any data, `(steps,)` float64 on the CPU.

    Attributes:
        betas: Variance that the step adds.
        alpha_bars: Share of the data's variance that is left after it.
        alpha_bars_before: The same before it.
        variances: Variance of the posterior, `noised` before the step given data and after it.
        log_variances: Its logarithm; that of the first step, minus infinity, is the second's.
        clean_weights: Weight of the data in the mean of the posterior.
        noised_weights: Weight of `noised` in it.
    """

    betas: Tensor
    alpha_bars: Tensor
    alpha_bars_before: Tensor
    variances: Tensor
    log_variances: Tensor
    clean_weights: Tensor
    noised_weights: Tensor

    @classmethod
    def of(cls, betas: Tensor) -> NoiseTables:
        """Compute the tables of a schedule, `(steps,)` float64."""
        alpha_bars = (1 - betas).cumprod(0)
        before = torch.cat([alpha_bars.new_ones(1), alpha_bars[:-1]])
        variances = betas * (1 - before) / (1 - alpha_bars)
        # A single step is the first and the last: it has no posterior to take the variance from.
        floor = variances[1:2] if len(betas) > 1 else betas
        return cls(
            betas=betas,
            alpha_bars=alpha_bars,
            alpha_bars_before=before,
            variances=variances,
            log_variances=torch.cat([floor, variances[1:]]).log(),
            clean_weights=betas * before.sqrt() / (1 - alpha_bars),
            noised_weights=(1 - before) * (1 - betas).sqrt() / (1 - alpha_bars),
        )

    def respaced(self, steps: Sequence[int]) -> NoiseTables:
        """Tables of a process that visits only some steps, in ascending order."""
        kept = self.alpha_bars[list(steps)]
        return NoiseTables.of(1 - kept / torch.cat([kept.new_ones(1), kept[:-1]]))


def range_log_variance(
    values: Tensor, log_beta: Tensor | float, log_variance: Tensor | float
) -> Tensor:
    """Logarithm of a learned variance: -1 is that of the posterior, 1 that of the step."""
    share = (values + 1) / 2
    return share * log_beta + (1 - share) * log_variance


def gaussian_kl(mean_error: Tensor, log_variance: Tensor, true_log_variance: Tensor) -> Tensor:
    """KL divergence in nats of a Gaussian from the true one, whose mean is `mean_error` away."""
    ratio = true_log_variance - log_variance
    return 0.5 * (ratio.exp() - 1 - ratio + mean_error.square() * (-log_variance).exp())


def decoder_nll(clean: Tensor, mean_error: Tensor, log_variance: Tensor) -> Tensor:
    """Negative log-likelihood in nats of 8-bit data in [-1, 1] under a Gaussian.

    Each of the 256 values owns a bin as wide as their distance, 2/255; the two at the ends own all
    that is beyond. The normal distribution function is approximated by a tanh, as in the source.

    Args:
        clean: Data.
        mean_error: The Gaussian's mean less `clean`.
        log_variance: Logarithm of its variance.
    """
    precision = (-0.5 * log_variance).exp()
    below = _normal_cdf(precision * (-mean_error - 1 / 255))
    above = _normal_cdf(precision * (-mean_error + 1 / 255))
    mass = torch.where(clean < -0.999, above, torch.where(clean > 0.999, 1 - below, above - below))
    return -mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


class DDPM(Process):
    """The process of Ho et al. with its loss; times are steps, int64 from 0 to `num_steps - 1`.

    The loss of an element is the squared error of the noise and, with learned variance, the
    variational bound in bits. The bound trains the variance only: the noise in it is detached.
    """

    def __init__(
        self,
        channels: int,
        num_steps: int = 1000,
        schedule: Literal["linear", "squared_cosine"] = "linear",
        learned_variance: bool = True,
    ):
        """Build the process.

        Args:
            channels: Channels of the data. With learned variance the model has twice as many: of
                each pixel first the noise, then the variance.
            num_steps: Number of noise levels.
            schedule: How noise grows, a key of `SCHEDULES`.
            learned_variance: Whether the model predicts the variance of each step too.
        """
        self.channels = channels
        self.num_steps = num_steps
        self.learned_variance = learned_variance
        self.tables = NoiseTables.of(SCHEDULES[schedule](num_steps))
        tables = self.tables
        signal, sigma = tables.alpha_bars.sqrt(), (1 - tables.alpha_bars).sqrt()
        # How far an error of the noise moves the mean of the step before.
        mean_error = tables.clean_weights * sigma / signal
        log_betas = tables.betas.log()
        self._rows = torch.stack([signal, sigma, mean_error, log_betas, tables.log_variances])
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def _at(self, times: Tensor, like: Tensor) -> Tensor:
        """Values of each row at `times`, `(rows, batch, 1, ...)`, in the precision of `like`."""
        key = (times.device, like.dtype)
        if key not in self._copies:
            self._copies[key] = self._rows.to(like.dtype).to(times.device)
        return per_sample(self._copies[key][:, times], like)

    def times(self, uniform: Tensor) -> Tensor:
        """See `Process`."""
        return (uniform * self.num_steps).long()

    def level_times(self, levels: int) -> Tensor:
        """See `Process`."""
        middles = (torch.arange(levels, dtype=torch.float64, device="cpu") + 0.5) / levels
        return self.times(middles)

    def fraction(self, times: Tensor) -> Tensor:
        """See `Process`; each step counts as its middle."""
        return (times.float() + 0.5) / self.num_steps

    def model_times(self, times: Tensor) -> Tensor:
        """See `Process`."""
        return times.float()

    def corrupt(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """See `Process`."""
        clean, noise = at_least_float32(clean), at_least_float32(noise)
        signal, sigma, *_ = self._at(times, clean)
        return signal * clean + sigma * noise

    def loss_terms(
        self, prediction: Tensor, clean: Tensor, noise: Tensor, times: Tensor
    ) -> dict[str, Tensor]:
        """See `Process`: `mse`, and `vb` with learned variance."""
        prediction, clean, noise = map(at_least_float32, (prediction, clean, noise))
        if not self.learned_variance:
            return {"mse": (prediction - noise).square().mean(-1)}
        pixels = prediction.unflatten(-1, (-1, 2 * self.channels))
        predicted_noise, values = (part.flatten(-2) for part in pixels.chunk(2, dim=-1))
        error = predicted_noise - noise
        bound = self._variational_bound(error.detach(), values, clean, times)
        return {"mse": error.square().mean(-1), "vb": bound.mean(-1)}

    def _variational_bound(
        self, error: Tensor, values: Tensor, clean: Tensor, times: Tensor
    ) -> Tensor:
        """In bits; the means differ by a multiple of the noise's error, so `noised` cancels."""
        _, _, mean_error, log_beta, true_log_variance = self._at(times, clean)
        log_variance = range_log_variance(values, log_beta, true_log_variance)
        moved = -mean_error * error
        nats = torch.where(
            per_sample(times, clean) == 0,
            decoder_nll(clean, moved, log_variance),
            gaussian_kl(moved, log_variance, true_log_variance),
        )
        return nats / math.log(2)
