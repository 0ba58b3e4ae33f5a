"""`scripts/benchmark.py parallel` measures every layout, and its byte counts are the arithmetic."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.jobs import ROOT
from torchtitan_mixtures.planning.collectives import UnknownCollectiveError
from torchtitan_mixtures.planning.world import fake_world

pytestmark = pytest.mark.distributed

FAMILIES = ("mot", "llama3")
SIZES = {"dim": 64, "heads": 4, "layers": 4, "batch": 4, "seq": 128}
FFN = 256  # 2/3 of 4 x 64, rounded up to a multiple of 256
TOKENS = SIZES["batch"] * SIZES["seq"]
FLOAT = 4  # bytes


@pytest.fixture(scope="module")
def scripts():
    """The scripts, which import each other as files of a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        names = ("benchmark", "benchmark_layouts", "benchmark_parallel", "benchmark_ranks")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def quick(scripts, tmp_path_factory):
    """What `parallel --quick` prints, the records of its tables by layout, and by model."""
    file = tmp_path_factory.mktemp("benchmark") / "numbers.json"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        scripts.benchmark.main(["parallel", "--quick", "--json", str(file)])
    content = json.loads(file.read_text())
    timed, counted = [table["rows"] for table in content["tables"]]
    return SimpleNamespace(
        printed=printed.getvalue(),
        machine=content["machine"],
        timed={record["layout"]: record for record in timed},
        counted={(record["layout"], record["model"]): record for record in counted},
    )


def block_bytes(family: str) -> int:
    """Bytes of a block's parameters; a MoT has them twice."""
    dim = SIZES["dim"]
    parameters = 4 * dim**2 + 3 * dim * FFN + 2 * dim
    return parameters * FLOAT * (2 if family == "mot" else 1)


def of_a_block(quick, layout: str, family: str) -> tuple[dict[str, float], dict[str, float]]:
    """Collectives and bytes of a block, which are the same on both ranks."""
    first, second = quick.counted[layout, family]["ranks"]
    assert first["block"] == second["block"]
    return first["block"]["calls"], first["block"]["bytes"]


@pytest.mark.slow
def test_every_layout_is_in_both_tables(scripts, quick):
    layouts = list(scripts.benchmark_layouts.LAYOUTS)
    assert list(quick.timed) == layouts
    assert list(quick.counted) == [(name, family) for name in layouts for family in FAMILIES]
    assert vars(scripts.benchmark_layouts.QUICK) == SIZES
    assert quick.machine["measured on"] == "CPU only"
    assert all(f"| {name} |" in quick.printed for name in layouts)
    assert quick.printed.count("CPU only, gloo") == 2


@pytest.mark.slow
def test_ratios_are_of_steps_in_the_same_processes(quick):
    for name, record in quick.timed.items():
        ratios = set(record["ratios"])
        expected = {"mot again / mot"}
        expected |= set() if name == "1 process" else {"mot / mot alone"}
        if record["llama3_error"] is None:
            expected.add("mot / llama3")
            expected |= set() if name == "1 process" else {"llama3 / llama3 alone"}
        assert ratios == expected
        assert all(low <= median <= high for low, median, high in record["ratios"].values())


@pytest.mark.slow
def test_what_llama3_cannot_do_is_said(quick):
    failed = {name for name, record in quick.timed.items() if record["llama3_error"]}
    assert failed == {"CP2"}
    error = quick.timed["CP2"]["llama3_error"]
    assert "flash_attention_for_cpu" in error
    assert quick.counted["CP2", "llama3"]["error"] == error
    assert quick.printed.count(error) == 2


