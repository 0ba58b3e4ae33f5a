"""From noise to pictures or latents: ancestral steps, DDIM, Euler, classifier-free guidance.

Source: ancestral steps: Ho et al. 2020 (arXiv 2006.11239), algorithm 2, with the variance of
Nichol and Dhariwal 2021 (arXiv 2102.09672); DDIM: Song et al. 2020 (arXiv 2010.02502), equations
12 and 16; Euler: the flow's equation in equal steps of time, shifted as in training. Predicted
data is not clipped. Latents are float32 whatever precision the model runs in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchtitan_mixtures.objectives.ddpm import (
    DDPM,
    NoiseTables,
    range_log_variance,
    spaced_steps,
)
from torchtitan_mixtures.objectives.flow import RectifiedFlow, shift_times
from torchtitan_mixtures.objectives.process import at_least_float32, per_sample
from torchtitan_mixtures.objectives.randomness import draw_normal

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""From latents `(batch, channels, height, width)` and what the model's embedding of time is fed,
`(batch,)` float32, to its prediction `(batch, out_channels, height, width)`."""

StepNoise = Callable[[int], Tensor]
"""From the number of steps done to noise of the shape of the latents; 0 gives the first latents."""

Progress = Callable[[int, int], None]
"""Told steps done and steps in all, after each step."""

StepEdit = Callable[[int, float, Tensor], Tensor]
"""Before each step, from the number of steps done, the time that latents are at and the latents to
latents to go on from."""


def noise_of_samples(
    seed: int, samples: Tensor, shape: Sequence[int], device: torch.device | str
) -> StepNoise:
    """Make noise that depends on the seed and a sample's number, not on the batch it is in.

    Args:
        seed: Seed of all samples.
        samples: Number of each sample, `(batch,)` int64 on the CPU.
        shape: `(channels, height, width)`.
        device: Where noise is needed.
    """
    return lambda step: draw_normal(seed, samples, shape, f"sampling/{step}").to(device)


