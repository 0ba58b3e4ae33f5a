"""Models compared by numbers of several seeds each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Measured = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Metrics by name, of each seed, of each model."""


class Summary(NamedTuple):
    """Numbers of several seeds.

    Attributes:
        mean: Their mean.
        deviation: Their standard deviation (of a sample); None of a single one.
        values: The numbers, by seed.
    """

    mean: float
    deviation: float | None
    values: dict[int, float]

    @classmethod
    def of(cls, values: Mapping[int, float]) -> Summary:
        """Summarise at least one number."""
        numbers = list(values.values())
        deviation = None
        if len(numbers) > 1:  # that of what diverged is not a number either
            deviation = statistics.stdev(numbers) if all(map(math.isfinite, numbers)) else math.nan
        return cls(statistics.fmean(numbers), deviation, dict(values))

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" +- {self.deviation:.4f}"
        return f"{self.mean:.4f}{spread}"


def summarise(measured: Measured, metrics: Sequence[str]) -> dict[str, dict[str, Summary]]:
    """Summarise each metric of each model over its seeds."""
    return {
        model: {m: Summary.of({seed: found[m] for seed, found in seeds.items()}) for m in metrics}
        for model, seeds in measured.items()
    }


def differences(
    measured: Measured, metrics: Sequence[str], baseline: str
) -> dict[str, dict[str, Summary]]:
    """Summarise how far each other model is from the baseline, of equal seeds.

    Seeds that the baseline or the model lacks are left out; so is a model that shares none.
    """
    base = measured.get(baseline, {})
    result = {}
    for model, seeds in measured.items():
        shared = sorted(seeds.keys() & base.keys())
        if model != baseline and shared:
            result[model] = {
                m: Summary.of({seed: seeds[seed][m] - base[seed][m] for seed in shared})
                for m in metrics
            }
    return result


def as_json(summaries: Mapping[str, Mapping[str, Summary]]) -> dict[str, Any]:
    """Plain JSON of summaries by model and metric."""
    return {
        model: {metric: summary._asdict() for metric, summary in found.items()}
        for model, found in summaries.items()
    }


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
