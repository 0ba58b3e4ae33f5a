"""A job as the planner takes it: the command line of training, less what only the data can say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torchtitan_mixtures import layout_checks
from torchtitan_mixtures.checks import check_data, check_flavor, check_model, note_checked
from torchtitan_mixtures.data.assumed_images import AssumedImages, assume_images
from torchtitan_mixtures.float8 import check_converters
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.planning.batches import images_to_assume
from torchtitan_mixtures.towers import check_towers
from torchtitan_mixtures.train import parse_job


class PlannedJob(NamedTuple):
    """A checked job.

    Attributes:
        config: Its configuration.
        assumed: What its images are taken to be; None: the data is here, or is of tokens.
    """

    config: MixtureJobConfig
    assumed: AssumedImages | None


def parse_planned_job(arguments: Sequence[str]) -> PlannedJob:
    """Parse and check the command line of a training, for as many ranks as `WORLD_SIZE` says.

    Args:
        arguments: `--config FILE.toml` and overrides.

    Raises:
        ValueError: As in training, for all that can be known without the data and the device.
    """
    assumed: list[AssumedImages | None] = []
    config = parse_job(arguments, lambda job_config: assumed.append(_check(job_config)))
    return PlannedJob(config, assumed[0])


def _check(job_config: MixtureJobConfig) -> AssumedImages | None:
    check_flavor(job_config)
    assumed = images_to_assume(job_config)
    with assume_images(assumed):
        args: Any = check_data(job_config) if assumed is None else check_model(job_config)
        layout_checks.check_layout(job_config, args)
        check_towers(job_config, args)
        check_converters(job_config, args)
    if job_config.optimizer.early_step_in_backward:
        raise ValueError(
            "optimizer.early_step_in_backward = true: the planner lets the optimizer step after "
            "the backward pass, which needs more; set it to false."
        )
    if job_config.training.enable_cpu_offload:
        raise ValueError(
            "training.enable_cpu_offload = true: the planner does not tell the host's memory from "
            "the device's. Plan without it, and move parameters, gradients and optimizer state to "
            "the host yourself."
        )
    note_checked(job_config)
    return assumed


def fewest_ranks(arguments: Sequence[str]) -> int:
    """Multiply the degrees of a job's layout; a job that names none has one rank.

    Raises:
        ValueError: One of several degrees is to take what is left of a number that nobody said. Or
            as `parse_planned_job`, for what does not depend on the number of ranks.
    """
    config = parse_job(arguments, check_flavor).parallelism
    degrees = (
        config.data_parallel_replicate_degree,
        config.data_parallel_shard_degree,
        config.tensor_parallel_degree,
        config.context_parallel_degree,
        config.pipeline_parallel_degree,
    )
    ranks = math.prod(max(degree, 1) for degree in degrees)
    if config.data_parallel_shard_degree < 1 and ranks > 1:
        raise ValueError(
            "--world-size: is missing, and parallelism.data_parallel_shard_degree = -1 takes what "
            f"is left of it; say how many devices there are, a multiple of {ranks}."
        )
    return ranks
