"""Whether a plan fits a device, and if not, the nearest one that does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.planning.devices import GIB, Device
from torchtitan_mixtures.planning.jobs import parse_planned_job
from torchtitan_mixtures.planning.step import Memory, Plan, plan_step
from torchtitan_mixtures.planning.world import world_size_in_environment

RESERVE = 6 * GIB
"""What is left to CUDA, NCCL and what an allocator cannot use of what it holds, unless said."""

MAX_BUILDS = 6
"""Remedies that are built, the nearest first, before none is named."""


@dataclass(frozen=True)
class Remedy:
    """A change that makes a job fit.

    Attributes:
        overrides: What is added to the command line; empty: nothing, more ranks are enough.
        world_size: How many ranks there are then.
        plan: What it needs.
    """

    overrides: tuple[str, ...]
    world_size: int
    plan: Plan


def state_bytes(memory: Memory) -> int:
    """What a rank holds all the time, gradients among it."""
    state = memory.parameters + memory.gradients + memory.optimizer_state
    return state + memory.other_state


def fewest_ranks_for_state(plan: Plan, device: Device, reserve: int = RESERVE) -> int:
    """How many devices hold parameters, gradients and optimizer state, however they are cut."""
    copies = plan.degrees.get("dp_replicate", 1)
    whole = state_bytes(plan.memory) * plan.world_size / copies
    return math.ceil(whole / (device.memory - reserve))


def fits(plan: Plan, device: Device, reserve: int = RESERVE) -> bool:
    """Say whether the peak leaves the reserve free."""
    return plan.memory.peak <= device.memory - reserve


def plan_deciding(arguments: Sequence[str], world_size: int) -> list[Plan]:
    """Plan the ranks that decide what a layout needs and how long it takes.

    All ranks are alike but those of a pipeline. There the first ones hold most microbatches, the
    first and the last may have fewer layers than others, and the last of 1F1B has the logits; so
    the first two ranks and the last one are planned.
    """
    plan = plan_step(arguments, world_size)
    stages = plan.degrees.get("pp", 1)
    of_a_stage = world_size // stages
    others = sorted({1, stages - 1} - {0}) if stages > 1 else []
    return [plan, *(plan_step(arguments, world_size, of_a_stage * stage) for stage in others)]


def heaviest(plans: Sequence[Plan]) -> Plan:
    """The plan of the rank that needs most memory."""
    return max(plans, key=lambda plan: plan.memory.peak)


def find_remedy(
    arguments: Sequence[str],
    plan: Plan,
    device: Device,
    reserve: int = RESERVE,
    progress: Callable[[str], None] = lambda message: None,
) -> Remedy | None:
    """Find the nearest change that makes a job fit, by building what may.

    Nearest is to deal replicas of the model out to their ranks, then to recompute more, then
    smaller microbatches of the same batch, both, more tensor parallelism, and more ranks.

    Args:
        arguments: The command line of training.
        plan: Its plan, which does not fit.
        device: What it runs on.
        reserve: Bytes that must be left free.
        progress: Told what is built.

    Returns:
        The remedy, or None: none was found in `MAX_BUILDS` builds.
    """
    builds = 0
    for overrides, world_size in _changes(arguments, plan, device, reserve):
        if builds == MAX_BUILDS:
            return None
        changed = [*arguments, *overrides]
        with world_size_in_environment(world_size):
            try:
                parse_planned_job(changed)
            except ValueError:  # a layout that the model does not have is no remedy
                continue
        remedy = f"{world_size} ranks {' '.join(overrides)}"
        progress(f"does it fit with {remedy}?")
        builds += 1
        found = heaviest(plan_deciding(changed, world_size))
        if fits(found, device, reserve):
            return Remedy(overrides, world_size, found)
    return None


def _changes(
    arguments: Sequence[str], plan: Plan, device: Device, reserve: int
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Overrides and ranks to try, the nearest first."""
    with world_size_in_environment(plan.world_size):
        job_config = parse_planned_job(arguments).config
    world, usable = plan.world_size, device.memory - reserve
    state = state_bytes(plan.memory)
    shards = "--parallelism.data_parallel_shard_degree=-1"
    if job_config.parallelism.data_parallel_replicate_degree > 1:
        yield ("--parallelism.data_parallel_replicate_degree=1", shards), world
    if state < usable:
        yield from ((overrides, world) for overrides in _without_ranks(job_config, plan))
    degree = job_config.parallelism.tensor_parallel_degree
    most = (_full(job_config), *_smaller(job_config, plan, 1))
    while degree < device.of_a_node:
        degree *= 2
        tensor = f"--parallelism.tensor_parallel_degree={degree}"
        if world % degree == 0 and state < usable:
            yield (*filter(None, most), tensor, shards), world
    # Each rank holds less of the state the more there are.
    times = 2 ** max(1, math.ceil(math.log2(state / usable)))
    for more in (times, 2 * times):
        yield (shards,), world * more
        yield (*filter(None, most), shards), world * more


def _without_ranks(job_config: MixtureJobConfig, plan: Plan) -> Iterator[tuple[str, ...]]:
    full, rows = _full(job_config), job_config.training.local_batch_size
    if full:
        yield (full,)
    half = rows // 2
    if half:
        yield _smaller(job_config, plan, half)
        if full:
            yield (full, *_smaller(job_config, plan, half))
    if half > 1:
        yield (*filter(None, (full,)), *_smaller(job_config, plan, 1))


def _full(job_config: MixtureJobConfig) -> str:
    is_full = job_config.activation_checkpoint.mode == "full"
    return "" if is_full else "--activation_checkpoint.mode=full"


def _smaller(job_config: MixtureJobConfig, plan: Plan, rows: int) -> tuple[str, ...]:
    """Say how to take the same batch in microbatches of so many samples."""
    training = job_config.training
    if rows == training.local_batch_size:
        return ()
    return (
        f"--training.local_batch_size={rows}",
        f"--training.global_batch_size={plan.samples}",
    )
