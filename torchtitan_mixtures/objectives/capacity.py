"""How much of a nested model each training step uses, and for how many steps.

A capacity is the effective one of Jain et al. 2024 (arXiv 2407.19985, 3.3): the mean share of the
width that tokens get. It may go down over a run in a few levels (each is compiled anew), or be
drawn for each step ("adaptive", 4.3), so that one model serves at any of them. What a step has
depends on its number and the seed alone: it is the same on all ranks and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch

from torchtitan_mixtures.classifier_config import Nested
from torchtitan_mixtures.objectives.randomness import sample_generator


class NestedArgs(Protocol):
    """What the arguments of a nested model, or of the dense one beside it, say about its cost."""

    num_experts: int
    num_routers: int
    capacity: float

    def budget(self, capacity: float | None = None) -> Any:
        """Say how many tokens each expert gets at an effective capacity."""
        ...

    def macs_per_image(self, budget: Any = None) -> int:
        """Count multiply-adds of an image with a budget."""
        ...

    @property
    def dense_macs_per_image(self) -> int:
        """Count those of the dense model."""
        ...


def own_capacity(args: NestedArgs) -> float:
    """The effective capacity that a model has if nothing else is said; that of a dense one is 1."""
    return args.capacity if args.num_experts > 1 else 1.0


def _linear(start: float, end: float, fraction: float) -> float:
    return start + (end - start) * fraction


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


def _exponential(start: float, end: float, fraction: float) -> float:
    return start * (end / start) ** fraction


_CURVES: dict[str, Callable[[float, float, float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
}


def anneal(kind: str, start: float, end: float, fraction: float) -> float:
    """Go from `start` to `end`.

    Args:
        kind: `linear`, `cosine` or `exponential`.
        start: Value at 0.
        end: Value at 1.
        fraction: How far to have gone, from 0 to 1.

    Returns:
        The value there, exact at both ends.
    """
    if fraction in (0, 1):
        return end if fraction else start
    return _CURVES[kind](start, end, fraction)


class CapacitySchedule:
    """Effective capacity of each training step.

    A run whose capacity goes down is cut into equal parts, at most `nested.schedule_levels`. Part i
    of n has the value of the curve at i / (n - 1): the first is at the start exactly, the last at
    the end.

    Args:
        config: The `[nested]` section.
        total_steps: Steps of the run.
        seed: Of what is drawn.
        own: Capacity of the model's arguments, to which `nested.capacity` was applied.

    Attributes:
        levels: All capacities that steps have; each has about as many steps as any other.
    """

    def __init__(self, config: Nested, total_steps: int, seed: int, own: float) -> None:
        self._total_steps = total_steps
        self._seed = seed
        self._is_drawn = config.schedule == "adaptive"
        if config.schedule == "constant":
            self.levels = [own]
        elif self._is_drawn:
            self.levels = list(config.capacities)
        else:
            count = min(config.schedule_levels, total_steps)
            fractions = [i / (count - 1) for i in range(count)] if count > 1 else [1.0]
            self.levels = [
                anneal(config.schedule, config.start_capacity, own, fraction)
                for fraction in fractions
            ]

    def capacity(self, step: int) -> float:
        """Say what a step has.

        Args:
            step: TorchTitan's number of it, from 1. Steps beyond the last are like the last.
        """
        return self.levels[self.level(step)]

    def level(self, step: int) -> int:
        """Say which of `levels` a step has; see `capacity`."""
        count = len(self.levels)
        if self._is_drawn:
            rng = sample_generator(self._seed, step, "capacity")
            return int(torch.randint(count, (), generator=rng))
        return min((step - 1) * count // self._total_steps, count - 1)


def same_flops_steps(steps: int, args: NestedArgs, schedule: CapacitySchedule) -> int:
    """Count the steps that cost together what dense ones do ("isoFLOPs"; the paper's 4.2).

    Args:
        steps: Steps of the dense model.
        args: The nested model's arguments.
        schedule: Its capacities, in a run of any length.

    Returns:
        The nearest number of steps, at least 1. Multiply-adds are those of forward passes; backward
        ones take twice as many in both models.
    """
    macs = [args.macs_per_image(args.budget(capacity)) for capacity in schedule.levels]
    return max(1, round(steps * args.dense_macs_per_image * len(macs) / sum(macs)))
