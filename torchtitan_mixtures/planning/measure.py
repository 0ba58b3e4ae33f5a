"""What the allocator of a real step hands out: the plan of a job, measured where it can be.

PyTorch's profiler notes every allocation and every free of its thread on a CPU, and how much all
threads of the process then hold. That total, at the places in the trainer's step that a plan names,
is compared with the plan (`scripts/benchmark.py memory`). gloo's own buffers do not come from that
allocator, and a plan does not count them either.

A sum of the noted bytes would drift: what a collective sends is often dropped last, and so freed,
by a thread of gloo's, which the profiler does not watch.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.profiler import ProfilerActivity, profile, record_function

from torchtitan_mixtures.planning.running import storage_bytes
from torchtitan_mixtures.train import parse_job
from torchtitan_mixtures.trainer import MixtureTrainer

PREFIX = "torchtitan_mixtures.planning."
BUILDING, BUILT = f"{PREFIX}building", f"{PREFIX}built"
FORWARD, BACKWARD = f"{PREFIX}forward", f"{PREFIX}backward"
STEPPING, STEPPED = f"{PREFIX}stepping", f"{PREFIX}stepped"
FREEING, FREED = f"{PREFIX}freeing", f"{PREFIX}freed"
"""Places in a profile: around the allocation of a model, at the beginning of a microbatch, when its
loss is there, around the optimizer's step, and around the freeing of gradients."""


STEPS = 4
"""Steps that are taken."""


@dataclass(frozen=True)
class Measured:
    """Bytes that a rank allocated; see `Memory` of `planning/step.py` for what they are of.

    Attributes:
        parameters: Of its share of the parameters.
        gradients: That were freed after a first step.
        optimizer_state: That the optimizer's first step left.
        activations: Of a microbatch, and that its forward pass left in a later step; None of a
            pipeline, whose passes alternate.
        peak: Most that lived in a later step, from its first microbatch to its end.

    Of later steps the least is taken: a thread of gloo's may hold what it sent a moment longer than
    it must.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    activations: int | None
    peak: int


def measure_steps(arguments: Sequence[str]) -> Measured:
    """Take a few steps of a job on this rank, and say what they allocated.

    Args:
        arguments: The command line of training, for CPUs; the environment is that of torchrun.
    """
    job_config = parse_job(arguments)
    cpu = [ProfilerActivity.CPU]
    with all_threads(), profile(activities=cpu, profile_memory=True) as profiler, _marked():
        trainer = MixtureTrainer(job_config)
        built = _State.of(trainer)
        batches = trainer.batch_generator(trainer.dataloader)  # pyrefly: ignore [bad-argument-type]
        for step in range(1, STEPS + 1):
            trainer.step = step
            trainer.train_step(batches)
    is_pipeline = trainer.parallel_dims.pp_enabled
    trainer.close()
    torch.distributed.destroy_process_group()
    return Timeline(profiler).measured(built, is_pipeline)


@dataclass(frozen=True)
class _State:
    """What was there before the first step, beside parameters."""

    parameters: int
    buffers: int
    average: int

    @classmethod
    def of(cls, trainer: MixtureTrainer) -> _State:
        parts = trainer.model_parts
        average = 0 if trainer.ema is None else storage_bytes(trainer.ema.state_dict().values())
        return cls(
            storage_bytes(p for part in parts for p in part.parameters()),
            storage_bytes(b for part in parts for b in part.buffers()),
            average,
        )


@contextmanager
def all_threads() -> Iterator[None]:
    """Let the total that a profiler notes be that of all threads, not of those that it watches.

    The switch is PyTorch's own, but it has no name in Python.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    switch = ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage")
    before, switch.value = switch.value, True
    try:
        yield
    finally:
        switch.value = before


