"""Long pipelines are planned by their first microbatches: once all stages are at work, it repeats.

Under 1F1B and its interleaved form a rank holds no more microbatches after the pipeline has filled,
and each further one adds the same work and traffic. Planning takes time for every microbatch, so
only enough are run to fill the pipeline, and the rest is multiplied. Only what FSDP and replicas
send is of a step and not of a microbatch: weights stay gathered until all have passed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torchtitan.distributed import ParallelDims

from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.planning.collectives import Group
from torchtitan_mixtures.planning.running import RankRun
from torchtitan_mixtures.planning.world import group_dimensions

_STAGES_OF_A_RANK = {"1F1B": 1, "Interleaved1F1B": 2}
"""Of schedules that repeat; of the latter as many as TorchTitan makes unless it is told."""

_OF_A_STEP = ("fsdp", "dp_replicate", "other")


@dataclass(frozen=True)
class Microbatches:
    """How many microbatches a pipeline has, and how many of them are run to plan it."""

    all: int
    run: int

    @property
    def factor(self) -> float:
        """What counts of those that are run are multiplied by."""
        return self.all / self.run

    def extend(self, run: RankRun, dims: ParallelDims) -> RankRun:
        """What would have been counted with all microbatches.

        Args:
            run: Of those that were run.
            dims: The layout.
        """
        if self.run == self.all:
            return run
        waiting = round((self.factor - 1) * run.waiting)
        dimensions = group_dimensions(dims)

        def times(group: Group) -> float:
            return 1 if dimensions.get(group, "other") in _OF_A_STEP else self.factor

        tallies = [
            replace(
                tally,
                activations=tally.activations + waiting,
                peak=tally.peak + waiting,
                flops=round(tally.flops * self.factor),
                product_bytes=round(tally.product_bytes * self.factor),
                other_bytes=round(tally.other_bytes * self.factor),
                sent={group: round(times(group) * n) for group, n in tally.sent.items()},
                calls={key: round(times(key[0]) * n) for key, n in tally.calls.items()},
            )
            for tally in run.tallies
        ]
        return replace(run, tallies=tallies, waiting=run.waiting + waiting)


def shorten(job_config: MixtureJobConfig, dims: ParallelDims) -> Microbatches:
    """Leave a job the microbatches that its pipeline has to be planned with.

    Args:
        job_config: A checked job; its batch becomes shorter if it has more of them.
        dims: Its layout.
    """
    parallelism, training = job_config.parallelism, job_config.training
    size = parallelism.pipeline_parallel_microbatch_size
    count = training.local_batch_size // size if dims.pp_enabled else 1
    stages = _STAGES_OF_A_RANK.get(parallelism.pipeline_parallel_schedule)
    if not dims.pp_enabled or stages is None or parallelism.pipeline_parallel_schedule_csv:
        return Microbatches(count, count)
    needed = dims.pp + 1 if stages == 1 else 2 * dims.pp
    if parallelism.pipeline_parallel_layers_per_stage is not None or needed >= count:
        return Microbatches(count, count)
    training.local_batch_size = needed * size
    return Microbatches(count, needed)
