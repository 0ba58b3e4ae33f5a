"""Canvases: images larger than a model's, of regions that each have a subject of their own.

Source: Barbero Jimenez 2023 (arXiv 2302.02412): a model predicts each region of the noisy canvas by
itself, and what it says of a place is the mean of the regions there, weighed by a kernel. One step
of a sampler then moves the whole canvas, so that seams are blended at every step.

Deviations: kernels are symmetric in both directions; places that no region covers are an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Rectangle:
    """Part of a canvas, in pixels or in cells of latents; the origin is at the top left."""

    left: int
    top: int
    width: int
    height: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns."""
        rows = slice(self.top, self.top + self.height)
        return rows, slice(self.left, self.left + self.width)

    def crop(self, canvas: Tensor) -> Tensor:
        """The rectangle of `(..., height, width)`, as a view."""
        rows, columns = self.slices
        return canvas[..., rows, columns]

    def in_cells(self, cell: int) -> Rectangle:
        """The same rectangle where `cell` pixels are one."""
        sides = self.left, self.top, self.width, self.height
        return Rectangle(*(side // cell for side in sides))


@dataclass(frozen=True)
class Region:
    """A part of the canvas with a subject.

    Attributes:
        name: What the canvas file calls it, as `regions[0]`.
        rectangle: Where, in pixels.
        subject: A prompt, or the number of a class.
        guidance: See `[sampling]`; 1 = none.
        kernel: How its weight falls towards its borders, a key of `KERNELS`.
        weight: Multiplies the kernel. A region of weight 0 is not drawn.
        seed: Of the noise in the rectangle; None: that of the canvas.
        negative_prompt: What guidance leads away from; empty: from no prompt.
    """

    name: str
    rectangle: Rectangle
    subject: str | int
    guidance: float
    kernel: str = "gaussian"
    weight: float = 1.0
    seed: int | None = None
    negative_prompt: str = ""


@dataclass(frozen=True)
class ReferenceImage:
    """A picture that a part of the canvas is to be like.

    Attributes:
        rectangle: Where, in pixels.
        path: The picture's file.
        picture: What is in it, RGB, of any size.
        strength: Share of the steps after which it is imposed, see `count_imposed_steps`.
    """

    rectangle: Rectangle
    path: Path
    picture: Image.Image
    strength: float


@dataclass(frozen=True)
class Reroll:
    """A part of the canvas whose noise is another one.

    Attributes:
        rectangle: Where, in pixels.
        seed: Of the new noise.
        epsilon: How much of it comes to what was there, see `mix_noise`; None: it replaces that.
    """

    rectangle: Rectangle
    seed: int
    epsilon: float | None = None


@dataclass(frozen=True)
class Canvas:
    """What is to be drawn where. Later regions and rerolls come on top of earlier noise.

    Attributes:
        width: In pixels, as `height`.
        regions: In the order of their numbers.
        images: Later ones win where they overlap.
        rerolls: One after the other.
    """

    width: int
    height: int
    regions: tuple[Region, ...]
    images: tuple[ReferenceImage, ...] = ()
    rerolls: tuple[Reroll, ...] = ()

    def cells(self, cell: int) -> tuple[int, int]:
        """Height and width of its latents, of `cell` pixels to a side."""
        return self.height // cell, self.width // cell


def _gaussian(size: int) -> Tensor:
    """Density of a normal distribution whose deviation is a tenth of the region."""
    variance = 0.01
    offsets = (torch.arange(size, dtype=torch.float64, device="cpu") - (size - 1) / 2) / size
    return (-offsets.square() / (2 * variance)).exp() / math.sqrt(2 * math.pi * variance)


def _quartic(size: int) -> Tensor:
    end = 0.995 if size > 1 else 0.0  # 1 would leave nothing at the borders
    places = torch.linspace(-end, end, size, dtype=torch.float64, device="cpu")
    return 15 / 16 * (1 - places.square()).square()


def _constant(size: int) -> Tensor:
    return torch.ones(size, dtype=torch.float64, device="cpu")


KERNELS: Mapping[str, Callable[[int], Tensor]] = {
    "constant": _constant,
    "gaussian": _gaussian,
    "quartic": _quartic,
}
"""By name: from the cells of a side to the weight of each, `(size,)` float64."""


def kernel_weights(kernel: str, height: int, width: int) -> Tensor:
    """Weight of each cell of a region, `(height, width)` float64: the product of both sides'."""
    along = KERNELS[kernel]
    return along(height)[:, None] * along(width)


def blending_weights(canvas: Canvas, cell: int) -> list[Tensor]:
    """Share of each region in each of its cells; over regions they sum to 1 wherever one is.

    Args:
        canvas: Its regions.
        cell: Pixels to a side of a cell of latents.

    Returns:
        Of each region `(height, width)` float64, in cells.
    """
    largest = max((region.weight for region in canvas.regions), default=0) or 1.0
    total = torch.zeros(*canvas.cells(cell), dtype=torch.float64, device="cpu")
    places, weights = [], []
    for region in canvas.regions:
        places.append(region.rectangle.in_cells(cell))
        weight = kernel_weights(region.kernel, places[-1].height, places[-1].width)
        weights.append(weight * (region.weight / largest))
        places[-1].crop(total).add_(weights[-1])
    total[total == 0] = 1  # where nothing weighs anything
    return [weight / place.crop(total) for place, weight in zip(places, weights, strict=True)]


def covered_cells(canvas: Canvas, cell: int) -> Tensor:
    """Which cells are in a region that weighs something, `(height, width)` bool."""
    covered = torch.zeros(*canvas.cells(cell), dtype=torch.bool, device="cpu")
    for region, weight in zip(canvas.regions, blending_weights(canvas, cell), strict=True):
        region.rectangle.in_cells(cell).crop(covered).logical_or_(weight > 0)
    return covered


def grid_side(tile: int, tiles: int, overlap: int) -> int:
    """Length of a row of overlapping tiles."""
    return tile + (tiles - 1) * (tile - overlap)


def spread_tiles(side: int, tile: int, overlap: int, cell: int) -> list[int]:
    """Where as few tiles as cover a side begin, at about equal distances.

    Args:
        side: Length to cover, at least `tile`.
        tile: Length of a tile.
        overlap: Of neighbours, at least (up to rounding to cells).
        cell: What all positions are multiples of, as the lengths are.
    """
    count = max(1, math.ceil((side - overlap) / (tile - overlap)))
    room = (side - tile) // cell
    return [cell * (room * i // max(1, count - 1)) for i in range(count)]


def count_imposed_steps(num_steps: int, strength: float) -> int:
    """After how many of the first steps a reference image is imposed.

    Args:
        num_steps: Steps in all.
        strength: 0: after none; 1: after all but the last.
    """
    return min(round(num_steps * strength), num_steps - 1)


def mix_noise(noise: Tensor, other: Tensor, epsilon: float) -> Tensor:
    """Add so much of other noise that the variance stays 1."""
    return (noise + epsilon * other) / math.sqrt(1 + epsilon**2)


def seam_energy(picture: Tensor, rectangles: Sequence[Rectangle]) -> dict[str, float | None]:
    """Compare how much neighbours differ across the borders of regions and elsewhere.

    Args:
        picture: `(channels, height, width)`.
        rectangles: The regions, in pixels. Borders of the canvas do not count.

    Returns:
        Mean squared differences `across` borders and `inside`, and their `ratio`, about 1 where no
        seams are seen. None where there is no such pair, or nothing to divide by.
    """
    height, width = picture.shape[-2:]
    rows = torch.zeros(height + 1, width, dtype=torch.bool, device=picture.device)
    columns = torch.zeros(height, width + 1, dtype=torch.bool, device=picture.device)
    for place in rectangles:
        across, along = place.slices
        rows[[across.start, across.stop], along] = True
        columns[across, [along.start, along.stop]] = True
    borders = torch.cat([rows[1:-1].flatten(), columns[:, 1:-1].flatten()])
    changes = [picture.double().diff(dim=dim).square().mean(0).flatten() for dim in (-2, -1)]
    energy = torch.cat(changes)
    across, inside = (
        energy[chosen].mean().item() if bool(chosen.any()) else None
        for chosen in (borders, ~borders)
    )
    ratio = across / inside if across is not None and inside else None
    return {"across": across, "inside": inside, "ratio": ratio}
