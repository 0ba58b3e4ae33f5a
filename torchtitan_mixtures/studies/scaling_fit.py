"""Power laws through the losses of several sizes, and how far they could be other ones by chance.

`loss = a * x^-b` is a straight line in logarithms, fitted by least squares. `loss = e + a * x^-b`
ends at a loss `e` that no size goes below (Hoffmann et al. 2022, arXiv 2203.15556, equation 2, of
one variable).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

MIN_SIZES = 3
MIN_SIZES_WITH_FLOOR = 5
MIN_SEEDS = 6
"""Of the bootstrap: of two seeds 95 % intervals cover about 70 % of what they should."""
RESAMPLES = 4000
_BAND_POINTS = 40
_FLOORS, _ROUNDS = 200, 6

BOOTSTRAP = "bootstrap over seeds"
REGRESSION = "t-interval of the regression"


class Sample(NamedTuple):
    """A run: the size it is of, where it lies on the axis, and its loss."""

    size: str
    x: float
    y: float


class BandPoint(NamedTuple):
    """The 95 % interval of a fitted line at one place."""

    x: float
    low: float
    high: float


@dataclass(frozen=True)
class PowerLaw:
    """`loss = scale * x^-exponent`.

    Attributes:
        scale: The `a` of the law.
        exponent: The `b` of the law.
        low: Lower end of the 95 % interval of `b`.
        high: Upper end.
        method: How the interval was found.
        num_sizes: Sizes that were fitted.
        band: The interval of the line, from the smallest size to the largest.
    """

    scale: float
    exponent: float
    low: float
    high: float
    method: str
    num_sizes: int
    band: list[BandPoint]

    def at(self, x: float) -> float:
        """Loss at a place of the axis."""
        return self.scale * x**-self.exponent


class PowerLawWithFloor(NamedTuple):
    """`loss = floor + scale * x^-exponent`."""

    floor: float
    scale: float
    exponent: float


def num_sizes(samples: Sequence[Sample]) -> int:
    """Count sizes."""
    return len({sample.size for sample in samples})


def obstacle(samples: Sequence[Sample], least: int = MIN_SIZES) -> str:
    """Say why no law can be fitted; empty if one can."""
    if (found := num_sizes(samples)) < least:
        return f"{found} of at least {least} sizes are done"
    if not all(math.isfinite(s.x) and math.isfinite(s.y) and min(s.x, s.y) > 0 for s in samples):
        return "not all values are finite numbers above 0"
    if len({sample.x for sample in samples}) < least:
        return "several sizes lie at the same place of the axis"
    return ""


def fit_power_law(samples: Sequence[Sample]) -> PowerLaw:
    """Fit `a * x^-b` to runs for which there is no `obstacle`.

    The interval is that of percentiles of a bootstrap (Efron 1979) where every size has `MIN_SEEDS`
    or more: seeds of each size are drawn with replacement, independently of other sizes, and sizes
    are kept. It says how far other seeds would move the line, not whether it is one. Of fewer seeds
    it would be too narrow, and it is the t-interval of a regression, each run a point.
    """
    x, y = (np.log([getattr(sample, key) for sample in samples]) for key in ("x", "y"))
    slope, intercept = _line(x, y)
    grid = np.linspace(x.min(), x.max(), _BAND_POINTS)
    seeds = {sample.size: [s.size for s in samples].count(sample.size) for sample in samples}
    if min(seeds.values()) >= MIN_SEEDS:
        method = BOOTSTRAP
        drawn = _draw([sample.size for sample in samples])
        slopes, intercepts = _line(x[drawn], y[drawn])
        ends = np.percentile(-slopes, (2.5, 97.5))
        lines = intercepts[:, None] + slopes[:, None] * grid  # (resamples, points)
        band = np.percentile(lines, (2.5, 97.5), axis=0)
    else:
        method = REGRESSION
        residuals = y - intercept - slope * x
        squares = ((x - x.mean()) ** 2).sum()
        error = math.sqrt((residuals**2).sum() / (len(x) - 2))
        reach = t_quantile(len(x) - 2) * error
        ends = -slope + reach / math.sqrt(squares) * np.array([-1, 1])
        width = reach * np.sqrt(1 / len(x) + (grid - x.mean()) ** 2 / squares)
        band = intercept + slope * grid + np.stack([-width, width])
    return PowerLaw(
        math.exp(intercept),
        -float(slope),
        float(ends[0]),
        float(ends[1]),
        method,
        len(seeds),
        [BandPoint(*map(float, row)) for row in np.exp(np.stack([grid, *band], axis=1))],
    )


def fit_with_floor(samples: Sequence[Sample]) -> PowerLawWithFloor:
    """Fit `e + a * x^-b` to runs for which there is no `obstacle`, `e` from 0 to the least loss.

    `e` is looked for on a grid that is made finer about the best one. `a` and `b` follow by least
    squares of `log(loss - e)`, weighted such that what is made least is, nearly, the squared error
    of `log(loss)`.
    """
    x, y = (np.array([getattr(sample, key) for sample in samples]) for key in ("x", "y"))
    low, high = 0.0, float(y.min())
    best = (math.inf, PowerLawWithFloor(0.0, 0.0, 0.0))
    for _ in range(_ROUNDS):
        step = (high - low) / _FLOORS
        for floor in low + step * np.arange(_FLOORS):  # not the end: its logarithm is none
            slope, intercept = _line(np.log(x), np.log(y - floor), ((y - floor) / y) ** 2)
            fitted = floor + np.exp(intercept + slope * np.log(x))
            error = float((np.log(y / fitted) ** 2).sum())
            if error < best[0]:
                found = (float(floor), math.exp(intercept), -float(slope))
                best = (error, PowerLawWithFloor(*found))
        floor = best[1].floor
        low, high = max(0.0, floor - step), min(float(y.min()), floor + step)
    return best[1]


def t_quantile(freedom: int) -> float:
    """Say what |t| of so many degrees of freedom exceeds in 5 % of all cases.

    By bisection of Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    low, high = 1.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def _t_within(t: float, freedom: int) -> float:
    """Probability that |t| is no larger."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for number in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * number / (number + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def _line(x: ArrayLike, y: ArrayLike, weights: ArrayLike = 1.0) -> tuple[NDArray, NDArray]:
    """Slope and intercept of the lines of least squares, over the last axis."""
    x, y = np.asarray(x), np.asarray(y)
    weights = np.broadcast_to(weights, x.shape)
    total = weights.sum(-1)
    x_mean, y_mean = (weights * x).sum(-1) / total, (weights * y).sum(-1) / total
    x_gap, y_gap = x - x_mean[..., None], y - y_mean[..., None]
    slope = (weights * x_gap * y_gap).sum(-1) / (weights * x_gap**2).sum(-1)
    return slope, y_mean - slope * x_mean


def _draw(sizes: Sequence[str]) -> NDArray[np.int64]:
    """Draw runs of each size with replacement, `(resamples, runs)`; the same at every call."""
    rng = np.random.default_rng(0)
    columns = []
    for size in dict.fromkeys(sizes):
        members = np.array([number for number, other in enumerate(sizes) if other == size])
        columns.append(members[rng.integers(len(members), size=(RESAMPLES, len(members)))])
    return np.concatenate(columns, axis=1)
