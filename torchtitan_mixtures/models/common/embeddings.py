"""Embeddings of what a denoising transformer is told: time, class and position.

Source: Peebles and Xie 2022, arXiv 2212.09748, 3.2, and its published code for what the paper
leaves open (cosines before sines in time, sines before cosines in position).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_mixtures.models.common import init

EMBEDDING_STD = 0.02
"""Standard deviation of the embeddings' initial weights."""


def timestep_features(times: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines and sines of times at many frequencies.

    Computed outside the layers that use them, in float32: FSDP's mixed precision would round the
    times, of which bfloat16 tells no more than some two hundred apart.

    Args:
        times: `(batch,)`, from 0 to about 1000.
        dim: Number of features, even.
        max_period: Longest wavelength, divided by 2 pi.

    Returns:
        `(batch, dim)`, cosines first, float32 or the precision of `times` if that is higher.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float64, device=times.device) / half
    frequencies = torch.exp(-math.log(max_period) * steps)
    dtype = torch.promote_types(times.dtype, torch.float32)
    angles = times.to(dtype)[:, None] * frequencies.to(dtype)  # (batch, dim / 2)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def position_table(dim: int, rows: int, columns: int | None = None) -> Tensor:
    """Fixed embedding of the places of a grid.

    Args:
        dim: Width, a multiple of 4. The first half of a vector tells the column, the second half
            the row, each by sines and then cosines.
        rows: Height of the grid.
        columns: Its width; None: as its height.

    Returns:
        `(rows * columns, dim)` float32, row by row.
    """
    columns = rows if columns is None else columns
    return _embed_places(
        dim, torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64)
    )


def centred_position_table(
    dim: int, rows: int, columns: int, side: int, scaled_side: int, device: torch.device
) -> Tensor:
    """Fixed embedding of the places of a grid that is not square, in the middle of larger ones.

    A square grid has the places 0, 1, ... of `position_table`; others are cut out of the middle of
    a large one around it (Esser et al. 2024, arXiv 2403.03206, 4.2). Where the middle is
    between two places, there is one more in front.

    Args:
        dim: Width, a multiple of 4; see `position_table`.
        rows: Height of the grid.
        columns: Its width.
        side: Height and width of a square grid of as many places.
        scaled_side: Places are scaled such that those of the square grid end here.
        device: Where the table is needed.

    Returns:
        `(rows * columns, dim)` float32, row by row.
    """
    row, column = (
        (torch.arange(n, dtype=torch.float64, device=device) + (side - n) // 2)
        * (scaled_side / side)
        for n in (rows, columns)
    )
    return _embed_places(dim, row, column)


def _embed_places(dim: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Embed the places of rows and columns, each float64; see `position_table`."""
    powers = torch.arange(dim // 4, dtype=torch.float64, device=rows.device) / (dim // 4)
    row, column = (torch.outer(places, 10000.0**-powers) for places in (rows, columns))
    row, column = (torch.cat([x.sin(), x.cos()], 1).float() for x in (row, column))
    shape = len(rows), len(columns), dim // 2
    return torch.cat([column[None].expand(shape), row[:, None].expand(shape)], 2).flatten(0, 1)


class TimestepEmbedder(nn.Module):
    """Two layers on `timestep_features`.

    State dict:

        w1.weight  (dim, features)    w1.bias  (dim,)
        w2.weight  (dim, dim)         w2.bias  (dim,)
    """

    def __init__(self, num_features: int, dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(num_features, dim)
        self.w2 = nn.Linear(dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        """`(batch, features)` -> `(batch, dim)`."""
        return self.w2(F.silu(self.w1(features.to(self.w1.weight.dtype))))

    def init_weights(self) -> None:
        """Initialise all weights."""
        for linear in (self.w1, self.w2):
            init.normal_(linear.weight, std=EMBEDDING_STD)
            nn.init.zeros_(linear.bias)


class LabelEmbedder(nn.Embedding):
    """A vector for each class, and one more, number `num_classes`, for "no class".

    State dict:

        weight  (classes + 1, dim)
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__(num_classes + 1, dim)

    def init_weights(self) -> None:
        """Initialise all weights."""
        init.normal_(self.weight, std=EMBEDDING_STD)
