from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    _Action,
)

from torchtitan_mixtures.planning.bubble import (
    FORWARD,
    FULL_BACKWARD,
    INPUT,
    WEIGHT,
    bubble_share,
    schedule_order,
    simulate,
)


def make(kind, ranks, microbatches):
    """A schedule without its stages, of which two are on a rank where it takes several."""
    schedule = object.__new__(kind)
    schedule._n_microbatches = microbatches
    if issubclass(kind, ScheduleInterleaved1F1B):
        schedule.pp_group_size, schedule.n_local_stages = ranks, 2
        schedule.number_of_rounds = max(1, microbatches // ranks)
        schedule.microbatches_per_round = microbatches // schedule.number_of_rounds
        schedule.pipeline_order = {
            rank: schedule._calculate_single_rank_operations(rank) for rank in range(ranks)
        }
    return schedule


@pytest.mark.parametrize("kind", [Schedule1F1B, ScheduleGPipe])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (2, 8), (4, 4), (4, 16), (8, 3)])
def test_pipelines_with_one_stage_a_rank_wait_as_long_as_their_formula_says(
    kind, ranks, microbatches
):
    share = bubble_share(make(kind, ranks, microbatches), ranks)
    assert share == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 16)])
def test_two_stages_a_rank_halve_what_ranks_wait(ranks, microbatches):
    share = bubble_share(make(ScheduleInterleaved1F1B, ranks, microbatches), ranks)
    assert share == pytest.approx((ranks - 1) / (2 * microbatches + ranks - 1))


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_runs_every_microbatch_once_each_way(ranks):
    order = schedule_order(make(Schedule1F1B, ranks, 6), ranks)
    for rank, row in order.items():
        for kind in (FORWARD, FULL_BACKWARD):
            numbers = [a.microbatch_index for a in row if a.computation_type is kind]
            assert numbers == list(range(6))
        assert {action.stage_index for action in row} == {rank}


def test_a_rank_of_1f1b_holds_no_more_microbatches_than_there_are_ranks_behind_it():
    order = schedule_order(make(Schedule1F1B, 4, 16), 4)
    for rank, row in order.items():
        held, most = 0, 0
        for action in row:
            held += 1 if action.computation_type is FORWARD else -1
            most = max(most, held)
        assert most == 4 - rank


def test_a_schedule_by_hand_takes_as_long_as_counted_by_hand():
    # Two ranks, one microbatch: forward 1 + 1, backward 2 + 2.
    order = {
        0: [_Action(0, FORWARD, 0), _Action(0, FULL_BACKWARD, 0)],
        1: [_Action(1, FORWARD, 0), _Action(1, FULL_BACKWARD, 0)],
    }
    assert simulate(order) == 6
    # Split: rank 0 goes on once rank 1 has the gradient of its input.
    order[1][1:] = [_Action(1, INPUT, 0), _Action(1, WEIGHT, 0)]
    assert simulate(order) == 5


def test_a_schedule_that_waits_for_itself_is_an_error():
    order = {0: [_Action(0, FULL_BACKWARD, 0), _Action(0, FORWARD, 0)]}
    with pytest.raises(ValueError, match="wait for one another"):
        simulate(order)


def test_idle_steps_and_reductions_cost_nothing_and_pairs_cost_both():
    pair = SimpleNamespace(sub_actions=(_Action(0, FORWARD, 1), _Action(0, FULL_BACKWARD, 0)))
    schedule = SimpleNamespace(
        pipeline_order={0: [_Action(0, FORWARD, 0), None, pair, _Action(0, FULL_BACKWARD, 1)]}
    )
    order = schedule_order(schedule, 1)
    assert [str(action) for action in order[0]] == ["0F0", "0F1", "0B0", "0B1"]
    assert simulate(order) == 6
