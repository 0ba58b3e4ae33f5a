"""How far a difference between two models could be another one by chance."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 4000


def paired_interval(differences: ArrayLike, groups: Sequence[Hashable]) -> tuple[float, float]:
    """95 % interval of a mean difference, by the bootstrap (Efron 1979), of percentiles.

    Seeds are drawn with replacement, and independently of them groups of images: pictures of one
    thing are answered alike, and so count for less than as many of different things. Few seeds say
    little about other seeds: of three the interval is rather too narrow.

    Args:
        differences: What one model has more than the other of the same seed on the same image,
            `(seeds, images)`.
        groups: Group of each image.

    Returns:
        Its ends; the same at every call.
    """
    values = np.asarray(differences, dtype=np.float64)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    member = np.zeros((values.shape[1], len(numbers)))
    member[np.arange(len(groups)), [numbers[group] for group in groups]] = 1
    seeds, drawn = _draw(len(values), 0), _draw(len(numbers), 1)  # (resamples, seeds or groups)
    sums = (seeds @ (values @ member) * drawn).sum(1) / len(values)
    low, high = np.percentile(sums / (drawn @ member.sum(0)), (2.5, 97.5))
    return float(low), float(high)


@lru_cache(maxsize=8)
def _draw(count: int, stream: int) -> NDArray[np.float64]:
    """How often each of `count` is drawn, in each of many draws of as many with replacement."""
    rng = np.random.default_rng(stream)
    return rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)
