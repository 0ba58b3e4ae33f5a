"""Into how many shards the training data is dealt, and which data a checkpoint can continue.

Shards keep the order of the training data apart from who reads it. Sequence g = 0, 1, 2, ... of a
run is sequence g // S of shard g % S, whatever the number of data-parallel ranks; rank r of n takes
the sequences with g % n = r. So its shards are those with s % n = r, and n must divide S. The same
goes for the worker processes of a rank, which take its sequences in turn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchtitan.config import JobConfig

if TYPE_CHECKING:
    from torchtitan_mixtures.job_config import Multimodal

START_AFRESH = (
    'start the data from the beginning with checkpoint.exclude_from_loading = ["dataloader"]'
)

_MANY = 48
"""Shards of a new run, if nothing else decides: many numbers of ranks divide it."""


@dataclass(frozen=True)
class Share:
    """One of `count` equals: a data-parallel rank, or a worker process of one."""

    index: int
    count: int


def count_shards(job_config: JobConfig, num_ranks: int) -> int:
    """Count the shards of a run's training data.

    `multimodal.shards`, or if that is 0: for data with an index, the least number that the readers
    and 48 divide; for a stream one shard per reader, since more would read each file several times.

    Args:
        job_config: The whole configuration.
        num_ranks: Data-parallel ranks.

    Raises:
        ValueError: The readers (ranks times workers) do not divide the shards.
    """
    config: Multimodal = job_config.multimodal  # pyrefly: ignore [missing-attribute]
    num_workers = job_config.training.dataloader.num_workers
    readers_of_rank = max(1, num_workers)
    readers = num_ranks * readers_of_rank
    if not config.shards:
        is_stream = config.source == "datasets" and config.streaming
        is_stream |= any(table.get("streaming", False) for table in config.sources)
        return readers if is_stream else math.lcm(_MANY, readers)
    if config.shards % readers == 0:
        return config.shards
    possible = [
        str(ranks)
        for ranks in range(1, config.shards + 1)
        if config.shards % (ranks * readers_of_rank) == 0
    ]
    advice = f"launch one of {', '.join(possible)} of them" if possible else "lower num_workers"
    raise ValueError(
        f"The training data is dealt into {config.shards} shards (multimodal.shards, or the "
        f"checkpoint's), which {num_ranks} data-parallel ranks (the product of "
        "parallelism.data_parallel_replicate_degree and data_parallel_shard_degree) with "
        f"training.dataloader.num_workers = {num_workers} cannot share: they are {readers} "
        f"readers. With these workers {advice}. For a new run set multimodal.shards to 0 or a "
        f"multiple of {readers}; to resume with any number, {START_AFRESH}."
    )


def check_fingerprint(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise a `ValueError` that names the first key in which two fingerprints differ."""
    for key in [*current, *(key for key in saved if key not in current)]:
        old, new = saved.get(key), current.get(key)
        if old != new:
            source = ""
            if key == "multimodal.shards":
                source = "If it is not set, the ranks and training.dataloader.num_workers decide. "
            raise ValueError(
                f"{key} is {new!r}, but {old!r} in the run that saved the checkpoint: its data "
                f"loader state does not fit. {source}Put it back, or {START_AFRESH}."
            )
