from __future__ import annotations

import dataclasses
import re
from itertools import pairwise

import pytest

from tests.jobs import TRAIN_CONFIGS
from tests.unit.planning.test_score import naive, naive_probes
from torchtitan_mixtures.planning import sweep as module
from torchtitan_mixtures.planning.candidates import Candidate, Layout, Space
from torchtitan_mixtures.planning.devices import GIB, Device, find_device
from torchtitan_mixtures.planning.fit import fits
from torchtitan_mixtures.planning.probes import find_space, samples_of_a_step
from torchtitan_mixtures.planning.step import plan_step
from torchtitan_mixtures.planning.sweep import sweep
from torchtitan_mixtures.planning.toml_edit import write_config
from torchtitan_mixtures.train import parse_job

DEBUG = TRAIN_CONFIGS / "mot" / "debugmodel.toml"
ARGUMENTS = [f"--config={DEBUG}", "--validation.no-enable"]
SPACE = Space(8, 8, 64, 2, tensor=(1, 2, 4), context=(1, 2), pipeline=((1, ""),))


def device(memory):
    return Device("round", memory, 1e3, 1e3, 1e5, 1e4, 1e3)


def candidate_of(overrides):
    """Read a candidate back from the command line."""
    said = dict(re.findall(r"--(\S+?)=(\S+)", " ".join(overrides)))
    degrees = [int(said[f"parallelism.{name}_degree"]) for name in (
        "tensor_parallel", "context_parallel", "pipeline_parallel",
        "data_parallel_replicate", "data_parallel_shard")]  # fmt: skip
    tensor, context, pipeline, replicas, shards = degrees
    return Candidate(
        Layout(tensor, context, pipeline, "", replicas, shards),
        said["activation_checkpoint.mode"],
        int(said["training.local_batch_size"]),
        int(said["training.global_batch_size"]),
    )


@pytest.fixture
def naive_job(monkeypatch):
    """Let a sweep see the naive job of `test_score.py`, and note what it builds."""
    built = []

    def plan(command, world_size, rank):
        candidate = candidate_of(command[len(ARGUMENTS) :])
        built.append(candidate)
        return naive(candidate.layout, candidate.mode, candidate.rows)

    monkeypatch.setattr(module, "find_space", lambda *arguments: SPACE)
    monkeypatch.setattr(module, "plan_probes", lambda *arguments: naive_probes())
    monkeypatch.setattr(module, "is_possible", lambda *arguments: True)
    monkeypatch.setattr(module, "plan_step", plan)
    return built


def test_the_best_three_layouts_are_built_and_the_fastest_is_taken(naive_job):
    messages = []
    result = sweep(ARGUMENTS, 8, device(10**9), 0, messages.append)
    assert result.samples == 64
    assert result.considered == len(list(SPACE.candidates())) == len(result.ranked)
    times = [score.times.step for score in result.ranked]
    # In order but for what is alike.
    assert all(first < 1.05 * second for first, second in pairwise(times))
    layouts = [each.score.candidate.layout for each in result.verified]
    assert len(set(layouts)) == len(layouts) == len(naive_job) == len(messages) == 3
    assert result.best is not None and result.best.fits
    assert result.best.times.step == min(each.times.step for each in result.verified)
    assert result.remedy == ""


def test_what_fits_by_formula_only_is_followed_by_the_next(naive_job, monkeypatch):
    plan, first = module.plan_step, []

    def heavy_at_first(*arguments):
        found = plan(*arguments)
        first.append(found)
        peak = 10**10 if len(first) < 3 else found.memory.peak
        return dataclasses.replace(found, memory=dataclasses.replace(found.memory, peak=peak))

    monkeypatch.setattr(module, "plan_step", heavy_at_first)
    result = sweep(ARGUMENTS, 8, device(10**9), 0)
    assert [each.fits for each in result.verified] == [False, False, True, True, True]
    assert result.best is not None and result.best.fits
    layouts = [each.score.candidate.layout for each in result.verified if each.fits]
    assert len(set(layouts)) == 3


