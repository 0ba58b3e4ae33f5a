"""What headers of the large configurations say of layouts is what the planner says."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from tests.gang import run_ranks
from tests.jobs import TRAIN_CONFIGS
from tests.rows import quick
from torchtitan_mixtures.planning.devices import GIB, find_device
from torchtitan_mixtures.planning.fit import fewest_ranks_for_state, fits
from torchtitan_mixtures.planning.step import Plan, plan_step
from torchtitan_mixtures.planning.timing import step_times

LARGE = sorted(path.stem for path in (TRAIN_CONFIGS / "mot").glob("*B_*.toml"))
QUICK = ("8B_2modality", "70B_3modality")
DEVICE = find_device("h100-80g")
COUNTS = [4, 8, 64, 256, 1024]


class Row(NamedTuple):
    """What a header says of a number of GPUs."""

    count: int
    overrides: list[str]
    peak: float
    seconds: float
    tokens: int | None = None


def text_of(config):
    return (TRAIN_CONFIGS / "mot" / f"{config}.toml").read_text()


def own_row(config):
    text = text_of(config)
    (count,) = re.findall(r"^# World size: (\d+) ", text, flags=re.MULTILINE)
    said = r"^# Planned \(scripts/estimate\.py\): peak ([\d.]+) GiB, a step of ([\d.]+) s or more"
    ((peak, seconds),) = re.findall(said, text, flags=re.MULTILINE)
    return Row(int(count), [], float(peak), float(seconds))


def other_rows(config):
    said = r"^# +(\d+): (.+): ([\d.]+) GiB ([\d.]+) s (\d+) tokens$"
    found = re.findall(said, text_of(config).replace(",", ""), flags=re.MULTILINE)
    return [
        Row(
            int(count),
            [] if changes == "as it is" else changes.split(),
            float(peak),
            float(time),
            int(tokens),
        )
        for count, changes, peak, time, tokens in found
    ]


def too_few(config):
    """Numbers of GPUs of which a header says that they are too few, and how many it takes."""
    said = r"^# +([\d and]+): too few; the state alone takes (\d+)\.$"
    return [
        (int(count), int(needed))
        for counts, needed in re.findall(said, text_of(config), flags=re.MULTILINE)
        for count in counts.split(" and ")
    ]


def make_plan(config, row):
    path = TRAIN_CONFIGS / "mot" / f"{config}.toml"
    return plan_step([f"--config={path}", *row.overrides], row.count)


def check(config, row) -> Plan:
    (plan,) = run_ranks(make_plan, 1, config, row, timeout=300, init=False)
    assert row.peak == pytest.approx(plan.memory.peak / GIB, abs=0.06)
    assert row.seconds == pytest.approx(step_times(plan, DEVICE).step, rel=0.01, abs=0.006)
    assert row.tokens in (None, plan.tokens)
    assert fits(plan, DEVICE)
    return plan


@pytest.mark.parametrize("config", LARGE)
def test_a_header_speaks_of_every_number_of_gpus(config):
    counts = {own_row(config).count, *(row.count for row in other_rows(config))}
    assert counts | {count for count, _ in too_few(config)} == set(COUNTS)


@pytest.mark.parametrize("config", quick(["8B_2modality"], QUICK))
def test_a_header_carries_the_numbers_of_its_plan(config):
    plan = check(config, own_row(config))
    words = " ".join(text_of(config).replace("#", "").split())
    assert f"s or more, bound by {step_times(plan, DEVICE).limit} at published peaks" in words
    for count, needed in too_few(config):
        assert needed == fewest_ranks_for_state(plan, DEVICE)
        assert count < needed


@pytest.mark.slow
@pytest.mark.parametrize("config", LARGE)
def test_all_layouts_of_a_header_are_planned_as_it_says(config):
    plan = check(config, own_row(config))
    for count, needed in too_few(config):
        assert needed == fewest_ranks_for_state(plan, DEVICE)
        assert count < needed
    for row in other_rows(config):
        check(config, row)
