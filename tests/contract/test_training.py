"""What training must do in every family, in one process and on two."""

from __future__ import annotations

import math

import pytest
import torch

from tests.gang import run_ranks
from tests.jobs import debug_job
from tests.rows import quick
from tests.runs import QUICK, train
from torchtitan_mixtures import checkpoint_config
from torchtitan_mixtures.checks import check_job
from torchtitan_mixtures.models import FAMILIES

LOWER = {"mot": (1.5, 0.3), "mom": (0.5, 0.1), "mone": (0.1, 0.01), "mmdit": (0.3, 0.05),
         "mixdiff": (0.5, 0.1)}  # fmt: skip
"""By how much forty steps and eight steps lower the loss at least."""

TO_LEARN = {"mone": ("--training.local_batch_size=32",)}
"""What makes a few steps enough: two pictures say nothing about classes."""

EVEN_LOSS = {"mot": (), "mom": ("--objective.balance_weight=0",), "mone": (), "mmdit": (),
             "mixdiff": ()}  # fmt: skip
"""Makes the loss a mean over samples: the load of a router is that of a microbatch."""


@pytest.mark.parametrize("family", FAMILIES)
def test_forty_steps_lower_the_loss(family, tmp_path):
    (records,) = run_ranks(
        train, 1, family, *QUICK, f"--job.dump_folder={tmp_path}", "--training.steps=40",
        "--lr_scheduler.warmup_steps=5", *TO_LEARN.get(family, ()), timeout=200, init=False,
    )  # fmt: skip
    losses = records["loss"]
    assert all(math.isfinite(loss) for loss in losses.values())
    assert losses[40] < losses[1] - LOWER[family][0]


