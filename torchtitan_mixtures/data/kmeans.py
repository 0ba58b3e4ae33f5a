"""k-means on bytes whose result is the same on every machine."""

import random

import numpy as np
from numpy.typing import NDArray

from torchtitan_mixtures.data.codebooks import nearest_centres

_CHUNK_ROWS = 65_536  # whose differences are held at once


def kmeans(
    points: NDArray[np.uint8],
    weights: NDArray[np.int64],
    pinned: NDArray[np.uint8],
    num_centres: int,
    iterations: int,
    seed: int,
) -> NDArray[np.uint8]:
    """Lloyd's algorithm on bytes, with one centre that does not move.

    Centres are rounded to bytes in every round. All arithmetic is then on integers, and the result
    is the same on every machine.

    Args:
        points: `(points, dim)` uint8, all different.
        weights: `(points,)` int64, how often each occurs.
        pinned: `(dim,)` uint8, centre 0.
        num_centres: Number of centres, the pinned one included.
        iterations: Number of rounds.
        seed: Of the k-means++ start.

    Returns:
        `(num_centres, dim)` uint8.
    """
    centres = _spread_centres(points, weights, pinned, num_centres, seed)
    for _ in range(iterations):
        labels = nearest_centres(points, centres)
        counts = np.bincount(labels, weights, num_centres).astype(np.int64)
        sums = np.stack(
            [
                np.bincount(labels, weights * column.astype(np.int64), num_centres)
                for column in points.T  # one after the other: they are eight times as large
            ],
            axis=1,
        ).astype(np.int64)
        used = counts > 0
        centres[used] = (2 * sums[used] + counts[used, None]) // (2 * counts[used, None])
        centres[0], used[0] = pinned, True
        if not used.all():
            # An empty cluster restarts at one of the points that are served worst.
            errors = weights * _squared_distances(points, centres[labels])
            centres[~used] = points[np.argsort(-errors, kind="stable")[: (~used).sum()]]
    return centres


def _spread_centres(
    points: NDArray[np.uint8],
    weights: NDArray[np.int64],
    pinned: NDArray[np.uint8],
    num_centres: int,
    seed: int,
) -> NDArray[np.uint8]:
    """k-means++: each start is drawn by its squared distance to the nearest one before it."""
    rng = random.Random(seed)
    stride = max(1, len(points) // 50_000)
    points, weights = points[::stride], weights[::stride]
    centres = [pinned]
    errors = weights * _squared_distances(points, pinned)
    for _ in range(num_centres - 1):
        cumulative = np.cumsum(errors)
        centres.append(
            points[
                np.searchsorted(cumulative, int(rng.random() * int(cumulative[-1])), side="right")
            ]
        )
        errors = np.minimum(errors, weights * _squared_distances(points, centres[-1]))
    return np.stack(centres)


def _squared_distances(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.int64]:
    b = np.broadcast_to(b, a.shape)
    squares = np.empty(len(a), np.int64)
    for start in range(0, len(a), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        difference = a[rows].astype(np.int32) - b[rows]
        squares[rows] = np.einsum("nd,nd->n", difference, difference)
    return squares
