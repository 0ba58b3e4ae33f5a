"""Plans of memory against what ranks of real jobs allocate."""

from __future__ import annotations

import importlib
import sys

import pytest

from tests.jobs import ROOT
from tests.rows import quick
from torchtitan_mixtures.planning.measure import Measured
from torchtitan_mixtures.planning.step import Memory

QUICK = [
    ("mot", "1 process, mixed bfloat16, seq 512"),
    ("mom", "1 process"),
    ("mixdiff", "TP 2"),
]


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module("benchmark_memory")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def check(real: Measured, plan: Memory) -> None:
    for name in ("parameters", "gradients", "optimizer_state"):
        assert getattr(plan, name) == pytest.approx(getattr(real, name), rel=0.01), name
    if real.activations is not None:
        assert plan.activations == pytest.approx(real.activations, rel=0.01)
    assert plan.peak == pytest.approx(real.peak, rel=0.04)


@pytest.mark.parametrize(("family", "layout"), quick(QUICK[:2], QUICK))
def test_a_plan_says_what_a_rank_allocates(family, layout, benchmark):
    check(*benchmark.compare(family, layout))


@pytest.mark.slow
def test_plans_of_all_cases_of_the_readme_say_what_ranks_allocate(benchmark):
    for family, layout in benchmark.CASES:
        if (family, layout) not in QUICK:
            check(*benchmark.compare(family, layout))


def test_every_case_of_the_table_is_a_job_of_its_own(benchmark):
    jobs = {
        (ranks, *flags) for ranks, flags in (benchmark.job_of(*case) for case in benchmark.CASES)
    }
    assert len(jobs) == len(benchmark.CASES)
    assert {family for family, _ in benchmark.CASES} == set(benchmark.FAMILIES)