@pytest.mark.parametrize("family", quick(["mot", "mixdiff"], FAMILIES))
def test_an_average_is_resumed_bit_for_bit(family, tmp_path):
    common = ("--metrics.no_enable_tensorboard", "--validation.no_enable", "--ema.decay=0.5",
              "--checkpoint.interval=2", "--lr_scheduler.total_steps=4",
              "--lr_scheduler.warmup_steps=1")  # fmt: skip
    once, twice = f"--job.dump_folder={tmp_path}/once", f"--job.dump_folder={tmp_path}/twice"
    (whole,) = run_ranks(train, 1, family, *common, once, "--training.steps=4", init=False)
    (_,) = run_ranks(train, 1, family, *common, twice, "--training.steps=2", init=False)
    (second,) = run_ranks(train, 1, family, *common, twice, "--training.steps=4", init=False)
    assert second["averages"] == whole["averages"] != whole["weights"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_kept_its_weights_alone_is_not_gone_on_with(family, tmp_path):
    common = ("--metrics.no_enable_tensorboard", "--validation.no_enable", "--ema.decay=0",
              "--checkpoint.interval=1", "--checkpoint.last_save_model_only",
              "--lr_scheduler.warmup_steps=1", f"--job.dump_folder={tmp_path}")  # fmt: skip
    run_ranks(train, 1, family, *common, "--training.steps=2", init=False)
    whole, last = (checkpoint_config.read(tmp_path / f"checkpoint/step-{n}") for n in (1, 2))
    assert (whole["weights_only"], last["weights_only"]) == (False, True)
    job = debug_job(family, *common, "--training.steps=4")
    with pytest.raises(ValueError, match="step-2 has nothing but weights"):
        check_job(job)
    job.checkpoint.load_step = 1
    check_job(job)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(family, tmp_path):
    common = ("--metrics.no_enable_tensorboard", "--validation.no_enable",
              "--checkpoint.interval=2", "--lr_scheduler.total_steps=4",
              "--lr_scheduler.warmup_steps=1")  # fmt: skip
    once, twice = f"--job.dump_folder={tmp_path}/once", f"--job.dump_folder={tmp_path}/twice"
    (whole,) = run_ranks(train, 1, family, *common, once, "--training.steps=4", init=False)
    (first,) = run_ranks(train, 1, family, *common, twice, "--training.steps=2", init=False)
    (second,) = run_ranks(train, 1, family, *common, twice, "--training.steps=4", init=False)
    assert list(second["loss"]) == [3, 4]
    assert {**first["loss"], **second["loss"]} == whole["loss"]
    assert second["weights"] == whole["weights"]


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulating_gradients_equals_one_large_batch(family, tmp_path):
    def run(folder, local):
        (records,) = run_ranks(
            train, 1, family, *QUICK, f"--job.dump_folder={tmp_path}/{folder}",
            "--training.steps=3", f"--training.local_batch_size={local}",
            "--training.global_batch_size=4", "--lr_scheduler.warmup_steps=1",
            *EVEN_LOSS[family], init=False,
        )  # fmt: skip
        return records

    large, small = run("large", 4), run("small", 1)
    for step in (1, 2, 3):
        assert small["loss"][step] == pytest.approx(large["loss"][step], rel=2e-5)
        assert small["grad_norm"][step] == pytest.approx(large["grad_norm"][step], rel=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_validation_reports_every_split_and_leaves_training_as_it_was(family, tmp_path):
    base = ("--metrics.no_enable_tensorboard", "--checkpoint.no_enable", "--training.steps=3",
            "--lr_scheduler.warmup_steps=1", "--validation.freq=1", "--validation.steps=2",
            "--validation.local_batch_size=1")  # fmt: skip
    (with_it,) = run_ranks(train, 1, family, *base, f"--job.dump_folder={tmp_path}/a", init=False)
    (without,) = run_ranks(
        train, 1, family, *base, "--validation.no_enable", f"--job.dump_folder={tmp_path}/b",
        init=False,
    )  # fmt: skip
    assert with_it["loss"] == without["loss"]
    assert with_it["weights"] == without["weights"]
    splits = debug_job(family).multimodal.validation_splits
    assert set(with_it["validation"]) == {(s, split) for s in (1, 2, 3) for split in splits}
    assert all(math.isfinite(loss) for loss in with_it["validation"].values())


def run_until_divergence(family, *overrides):
    with pytest.raises(ValueError) as error:
        train(family, *overrides)
    return str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_diverges_stops_and_keeps_its_sound_checkpoint(family, tmp_path):
    base = ("--metrics.no_enable_tensorboard", "--validation.no_enable", "--ema.decay=0",
            "--training.steps=9", "--checkpoint.interval=1", "--lr_scheduler.warmup_steps=1",
            f"--job.dump_folder={tmp_path}", "--optimizer.lr=1e38")  # fmt: skip
    # What is logged tells; where nothing is, the weights do before they are saved.
    for frequency, expected in ((1, "diverged"), (100, "weights are not finite")):
        (message,) = run_ranks(
            run_until_divergence, 1, family, *base, f"--metrics.log_freq={frequency}", init=False
        )
        assert expected in message and "smaller optimizer.lr" in message
    for step in tmp_path.glob("checkpoint/step-*"):
        assert checkpoint_config.read(step)["weights_only"] is False


@pytest.mark.parametrize("option", quick(["op"], ["full", "selective", "op"]))
def test_activation_checkpointing_changes_nothing(option, tmp_path):
    mode = {"full": ["--activation_checkpoint.mode=full"],
            "selective": ["--activation_checkpoint.mode=selective"],
            "op": ["--activation_checkpoint.mode=selective",
                   "--activation_checkpoint.selective_ac_option=op"]}  # fmt: skip
    for family in FAMILIES:
        args = (*QUICK, "--training.steps=2", "--lr_scheduler.warmup_steps=1")
        (plain,) = run_ranks(
            train, 1, family, *args, f"--job.dump_folder={tmp_path}/plain", init=False
        )
        (saved,) = run_ranks(
            train, 1, family, *args, *mode[option], f"--job.dump_folder={tmp_path}/ac", init=False
        )
        assert saved["loss"] == plain["loss"]
        assert saved["weights"] == plain["weights"]


def test_threads_of_a_rank_are_limited():
    assert run_ranks(torch.get_num_threads, 1, init=False) == [1]


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_train_as_eager_ones(family, tmp_path):
    args = (*QUICK, "--training.steps=3", "--lr_scheduler.warmup_steps=1")
    (eager,) = run_ranks(train, 1, family, *args, f"--job.dump_folder={tmp_path}/eager", init=False)
    (compiled,) = run_ranks(
        train, 1, family, *args, f"--job.dump_folder={tmp_path}/compiled",
        "--compile.enable", "--compile.backend=aot_eager", init=False,
    )  # fmt: skip
    for step in (1, 2, 3):
        assert compiled["loss"][step] == pytest.approx(eager["loss"][step], rel=1e-5)
        assert compiled["grad_norm"][step] == pytest.approx(eager["grad_norm"][step], rel=1e-3)


@pytest.mark.parametrize("family", quick(["mot", "mixdiff"], FAMILIES))
def test_bfloat16_trains(family, tmp_path):
    for world in (1, 2):  # autocast on one process, FSDP's own casts on two
        records = run_ranks(
            train, world, family, *QUICK, f"--job.dump_folder={tmp_path}/{world}",
            "--training.steps=8", "--training.mixed_precision_param=bfloat16",
            "--lr_scheduler.warmup_steps=1", *TO_LEARN.get(family, ()), init=False, timeout=240,
        )  # fmt: skip
        losses = records[0]["loss"]
        assert losses[8] < losses[1] - LOWER[family][1]