@pytest.mark.slow
def test_gradients_are_those_of_one_process_but_for_what_the_notes_say(quick):
    for (layout, family), record in quick.counted.items():
        if "error" in record:
            continue
        expected = 1.0
        if family == "llama3" and layout == "DDP2":
            expected = 0.5
        if family == "llama3" and layout.startswith("PP2"):
            expected = TOKENS
        assert record["gradient"] == pytest.approx(expected, rel=1e-4), (layout, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_fsdp_gathers_a_block_twice_and_reduces_it_once(quick, family):
    calls, moved = of_a_block(quick, "FSDP2", family)
    assert calls == {"all-gather": 2, "reduce-scatter": 1}
    half = block_bytes(family) / 2
    assert moved == {"all-gather": 2 * half, "reduce-scatter": half}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ddp_reduces_a_block_in_a_bucket_with_others(quick, family):
    calls, moved = of_a_block(quick, "DDP2", family)
    assert calls == {}
    assert moved == {"all-reduce": block_bytes(family)}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_tp_gathers_and_scatters_rows_around_both_sub_layers(quick, family):
    calls, moved = of_a_block(quick, "TP2", family)
    assert calls == {"all-gather": 4, "reduce-scatter": 4}
    rows = TOKENS + (8 if family == "mot" else 0)  # padding between two towers
    half = rows * SIZES["dim"] * FLOAT / 2
    assert moved == {"all-gather": 4 * half, "reduce-scatter": 4 * half}


@pytest.mark.slow
def test_cp_exchanges_queries_keys_values_and_output(quick):
    calls, moved = of_a_block(quick, "CP2", "mot")
    sharded = of_a_block(quick, "FSDP2", "mot")
    assert calls == {"all-to-all": 4} | sharded[0]
    share = TOKENS / 2 * SIZES["dim"] * FLOAT  # of one of the four
    assert moved == {"all-to-all": 2 * (3 + 1) * share / 2} | sharded[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("schedule", "stages"), [("1F1B", 2), ("InterleavedZeroBubble", 4)])
def test_pipelines_send_activations_and_gradients_between_stages(quick, family, schedule, stages):
    calls, moved = of_a_block(quick, f"PP2 {schedule}", family)
    assert calls == moved == {}
    ranks = quick.counted[f"PP2 {schedule}", family]["ranks"]
    microbatches = SIZES["batch"]
    assert sum(rank["step"]["calls"]["send"] for rank in ranks) == 2 * microbatches * (stages - 1)
    whole = TOKENS * SIZES["dim"] * FLOAT
    assert sum(rank["step"]["bytes"]["send"] for rank in ranks) == 2 * whole * (stages - 1)


def refuse_sum_reduction() -> None:
    """A step of llama3 under FSDP without the adaptation."""
    from benchmark_layouts import LAYOUTS, QUICK, Step  # pyrefly: ignore [missing-import]
    from torch.distributed.fsdp import FSDPModule

    FSDPModule.set_force_sum_reduction_for_comms = lambda self, enable: None
    Step("llama3", QUICK, LAYOUTS["FSDP2"])()


def test_llama3_needs_the_adaptation_for_gloo(scripts):
    message = r"Cannot use ReduceOp.PREMUL_SUM with Gloo"
    with pytest.raises(RuntimeError, match=message):
        scripts.benchmark_ranks.run_layout(refuse_sum_reduction, 2)
    assert message.replace("\\", "") in scripts.benchmark_parallel.ADAPTED


def fail() -> None:
    raise ValueError("first line\nsecond line")


def test_a_layout_that_fails_gives_the_first_line_of_its_error(scripts):
    with pytest.raises(RuntimeError) as caught:
        scripts.benchmark_ranks.run_layout(fail, 2)
    assert str(caught.value) == "ValueError: first line"


def test_an_unknown_collective_stops_the_count(scripts):
    counted = scripts.benchmark_ranks.Traffic()
    with fake_world(2, 0), counted, pytest.raises(UnknownCollectiveError, match="scatter_"):
        dist.scatter(torch.ones(2), [torch.ones(2), torch.ones(2)])


def test_accelerators_are_refused(scripts):
    with pytest.raises(SystemExit, match="CUDA_VISIBLE_DEVICES"):
        scripts.benchmark_parallel.require_cpu(torch.device("cuda"))
