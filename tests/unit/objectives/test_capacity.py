"""Schedules of the capacity of training steps, and how many steps cost the same."""

import pytest

from torchtitan_mixtures.classifier_config import Nested
from torchtitan_mixtures.models.mone.args import MoNEModelArgs
from torchtitan_mixtures.objectives.capacity import (
    CapacitySchedule,
    anneal,
    own_capacity,
    same_flops_steps,
)


def make_schedule(total=100, seed=0, own=0.5, **keys):
    return CapacitySchedule(Nested(**keys), total, seed, own)


def capacities(schedule, total=100):
    return [schedule.capacity(step) for step in range(1, total + 1)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", (0.875, 0.75, 0.625)),
        ("cosine", (0.926777, 0.75, 0.573223)),
        ("exponential", (0.840896, 0.707107, 0.594604)),
    ],
)
def test_curves_are_the_known_ones(kind, expected):
    values = [anneal(kind, 1.0, 0.5, step / 100) for step in (25, 50, 75)]
    assert values == pytest.approx(expected, abs=1e-6)
    assert (anneal(kind, 0.9, 0.3, 0), anneal(kind, 0.9, 0.3, 1)) == (0.9, 0.3)


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential"])
@pytest.mark.parametrize("total", [100, 5, 2])
def test_a_run_goes_down_in_equal_parts_from_the_start_to_the_end_exactly(kind, total):
    schedule = make_schedule(total, own=0.3, schedule=kind, start_capacity=0.9, schedule_levels=5)
    values = capacities(schedule, total)
    assert (values[0], values[-1]) == (0.9, 0.3)
    assert values == sorted(values, reverse=True)
    levels = min(5, total)
    assert [values.count(level) for level in schedule.levels] == [total // levels] * levels
    expected = [anneal(kind, 0.9, 0.3, i / (levels - 1)) for i in range(levels)]
    assert schedule.levels == expected


def test_steps_beyond_the_last_and_a_run_of_one_step_are_at_the_end():
    assert make_schedule(10, schedule="linear").capacity(500) == 0.5
    assert make_schedule(1, schedule="linear").capacity(1) == 0.5


def test_parts_differ_by_a_step_at_most_where_they_cannot_be_equal():
    values = capacities(make_schedule(schedule="cosine", schedule_levels=7))
    counts = [values.count(value) for value in dict.fromkeys(values)]
    assert (sum(counts), len(counts), max(counts) - min(counts)) == (100, 7, 1)


def test_a_constant_capacity_is_that_of_the_model():
    schedule = make_schedule(own=0.35, capacities=[0.5], start_capacity=0.9)
    assert set(capacities(schedule)) == {0.35}
    assert schedule.levels == [0.35]


def test_adaptive_capacities_belong_to_steps_and_seeds():
    choices = [0.15, 0.5, 0.95]
    first = capacities(make_schedule(schedule="adaptive", capacities=choices), 3000)
    again = make_schedule(total=7, schedule="adaptive", capacities=choices)
    assert [again.capacity(step) for step in (2999, 3, 2999)] == [
        first[2998],
        first[2],
        first[2998],
    ]
    assert first != capacities(make_schedule(seed=1, schedule="adaptive", capacities=choices), 3000)
    assert all(900 < first.count(choice) < 1100 for choice in choices)


def nested_args(**keys):
    return MoNEModelArgs(dim=64, n_layers=3, n_heads=2, patch_size=8, image_size=64, **keys)


def test_as_many_steps_as_cost_the_same():
    args = nested_args(capacity=0.3)
    schedule = make_schedule(own=0.3)
    steps = same_flops_steps(100, args, schedule)
    macs, dense = args.macs_per_image(), args.dense_macs_per_image
    assert steps > 150
    assert abs(steps * macs - 100 * dense) <= macs / 2


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_a_run_whose_capacity_goes_down_costs_the_same(kind):
    args = nested_args(capacity=0.25)
    keys = dict(own=0.25, schedule=kind, schedule_levels=8)
    steps = same_flops_steps(200, args, make_schedule(200, **keys))
    schedule = make_schedule(steps, **keys)
    spent = sum(
        args.macs_per_image(args.budget(schedule.capacity(step))) for step in range(1, steps + 1)
    )
    assert spent == pytest.approx(200 * args.dense_macs_per_image, rel=0.01)


def test_a_run_of_drawn_capacities_costs_the_same_on_average():
    args = nested_args(capacity=0.5)
    choices = [0.2, 0.4, 0.9]
    steps = same_flops_steps(90, args, make_schedule(schedule="adaptive", capacities=choices))
    mean = sum(args.macs_per_image(args.budget(choice)) for choice in choices) / 3
    assert steps == round(90 * args.dense_macs_per_image / mean)


def test_the_capacity_of_a_dense_model_is_one():
    assert own_capacity(nested_args(num_experts=1)) == 1.0
    assert own_capacity(nested_args(capacity=0.4)) == 0.4
