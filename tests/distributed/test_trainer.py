"""The trainer under parallel layouts takes the steps of one process and reports its numbers."""

from __future__ import annotations

import json

import pytest

from tests.gang import run_ranks
from tests.rows import quick
from tests.runs import QUICK, train
from torchtitan_mixtures.models import FAMILIES

pytestmark = pytest.mark.distributed

TWO_RANKS = {
    "FSDP2": [],
    "DDP": ["--parallelism.data_parallel_replicate_degree=2",
            "--parallelism.data_parallel_shard_degree=1"],
    "FSDP2_compiled": ["--compile.enable", "--compile.backend=aot_eager"],
    "FSDP2_full_ac": ["--activation_checkpoint.mode=full"],
    "FSDP2_never_reshard": ["--parallelism.fsdp_reshard_after_forward=never"],
    "FSDP2_cpu_offload": ["--training.enable_cpu_offload"],
}  # fmt: skip


# Four microbatches of one sequence on each rank are to equal one of four.
BASE = (*QUICK, "--training.steps=3", "--training.global_batch_size=8",
        "--lr_scheduler.warmup_steps=1")  # fmt: skip


# What a router balances is the load of a microbatch.
FURTHER = {"mom": ["--objective.balance_weight=0"]}


def run(family, folder, local, *options):
    records = run_ranks(
        train, 2, family, *BASE, *FURTHER.get(family, ()),
        f"--training.local_batch_size={local}", *options, f"--job.dump_folder={folder}",
        init=False, timeout=200,
    )  # fmt: skip
    assert records[0]["loss"] == records[1]["loss"]
    assert records[0]["weights"] == records[1]["weights"]
    return records[0]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return {f: run(f, tmp_path_factory.mktemp(f), 4) for f in FAMILIES}


# What a layout does beside sharding is the same for all families.
ACCUMULATED = [(layout, family) for layout in TWO_RANKS for family in FAMILIES]
QUICK_ACCUMULATED = [
    *((layout, "mot") for layout in TWO_RANKS if layout != "FSDP2_never_reshard"),
    *((layout, family) for layout in ("FSDP2", "DDP") for family in FAMILIES if family != "mot"),
    ("FSDP2_compiled", "mom"),
    ("FSDP2_cpu_offload", "mixdiff"),
    ("FSDP2_never_reshard", "mmdit"),
]


@pytest.mark.parametrize(("layout", "family"), quick(QUICK_ACCUMULATED, ACCUMULATED))
def test_every_layout_takes_the_same_steps_with_accumulation(family, layout, expected, tmp_path):
    found = run(family, tmp_path, 1, *TWO_RANKS[layout])
    for step, loss in expected[family]["loss"].items():
        assert found["loss"][step] == pytest.approx(loss, rel=2e-5)
        grad_norm = expected[family]["grad_norm"][step]
        assert found["grad_norm"][step] == pytest.approx(grad_norm, rel=2e-3)


STEPS = (
    "--metrics.no_enable_tensorboard", "--checkpoint.no_enable", "--training.steps=2",
    "--training.seq_len=128", "--training.global_batch_size=4", "--lr_scheduler.warmup_steps=1",
    "--validation.enable", "--validation.freq=1", "--validation.steps=1",
    "--validation.seq_len=96",
    "--multimodal.image_weight=0.5",
)  # fmt: skip
COMPILED = ("--compile.enable", "--compile.backend=aot_eager")
TP2 = "--parallelism.tensor_parallel_degree=2"
CP2 = "--parallelism.context_parallel_degree=2"
PP2 = "--parallelism.pipeline_parallel_degree=2"
SCHEDULE = "--parallelism.pipeline_parallel_schedule"

# Number of processes, sequences of a data-parallel rank, options.
LAYOUTS = {
    "FSDP2": (2, 2, ()),
    "TP2, without loss parallelism": (2, 4, (TP2, "--parallelism.disable_loss_parallel")),
    "TP2, compiled": (2, 4, (TP2, *COMPILED)),
    "CP2, accumulation, full AC": (2, 2, (CP2, "--activation_checkpoint.mode=full")),
    "CP2, compiled, selective AC": (2, 4, (CP2, *COMPILED,
        "--activation_checkpoint.mode=selective",
        "--activation_checkpoint.selective_ac_option=op")),
    "PP2, accumulation, full AC": (2, 2, (PP2, "--activation_checkpoint.mode=full")),
    "PP2, compiled": (2, 4, (PP2, *COMPILED)),
    "PP2, InterleavedZeroBubble, full AC": (2, 4, (PP2, f"{SCHEDULE}=InterleavedZeroBubble",
        "--activation_checkpoint.mode=full")),
    "PP2, ZBVZeroBubble, masks": (2, 4, (PP2, f"{SCHEDULE}=ZBVZeroBubble",
        "--model.flavor=debugmodel_flex_attn")),
    "CP2xPP2, masks": (4, 4, (CP2, PP2, "--model.flavor=debugmodel_flex_attn")),
    "FSDP2xPP2, never resharded, CPU offload": (4, 2, (PP2, "--training.enable_cpu_offload",
        "--parallelism.fsdp_reshard_after_forward=never")),
    "FSDP2xPP2, accumulation": (4, 1, (PP2, f"{SCHEDULE}=GPipe")),
    "TP2xPP2, compiled": (4, 4, (TP2, PP2, *COMPILED)),
}  # fmt: skip


