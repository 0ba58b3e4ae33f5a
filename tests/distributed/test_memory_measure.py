"""What is measured of real steps, against what shapes say; plans are in test_memory_plans.py."""

from __future__ import annotations

import math
import threading
from functools import cache

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torchtitan.protocols.train_spec import get_train_spec

from tests.gang import run_ranks
from tests.jobs import TRAIN_CONFIGS, debug_job
from tests.runs import QUICK
from torchtitan_mixtures.planning.measure import (
    PREFIX,
    STEPS,
    Timeline,
    all_threads,
    measure_steps,
)

FLOAT32, MIB = 4, 2**20
SMALL = (
    f"--config={TRAIN_CONFIGS / 'mot' / 'debugmodel.toml'}",
    *QUICK,
    f"--training.steps={STEPS}",
    "--lr_scheduler.warmup_steps=1",
    "--training.seq_len=256",
    "--sampling.interval=0",
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Measure a small job on two ranks; each job once."""
    folder = tmp_path_factory.mktemp("job")

    @cache
    def measure(*overrides):
        arguments = [*SMALL, f"--job.dump_folder={folder}", *overrides]
        return run_ranks(measure_steps, 2, arguments, init=False)

    return measure


def shapes_of_parameters():
    spec = get_train_spec("mot")
    args = spec.model_args["debugmodel"]
    args.update_from_config(debug_job("mot"))
    with torch.device("meta"):
        return [p.shape for p in spec.model_cls(args).parameters()]


@pytest.mark.distributed
def test_fsdp_allocates_half_of_each_parameter_and_of_its_gradient_and_moments(measured):
    shapes = shapes_of_parameters()
    elements = sum(math.ceil(rows / 2) * math.prod(rest) for rows, *rest in shapes)
    for rank in measured():
        assert rank.parameters == rank.gradients == elements * FLOAT32
        # AdamW counts the steps of each parameter by a number of its own.
        assert rank.optimizer_state == (2 * elements + len(shapes)) * FLOAT32
        assert rank.peak > rank.parameters + rank.optimizer_state + rank.activations


@pytest.mark.distributed
def test_blocks_that_are_recomputed_leave_less_and_their_state_is_the_same(measured):
    kept, none = measured()[0], measured("--activation_checkpoint.mode=full")[0]
    assert none.activations < kept.activations
    assert none.peak < kept.peak
    for name in ("parameters", "gradients", "optimizer_state"):
        assert getattr(none, name) == getattr(kept, name)


@pytest.mark.slow
@pytest.mark.distributed
def test_blocks_of_which_some_is_recomputed_are_between(measured):
    selective = "--activation_checkpoint.mode=selective"
    some = measured(selective, "--activation_checkpoint.selective_ac_option=op")[0]
    kept, none = measured()[0], measured("--activation_checkpoint.mode=full")[0]
    assert none.activations < some.activations < kept.activations
    assert none.peak < some.peak < kept.peak


@pytest.mark.slow
@pytest.mark.distributed
def test_a_pipeline_has_a_peak_but_no_activations_of_its_own(measured):
    ranks = measured(
        "--parallelism.pipeline_parallel_degree=2",
        "--parallelism.pipeline_parallel_schedule=1F1B",
    )
    shapes = shapes_of_parameters()
    assert sum(rank.parameters for rank in ranks) == sum(map(math.prod, shapes)) * FLOAT32
    for rank in ranks:
        assert rank.activations is None
        assert rank.peak > rank.parameters + rank.gradients + rank.optimizer_state


def test_what_another_thread_frees_does_not_live_on():
    def mark(name):
        torch.zeros(1)  # totals are noted when something is allocated or freed
        with record_function(PREFIX + name):
            pass

    cpu = [ProfilerActivity.CPU]
    with all_threads(), profile(activities=cpu, profile_memory=True) as profiler:
        mark("before")
        sent = [torch.zeros(MIB // FLOAT32)]
        mark("sent")
        dropping = threading.Thread(target=sent.clear)
        dropping.start()
        dropping.join()
        mark("dropped")
    timeline = Timeline(profiler)
    before, during, after = (
        timeline.level(timeline.marks[PREFIX + name][0]) for name in ("before", "sent", "dropped")
    )
    assert (during - before, after - before) == (MIB, 0)