def test_a_sweep_gives_up_after_six_builds(naive_job, monkeypatch):
    plan = module.plan_step

    def heavy(*arguments):
        found = plan(*arguments)
        return dataclasses.replace(found, memory=dataclasses.replace(found.memory, peak=10**10))

    monkeypatch.setattr(module, "plan_step", heavy)
    result = sweep(ARGUMENTS, 8, device(10**9), 0)
    assert [each.fits for each in result.verified] == 6 * [False]
    assert result.best is None
    assert "Try a larger --reserve" in result.remedy


def test_layouts_that_checks_refuse_are_passed_over(naive_job, monkeypatch):
    monkeypatch.setattr(
        module, "is_possible", lambda _, candidate, world: candidate.layout.tensor == 4
    )
    result = sweep(ARGUMENTS, 8, device(10**9), 0)
    assert {each.score.candidate.layout.tensor for each in result.verified} == {4}


def test_nothing_that_fits_says_how_many_ranks_the_state_needs(naive_job):
    usable = 2500  # the state is of 4 x 8,800 bytes and 16 of each rank
    result = sweep(ARGUMENTS, 8, device(usable), 0)
    assert (result.best, list(result.verified), naive_job) == (None, [], [])
    assert "nothing fits: the smallest peak is" in result.remedy
    assert "alone need 15 ranks" in result.remedy  # 35,328 / 2,500
    assert "the reserve leaves nothing of" in sweep(ARGUMENTS, 8, device(usable), usable).remedy


def test_a_batch_of_no_layout_says_which_would_do(naive_job, monkeypatch):
    space = dataclasses.replace(SPACE, samples=3)
    monkeypatch.setattr(module, "find_space", lambda *arguments: space)
    result = sweep(ARGUMENTS, 8, device(10**9), 0)
    assert (result.best, result.considered) == (None, 0)
    assert "Set training.global_batch_size to a multiple of 16" in result.remedy


@pytest.mark.parametrize(
    ("overrides", "samples"),
    [
        ((), 16),  # two of each rank
        (("--parallelism.tensor_parallel_degree=2",), 8),
        (("--parallelism.tensor_parallel_degree=16",), 2),  # more than there are ranks
        (("--training.global_batch_size=48",), 48),
    ],
)
def test_the_samples_of_a_step_are_those_of_the_layout_that_was_given(overrides, samples):
    job_config = parse_job([*ARGUMENTS, *overrides], lambda job_config: None)
    assert samples_of_a_step(job_config, 8) == samples


def test_only_degrees_that_the_family_takes_are_considered():
    family, h100 = TRAIN_CONFIGS / "mom" / "debugmodel.toml", find_device("h100-80g")
    arguments = [f"--config={family}"]
    space = find_space(arguments, parse_job(arguments, lambda job_config: None), 4, h100)
    assert space.pipeline == ((1, ""),)
    assert space.context == (1,)  # its images are short
    assert set(space.tensor) <= {1, 2}  # FSDP has two ranks at least
    assert space.least_rows >= 1


@pytest.mark.slow
def test_a_job_is_swept_and_its_configuration_written(tmp_path):
    h100 = find_device("h100-80g")
    arguments = [*ARGUMENTS, "--training.seq_len=512", "--training.local_batch_size=4"]
    result = sweep(arguments, 8, h100, 6 * GIB)
    assert 1 <= len(result.verified) <= 3
    for each in result.verified:
        assert each.plan.samples == each.score.plan.samples == result.samples == 32
        assert fits(each.plan, h100, 6 * GIB) == each.fits
        assert each.score.times.step == pytest.approx(each.times.step, rel=0.15)
    assert result.best is not None
    target = tmp_path / "best.toml"
    overrides = [*arguments[1:], *result.best.score.candidate.overrides()]
    write_config(DEBUG, overrides, ["The best."], target)
    assert plan_step([f"--config={target}"], 8, result.best.plan.rank) == result.best.plan
