"""Looks for the fastest layout that fits: all by formula, the best few by building them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torchtitan_mixtures.checks import check_flavor
from torchtitan_mixtures.planning.candidates import Candidate, Layout
from torchtitan_mixtures.planning.devices import GIB, Device
from torchtitan_mixtures.planning.fit import fits, state_bytes
from torchtitan_mixtures.planning.probes import find_space, is_possible, plan_probes
from torchtitan_mixtures.planning.score import Probes, deciding_ranks, predict
from torchtitan_mixtures.planning.step import Plan, plan_step
from torchtitan_mixtures.planning.timing import Times, step_times
from torchtitan_mixtures.train import parse_job

WANTED = 3
"""Layouts that are verified."""

MAX_BUILT = 6
"""Candidates that are built in order to have them."""

ALIKE = 0.02
"""Share of a step's time that formulas do not tell apart."""


@dataclass(frozen=True)
class Score:
    """A candidate by formula.

    Attributes:
        candidate: See there.
        plan: What it needs and costs.
        times: How long a step takes at least.
    """

    candidate: Candidate
    plan: Plan
    times: Times


@dataclass(frozen=True)
class Verified:
    """A candidate that was built.

    Attributes:
        score: What the formula said.
        plan: Of the rank that needs most.
        times: Of the slowest rank that was planned.
        fits: Whether it does.
    """

    score: Score
    plan: Plan
    times: Times
    fits: bool


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        samples: Of a step, the same in all candidates.
        considered: Number of candidates.
        ranked: Those that fit by formula, the fastest first.
        verified: Those that were built, in that order.
        best: The fastest of these that fits; None: none does.
        remedy: What would help if there is no best; empty if there is.
    """

    samples: int
    considered: int
    ranked: Sequence[Score]
    verified: Sequence[Verified]
    best: Verified | None
    remedy: str


def sweep(
    arguments: Sequence[str],
    world_size: int,
    device: Device,
    reserve: int,
    progress: Callable[[str], None] = lambda message: None,
) -> SweepResult:
    """Look for the fastest layout of a job.

    Args:
        arguments: The command line of training. What it says of the layout counts only for the
            samples of a step, and for context parallelism to be considered.
        world_size: Number of ranks.
        device: What they are.
        reserve: Bytes that must be left free.
        progress: Told what is built.

    Raises:
        ValueError: As in training, if the job cannot be trained even in the plainest layout.
    """
    job_config = parse_job(arguments, check_flavor)
    space = find_space(arguments, job_config, world_size, device)
    probes = plan_probes(arguments, job_config, space, progress)
    plans = [(candidate, predict(probes, candidate)) for candidate in space.candidates()]
    scores = [Score(candidate, plan, step_times(plan, device)) for candidate, plan in plans]
    ranked = sorted((s for s in scores if fits(s.plan, device, reserve)), key=_order)
    verified = list(_verify(arguments, probes, ranked, device, reserve, progress))
    fitting = [each for each in verified if each.fits]
    best = min(fitting, key=lambda each: each.times.step, default=None)
    remedy = "" if best else _remedy(probes, scores, ranked, device, reserve, space.samples)
    return SweepResult(space.samples, len(scores), ranked, verified, best, remedy)


def _order(score: Score) -> tuple[int, int, int, int]:
    """Sort by time; what is alike by plainness, fewest microbatches, and memory.

    Times are alike that differ by less than `ALIKE`, in steps of it.
    """
    steps = round(math.log(score.times.step) / math.log1p(ALIKE))
    return steps, len(score.plan.degrees), score.candidate.rounds, score.plan.memory.peak


def _verify(
    arguments: Sequence[str],
    probes: Probes,
    ranked: Sequence[Score],
    device: Device,
    reserve: int,
    progress: Callable[[str], None],
) -> Iterator[Verified]:
    """Build the best of each layout until enough of them fit."""
    world = probes.base["full"].world_size
    done: set[Layout] = set()
    refused: set[Layout] = set()
    built = 0
    for score in ranked:
        candidate = score.candidate
        if len(done) == WANTED or built == MAX_BUILT:
            return
        if candidate.layout in done | refused:
            continue
        # Each degree alone is possible; what refuses them together has nothing to do with the rest.
        if not is_possible(arguments, candidate, world):
            refused.add(candidate.layout)
            continue
        progress(f"verify: {' '.join(candidate.overrides())}")
        built += 1
        command = [*arguments, *candidate.overrides()]
        plans = [plan_step(command, world, rank) for rank in deciding_ranks(probes, candidate)]
        plan = max(plans, key=lambda each: each.memory.peak)
        times = max((step_times(each, device) for each in plans), key=lambda each: each.step)
        it_fits = fits(plan, device, reserve)
        if it_fits:
            done.add(candidate.layout)
        yield Verified(score, plan, times, it_fits)


def _remedy(
    probes: Probes,
    scores: Sequence[Score],
    ranked: Sequence[Score],
    device: Device,
    reserve: int,
    samples: int,
) -> str:
    """Say what would help where nothing fits."""
    base = probes.base["full"]
    world, usable = base.world_size, device.memory - reserve
    if not scores:
        return (
            f"no layout of {world} ranks makes {samples} samples a step of microbatches of "
            f"{probes.rows} or more. Set training.global_batch_size to a multiple of "
            f"{probes.rows * world}."
        )
    if ranked:
        return (
            f"{MAX_BUILT} layouts that fit by formula did not when they were built. Try a larger "
            "--reserve, which leaves out those that hardly fit."
        )
    if usable <= 0:
        return f"the reserve leaves nothing of the {device.memory / GIB:.0f} GiB of {device.name}."
    least = min(scores, key=lambda score: score.plan.memory.peak)
    needed = math.ceil(state_bytes(base.memory) * world / usable)
    text = (
        f"nothing fits: the smallest peak is {least.plan.memory.peak / GIB:.1f} GiB, with "
        f"{' '.join(least.candidate.overrides())}, and {device.name} has {usable / GIB:.1f} GiB "
        "that are not reserved."
    )
    if needed > world:
        return (
            f"{text} Parameters, gradients and optimizer state alone need {needed} ranks; take "
            "more than that, or a device with more memory."
        )
    return f"{text} Take more ranks, shorter sequences or a device with more memory."
