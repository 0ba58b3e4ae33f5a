"""A run under FSDP2 or tensor parallelism begins with a folder of experts, as one process does."""

from __future__ import annotations

import pytest

from tests.checkpoints import save_tiny_mixdiff
from tests.distributed.parity import KEYS
from tests.gang import run_ranks
from tests.jobs import debug_job
from tests.runs import run_to_the_end
from torchtitan_mixtures import expert_folder_edits as edits
from torchtitan_mixtures.trainer import MixtureTrainer

pytestmark = pytest.mark.distributed

BASE = ("--validation.no_enable", "--metrics.no_enable_tensorboard", "--checkpoint.interval=1",
        "--lr_scheduler.warmup_steps=1", "--ema.decay=0.5", "--training.global_batch_size=4",
        "--mixture.frozen_towers=noto,noto_v1")  # fmt: skip


def totals(tensors):
    return {
        name: float((t.full_tensor() if hasattr(t, "full_tensor") else t).detach().double().sum())
        for name, t in tensors.items()
    }


def sums(model):
    return totals(dict(model.named_parameters()))


def train(steps, *overrides):
    """Weights before and after some steps, the step, and the average of the weights."""
    trainer = MixtureTrainer(debug_job("mixdiff", *BASE, f"--training.steps={steps}", *overrides))
    before = sums(trainer.model_parts[0])
    run_to_the_end(trainer)
    after = sums(trainer.model_parts[0])
    step = trainer.step
    average = totals(trainer.ema.state_dict())
    trainer.close()
    return before, after, step, average


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    model = save_tiny_mixdiff(root / "run")
    edits.export(str(root / "run"), root / "two")
    edits.remove(root / "two", "fluent")
    return root / "two", sums(model)


@pytest.mark.parametrize("degrees", [{}, {"dp_shard": 2}, {"tp": 2}], ids=["one", "FSDP2", "TP2"])
def test_weights_are_those_of_the_folder(degrees, folder, tmp_path):
    path, expected = folder
    layout = [f"--parallelism.{KEYS[key]}={degree}" for key, degree in degrees.items()]
    options = (f"--diffusers.start={path}", "--diffusers.new_expert_from=noto", *layout)
    world = 2 if degrees else 1
    for before, after, step, average in run_ranks(
        train, world, 1, f"--job.dump_folder={tmp_path}", *options, init=False, timeout=200
    ):
        assert step == 1
        for name, value in before.items():
            if "head" in name:
                continue  # one of its rows is new
            source = name.replace("fluent", "noto")
            assert value == pytest.approx(expected[source], rel=1e-9), name
            is_frozen = name.startswith("experts.noto")
            assert (after[name] == value) == is_frozen, name
            # It begins with the folder's weights, and ema.decay is a half.
            between = pytest.approx((value + after[name]) / 2, rel=1e-5, abs=1e-4)
            assert average[name] == between, name


def test_a_resumed_run_goes_on_with_its_own_weights(folder, tmp_path):
    options = (f"--job.dump_folder={tmp_path}", f"--diffusers.start={folder[0]}")
    ((_, first, _, _),) = run_ranks(train, 1, 1, *options, init=False, timeout=200)
    ((_, second, step, average),) = run_ranks(train, 1, 2, *options, init=False, timeout=200)
    assert step == 2 and second != first
    ((_, again, _, whole),) = run_ranks(
        train, 1, 2, f"--job.dump_folder={tmp_path}/whole", *options[1:], init=False, timeout=200
    )
    assert second == again and average == whole
