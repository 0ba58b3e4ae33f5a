"""What is reported of a classifier beside its loss: accuracy, and what its routers do."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.distributed import ParallelDims

from torchtitan_mixtures.objectives.balance import mean_over_ranks
from torchtitan_mixtures.objectives.outputs import NestedStatistics

ACCURACY = "train/accuracy"
"""Scalar of the share of training images whose likeliest class is right."""


class ClassificationMeter:
    """Running sums of a step's microbatches, kept on the device until metrics are logged.

    Args:
        num_experts: Experts of the model.
        parallel_dims: The job's parallel layout; None: one process.
    """

    def __init__(self, num_experts: int, parallel_dims: ParallelDims | None = None) -> None:
        self._shares = [0.5 ** (num_experts - 1 - expert) for expert in range(num_experts)]
        self._parallel_dims = parallel_dims
        self.reset()

    def reset(self) -> None:
        """Forget everything added so far."""
        self._hits: Tensor | None = None  # (2,): right answers, images
        self._routing: Tensor | None = None  # (routers, 2 * experts + 1)
        self._count = 0

    def add_hits(self, hits: Tensor, count: Tensor) -> None:
        """Add the number of right answers and of images, scalars."""
        update = torch.stack([hits, count]).double()
        self._hits = update if self._hits is None else self._hits + update

    def add_routing(self, router: NestedStatistics) -> None:
        """Add how the routers of a model decided about one microbatch."""
        columns = [router.load, router.probabilities, router.entropy[:, None]]
        update = torch.cat(columns, 1).detach()
        self._routing = update if self._routing is None else self._routing + update
        self._count += 1

    def scalars(self) -> dict[str, float]:
        """What is logged; reduced over ranks here, so that all must call it.

        The capacity is the effective one that was realised: rounding makes it a little less than
        was asked for, and where tokens choose it is what they chose.
        """
        mesh = None
        if self._parallel_dims is not None and self._parallel_dims.dp_cp_enabled:
            mesh = self._parallel_dims.get_mesh("loss")  # also ranks with parts of images
        scalars: dict[str, float] = {}
        if self._hits is not None:
            totals = self._hits.clone()
            if mesh is not None:
                dist.all_reduce(totals, group=mesh.get_group())
            hits, count = totals.tolist()
            scalars[ACCURACY] = hits / count if count else float("nan")
        if self._routing is not None:
            means = mean_over_ranks(self._routing.double(), mesh) / self._count
            scalars |= self._describe(means.tolist())
        return scalars

    def _describe(self, rows: list[list[float]]) -> dict[str, float]:
        """Name the numbers of each router, and of all together."""
        experts = len(self._shares)
        spent = [row[expert] * share for row in rows for expert, share in enumerate(self._shares)]
        scalars = {"nested/capacity": sum(spent) / len(rows)}
        for router, row in enumerate(rows):
            for expert in range(experts):
                name = f"expert_{expert}"
                scalars[f"router/{router}/load/{name}"] = row[expert]
                scalars[f"router/{router}/probability/{name}"] = row[experts + expert]
            scalars[f"router/{router}/entropy"] = row[-1]
        return scalars
