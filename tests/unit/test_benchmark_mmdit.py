"""`scripts/benchmark.py mmdit` compares blocks of the same FLOPs that compute what they should."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch

from tests.jobs import ROOT
from torchtitan_mixtures import benchmark as measure

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def scripts(monkeypatch) -> tuple[ModuleType, ModuleType]:
    """`scripts/benchmark.py` and its rows of mmdit, with prompts and images of a few tokens."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    mmdit = importlib.import_module("benchmark_mmdit")
    small = {2: {"text": 12, "image": 16}, 3: {"text": 12, "speech": 8, "image": 16}}
    monkeypatch.setattr(mmdit, "LENGTHS", small)
    return importlib.import_module("benchmark"), mmdit


def test_rows_and_cases_are_those_of_the_design(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    benchmark, mmdit = (importlib.import_module(f"benchmark{of}") for of in ("", "_mmdit"))
    options = benchmark.parse(["mmdit"])
    assert list(options.table) == ["block", "streams", "options", "counts", "startup"]
    cases = mmdit.cases(options, is_brief=False)
    assert len(set(cases)) == len(cases) == 16
    assert {case.width for case in cases} == {512, 1024}
    assert {tuple(case.lengths.values()) for case in cases} == {(154, 256), (154, 128, 256)}
    brief = mmdit.cases(options, is_brief=True)
    assert {(case.width, case.dtype) for case in brief} == {
        (512, "fp32"), (512, "bf16"), (1024, "fp32"), (1024, "bf16"),
    }  # fmt: skip
    assert {(case.modalities, case.masks) for case in brief} == {(2, "none")}
    quick = mmdit.cases(benchmark.parse(["mmdit", "--quick"]), is_brief=False)
    assert quick == [mmdit.Case()]
    targets = {name: (row.must, row.aim, row.judged) for name, row in mmdit.BLOCK_ROWS.items()}
    assert targets["block"] == (1.06, 1.02, ("joint",))
    assert targets["streams"] == (1.4, 1.25, ("4 static", "4 dynamic"))
    assert targets["options"][2] == ()


def test_flags_multiply(scripts):
    benchmark, mmdit = scripts
    flags = "mmdit --widths 64 128 --modalities 2 3 --masks none keys --dtypes fp32 --batch 3"
    for is_brief in (False, True):
        cases = mmdit.cases(benchmark.parse(flags.split()), is_brief=is_brief)
        assert len(set(cases)) == 8
        assert {case.batch for case in cases} == {3}


@pytest.mark.parametrize("masks", ["none", "keys"])
@pytest.mark.parametrize("modalities", [2, 3])
def test_blocks_of_one_row_cost_the_same_but_for_modulations(scripts, modalities, masks):
    _, mmdit = scripts
    case = mmdit.Case(64, modalities, masks, batch=2)
    square, tokens = case.width**2, sum(case.lengths.values())
    # 4 of attention and 8 of the feed-forward network, attention itself, and modulations.
    shared = case.batch * (12 * tokens * square + 2 * tokens**2 * case.width)
    modulation = 6 * case.batch * square
    builders = {"plain": (mmdit.plain, 1), "joint": (mmdit.joint, modalities)}
    if modalities == 2:
        builders["seed's"] = (mmdit.seed, 2)
    for build, count in builders.values():
        forward, total = mmdit.count_flops(build, case)
        assert forward == 2 * (shared + count * modulation)
        assert total == 3 * forward


@pytest.mark.parametrize(("modalities", "low", "high"), [(2, 1.0011, 1.0013), (3, 1.0017, 1.0020)])
def test_modulations_of_more_modalities_are_two_thousandths_at_most(
    monkeypatch, modalities, low, high
):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    mmdit = importlib.import_module("benchmark_mmdit")
    for width in mmdit.WIDTHS:
        case = mmdit.Case(width, modalities)
        plain, joint = (mmdit.count_flops(build, case)[1] for build in (mmdit.plain, mmdit.joint))
        assert low - 2e-4 < joint / plain < high


def test_options_of_attention_cost_no_matrix_products_and_streams_few(scripts):
    _, mmdit = scripts
    case = mmdit.Case(64)
    base = mmdit.count_flops(mmdit.joint, case)
    for build in mmdit.BLOCK_ROWS["options"].variants.values():
        assert mmdit.count_flops(build, case) == base
    tokens, branches, streams = 28, 2, 4
    per_column = 2 * case.batch * tokens * case.width * streams * branches
    rows = mmdit.BLOCK_ROWS["streams"].variants
    columns = per_column * (streams + 2)  # what is read, carried on and written
    assert mmdit.count_flops(rows["4 static"], case)[0] == base[0] + columns
    assert mmdit.count_flops(rows["4 dynamic"], case)[0] == base[0] + 2 * columns


@pytest.mark.parametrize("masks", ["none", "keys"])
def test_the_joint_block_with_equal_weights_computes_what_the_plain_one_does(scripts, masks):
    _, mmdit = scripts
    case = mmdit.Case(64, 3, masks, batch=2)
    plain, joint = mmdit.plain(case, CPU), mmdit.joint(case, CPU)
    source, target = plain.block, joint.block
    heads, square = case.width // mmdit.HEAD_DIM, (-1, mmdit.HEAD_DIM)
    with torch.no_grad():
        for name in case.lengths:
            for kind in ("weight", "bias"):
                of = [getattr(getattr(source.attention, f"w{x}"), kind) for x in "qkv"]
                parts = [p.unflatten(0, square) for p in of]
                fused = torch.stack(parts, 1).flatten(0, 2)  # rows (head, q | k | v, head_dim)
                assert heads * 3 * mmdit.HEAD_DIM == len(fused)
                getattr(target.attention.wqkv[name], kind).copy_(fused)
                wo = getattr(target.attention.wo[name], kind)
                wo.copy_(getattr(source.attention.wo, kind))
            target.feed_forward[name].load_state_dict(source.feed_forward.state_dict())
            target.modulation[name].load_state_dict(source.modulation.state_dict())
    *streams, condition = joint.inputs
    expected = plain.run_forward(torch.cat(streams, 1), condition)[0]
    found = torch.cat(list(joint.forward()), 1)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(expected, torch.cat(streams, 1))


def test_masks_hide_a_part_of_each_prompt_and_nothing_of_the_image(scripts):
    _, mmdit = scripts
    case = mmdit.Case(64, 3, "keys", batch=50)
    masks = mmdit.draw_masks(case, CPU)
    assert masks.pop("image") is None
    for name, mask in masks.items():
        length = case.lengths[name]
        seen = mask.sum(1)
        assert length // 4 <= seen.min() < seen.max() < length
        assert (mask == (torch.arange(length) < seen[:, None])).all()
    assert set(mmdit.draw_masks(mmdit.Case(64, 3), CPU).values()) == {None}


def test_what_is_kept_for_the_backward_pass_is_counted_once(scripts):
    _, mmdit = scripts
    linear = torch.nn.Linear(8, 4)
    x = torch.randn(2, 8)
    # The input of the product, the exponential's result; no weights, and views only once.
    passes = mmdit.Passes(linear, lambda x, _: [linear(x).exp()[:, :2]], [x[:, :2], torch.ones(1)])
    passes.inputs[0] = x.requires_grad_()
    assert mmdit.count_kept_bytes(passes) == 4 * (2 * 8 + 2 * 4)


def test_several_streams_keep_more(scripts):
    _, mmdit = scripts
    case = mmdit.Case(64)
    one, four = (
        mmdit.count_kept_bytes(partial(mmdit.joint, num_residual_streams=n)(case, CPU))
        for n in (1, 4)
    )
    assert one < four


@pytest.mark.parametrize("row", ["block", "streams", "options"])
def test_small_blocks_are_measured(scripts, tmp_path, capsys, row):
    benchmark, mmdit = scripts
    path = tmp_path / "numbers.json"
    flags = f"--rows {row} --widths 64 --masks keys --rounds 1 --batch 2 --json {path}"
    benchmark.main(["mmdit", *flags.split()])
    assert "key masks" in capsys.readouterr().out
    tables = json.loads(path.read_text())["tables"]
    assert len(tables) == (4 if row == "block" else 2)  # modalities, types
    names = list(mmdit.BLOCK_ROWS[row].variants)
    base = mmdit.BLOCK_ROWS[row].base
    for table in tables:
        records = {record["variant"]: record for record in table["rows"]}
        expected = [n for n in names if n != "seed's" or "12 + 16" in table["title"]]
        assert list(records) == [*expected, f"{base} again"]
        assert records[base]["ratio"] == [1.0, 1.0, 1.0]
        assert records[f"{base} again"]["flop_ratio"] == 1
        for record in records.values():
            assert all(math.isfinite(x) and x > 0 for x in record["ratio"])


@pytest.mark.parametrize(
    ("milliseconds", "verdict"), [(10.1, "aim met"), (10.5, "met"), (10.7, "MISSED")]
)
def test_the_joint_block_in_float32_is_judged(scripts, monkeypatch, milliseconds, verdict):
    benchmark, mmdit = scripts

    def timed(runs, *unused, **named):
        return {name: [milliseconds if name == "joint" else 10.0] for name in runs}

    monkeypatch.setattr(measure, "time_interleaved", timed)
    options = benchmark.parse(["mmdit"])
    for dtype in ("fp32", "bf16"):
        case = mmdit.Case(64, dtype=dtype, batch=1)
        table = mmdit.measure_case(mmdit.BLOCK_ROWS["block"], case, options, CPU)
        verdicts = {row[0]: row[-1] for row in table.rows}
        assert verdicts.pop("joint") == (verdict if dtype == "fp32" else "")
        assert set(verdicts.values()) == {""}


def test_compiled_rows_say_so_where_nothing_can_compile(scripts, monkeypatch):
    benchmark, mmdit = scripts
    monkeypatch.setattr(measure, "has_cpp_compiler", lambda: False)
    options, case = benchmark.parse(["mmdit"]), replace(mmdit.Case(), mode="compiled")
    table = mmdit.measure_case(mmdit.BLOCK_ROWS["block"], case, options, CPU)
    assert not table.rows
    assert "no C++ compiler" in str(table)


def test_blocks_read_nothing(scripts, monkeypatch):
    benchmark, mmdit = scripts
    # That each is one graph the tests of blocks see to; tracing them takes seconds.
    monkeypatch.setattr(measure, "count_graphs", lambda blocks, steps: (1, 0))
    (table,) = mmdit.measure_counts(benchmark.parse(["mmdit"]), CPU)
    assert len(table.records) == 10
    assert {record["host_reads"] for record in table.records} == {0}
