"""Layouts that a sweep considers, and how the command line of training says them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MODES = ("none", "selective", "full")
"""What is computed again in the backward pass; "selective" is the kind "op"."""

SCHEDULES = ("Interleaved1F1B", "1F1B")
"""Schedules of a pipeline and, in `Layout.stages`, two stages a rank and one."""

HIGHEST_DEGREE = 8
"""Of context and pipeline parallelism."""


@dataclass(frozen=True)
class Layout:
    """How ranks share a model.

    Attributes:
        tensor: Degree of tensor parallelism.
        context: Degree of context parallelism.
        pipeline: Degree of pipeline parallelism.
        schedule: Of the pipeline; empty without one.
        replicas: Groups of ranks that hold the same parts of the parameters.
        shards: Ranks of data parallelism that such a group has.
    """

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    schedule: str = ""
    replicas: int = 1
    shards: int = 1

    @property
    def readers(self) -> int:
        """Ranks that have samples of their own."""
        return self.replicas * self.shards

    @property
    def stages(self) -> int:
        """Stages of a pipeline that a rank has."""
        return 2 if self.schedule == "Interleaved1F1B" else 1

    @property
    def holders(self) -> int:
        """Ranks that FSDP deals parameters out to: those of context parallelism are among them."""
        return self.context * self.shards

    @property
    def degrees(self) -> dict[str, int]:
        """As in `Plan.degrees`."""
        sizes = {
            "dp_replicate": self.replicas,
            "dp_shard": self.shards,
            "cp": self.context,
            "tp": self.tensor,
            "pp": self.pipeline,
        }
        return {name: size for name, size in sizes.items() if size > 1}

    def overrides(self) -> tuple[str, ...]:
        """Say the layout on the command line of training."""
        values: dict[str, int | str] = {
            "data_parallel_replicate_degree": self.replicas,
            "data_parallel_shard_degree": self.shards,
            "tensor_parallel_degree": self.tensor,
            "context_parallel_degree": self.context,
            "pipeline_parallel_degree": self.pipeline,
        }
        if self.pipeline > 1:
            values["pipeline_parallel_schedule"] = self.schedule
            values["pipeline_parallel_microbatch_size"] = 1
        return tuple(f"--parallelism.{key}={value}" for key, value in values.items())


@dataclass(frozen=True)
class Candidate:
    """A layout with the rest of what decides about memory and time.

    Attributes:
        layout: How ranks share the model.
        mode: One of `MODES`.
        rows: `training.local_batch_size`; of a pipeline this is the number of microbatches.
        samples: `training.global_batch_size`; -1: one microbatch a rank.
    """

    layout: Layout
    mode: str
    rows: int
    samples: int

    @property
    def rounds(self) -> int:
        """How often gradients are accumulated in a step."""
        if self.samples < 0:
            return 1
        return self.samples // (self.rows * self.layout.readers)

    def overrides(self) -> tuple[str, ...]:
        """Say it on the command line of training."""
        selective = ("--activation_checkpoint.selective_ac_option=op",)
        return (
            *self.layout.overrides(),
            f"--training.local_batch_size={self.rows}",
            f"--training.global_batch_size={self.samples}",
            f"--activation_checkpoint.mode={self.mode}",
            *(selective if self.mode == "selective" else ()),
        )


@dataclass(frozen=True)
class Space:
    """What a sweep may choose from.

    Attributes:
        world_size: Number of ranks.
        of_a_node: Ranks of a node.
        samples: Of a step, whatever the layout.
        least_rows: Smallest local batch size.
        tensor: Degrees of tensor parallelism.
        context: Degrees of context parallelism.
        pipeline: Degrees of pipeline parallelism, each with a schedule.
    """

    world_size: int
    of_a_node: int
    samples: int
    least_rows: int
    tensor: Sequence[int]
    context: Sequence[int]
    pipeline: Sequence[tuple[int, str]]

    def layouts(self) -> Iterator[Layout]:
        """List layouts, the plainest first.

        Parameters are always dealt out by FSDP, with which TorchTitan mixes precisions. Replicas
        hold them whole between them within a node or several, never in less than a node.
        """
        for pipeline, schedule in self.pipeline:
            for context in self.context:
                for tensor in self.tensor:
                    readers, rest = divmod(self.world_size, tensor * context * pipeline)
                    if not rest:
                        yield from self._dealt_out(tensor, context, pipeline, schedule, readers)

    def _dealt_out(
        self, tensor: int, context: int, pipeline: int, schedule: str, readers: int
    ) -> Iterator[Layout]:
        of_a_stage = tensor * context * readers
        for replicas in divisors(readers):
            shards = readers // replicas
            layout = Layout(tensor, context, pipeline, schedule, replicas, shards)
            is_cut = layout.holders > 1 or self.world_size == 1
            in_a_node = tensor * context * shards >= min(self.of_a_node, of_a_stage)
            if is_cut and in_a_node and (replicas == 1 or shards > 1):
                yield layout

    def candidates(self) -> Iterator[Candidate]:
        """List layouts with each kind of checkpointing and each batch that makes the samples."""
        for layout in self.layouts():
            of_rank, rest = divmod(self.samples, layout.readers)
            if rest or not of_rank:
                continue
            for rows in powers_of_two(self.least_rows, of_rank):
                # A pipeline needs a microbatch for each of its ranks at least.
                if of_rank % rows == 0 and (layout.pipeline == 1 or rows >= layout.pipeline):
                    for mode in MODES:
                        yield Candidate(layout, mode, rows, self.samples)


def powers_of_two(first: int, last: int) -> Iterator[int]:
    """List `first` times 1, 2, 4, ... up to `last`."""
    while first <= last:
        yield first
        first *= 2


def divisors(number: int) -> list[int]:
    """List the divisors of a number, the smallest first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    large = [number // n for n in reversed(small) if n * n != number]
    return small + large
