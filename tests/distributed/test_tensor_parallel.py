"""Tensor and sequence parallelism: collectives, and the trainer on its layouts."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from tests.distributed.collectives import count
from tests.distributed.parity import (
    LAYOUTS,
    ROWS,
    SEQ,
    Run,
    errors_of_a_step,
    make_args,
    make_batch,
    make_job,
    make_runs,
    use_float64,
)
from tests.gang import run_ranks
from tests.jobs import TRAIN_CONFIGS, load_job
from tests.runs import run_to_the_end
from torchtitan_mixtures.models.common.rope import rotation_at
from torchtitan_mixtures.trainer import MixtureTrainer

pytestmark = pytest.mark.distributed


def test_without_loss_parallel_nothing_else_changes():
    for errors in run_ranks(compare_without_loss_parallel, 2):
        assert max(errors.values()) < 1e-10, errors


def compare_without_loss_parallel():
    use_float64()
    dims = LAYOUTS["TP2"].dims()
    errors = {}
    for variant in ("2 modalities", "dense"):
        args, run, single = make_runs("TP2", variant, dims, disable_loss_parallel=True)
        batch = make_batch(args, "mixed")
        pred = run.parts[0](batch[0]["input"], batch[0]["modality_masks"])
        assert not isinstance(pred, DTensor)
        errors |= errors_of_a_step(run, single, batch, dims)
    return errors


def count_collectives(variant):
    """All-gathers, reduce-scatters and all else of each part, forward and backward."""
    args, run, _ = make_runs("TP2", variant, LAYOUTS["TP2"].dims())
    torch.set_default_dtype(torch.float32)
    model = run.parts[0]
    batch, labels = make_batch(args, "mixed")
    plan = model._plan(batch["input"], batch["modality_masks"])
    rotation = rotation_at(model.rope_table, SEQ, None)
    shape = (ROWS, SEQ // 2, args.dim) if plan is None else (sum(plan.sizes) // 2, args.dim)
    block, x = model.layers["0"], torch.randn(*shape, requires_grad=True)
    counts = {}
    for name, part, arguments in (
        ("attention", block.attention, (x, rotation, None, plan)),
        ("feed_forward", block.feed_forward, (x, plan)),
        ("block", block, (x, rotation, None, plan)),
    ):
        output, forward = count(lambda part=part, arguments=arguments: part(*arguments))
        _, backward = count(lambda output=output: output.sum().backward())
        counts[name] = (by_kind(forward), by_kind(backward))
    with loss_parallel():
        inputs = {name: tensor for name, tensor in batch.items() if name != "loss_weights"}
        inputs["tokens"] = inputs.pop("input")
        loss, forward = count(lambda: run.loss_fn(model(**inputs), labels))
        _, backward = count(loss.backward)
    counts["model"] = (by_kind(forward), by_kind(backward))
    return counts


def by_kind(counts):
    gathers, scatters = counts["all_gather_into_tensor"], counts["reduce_scatter_tensor"]
    return gathers, scatters, counts.total() - gathers - scatters


@pytest.mark.parametrize("variant", ["3 modalities", "dense", "grouped"])
def test_a_sub_layer_takes_one_all_gather_and_one_reduce_scatter(variant):
    for counts in run_ranks(count_collectives, 2, variant):
        assert counts["attention"] == counts["feed_forward"] == ((1, 1, 0), (1, 1, 0))
        assert counts["block"] == ((2, 2, 0), (2, 2, 0))
        # Two blocks, the embedding's reduce-scatter, the all-gather before the head, and three
        # reductions over the vocabulary, of one number a position.
        assert counts["model"] == ((5, 5, 3), (5, 5, 0))


def record(config, *overrides):
    """Train; return every scalar of every step that does not depend on the machine's speed."""
    job = load_job(TRAIN_CONFIGS / "mot" / config, *overrides)
    trainer = MixtureTrainer(job)
    scalars = {}

    def log(values, step):
        for name, value in values.items():
            if not name.startswith(("throughput", "tflops", "time_metrics", "memory", "mfu")):
                scalars[step, name] = value

    trainer.metrics_processor.logger.log = log
    run_to_the_end(trainer)
    trainer.close()
    return scalars


def count_graphs():
    """Graphs after each of six steps with other shares of the modalities."""
    use_float64()
    dims = LAYOUTS["TP2"].dims()
    job = make_job(LAYOUTS["TP2"], "debugmodel_3modality")
    job.compile.enable, job.compile.backend = True, "aot_eager"
    args = make_args(job, "3 modalities")
    run = Run(LAYOUTS["TP2"], job, args, dims)
    graphs = []
    for seed in range(6):
        batch, labels = make_batch(args, "mixed")
        draws = torch.rand(*labels.shape, generator=torch.Generator().manual_seed(seed))
        limits = torch.tensor([0, seed / 10, seed / 6])
        which = (draws[..., None] >= limits).sum(-1) - 1
        batch["modality_masks"] = which[:, None] == torch.arange(3)[:, None]
        run.backward((batch, labels))
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


@pytest.mark.slow
def test_blocks_are_compiled_three_times_whatever_the_mix():
    # For one mix, for one in which a second size changes, then for all.
    for graphs in run_ranks(count_graphs, 2, timeout=280):
        assert graphs[-1] == graphs[2] <= 3, graphs


SHORT = (
    "--training.seq_len=128", "--metrics.no_enable_tensorboard", "--metrics.log_freq=1",
    "--checkpoint.no_enable", "--lr_scheduler.warmup_steps=1",
)  # fmt: skip


@pytest.mark.parametrize(
    "config",
    ["8B_2modality.toml", pytest.param("70B_2modality.toml", marks=pytest.mark.slow)],
)
def test_the_layouts_of_the_large_configurations_work(config, tmp_path):
    options = (
        *SHORT, "--model.flavor=debugmodel", "--training.seq_len=272", "--training.steps=2",
        "--training.mixed_precision_param=float32", "--debug.seed=3",
    )  # fmt: skip
    (expected,) = run_ranks(
        record, 1, config, *options, f"--job.dump_folder={tmp_path}/1",
        "--parallelism.tensor_parallel_degree=1", "--compile.no_enable", init=False,
    )  # fmt: skip
    records = run_ranks(
        record, 4, config, *options, f"--job.dump_folder={tmp_path}/4",
        "--parallelism.tensor_parallel_degree=4", "--compile.backend=aot_eager", init=False,
    )  # fmt: skip
    assert records.count(records[0]) == 4
    assert records[0] == pytest.approx(expected, rel=1e-3)
