"""Samples while a run goes on: the same in every layout, and none of the run's business."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.gang import run_ranks
from tests.runs import train

pytestmark = pytest.mark.distributed

# A rate so small that rounding, which differs between layouts, stays below any choice of a token.
BASE = (
    "--checkpoint.no_enable", "--validation.no_enable", "--training.steps=2",
    "--training.seq_len=128", "--training.global_batch_size=4", "--optimizer.lr=1e-6",
    "--lr_scheduler.warmup_steps=1",
)  # fmt: skip
# Texts, because an image takes 66 passes; to the model a code is a token like any other.
SAMPLING = (
    "--sampling.interval=1", "--sampling.prompts=a red fox,two dogs", "--sampling.into", "text",
    "--sampling.max_text_tokens=9",
)  # fmt: skip
LAYOUTS = {
    "FSDP2, compiled, full AC": (2, 2, (
        "--compile.enable", "--compile.backend=aot_eager", "--activation_checkpoint.mode=full")),
    "DDP2": (2, 2, ("--parallelism.data_parallel_replicate_degree=2",
                    "--parallelism.data_parallel_shard_degree=1")),
    "TP2": (2, 4, ("--parallelism.tensor_parallel_degree=2",)),
}  # fmt: skip


def run(folder, world, local, *options):
    records = run_ranks(
        train, world, "mot", *BASE, f"--training.local_batch_size={local}", *options,
        f"--job.dump_folder={folder}", init=False, timeout=200,
    )  # fmt: skip
    return records[0]


def logged(folder):
    """The texts of both steps, from the one rank that writes."""
    (file,) = folder.glob("tb/*/events.out.tfevents*")
    events = EventAccumulator(str(file), size_guidance={"tensors": 0})
    events.Reload()
    entries = events.Tensors("samples/texts/text_summary")
    assert [entry.step for entry in entries] == [1, 2]
    return [entry.tensor_proto.string_val[0].decode() for entry in entries]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run(folder, 1, 4, *SAMPLING)
    return logged(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_are_those_of_one_process(layout, one_process, tmp_path):
    world, local, options = LAYOUTS[layout]
    run(tmp_path, world, local, *options, *SAMPLING)
    texts = logged(tmp_path)
    assert texts == one_process
    assert texts[0].count("'a red fox' -> ") == texts[0].count("'two dogs' -> ") == 2


def test_training_does_not_notice(tmp_path):
    options = ("--training.mixed_precision_param=bfloat16", "--optimizer.lr=1e-3")
    with_them = run(tmp_path / "a", 2, 2, *options, *SAMPLING)
    without = run(tmp_path / "b", 2, 2, *options)
    for key in ("loss", "grad_norm", "weights"):
        assert with_them[key] == without[key]
    assert len(logged(tmp_path / "a")) == 2
