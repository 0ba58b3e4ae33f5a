from __future__ import annotations

import dataclasses

import pytest

from tests.jobs import TRAIN_CONFIGS
from torchtitan_mixtures.planning.devices import DEVICES, GIB
from torchtitan_mixtures.planning.fit import MAX_BUILDS, find_remedy, fits, heaviest, plan_deciding
from torchtitan_mixtures.planning.step import plan_step

MIB = 2**20
CONFIG = f"--config={TRAIN_CONFIGS / 'mot' / 'debugmodel.toml'}"
JOB = [CONFIG, "--training.seq_len=512", "--training.local_batch_size=8", "--validation.no-enable"]


def device(memory):
    return dataclasses.replace(DEVICES["h100-80g"], memory=memory)


@pytest.fixture(scope="module")
def plan():
    return plan_step(JOB, 2)


def test_a_reserve_is_left_free(plan):
    peak = plan.memory.peak
    assert fits(plan, device(peak + GIB), GIB)
    assert not fits(plan, device(peak + GIB - 1), GIB)


def test_recomputing_is_the_nearest_remedy_where_it_is_enough(plan):
    told = []
    remedy = find_remedy(JOB, plan, device(plan.memory.peak - 1), 0, told.append)
    assert remedy is not None
    assert remedy.overrides == ("--activation_checkpoint.mode=full",)
    assert remedy.world_size == 2
    assert remedy.plan == plan_step([*JOB, *remedy.overrides], 2)
    assert fits(remedy.plan, device(plan.memory.peak - 1), 0)
    assert len(told) == 1


def test_smaller_microbatches_keep_the_batch(plan):
    full = plan_step([*JOB, "--activation_checkpoint.mode=full"], 2)
    remedy = find_remedy(JOB, plan, device(full.memory.peak - 1), 0)
    assert remedy is not None
    assert "--training.global_batch_size=16" in remedy.overrides
    assert remedy.plan.samples == plan.samples
    assert remedy.plan.memory.peak < full.memory.peak


def test_replicas_are_dealt_out_before_there_are_more_ranks():
    job = [*JOB, "--parallelism.data_parallel_replicate_degree=2"]
    replicas = plan_step(job, 2)
    remedy = find_remedy(job, replicas, device(replicas.memory.peak - 1), 0)
    assert remedy is not None
    assert remedy.world_size == 2
    assert remedy.plan.degrees == {"dp_shard": 2}


def test_more_ranks_help_where_the_state_alone_is_too_much(plan):
    memory = plan.memory
    state = memory.parameters + memory.gradients + memory.optimizer_state
    remedy = find_remedy(JOB, plan, device(state - MIB), 0)
    assert remedy is not None
    assert remedy.world_size > 2
    assert remedy.plan.world_size == remedy.world_size
    assert fits(remedy.plan, device(state - MIB), 0)


def test_where_nothing_helps_it_gives_up_after_a_few_builds(plan):
    told = []
    assert find_remedy(JOB, plan, device(MIB), 0, told.append) is None
    assert len(told) <= MAX_BUILDS


def test_of_a_pipeline_its_ends_and_what_lies_between_are_planned():
    flags = ["--parallelism.pipeline_parallel_degree=4",
             "--parallelism.pipeline_parallel_schedule=1F1B"]  # fmt: skip
    plans = plan_deciding([*JOB, *flags], 8)
    assert [plan.rank for plan in plans] == [0, 2, 6]
    # Of six layers the ends have one each, so that those between need and compute most.
    assert heaviest(plans) is plans[1]
    assert max(plans, key=lambda plan: plan.flops) is plans[1]
    assert [plan.rank for plan in plan_deciding(JOB, 2)] == [0]
