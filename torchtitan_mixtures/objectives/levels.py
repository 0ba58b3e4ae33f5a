"""Scores at fixed levels of noise: of validation during training, and of evaluation afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from torch import Tensor, nn
from torchtitan.distributed import ParallelDims

from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.objectives.denoising import DenoisingLoss, DenoisingTargets


class LevelScore(NamedTuple):
    """What a model made of a batch at one noise level.

    Attributes:
        level: Number of the level.
        losses: Loss of each position, `(batch, tokens)` float32; zero where there is none.
        targets: What it was scored against.
    """

    level: int
    losses: Tensor
    targets: DenoisingTargets


def score_levels(
    model: nn.Module,
    loss_fn: DenoisingLoss,
    input_dict: dict[str, Tensor],
    labels: Tensor,
    parallel_dims: ParallelDims,
    job_config: MixtureJobConfig,
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[LevelScore]:
    """Score a validation batch at every noise level.

    Args:
        model: In evaluation mode.
        loss_fn: Noises and scores.
        input_dict: See `DenoisingLoss.prepare`; frozen encoders see it once for all levels.
        labels: `(batch, tokens)` int64.
        parallel_dims: The job's parallel layout.
        job_config: The job's configuration.
        context: Makes the context that the model runs in.
    """
    clean = loss_fn.encode(input_dict)
    for level in range(job_config.objective.validation_levels):
        inputs, targets, extra, _ = loss_fn.prepare(
            model, None, clean, labels, parallel_dims, job_config, level=level
        )
        with context():
            losses = loss_fn.score(model(inputs, **extra), targets)
        yield LevelScore(level, losses, targets)
