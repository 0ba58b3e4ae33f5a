"""`scripts/benchmark.py mixdiff` compares mixtures and single experts that do the same work."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from tests.jobs import ROOT
from torchtitan_mixtures import benchmark as measure

CPU = torch.device("cpu")
SMALL = "mom/debugmodel_dit"


@pytest.fixture
def scripts(monkeypatch) -> tuple[ModuleType, ModuleType]:
    """`scripts/benchmark.py` and its rows of mixdiff."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("benchmark"), importlib.import_module("benchmark_mixdiff")


@pytest.fixture
def small(scripts):
    """Four small experts and eight samples."""
    return scripts[1].Case(expert=SMALL, batch=8)


def test_rows_and_cases_are_those_of_the_design(scripts):
    benchmark, mixdiff = scripts
    options = benchmark.parse(["mixdiff"])
    assert list(options.table) == ["training", "sampling", "stacked", "counts", "startup"]
    assert (mixdiff.MUST, mixdiff.AIM, options.top_k) == (1.10, 1.03, [1, 2])
    cases = mixdiff.cases(options)
    assert [(case.num_experts, case.dtype) for case in cases] == [
        (4, "fp32"), (4, "bf16"), (8, "fp32"), (8, "bf16"),
    ]  # fmt: skip
    assert {(case.expert, case.batch) for case in cases} == {("mom/DiT-S/4", 32)}
    assert (cases[0].args.in_channels, cases[0].args.image_size) == (4, 32)
    assert mixdiff.cases(benchmark.parse(["mixdiff", "--quick"])) == [mixdiff.Case()]
    flags = f"mixdiff --num-experts 2 3 --dtypes bf16 --batch 6 --expert {SMALL}"
    assert mixdiff.cases(benchmark.parse(flags.split())) == [
        mixdiff.Case(2, "bf16", SMALL, 6), mixdiff.Case(3, "bf16", SMALL, 6),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch 30", "--batch 30: must be a multiple of 2 .* and of --num-experts 4"),
        ("--batch 3 --num-experts 3", "--batch 3: must be a multiple of 2"),
        ("--batch 0", "--batch 0"),
        ("--top-k 5", r"--top-k \[5\]: must be from 1 to --num-experts 4"),
        ("--top-k 0 1", r"--top-k \[0, 1\]"),
    ],
)
def test_samples_that_cannot_be_shared_out_are_refused(scripts, flags, message):
    benchmark, mixdiff = scripts
    with pytest.raises(ValueError, match=message):
        mixdiff.cases(benchmark.parse(["mixdiff", *flags.split()]))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_experts_are_drawn_evenly_and_no_expert_twice(scripts, top_k):
    _, mixdiff = scripts
    draw = mixdiff.draw_experts(mixdiff.Case(), top_k, 4000, CPU)
    gates = draw.gates
    assert torch.equal((gates > 0).sum(1), torch.full((4000,), top_k))
    torch.testing.assert_close(gates.sum(1), torch.ones(4000))
    # Four standard deviations of a binomial distribution are less than 0.032.
    assert ((gates > 0).float().mean(0) - top_k / 4).abs().max() < 0.032
    again = mixdiff.draw_experts(mixdiff.Case(), top_k, 4000, CPU)
    assert torch.equal(draw.chosen, again.chosen)


