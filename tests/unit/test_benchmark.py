from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.jobs import ROOT
from torchtitan_mixtures import benchmark as measure

CPU = torch.device("cpu")


@pytest.fixture
def scripts(monkeypatch) -> tuple[ModuleType, ModuleType]:
    """`scripts/benchmark.py` and its rows of mot, which import each other as files of a folder."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("benchmark"), importlib.import_module("benchmark_mot")


def test_all_variants_run_once_per_round_in_changing_order():
    calls: list[str] = []
    names = ["a", "b", "c"]
    runs = {name: lambda name=name: calls.append(name) for name in names}
    seconds = measure.time_interleaved(runs, rounds=8, warmup=2)
    rounds = [tuple(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert len(rounds) == 10
    assert all(sorted(order) == names for order in rounds)
    assert len(set(rounds)) > 1
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(names, 8)


def test_warmup_is_not_counted():
    clock = count()
    seconds = measure.time_interleaved(
        {"a": lambda: None}, rounds=3, warmup=2, timer=lambda run: next(clock)
    )
    assert seconds == {"a": [2, 3, 4]}


def test_a_time_limit_leaves_three_rounds():
    run = {"a": lambda: None}
    seconds = measure.time_interleaved(run, rounds=9, limit=2.5, timer=lambda run: 1.0)
    assert len(seconds["a"]) == 3
    seconds = measure.time_interleaved(run, rounds=9, limit=6.5, timer=lambda run: 1.0)
    assert len(seconds["a"]) == 6


def test_ratios_are_formed_within_rounds():
    # A machine that becomes ten times slower must not change what is twice as slow as what.
    seconds = {"base": [1.0, 10.0, 1.0, 10.0, 1.0], "slow": [2.0, 20.0, 2.0, 21.0, 2.0]}
    spread = measure.ratio(seconds, "slow", "base")
    assert (spread.low, spread.median, spread.high) == (2.0, 2.0, 2.0)
    assert measure.ratio(seconds, "base", "base") == measure.Spread(1.0, 1.0, 1.0)


def test_spread_has_median_and_quartiles():
    assert measure.Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == measure.Spread(3.0, 2.0, 4.0)
    assert measure.Spread.of([7.0]) == measure.Spread(7.0, 7.0, 7.0)


def test_cpu_timer_measures_what_the_clock_says(monkeypatch):
    clock = iter([1.0, 3.5])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    assert measure.time_on_cpu(lambda: None) == 2.5


X = torch.arange(4.0)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: X * 2 + X.sum(), 0),
        (lambda: X.tolist(), 1),
        (lambda: X.to("cpu"), 1),
        (lambda: X[0].item(), 1),
        (lambda: bool((X > 1).any()), 1),
        (lambda: (float(X[0]), int(X[1])), 2),
        (lambda: X[X > 1], 1),
        (lambda: X.index_select(0, torch.tensor([1, 0])), 0),
        (lambda: X.nonzero(), 1),
        (lambda: (X.cpu(), X.numpy()), 2),
    ],
)
def test_host_reads_are_counted_once_each(run, expected):
    assert len(measure.host_reads(run)) == expected


def test_host_reads_of_the_backward_pass_are_counted():
    x = X.clone().requires_grad_()
    reads = measure.host_reads(lambda: x[X > 1].sum().backward())
    assert reads == ["boolean index"] * 2


@torch.library.custom_op("test_benchmark::reads_inside", mutates_args=())
def reads_inside(x: torch.Tensor) -> torch.Tensor:
    return x.new_tensor(x.tolist())


def test_what_an_operator_reads_inside_is_not_counted():
    # The fallback of grouped_mm for the CPU does so; its kernel on a GPU does not.
    assert measure.host_reads(lambda: reads_inside(X)) == []


class Doubling(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Breaking(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2


def test_graphs_and_graph_breaks_are_counted():
    whole, broken = Doubling(), Breaking()
    assert measure.count_graphs([whole], [lambda: whole(torch.ones(2, 4))] * 2) == (1, 0)
    assert measure.count_graphs([broken], [lambda: broken(torch.ones(2, 4))]) == (2, 1)


def test_lines_are_timed_and_failures_carry_the_output():
    code = "print('one'); print('two')"
    seen = measure.time_lines([sys.executable, "-c", code], {"a": "one", "b": "two"}, {}, 30)
    assert 0 < seen["a"] <= seen["b"] <= seen["exit"]
    with pytest.raises(RuntimeError, match=r"three(?s:.*)one"):
        measure.time_lines([sys.executable, "-c", code], {"c": "three"}, {}, 30)


def test_table_is_aligned_and_keeps_plain_numbers():
    table = measure.Table("title", ["name", "ms"], ["a note"])
    table.add("dense", "1.0", milliseconds=1.0)
    table.add("s", "10.0", milliseconds=10.0)
    lines = str(table).splitlines()
    assert lines == ["title", "name   ms", "-----  ----", "dense  1.0", "s      10.0", "a note"]
    assert table.as_json()["rows"] == [{"milliseconds": 1.0}, {"milliseconds": 10.0}]


@pytest.mark.parametrize(("value", "verdict"), [(1.0, "aim met"), (1.04, "met"), (1.1, "MISSED")])
def test_verdicts(value, verdict):
    assert measure.judge(value, must=1.06, aim=1.03) == verdict
    quiet, busy = measure.Spread(1.0, 0.98, 1.02), measure.Spread(1.0, 0.99, 1.2)
    assert measure.judge(value, must=1.06, aim=1.03, floor=quiet) == verdict
    assert measure.judge(value, must=1.06, aim=1.03, floor=busy) == "too noisy"


def test_machine_facts_name_no_machine():
    facts = json.dumps(measure.machine_facts(CPU))
    assert "CPU only" in facts
    assert measure.platform.node() not in facts


def test_rows_of_the_design_exist(scripts):
    benchmark, mot = scripts
    assert list(benchmark.parse(["mot"]).table) == [
        "width1024", "width512", "training", "counts", "startup", "sampling",
    ]  # fmt: skip
    wide, narrow = mot.MOT_BLOCKS["width1024"], mot.MOT_BLOCKS["width512"]
    assert (wide.dim, wide.heads, wide.batch, wide.seq, wide.modalities) == (1024, 16, 2, 1024, 2)
    assert (wide.must, wide.aim) == (1.06, 1.03)
    assert (narrow.dim, narrow.batch, narrow.seq, narrow.modalities) == (512, 2, 512, 3)
    assert (narrow.must, narrow.aim) == (1.12, 1.05)


def test_flags_multiply_and_reach_every_case(scripts):
    benchmark, mot = scripts
    assert len(set(mot.block_cases(benchmark.parse(["mot"])))) == 6
    assert mot.block_cases(benchmark.parse(["mot", "--quick"])) == [mot.BlockCase()]
    flags = "mot --dtypes fp32 bf16 --modes eager compiled --masks causal document --mixes 0 1 2"
    assert len(set(mot.block_cases(benchmark.parse(flags.split())))) == 24


def test_masks_have_the_shares_of_the_mix(scripts):
    _, mot = scripts
    row = mot.MOT_BLOCKS["width512"]
    for mix, counts in [((0.8, 0.1, 0.1), [819, 103, 102]), ((1, 0, 0), [1024, 0, 0])]:
        masks = mot.random_masks(row, mix)
        assert masks.sum((0, 2)).tolist() == counts
        assert (masks.sum(1) == 1).all()


@pytest.mark.parametrize("mask", ["causal", "document"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_tiny_block_is_measured(scripts, monkeypatch, mask, dtype):
    _, mot = scripts
    row = mot.BlockRow(
        32, 2, 2, 16, must=1.0, aim=1.0, rounds=2, mixes={"even": (0.5, 0.5), "one": (1, 0)}
    )
    monkeypatch.setitem(mot.MOT_BLOCKS, "tiny", row)
    options = argparse.Namespace(rounds=None, quick=True, dispatches=mot.DISPATCHES)
    case = mot.BlockCase(dtype=dtype, mask=mask, mix=1)
    table = mot.measure_block("tiny", case, options, CPU)
    variants = ["dense", "dense again", "llama3", "split", "grouped", "reference"]
    assert [record["variant"] for record in table.records] == variants
    assert all(math.isfinite(x) and x > 0 for record in table.records for x in record["ratio"])


def test_compiled_rows_say_so_where_nothing_can_compile(scripts, monkeypatch):
    _, mot = scripts
    monkeypatch.setattr(measure, "has_cpp_compiler", lambda: False)
    options = argparse.Namespace(rounds=1, quick=True, dispatches=["split"])
    table = mot.measure_block("width512", mot.BlockCase(mode="compiled"), options, CPU)
    assert not table.rows
    assert "no C++ compiler" in str(table)


def test_drawing_images_is_measured_and_the_cache_changes_no_code(scripts, monkeypatch):
    _, mot = scripts
    sampling = importlib.import_module("benchmark_sampling")
    small = mot.debug_job("--training.seq_len", "128", "--validation.seq_len", "128")
    monkeypatch.setattr(mot, "debug_job", lambda *overrides: small)
    model = mot.debug_model
    monkeypatch.setattr(mot, "debug_model", lambda job: model(job, dim=32, n_layers=1, n_heads=2))
    monkeypatch.setattr(sampling, "IMAGES", 2)
    options = argparse.Namespace(rounds=1, quick=True)
    (table,) = sampling.measure_sampling(options, CPU)
    assert [r["variant"] for r in table.records] == [
        "no cache", "no cache again", "cache", "cache, guidance",
    ]  # fmt: skip
    assert all(math.isfinite(r["images_per_second"]) for r in table.records)
    assert "100.0% of the codes" in table.notes[0]


def test_output_is_printed_and_written_as_json(scripts, monkeypatch, capsys, tmp_path):
    benchmark, mot = scripts

    def row(options: argparse.Namespace, device: torch.device) -> list[measure.Table]:
        table = measure.Table("some row", ["variant"])
        table.add("dense", variant="dense", ratio=1.0)
        return [table]

    monkeypatch.setattr(mot, "ROWS", {"fake": row})
    benchmark.main(["mot", "--rows", "fake", "--json", str(tmp_path / "numbers.json")])
    printed = capsys.readouterr().out
    assert "measured on:" in printed and "some row" in printed
    content = json.loads((tmp_path / "numbers.json").read_text())
    assert content["tables"][0]["rows"] == [{"variant": "dense", "ratio": 1.0}]


@pytest.fixture
def tiny_mone(scripts, monkeypatch) -> tuple[ModuleType, argparse.Namespace]:
    """Rows of mone, in which B/16 is a model of milliseconds, and what asks for it."""
    mone = importlib.import_module("benchmark_mone")
    nested = mone.MoNEModelArgs(
        dim=32, n_layers=2, n_heads=2, patch_size=4, image_size=16, num_classes=5
    )
    table = {"B/16": nested, "ViT-B/16": replace(nested, num_experts=1)}
    monkeypatch.setattr(mone, "get_train_spec", lambda family: SimpleNamespace(model_args=table))
    flags = "mone --quick --sizes B/16 --capacities 0.3 1 --batch 2 --rounds 2 --layers 1"
    return mone, scripts[0].parse(flags.split())


def of_variants(table: measure.Table, key: str) -> dict[str, Any]:
    """One number of each variant."""
    return {str(record["variant"]): record[key] for record in table.records}


@pytest.mark.parametrize("row", ["block", "forward", "training"])
def test_nested_models_and_blocks_are_timed_beside_dense_ones(tiny_mone, row):
    mone, options = tiny_mone
    tables = list(mone.ROWS[row](options, CPU))
    assert [table.title.split(", ")[-2] for table in tables] == ["fp32", "bf16"]
    assert all("2 images" in table.title for table in tables)
    assert all(("1 of 2 layers" in table.title) == (row != "block") for table in tables)
    for table in tables:
        times, macs = of_variants(table, "ratio"), of_variants(table, "mac_ratio")
        others = ["PyTorch's layer"] if row == "block" else []
        assert list(times) == ["dense", "dense again", *others, "nested 0.3", "nested 1"]
        assert all(math.isfinite(x) and x > 0 for spread in times.values() for x in spread)
        assert times["dense"] == [1.0, 1.0, 1.0]
        assert macs["dense again"] == 1 < macs["nested 0.3"]
        # A model of capacity 1 still has its router; a block does not.
        assert macs["nested 1"] == pytest.approx(1, abs=0.02)
        # 16 tokens: 7, 5, 3 and 1 of 4, 8, 16 and 32 channels.
        assert of_variants(table, "effective_capacity")["nested 0.3"] == (28 + 40 + 48 + 32) / 512


@pytest.mark.parametrize(
    ("layers", "milliseconds", "verdict"),
    [(2, 10.0, "aim met"), (2, 12.0, "met"), (2, 13.0, "MISSED"), (1, 10.0, "")],
)
def test_the_throughput_of_a_step_of_the_whole_model_is_judged(
    tiny_mone, monkeypatch, layers, milliseconds, verdict
):
    mone, options = tiny_mone
    options.layers, options.dtypes = layers, ["fp32"]

    def timed(runs: Iterable[str], *unused: Any, **named: Any) -> dict[str, list[float]]:
        return {name: [0.024 if "dense" in name else milliseconds / 1000] for name in runs}

    monkeypatch.setattr(measure, "time_interleaved", timed)
    (table,) = mone.measure_training(options, CPU)
    assert {row[0]: row[-1] for row in table.rows}["nested 0.3"] == verdict
    assert {row[-1] for row in table.rows if row[0] != "nested 0.3"} == {""}
    assert ("cut short" in str(table)) == (layers == 1)
    (table,) = mone.measure_forward(options, CPU)
    assert {row[-1] for row in table.rows} == {""}


def test_counted_multiply_adds_of_nested_models_equal_the_formula(tiny_mone):
    mone, options = tiny_mone
    (table,) = mone.measure_flops(options, CPU)
    counted = of_variants(table, "macs_counted")
    assert counted == of_variants(table, "macs_formula")
    assert "DIFFERS" not in str(table)
    assert counted["nested 0.3"] < counted["dense"] < counted["nested 1"]


def test_a_nested_model_reads_nothing_and_has_a_graph_for_each_capacity(scripts, monkeypatch):
    mone = importlib.import_module("benchmark_mone")
    twins = mone.twins
    small = {"image_size": 64, "num_classes": 5}
    monkeypatch.setattr(
        mone, "twins", lambda *of: tuple(replace(args, **small) for args in twins(*of))
    )
    options = scripts[0].parse(["mone", "--capacities", "0.3", "0.6"])
    (table,) = mone.measure_counts(options, CPU)
    assert set(of_variants(table, "host_reads").values()) == {0}
    assert set(of_variants(table, "graph_breaks").values()) == {0}
    assert of_variants(table, "graphs") == {
        "dense": 1, "nested 0.3": 1, "nested 0.6": 1, "these 2 in turn": 2,
    }  # fmt: skip


def test_steps_in_bfloat16_update_weights_of_float32(tiny_mone):
    mone, _ = tiny_mone
    _, nested = mone.twins("B/16", None)
    training = mone.Training(nested, torch.bfloat16, 2, CPU)
    before = [p.detach().clone() for p in training.masters]
    training.step(nested.budget(0.3))
    changes = [(p - b).abs().max() for p, b in zip(training.masters, before, strict=True)]
    assert all(p.dtype == torch.float32 for p in training.masters)
    # One step of Adam moves every weight that has a gradient by the learning rate, 1e-4, which
    # most weights of bfloat16 are too coarse for.
    assert all(change > 5e-5 for change in changes)
    for parameter, master in zip(training.parameters, training.masters, strict=True):
        assert torch.equal(parameter, master.bfloat16())


def test_rows_and_sizes_of_mone_are_those_of_its_issue(scripts):
    benchmark, _ = scripts
    mone = importlib.import_module("benchmark_mone")
    options = benchmark.parse(["mone"])
    assert list(options.table) == ["block", "forward", "training", "flops", "counts", "startup"]
    assert (options.batch, mone.MUST, mone.AIM) == (16, 1.9, 2.2)
    assert mone.capacities(options) == [0.2, 0.3, 0.4, 0.6, 0.8, 1.0]
    assert mone.cases(options) == [
        ("S/16", "fp32"), ("S/16", "bf16"), ("B/16", "fp32"), ("B/16", "bf16"),
    ]  # fmt: skip
    dense, nested = mone.twins("B/16", 3)
    assert (dense.dim, dense.n_layers, dense.num_experts) == (768, 3, 1)
    assert (nested.dim, nested.n_layers, nested.num_experts) == (768, 3, 4)