@contextmanager
def _marked() -> Iterator[None]:
    """Let a trainer note in the profile where it is."""
    places = [
        (nn.Module, "to_empty", BUILDING, BUILT),
        (MixtureTrainer, "forward_backward_step", FORWARD, ""),
        (Tensor, "backward", BACKWARD, ""),
        (Optimizer, "zero_grad", FREEING, FREED),
    ]
    before = [getattr(owner, name) for owner, name, *_ in places]
    for (owner, name, start, end), method in zip(places, before, strict=True):
        setattr(owner, name, _between(method, start, end))
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: _mark(STEPPING)),
        register_optimizer_step_post_hook(lambda *_: _mark(STEPPED)),
    ]
    try:
        yield
    finally:
        for (owner, name, *_), method in zip(places, before, strict=True):
            setattr(owner, name, method)
        for hook in hooks:
            hook.remove()


def _between(method: Callable[..., Any], start: str, end: str) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        _mark(start)
        result = method(*args, **kwargs)
        if end:
            _mark(end)
        return result

    return marked


def _mark(name: str) -> None:
    with record_function(name):
        pass


class Timeline:
    """Bytes that live over time.

    Args:
        profiler: What has profiled memory, within `all_threads`.

    Attributes:
        marks: Name of a place (`PREFIX...`) -> when it was passed, in order; nanoseconds.
    """

    def __init__(self, profiler: Any) -> None:
        totals: list[tuple[int, int]] = []
        self.marks: dict[str, list[int]] = {}
        events = list(profiler.profiler.kineto_results.experimental_event_tree())
        while events:
            event = events.pop()
            events += event.children
            if event.name == "[memory]":
                totals.append((event.start_time_ns, event.extra_fields.total_allocated))
            elif event.name.startswith(PREFIX):
                self.marks.setdefault(event.name, []).append(event.start_time_ns)
        totals.sort(key=lambda total: total[0])
        self._times = [time for time, _ in totals]
        self._levels = [0, *(total for _, total in totals)]
        for marks in self.marks.values():
            marks.sort()

    def level(self, time: int) -> int:
        """Bytes that live at a time, those from before the profile not among them."""
        return self._levels[bisect.bisect_right(self._times, time)]

    def measured(self, built: _State, is_pipeline: bool) -> Measured:
        """Read off what `measure_steps` says."""
        marks = {
            name: _by_step(times)
            for name, times in self.marks.items()
            if name not in (BUILDING, BUILT)
        }
        # Before the first batch there is nothing but what was built.
        empty = self.level(marks[FREED][0][-1])
        held = built.parameters + built.buffers + built.average - empty
        later = range(1, STEPS)
        activations = None
        if not is_pipeline:
            activations = self._batch(marks) + min(
                max(
                    self.level(end) - self.level(start)
                    for start, end in zip(marks[FORWARD][k], marks[BACKWARD][k], strict=True)
                )
                for k in later
            )
        return Measured(
            parameters=self._growth(self.marks[BUILDING], self.marks[BUILT]) - built.buffers,
            # They are freed at the beginning of the next step.
            gradients=-self._growth(marks[FREEING][1], marks[FREED][1]),
            optimizer_state=self._growth(marks[STEPPING][0], marks[STEPPED][0]),
            activations=activations,
            peak=held + min(self._most(marks[FORWARD][k][0], marks[STEPPED][k][-1]) for k in later),
        )

    def _batch(self, marks: Mapping[str, Sequence[Sequence[int]]]) -> int:
        """Bytes of a microbatch; of the first step, as later batches take the place of others."""
        microbatches = marks[FORWARD][0]
        return self._growth(marks[FREED][0][-1:], microbatches[:1]) // len(microbatches)

    def _most(self, start: int, end: int) -> int:
        """Most bytes that lived at once between two times."""
        low, high = (bisect.bisect_right(self._times, time) for time in (start, end))
        return max(self._levels[low : high + 1])

    def _growth(self, starts: Sequence[int], ends: Sequence[int]) -> int:
        """What was allocated between the first start and the last end, and not freed."""
        return self.level(ends[-1]) - self.level(starts[0])


def _by_step(times: Sequence[int]) -> list[Sequence[int]]:
    """Deal times, as many of each step, out to the steps."""
    count, rest = divmod(len(times), STEPS)
    assert not rest, f"{len(times)} marks in {STEPS} steps"
    return [times[step * count : (step + 1) * count] for step in range(STEPS)]
