"""What training must do in every family, in one process and on two."""

from __future__ import annotations

import math

import pytest
import torch

from tests.gang import run_ranks
from tests.jobs import debug_job
from torchtitan_mixtures.models import FAMILIES


def train(family: str, *overrides: str) -> dict:
    """Run the trainer; return losses by step, gradient norms, and the final weights' checksum."""
    from torchtitan_mixtures.trainer import MixtureTrainer

    job = debug_job(family, *overrides)
    trainer = MixtureTrainer(job)
    records: dict = {"loss": {}, "grad_norm": {}, "validation": {}}
    processor = trainer.metrics_processor

    def log(step, loss, max_loss, grad_norm, extra_metrics=None, *, original=processor.log):
        records["loss"][step] = loss
        records["grad_norm"][step] = grad_norm
        original(step, loss, max_loss, grad_norm, extra_metrics)

    processor.log = log
    if job.validation.enable:
        original = processor.log_validation

        def log_validation(loss, step, **rest):
            records["validation"][step, rest["split"]] = loss
            original(loss, step, **rest)

        processor.log_validation = log_validation
    trainer.train()
    records["weights"] = {}
    for name, p in trainer.model_parts[0].named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        records["weights"][name] = whole.detach().double().sum().item()
    trainer.close()
    return records


QUICK = (
    "--metrics.no_enable_tensorboard",
    "--checkpoint.no_enable",
    "--validation.no_enable",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_forty_steps_lower_the_loss(family, tmp_path):
    (records,) = run_ranks(
        train, 1, family, *QUICK, f"--job.dump_folder={tmp_path}", "--training.steps=40",
        "--lr_scheduler.warmup_steps=5", timeout=200, init=False,
    )  # fmt: skip
    losses = records["loss"]
    assert all(math.isfinite(loss) for loss in losses.values())
    assert losses[40] < losses[1] - 1.5


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
            "--training.global_batch_size=4", "--lr_scheduler.warmup_steps=1", init=False,
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


@pytest.mark.parametrize("option", ["full", "selective", "op"])
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


TWO_RANKS = {
    "FSDP2": [],
    "DDP": ["--parallelism.data_parallel_replicate_degree=2",
            "--parallelism.data_parallel_shard_degree=1"],
    "FSDP2_compiled": ["--compile.enable", "--compile.backend=aot_eager"],
    "FSDP2_full_ac": ["--activation_checkpoint.mode=full"],
    "FSDP2_never_reshard": ["--parallelism.fsdp_reshard_after_forward=never"],
    "FSDP2_cpu_offload": ["--training.enable_cpu_offload"],
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", TWO_RANKS)
def test_two_ranks_take_the_same_steps_with_and_without_accumulation(family, layout, tmp_path):
    # Two ranks read other documents than one, so runs of two are compared: four microbatches of
    # one sequence against two of two.
    base = (*QUICK, "--training.steps=3", "--training.global_batch_size=8",
            "--lr_scheduler.warmup_steps=1")  # fmt: skip

    def run(name, local, *options):
        records = run_ranks(
            train, 2, family, *base, f"--training.local_batch_size={local}", *options,
            f"--job.dump_folder={tmp_path}/{name}", init=False, timeout=200,
        )  # fmt: skip
        assert records[0]["loss"] == records[1]["loss"]
        assert records[0]["weights"] == records[1]["weights"]
        return records[0]

    expected = run("plain", 4)
    found = run("layout", 1, *TWO_RANKS[layout])
    for step in (1, 2, 3):
        assert found["loss"][step] == pytest.approx(expected["loss"][step], rel=2e-5)
        assert found["grad_norm"][step] == pytest.approx(expected["grad_norm"][step], rel=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_trains(family, tmp_path):
    for world in (1, 2):  # autocast on one process, FSDP's own casts on two
        records = run_ranks(
            train, world, family, *QUICK, f"--job.dump_folder={tmp_path}/{world}",
            "--training.steps=8", "--training.mixed_precision_param=bfloat16",
            "--lr_scheduler.warmup_steps=1", init=False,
        )  # fmt: skip
        losses = records[0]["loss"]
        assert losses[8] < losses[1] - 0.3
