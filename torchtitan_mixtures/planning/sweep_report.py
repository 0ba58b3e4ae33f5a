"""What a sweep found, as text for people, numbers for programs and the header of a TOML."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torchtitan_mixtures.planning.candidates import Candidate
from torchtitan_mixtures.planning.devices import GIB, Device
from torchtitan_mixtures.planning.report import as_table, layout
from torchtitan_mixtures.planning.step import Plan
from torchtitan_mixtures.planning.sweep import Score, SweepResult, Verified
from torchtitan_mixtures.planning.timing import Times
from torchtitan_mixtures.studies.comparison import markdown

SHOWN = 10
"""Layouts of the table by formula."""


def format_sweep(result: SweepResult, device: Device, reserve: int) -> str:
    """Write the best layouts by formula, those that were built, and the best of them."""
    usable = (device.memory - reserve) / GIB
    parts = [
        f"{result.samples:,} samples a step on {device.name} with {usable:.0f} GiB to use: "
        f"{result.considered} layouts by formula, {len(result.ranked)} fit."
    ]
    if result.ranked:
        rows = [_row(score.candidate, score.plan, score.times) for score in result.ranked[:SHOWN]]
        parts += ["By formula, the fastest first:", _table(rows, [])]
    if result.verified:
        rows = [
            [*_row(each.score.candidate, each.plan, each.times), "yes" if each.fits else "NO"]
            for each in result.verified
        ]
        parts += ["Built:", _table(rows, ["fits"])]
    if result.best is not None:
        parts.append("Best: " + " ".join(result.best.score.candidate.overrides()))
    return "\n\n".join(parts)


def _row(candidate: Candidate, plan: Plan, times: Times) -> list[object]:
    schedule = f" {candidate.layout.schedule}" if candidate.layout.schedule else ""
    return [
        layout(candidate.layout.degrees) + schedule,
        candidate.mode,
        f"{candidate.rows} x {candidate.rounds}",
        f"{plan.memory.peak / GIB:.1f}",
        f"{times.step:.3g}",
        f"{times.utilization:.0%}",
        times.limit,
    ]


def _table(rows: Sequence[Sequence[object]], more: Sequence[str]) -> str:
    columns = ["layout", "AC", "samples x rounds", "peak GiB", "step s", "of peak", "bound by"]
    return markdown([*columns, *more], [list(row) for row in rows])


def header_of(command: str, best: Verified, device: Device) -> list[str]:
    """Say at the head of a configuration where its layout comes from."""
    memory, times = best.plan.memory, best.times
    return [
        f"Layout for {best.plan.world_size} x {device.name}: {layout(best.plan.degrees)}. Found by",
        f"  python {command}",
        f"Planned, never run: peak {memory.peak / GIB:.1f} GiB (rank {best.plan.rank}); a step of",
        f"{best.plan.tokens:,} positions takes {times.step:.3g} s or more, bound by {times.limit}.",
        "What is said below of layouts is of the configuration that this one was made of.",
    ]


def sweep_as_table(result: SweepResult, device: Device, reserve: int) -> dict[str, Any]:
    """Give a sweep as numbers."""

    def of(candidate: Candidate, plan: Plan, times: Times) -> dict[str, Any]:
        changed = list(candidate.overrides())
        return {"overrides": changed, "plan": as_table(plan, times, device, reserve)}

    def of_score(score: Score) -> dict[str, Any]:
        return of(score.candidate, score.plan, score.times)

    best = result.best
    return {
        "samples": result.samples,
        "considered": result.considered,
        "device": dataclasses.asdict(device),
        "by_formula": [of_score(score) for score in result.ranked],
        "built": [of(e.score.candidate, e.plan, e.times) for e in result.verified],
        "best": None if best is None else of(best.score.candidate, best.plan, best.times),
        "remedy": result.remedy,
    }
