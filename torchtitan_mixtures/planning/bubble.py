"""How long ranks of a pipeline wait: their schedule, played through with stages of equal cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleGPipe,
    _Action,
    _ComputationType,
)

FORWARD, FULL_BACKWARD = _ComputationType.FORWARD, _ComputationType.FULL_BACKWARD
INPUT, WEIGHT = _ComputationType.BACKWARD_INPUT, _ComputationType.BACKWARD_WEIGHT

COST: Mapping[Any, int] = {FORWARD: 1, FULL_BACKWARD: 2, INPUT: 1, WEIGHT: 1}
"""Time of each action, in forward passes of a stage: each product has one of either gradient."""

Order = Mapping[int, Sequence[_Action]]

Key = tuple[_ComputationType, int, int | None]
"""What is done, of which stage, and of which microbatch."""


def bubble_share(schedule: Any, ranks: int, microbatches: int | None = None) -> float:
    """Share of the time in which the mean rank has nothing to do.

    Args:
        schedule: PyTorch's, of one rank.
        ranks: Of the pipeline.
        microbatches: How many there are; None: as the schedule has. Each that it lacks takes a
            rank as long as it computes: the pipeline is full.
    """
    order = schedule_order(schedule, ranks)
    length = simulate(order)
    busy = sum(COST[action.computation_type] for row in order.values() for action in row)
    further = (microbatches or schedule._n_microbatches) - schedule._n_microbatches
    of_one = busy / schedule._n_microbatches  # of all ranks
    return 1 - (busy + further * of_one) / (length * ranks + further * of_one)


def schedule_order(schedule: Any, ranks: int) -> Order:
    """What each rank computes, in order.

    PyTorch 2.13 says it of schedules with several stages a rank. What it says of 1F1B has ranks
    run microbatches that there are not, so schedules with one stage are written down here.
    """
    if not isinstance(schedule, PipelineScheduleSingle):
        return {rank: _computations(row) for rank, row in schedule.pipeline_order.items()}
    count = schedule._n_microbatches
    order: dict[int, list[_Action]] = {}
    for rank in range(ranks):
        forward = [_Action(rank, FORWARD, number) for number in range(count)]
        backward = [_Action(rank, FULL_BACKWARD, number) for number in range(count)]
        if isinstance(schedule, ScheduleGPipe):
            order[rank] = [*forward, *backward]
            continue
        assert isinstance(schedule, Schedule1F1B)
        ahead = min(count, ranks - rank)
        row = list(forward[:ahead])
        for number in range(count):
            row.append(backward[number])
            row += forward[ahead + number : ahead + number + 1]
        order[rank] = row
    return order


def _computations(row: Iterable[_Action | None]) -> list[_Action]:
    """Leave out idle steps and what costs nothing here; an action may consist of two."""
    flat: list[_Action] = []
    for action in row:
        if action is not None:
            flat += action.sub_actions or [action]
    return [action for action in flat if action.computation_type in COST]


def simulate(order: Order) -> int:
    """Play a schedule through; return its length in forward passes of a stage.

    An action begins when its rank is free, what it needs of other stages is there, and all before
    it on its rank has begun.
    """
    ends: dict[Key, int] = {}
    free = dict.fromkeys(order, 0)
    left = {rank: list(row) for rank, row in order.items()}
    last = max(action.stage_index for row in left.values() for action in row)
    while any(left.values()):
        progressed = False
        for rank, row in left.items():
            while row and (ready := _ready(row[0], ends, last)) is not None:
                action = row.pop(0)
                kind, number = action.computation_type, action.microbatch_index
                free[rank] = max(free[rank], ready) + COST[kind]
                # The next stage waits for the gradient of inputs, however it is called.
                key = INPUT if kind is FULL_BACKWARD else kind
                ends[key, action.stage_index, number] = free[rank]
                progressed = True
        if not progressed:
            raise ValueError(f"a schedule in which {left} wait for one another")
    return max(free.values())


def _ready(action: _Action, ends: Mapping[Key, int], last: int) -> int | None:
    """When what an action needs is there; None: it is not yet."""
    kind, stage, number = action.computation_type, action.stage_index, action.microbatch_index
    if kind is FORWARD:
        needed = [] if stage == 0 else [(FORWARD, stage - 1, number)]
    elif kind is WEIGHT:
        needed = [(INPUT, stage, number)]
    else:
        needed = [(FORWARD, stage, number)]
        needed += [] if stage == last else [(INPUT, stage + 1, number)]
    if any(key not in ends for key in needed):
        return None
    return max((ends[key] for key in needed), default=0)
