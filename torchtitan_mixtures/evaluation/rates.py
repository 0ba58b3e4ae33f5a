"""Shares of right answers, with the interval that the number of questions leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959964
"""Standard normal quantile of a two-sided interval of 95 %."""


@dataclass(frozen=True)
class Rate:
    """So many right answers to so many questions."""

    hits: int
    trials: int
    chance: float
    """Expected share of right answers of a guess."""

    @property
    def share(self) -> float:
        """Right answers per question."""
        return self.hits / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share (Wilson 1927), which stays sensible near 0 and 1."""
        n, p = self.trials, self.share
        centre = p + Z_95**2 / (2 * n)
        spread = Z_95 * (p * (1 - p) / n + Z_95**2 / (4 * n**2)) ** 0.5
        scale = 1 + Z_95**2 / n
        return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)

    @property
    def excludes_chance(self) -> bool:
        """Whether the whole interval is above chance."""
        return self.interval[0] > self.chance

    def as_json(self) -> dict[str, Any]:
        """All of it, as plain JSON."""
        low, high = self.interval
        return {
            "share": self.share,
            "low_95": low,
            "high_95": high,
            "chance": self.chance,
            "excludes_chance": self.excludes_chance,
            "hits": self.hits,
            "trials": self.trials,
        }


def retrieval_rate(scores: NDArray[np.float64], pool: int) -> Rate:
    """How often the right candidate scores highest among `pool` of them.

    Args:
        scores: Of each question (rows) for each candidate (columns), in the same order: the right
            ones are on the diagonal.
        pool: Candidates to choose from. The questions are cut into as many blocks of this size as
            they make, and each chooses among its own block; what is left over is not asked.

    Returns:
        The rate of strictly highest scores: a tie is a miss.
    """
    hits = trials = 0
    for start in range(0, len(scores) - pool + 1, pool):
        block = scores[start : start + pool, start : start + pool]
        right = np.diagonal(block)
        best_wrong = np.where(np.eye(pool, dtype=bool), -np.inf, block).max(1)
        hits += int((right > best_wrong).sum())
        trials += pool
    return Rate(hits, trials, 1 / pool)


def classification_rate(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> Rate:
    """How often the right class scores highest; chance is the share of the commonest class.

    Args:
        scores: `(questions, classes)`.
        labels: Right class of each, `(questions,)`.
    """
    hits = int((scores.argmax(1) == labels).sum())
    return Rate(hits, len(labels), float(np.bincount(labels).max() / len(labels)))
