"""The trainer with models of images under parallel layouts: averages, validation, samples, resume.

AdamW has a large epsilon and learning rate, so that it moves weights in proportion to their
gradients; else its first steps are their signs, also of those that are zero but for rounding.
"""

from __future__ import annotations

import pytest
import torch

from tests.distributed.parity import KEYS, whole
from tests.gang import run_ranks
from tests.jobs import debug_job
from tests.runs import run_to_the_end
from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.trainer import MixtureTrainer

pytestmark = pytest.mark.distributed

STEPS = (
    "--metrics.no_enable_tensorboard", "--training.steps=3", "--training.global_batch_size=4",
    "--optimizer.lr=1.0", "--optimizer.eps=1.0", "--lr_scheduler.warmup_steps=1", "--ema.decay=0.5",
    "--training.max_norm=1000", "--objective.balance_weight=1.0", "--objective.z_weight=0.1",
    "--validation.enable", "--validation.freq=3", "--validation.steps=1",
    "--sampling.interval=3", "--sampling.num_steps=2", "--sampling.class_labels", "1", "2",
)  # fmt: skip

LAYOUTS = {
    "1 rank": {},
    "FSDP2": {"dp_shard": 2},
    "TP2": {"tp": 2},
    "CP2": {"cp": 2},
}


def train_until(stop, flavor, *overrides):
    """Averages after the last step, how far they moved, and losses; weights as arrays."""
    trainer = MixtureTrainer(debug_job("mom", f"--model.flavor={flavor}", *overrides))
    losses, processor = {}, trainer.metrics_processor
    # The family's own are zero in so many places that hardly anything would move.
    with torch.no_grad(), init.parameter_names(trainer.model_parts[0], 5):
        for parameter in trainer.model_parts[0].parameters():
            init.normal_(parameter, std=0.05)
    initial = arrays(dict(trainer.model_parts[0].named_parameters()))
    trainer.should_continue_training = lambda: trainer.step < stop

    def log(scalars, step, *, original=processor.logger.log):
        names = [n for n in scalars if "loss" in n and "max" not in n]  # that is of one rank
        losses.update({f"{step} {name}": scalars[name] for name in names})
        original(scalars, step)

    processor.logger.log = log
    run_to_the_end(trainer)
    averages = arrays(trainer.ema.state_dict())
    trainer.close()
    return {"averages": averages, "initial": initial, "losses": losses}


def arrays(state):
    # Tensors would travel in shared memory, which ends with the rank.
    return {name: whole(tensor).detach().double().numpy() for name, tensor in state.items()}


def run(layout, flavor, folder, *options, stop=3):
    degrees = LAYOUTS[layout]
    world = 2 if degrees else 1
    batch = 4 // degrees.get("dp_shard", 1)
    records = run_ranks(
        train_until, world, stop, flavor, *STEPS, f"--job.dump_folder={folder}",
        f"--training.local_batch_size={batch}", f"--validation.local_batch_size={batch}", *options,
        *(f"--parallelism.{KEYS[key]}={degree}" for key, degree in degrees.items()),
        init=False, timeout=200,
    )  # fmt: skip
    for record in records:
        assert record["losses"] == records[0]["losses"]
        for name, average in record["averages"].items():
            assert (average == records[0]["averages"][name]).all(), name
    return records[0]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return {
        flavor: run("1 rank", flavor, tmp_path_factory.mktemp(flavor), "--checkpoint.no_enable")
        for flavor in ("debugmodel", "debugmodel_dit")
    }


def assert_same_averages(found, expected):
    assert found["averages"].keys() == expected["averages"].keys()
    for name, average in expected["averages"].items():
        if name.endswith("wk.bias"):
            continue  # attention is the same whatever it is: no gradient but for rounding
        moved = abs(average - expected["initial"][name]).max()
        error = abs(found["averages"][name] - average).max()
        assert moved > 1e-5, name
        assert error <= 1e-3 * moved, (name, error, moved)


CASES = [
    ("FSDP2", "debugmodel"),
    ("TP2", "debugmodel"),
    ("CP2", "debugmodel"),
    *(pytest.param(layout, "debugmodel_dit", marks=pytest.mark.slow)
      for layout in ("FSDP2", "TP2", "CP2")),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "flavor"), CASES)
def test_averages_and_losses_are_those_of_one_process(layout, flavor, expected, tmp_path):
    found = run(layout, flavor, tmp_path, "--checkpoint.no_enable")
    assert_same_averages(found, expected[flavor])
    assert found["losses"] == pytest.approx(expected[flavor]["losses"], rel=1e-5)
    assert {f"{step} loss_metrics/global_avg_loss" for step in (1, 2, 3)} <= found["losses"].keys()
    assert any("validation" in name for name in found["losses"]), found["losses"].keys()


def test_one_rank_goes_on_with_the_average_of_two(expected, tmp_path):
    options = ("--checkpoint.enable", "--checkpoint.interval=2")
    before = run("FSDP2", "debugmodel", tmp_path, *options, stop=2)
    found = run("1 rank", "debugmodel", tmp_path, *options)
    assert {name.split()[0] for name in found["losses"]} == {"3"}
    assert_same_averages(found, expected["debugmodel"])
    # Not the weights of step 2, from which an average that was not loaded would begin.
    assert any((before["averages"][n] != found["averages"][n]).any() for n in before["averages"])