@pytest.mark.parametrize("num_experts", [4, 8])
def test_by_default_no_expert_is_without_samples(scripts, num_experts):
    _, mixdiff = scripts
    for kind, top_k in ((kind, k) for kind in mixdiff.KINDS.values() for k in mixdiff.TOP_K):
        samples = mixdiff.BATCH // kind.copies
        draw = mixdiff.draw_experts(mixdiff.Case(num_experts), top_k, samples, CPU)
        assert draw.gates.any(0).all()


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", ["training", "sampling"])
def test_the_drawn_experts_are_those_that_run(scripts, small, name, top_k):
    _, mixdiff = scripts
    kind = mixdiff.KINDS[name]
    model, inputs = mixdiff.build(small, CPU), mixdiff.draw_inputs(small, CPU)
    draw = mixdiff.draw_experts(small, top_k, small.batch // kind.copies, CPU)
    expected = (draw.gates > 0).repeat(kind.copies, 1)
    mixdiff.set_top_k(model, top_k)
    routed, given = kind.routing(draw)
    with_router, without = (model(**inputs, **routing) for routing in (routed, given))
    for output in (with_router, without):
        assert torch.equal(output.gates > 0, expected)
    assert with_router.router_logits.shape == (small.batch // kind.copies, 4)
    assert without.router_logits is None


def test_a_training_step_reaches_router_and_experts_and_leaves_no_gradients(scripts, small):
    _, mixdiff = scripts
    model, inputs = mixdiff.build(small, CPU), mixdiff.draw_inputs(small, CPU)
    seen = set()
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.add(name))
    for top_k in (1, 2):
        seen.clear()
        draw = mixdiff.draw_experts(small, top_k, small.batch, CPU)
        routed, given = mixdiff.routing_of_training(draw)
        mixdiff.training_step(model, {**inputs, **routed}, top_k)
        assert seen == {name for name, _ in model.named_parameters()}
        seen.clear()
        mixdiff.training_step(model, {**inputs, **given}, top_k)
        assert seen == {f"experts.{name}" for name, _ in model.experts.named_parameters()}
        assert all(parameter.grad is None for parameter in model.parameters())


def test_sampling_needs_no_gradients(scripts, small):
    _, mixdiff = scripts
    states = []
    model = mixdiff.build(small, CPU)
    model.register_forward_hook(lambda *_: states.append(torch.is_grad_enabled()))
    draw = mixdiff.draw_experts(small, 2, 4, CPU)
    inputs = {**mixdiff.draw_inputs(small, CPU), **mixdiff.routing_of_sampling(draw)[0]}
    mixdiff.sampling_step(model, inputs, 2)
    assert states == [False]


def test_experts_are_cast_and_the_router_is_not(scripts, small):
    _, mixdiff = scripts
    model = mixdiff.build(replace(small, dtype="bf16"), CPU)
    assert {p.dtype for p in model.experts.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.router.parameters()} == {torch.float32}


def test_the_expected_cost_is_that_of_experts_and_of_the_router_where_it_is_asked(scripts):
    _, mixdiff = scripts
    args = mixdiff.Case().args
    expert = args.expert_args[0].total_macs_per_image()
    router = args.router_macs_per_image()
    for top_k in (1, 2):
        args.top_k = top_k
        for copies in (1, 2):
            cost = mixdiff.expected_cost(args, copies, with_router=True)
            assert cost == pytest.approx(1 + router / copies / (top_k * expert))
            assert mixdiff.expected_cost(args, copies, with_router=False) == 1
    args.top_k = 1
    # The router has two to five per cent of an expert.
    assert 1.02 < mixdiff.expected_cost(args, 1, with_router=True) < 1.05


def test_stacked_experts_compute_what_the_loop_does_and_have_the_same_gradients(scripts, small):
    _, mixdiff = scripts
    experts = list(mixdiff.build(small, CPU).experts.values())
    inputs = mixdiff.draw_inputs(small, CPU)
    loop, stacked = mixdiff.Loop(experts), mixdiff.Stacked(experts)
    expected, found = (model(**inputs).prediction for model in (loop, stacked))
    torch.testing.assert_close(found, expected)
    by_hand = [
        experts[row // 2](**{name: x[row : row + 1] for name, x in inputs.items()}).prediction
        for row in range(8)
    ]
    torch.testing.assert_close(expected, torch.cat(by_hand))
    for prediction in (expected, found):
        prediction.square().sum().backward()
    for name, parameter in zip(stacked.names, stacked.weights, strict=True):
        wanted = torch.stack([expert.get_parameter(name).grad for expert in experts])
        torch.testing.assert_close(parameter.grad, wanted, msg=name)


def test_small_mixtures_are_measured(scripts, tmp_path, capsys):
    benchmark, mixdiff = scripts
    path = tmp_path / "numbers.json"
    flags = f"--rows training sampling stacked --num-experts 2 --batch 4 --rounds 1 --json {path}"
    benchmark.main(["mixdiff", "--expert", SMALL, *flags.split()])
    assert f"forward, guided, 2 x {SMALL}, 4 samples, bf16" in capsys.readouterr().out
    tables = json.loads(path.read_text())["tables"]
    assert len(tables) == 8
    ones = [mixdiff.ONE, mixdiff.AGAIN]
    top_k = ["top-1", "top-1, no router", "top-2", "top-2, no router"]
    for table in tables:
        records = {record["variant"]: record for record in table["rows"]}
        is_stack = "equal experts" in table["title"]
        assert set(records) == {*ones, *(["loop", "stacked"] if is_stack else top_k)}
        assert records[mixdiff.ONE]["ratio"] == [1.0, 1.0, 1.0]
        assert all(math.isfinite(x) and x > 0 for r in records.values() for x in r["ratio"])


@pytest.mark.parametrize(
    ("milliseconds", "verdict"), [(10.2, "aim met"), (10.5, "met"), (11.1, "MISSED")]
)
def test_mixtures_in_float32_are_judged_by_k_experts(
    scripts, small, monkeypatch, milliseconds, verdict
):
    benchmark, mixdiff = scripts

    def timed(runs, *unused, **named):
        factors = {"top-1": 1, "top-1, no router": 1, "top-2": 2, "top-2, no router": 2}
        return {name: [factors[name] * milliseconds if name in factors else 10.0] for name in runs}

    monkeypatch.setattr(measure, "time_interleaved", timed)
    options = benchmark.parse(["mixdiff"])
    for kind in mixdiff.KINDS.values():
        for dtype in ("fp32", "bf16"):
            table = mixdiff.measure_mixture(kind, replace(small, dtype=dtype), options, CPU)
            verdicts = {row[0]: row[-1] for row in table.rows}
            judged = [verdicts.pop(name) for name in ("top-1", "top-2")]
            assert judged == [verdict if dtype == "fp32" else ""] * 2
            assert set(verdicts.values()) == {""}
            for record in table.records[2:]:
                assert record["ratio"] == pytest.approx([milliseconds / 10] * 3)


def test_the_host_reads_how_many_samples_each_expert_has(scripts):
    benchmark, mixdiff = scripts
    (table,) = mixdiff.measure_counts(benchmark.parse(["mixdiff"]), CPU)
    reads = {str(record["variant"]): record["host_reads"] for record in table.records}
    assert len(reads) == 8
    assert {reads[f"{name}, top-{k}"] for name in mixdiff.KINDS for k in (1, 2)} == {1}