def guide(
    conditional: Tensor,
    unconditional: Tensor,
    scale: float | Tensor,
    channels: int,
    guided_channels: int,
) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), of predictions.

    Args:
        conditional: Prediction given the condition, `(batch, out_channels, height, width)`.
        unconditional: Prediction without it, of the same shape.
        scale: 1 gives the former, 0 the latter, more exaggerates the difference; of all samples, or
            of each, `(batch,)`.
        channels: Channels of the latents; what follows them (the variance) is not guided.
        guided_channels: Guide the first so many; 0 = all of `channels`. The original DiT guides 3
            of 4. The others are those of `conditional`.

    Raises:
        ValueError: There are not so many channels.
    """
    if not 0 <= guided_channels <= channels:
        raise ValueError(
            f"guided_channels = {guided_channels}: must be from 0 (all) to {channels}, the "
            "channels of the latents."
        )
    # A model's bfloat16 has too few digits for a difference that is multiplied.
    conditional, unconditional = at_least_float32(conditional), at_least_float32(unconditional)
    guided = guided_channels or channels
    difference = conditional[:, :guided] - unconditional[:, :guided]
    if isinstance(scale, Tensor):
        scale = per_sample(scale.to(difference), difference)
    return torch.cat(
        [unconditional[:, :guided] + scale * difference, conditional[:, guided:]], dim=1
    )


def ancestral_step(
    tables: NoiseTables, index: int, latents: Tensor, prediction: Tensor
) -> tuple[Tensor, Tensor]:
    """Distribution of the latents one step closer to data.

    Args:
        tables: Of the visited steps.
        index: Which of them `latents` are at.
        latents: `(batch, channels, ...)`.
        prediction: The noise in them, and a learned variance if there are twice the channels.

    Returns:
        Mean and logarithm of the variance, each like `latents`.
    """
    channels = latents.shape[1]
    noise, values = prediction[:, :channels], prediction[:, channels:]
    clean = predicted_clean(tables, index, latents, noise)
    weights = float(tables.clean_weights[index]), float(tables.noised_weights[index])
    mean = weights[0] * clean + weights[1] * latents
    log_variance = float(tables.log_variances[index])
    if not values.shape[1]:
        return mean, torch.full_like(mean, log_variance)
    log_beta = math.log(float(tables.betas[index]))
    return mean, range_log_variance(values, log_beta, log_variance)


def ddim_step(
    tables: NoiseTables, index: int, latents: Tensor, prediction: Tensor, eta: float
) -> tuple[Tensor, float]:
    """Latents one step closer to data, and the standard deviation of the noise to add to them.

    Arguments as for `ancestral_step`, whose variance (that of the posterior) `eta = 1` gives.
    """
    noise = prediction[:, : latents.shape[1]]
    alpha_bar_before = float(tables.alpha_bars_before[index])
    variance = eta**2 * float(tables.variances[index])
    clean = predicted_clean(tables, index, latents, noise)
    # At the first step there is no noise left, up to rounding.
    direction = math.sqrt(max(0.0, 1 - alpha_bar_before - variance))
    return math.sqrt(alpha_bar_before) * clean + direction * noise, math.sqrt(variance)


def predicted_clean(tables: NoiseTables, index: int, latents: Tensor, noise: Tensor) -> Tensor:
    """Data that a prediction of the noise in `latents` amounts to."""
    alpha_bar = float(tables.alpha_bars[index])
    return (latents - math.sqrt(1 - alpha_bar) * noise) / math.sqrt(alpha_bar)


@torch.no_grad()
def sample_ddpm(
    denoiser: Denoiser,
    latents: Tensor,
    process: DDPM,
    num_steps: int | str,
    step_noise: StepNoise,
    progress: Progress | None = None,
    edit: StepEdit | None = None,
) -> Tensor:
    """Draw samples by ancestral steps.

    Args:
        denoiser: The model, guided or not.
        latents: Noise to start from, `(batch, channels, height, width)`.
        process: What the model was trained with.
        num_steps: See `spaced_steps`.
        step_noise: Gives the noise to add; not asked after the last step, which adds none.
        progress: Told of each step.
        edit: Changes the latents before each step; None: nothing does.

    Returns:
        `(batch, channels, height, width)` float32.
    """
    steps = spaced_steps(process.num_steps, num_steps)
    tables = process.tables.respaced(steps)
    latents = latents.float()
    for done, index in enumerate(reversed(range(len(steps))), start=1):
        if edit is not None:
            latents = edit(done - 1, steps[index], latents)
        prediction = _predict(denoiser, latents, steps[index], process)
        latents, log_variance = ancestral_step(tables, index, latents, prediction)
        if index:
            latents = latents + (0.5 * log_variance).exp() * step_noise(done)
        if progress is not None:
            progress(done, len(steps))
    return latents


@torch.no_grad()
def sample_ddim(
    denoiser: Denoiser,
    latents: Tensor,
    process: DDPM,
    num_steps: int | str,
    step_noise: StepNoise,
    eta: float = 0.0,
    progress: Progress | None = None,
    edit: StepEdit | None = None,
) -> Tensor:
    """Draw samples by DDIM; a learned variance is not used.

    Args:
        eta: Share of the posterior's standard deviation that is added as noise. 0: none is, and
            the latents decide the sample.
        denoiser, latents, process, num_steps, step_noise, progress, edit: See `sample_ddpm`.

    Returns:
        `(batch, channels, height, width)` float32.
    """
    steps = spaced_steps(process.num_steps, num_steps)
    tables = process.tables.respaced(steps)
    latents = latents.float()
    for done, index in enumerate(reversed(range(len(steps))), start=1):
        if edit is not None:
            latents = edit(done - 1, steps[index], latents)
        prediction = _predict(denoiser, latents, steps[index], process)
        latents, std = ddim_step(tables, index, latents, prediction, eta)
        if std:
            latents = latents + std * step_noise(done)
        if progress is not None:
            progress(done, len(steps))
    return latents


@torch.no_grad()
def sample_euler(
    denoiser: Denoiser,
    latents: Tensor,
    process: RectifiedFlow,
    num_steps: int,
    progress: Progress | None = None,
    shift: float = 0.0,
    edit: StepEdit | None = None,
) -> Tensor:
    """Draw samples of a rectified flow by Euler's method.

    Args:
        shift: Of the times; 0: that of the process.
        denoiser, latents, process, num_steps, progress, edit: See `sample_ddpm`.

    Raises:
        ValueError: There are no steps.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}: must be 1 or more.")
    grid = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64, device="cpu")
    times = shift_times(grid, shift or process.shift).tolist()
    latents = latents.float()
    for done in range(1, num_steps + 1):
        if edit is not None:
            latents = edit(done - 1, times[done - 1], latents)
        velocity = _predict(denoiser, latents, times[done - 1], process)
        latents = latents + (times[done] - times[done - 1]) * velocity
        if progress is not None:
            progress(done, num_steps)
    return latents


def _predict(
    denoiser: Denoiser, latents: Tensor, time: float, process: DDPM | RectifiedFlow
) -> Tensor:
    """Ask the model about latents that are all at one time; in float32."""
    times = torch.full((len(latents),), time, dtype=torch.float32, device=latents.device)
    return denoiser(latents, process.model_times(times)).float()