def record(folder, world, local, *options):
    # Validation takes a number of batches from every data-parallel rank.
    data_ranks = world // 2 ** sum("_degree=2" in option for option in options)
    records = run_ranks(
        train, world, "mot", *STEPS, f"--training.local_batch_size={local}",
        f"--validation.local_batch_size={4 // data_ranks}", *options,
        f"--job.dump_folder={folder}", init=False, timeout=240,
    )  # fmt: skip
    numbers = [
        {(step, name): value for step, scalars in r["scalars"].items()
         for name, value in scalars.items() if is_reproducible(name)} | r["validation"]
        for r in records
    ]  # fmt: skip
    assert numbers.count(numbers[0]) == world, "ranks report different numbers"
    return numbers[0]


def is_reproducible(name):
    return not name.startswith(("throughput", "tflops", "time_metrics", "memory", "mfu"))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    found = {}

    def get(*flavor):
        if flavor not in found:
            found[flavor] = record(tmp_path_factory.mktemp("one"), 1, 4, *flavor)
        return found[flavor]

    return get


# Compiled blocks with TP and PP are among those with both at once.
SLOW = (
    *("TP2, compiled", "PP2, compiled"),
    # Accumulation and recomputation are among others of these layouts.
    *("PP2, accumulation, full AC", "CP2, accumulation, full AC", "FSDP2xPP2, accumulation"),
)


@pytest.mark.parametrize("layout", [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS
])  # fmt: skip
def test_a_layout_reports_the_numbers_of_one_process(layout, one_process, tmp_path):
    world, local, options = LAYOUTS[layout]
    expected = one_process(*(o for o in options if o.startswith("--model.flavor")))
    found = record(tmp_path, world, local, *options)
    assert found.keys() == expected.keys()
    assert {(2, "grad_norm/image"), (2, "modality/image/loss"), (2, "n_tokens_seen"),
            (2, "unseen_concept")} <= set(found)  # fmt: skip
    for key, value in expected.items():
        if key[1] == "loss_metrics/global_max_loss" and "FSDP2" in layout:
            assert found[key] > value  # the other rank's is below the average
        else:
            assert found[key] == pytest.approx(value, rel=1e-3), key


BFLOAT16 = "--training.mixed_precision_param=bfloat16"


@pytest.mark.parametrize(
    ("world", "local", "options"),
    [
        (4, 2, (TP2,)),
        pytest.param(4, 2, (PP2,), marks=pytest.mark.slow),
        pytest.param(2, 4, (CP2, *COMPILED), marks=pytest.mark.slow),
    ],
    ids=["FSDP2xTP2", "FSDP2xPP2", "CP2, compiled"],
)
def test_mixed_precision_reports_nearly_the_same(world, local, options, one_process, tmp_path):
    expected = one_process()
    found = record(tmp_path, world, local, BFLOAT16, *options)
    loss = (2, "loss_metrics/global_avg_loss")
    for key in (loss, (2, "modality/image/loss"), (2, "unseen_concept")):
        assert found[key] == pytest.approx(expected[key], rel=2e-2), key
    assert abs(found[loss] / expected[loss] - 1) > 1e-5, "computed in float32"


def test_steps_without_anything_to_predict_have_no_loss_and_no_gradient(tmp_path):
    """Texts alone, with text that counts nothing: 0 instead of 0 / 0, on both ranks."""
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"text {n}"}) for n in range(50)))
    sources = [{"name": "texts", "kind": "jsonl", "path": str(data)}]
    records = run_ranks(
        train, 2, "mot", *BASE, "--training.local_batch_size=2", "--multimodal.source=mixture",
        f"--multimodal.sources={json.dumps(sources)}", "--multimodal.text_weight=0",
        "--validation.no-enable", f"--job.dump_folder={tmp_path / 'run'}", init=False, timeout=200,
    )  # fmt: skip
    for record in records:
        assert list(record["loss"].values()) == [0.0] * 3
        assert list(record["grad_norm"].values()) == [0.0] * 3
