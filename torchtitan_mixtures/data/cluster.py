"""Clusters of vectors: k-means, main directions, and how clusters agree with labels.

Source: Lloyd's algorithm from the starts of k-means++ (Arthur and Vassilvitskii 2007), the best of
several. All in float64 on the CPU, so that a seed gives the same clusters again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ROUNDS = 300
"""Rounds of Lloyd's algorithm at most."""

_ROWS_AT_A_TIME = 65536
_SMALLEST_VARIANCE = 1e-6  # of a direction that is kept, relative to the largest


class TooFewError(ValueError):
    """There are fewer different rows than clusters."""


@dataclass(frozen=True)
class Clusters:
    """What k-means found, the largest cluster first.

    Attributes:
        centres: `(clusters, dim)` float64.
        labels: Nearest centre of each row, `(rows,)` int64.
        inertias: Sum of squared distances to them in each round; the last is that of `labels`.
    """

    centres: Tensor
    labels: Tensor
    inertias: tuple[float, ...]

    @property
    def sizes(self) -> list[int]:
        """Rows of each cluster."""
        return torch.bincount(self.labels, minlength=len(self.centres)).tolist()


def find_clusters(rows: Tensor, num_clusters: int, seed: int = 0, restarts: int = 8) -> Clusters:
    """Divide rows into clusters.

    Args:
        rows: `(rows, dim)`.
        num_clusters: How many clusters.
        seed: Of the starts.
        restarts: Starts, of which the one that ends best is taken.

    Raises:
        TooFewError: There are fewer different rows than clusters.
    """
    rows = rows.to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    found = [_iterate(rows, choose_starts(rows, num_clusters, generator)) for _ in range(restarts)]
    best = min(found, key=lambda clusters: clusters.inertias[-1])
    by_size = torch.tensor(best.sizes).argsort(descending=True, stable=True)
    return Clusters(best.centres[by_size], by_size.argsort()[best.labels], best.inertias)


def find_nearest(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest centre of each row, the first of equally near ones.

    Args:
        rows: `(rows, dim)` float64.
        centres: `(clusters, dim)` float64.

    Returns:
        Its number, `(rows,)` int64, and its squared distance, `(rows,)`.
    """
    labels, squares = [], []
    for part in rows.split(_ROWS_AT_A_TIME):
        # Differences, not products: those lose the digits of points that are close together.
        distances = torch.cdist(part, centres, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.min(1)
        labels.append(nearest.indices)
        squares.append(nearest.values.square())
    return torch.cat(labels), torch.cat(squares)


def choose_starts(rows: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Choose rows as first centres: each by its squared distance to those before it (k-means++).

    Args:
        rows: `(rows, dim)` float64.
        num_clusters: How many.
        generator: Draws them.

    Raises:
        TooFewError: There are fewer different rows.
    """
    numbers = torch.rand(num_clusters, generator=generator, dtype=torch.float64)
    starts = [rows[int(numbers[0] * len(rows))]]
    squares = torch.full((len(rows),), torch.inf, dtype=torch.float64)
    for number in numbers[1:]:
        squares = torch.minimum(squares, find_nearest(rows, starts[-1][None])[1])
        line = squares.cumsum(0)
        if line[-1] == 0:
            raise TooFewError(
                f"there are {len(starts)} different features, too few for {num_clusters} clusters"
            )
        # `right`: a row at distance 0 has no part of the line and is never chosen again.
        place = int(torch.searchsorted(line, number * line[-1], right=True))
        starts.append(rows[place])
    return torch.stack(starts)


def _iterate(rows: Tensor, centres: Tensor) -> Clusters:
    inertias: list[float] = []
    labels, squares = find_nearest(rows, centres)
    for _ in range(MAX_ROUNDS):
        inertias.append(float(squares.sum()))
        centres = _move(rows, labels, squares, len(centres))
        before = labels
        labels, squares = find_nearest(rows, centres)
        if torch.equal(labels, before):
            break
    return Clusters(centres, labels, (*inertias, float(squares.sum())))


def _move(rows: Tensor, labels: Tensor, squares: Tensor, num_clusters: int) -> Tensor:
    """Move centres to the means of their rows, those without any to the rows farthest from all."""
    labels, squares = labels.clone(), squares.clone()
    counts = torch.bincount(labels, minlength=num_clusters)
    for empty in (counts == 0).nonzero()[:, 0].tolist():
        farthest = int(squares.argmax())
        labels[farthest], squares[farthest] = empty, 0
    counts = torch.bincount(labels, minlength=num_clusters)
    sums = rows.new_zeros(num_clusters, rows.shape[1]).index_add_(0, labels, rows)
    return sums / counts.clamp(min=1)[:, None]


# --- main directions ------------------------------------------------------------------------------


@dataclass(frozen=True)
class MainDirections:
    """Principal components of features, as long as they vary: `(x - mean) @ projection`.

    They are not whitened: that would make noise as long as what sets images apart.

    Attributes:
        mean: `(features,)` float64.
        projection: `(features, dim)` float64, its columns orthonormal.
    """

    mean: Tensor
    projection: Tensor

    @staticmethod
    def of(features: Tensor, max_dim: int) -> MainDirections:
        """Find those of features, `(rows, features)`, at most `max_dim`.

        Raises:
            TooFewError: All rows are the same.
        """
        features = features.to(torch.float64)
        mean = features.mean(0)
        centred = features - mean
        if not centred.any():
            raise TooFewError("there is 1 different feature, too few for several clusters")
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(features))
        order = variances.argsort(descending=True)[:max_dim]
        order = order[variances[order] > _SMALLEST_VARIANCE * variances.max()]
        return MainDirections(mean, directions[:, order])

    def apply(self, features: Tensor) -> Tensor:
        """Project features, `(rows, features)` to `(rows, dim)` float64."""
        return (features.to(torch.float64) - self.mean) @ self.projection


# --- agreement with labels ------------------------------------------------------------------------


def find_purity(clusters: Tensor, labels: Tensor) -> float:
    """Share of the rows whose label is the most frequent one of their cluster.

    Args:
        clusters: Cluster of each row, `(rows,)` int64.
        labels: Label of each row, `(rows,)` int64.
    """
    return float(_count_pairs(clusters, labels).max(1).values.sum() / len(labels))


def find_mutual_information(clusters: Tensor, labels: Tensor) -> float:
    """Mutual information of clusters and labels over the mean of their entropies, from 0 to 1.

    Args:
        clusters: Cluster of each row, `(rows,)` int64.
        labels: Label of each row, `(rows,)` int64.
    """
    joint = _count_pairs(clusters, labels) / len(labels)
    entropies = [_entropy(joint.sum(1)), _entropy(joint.sum(0))]
    if not sum(entropies):
        return 1.0  # one cluster, one label
    return (sum(entropies) - _entropy(joint.flatten())) / (sum(entropies) / 2)


def _count_pairs(clusters: Tensor, labels: Tensor) -> Tensor:
    """How often each cluster meets each label, `(clusters, labels)` float64."""
    width = int(labels.max()) + 1
    size = (int(clusters.max()) + 1) * width
    pairs = torch.bincount(clusters * width + labels, minlength=size)
    return pairs.view(-1, width).to(torch.float64)


def _entropy(shares: Tensor) -> float:
    return float(-torch.xlogy(shares, shares).sum())
