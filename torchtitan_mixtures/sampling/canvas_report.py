"""What is told of a canvas: all that it was drawn by, how seams are seen, and where regions lie."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from torchtitan_mixtures.sampling.canvas import (
    Canvas,
    Rectangle,
    Region,
    blending_weights,
    seam_energy,
)

_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")
_LEAST_SIDE = 256
"""Of the picture of places, so that numbers can be read."""


def describe(canvas: Canvas, cell: int, picture: Tensor) -> dict[str, Any]:
    """Say all that a canvas was drawn by, for JSON.

    Args:
        canvas: The canvas.
        cell: Pixels to a side of a cell of latents.
        picture: What was drawn, `(channels, height, width)`.
    """
    weights = blending_weights(canvas, cell)
    cells = canvas.width * canvas.height / cell**2
    drawn = [bool((weight > 0).any()) for weight in weights]
    places = [r.rectangle for r, is_drawn in zip(canvas.regions, drawn, strict=True) if is_drawn]
    return {
        "width": canvas.width,
        "height": canvas.height,
        "pixels_per_cell": cell,
        "regions": [
            # Its share of all that is drawn.
            {**_describe_region(region), "share": weight.sum().item() / cells}
            for region, weight in zip(canvas.regions, weights, strict=True)
        ],
        "images": [
            {**asdict(image.rectangle), "path": str(image.path), "strength": image.strength}
            for image in canvas.images
        ],
        "rerolls": [
            {**asdict(reroll.rectangle), "seed": reroll.seed, "epsilon": reroll.epsilon}
            for reroll in canvas.rerolls
        ],
        "seams": seam_energy(picture, places),
    }


def _describe_region(region: Region) -> dict[str, Any]:
    entry = asdict(region)
    place, subject = entry.pop("rectangle"), entry.pop("subject")
    key = "prompt" if isinstance(subject, str) else "class_label"
    return {"name": entry.pop("name"), **place, key: subject, **entry}


def draw_places(picture: NDArray[np.uint8], canvas: Canvas) -> NDArray[np.uint8]:
    """Draw borders of regions, and their names, onto a picture that is made pale.

    Args:
        picture: `(height, width, 3)` uint8.
        canvas: Its regions and reference images.

    Returns:
        `(height, width, 3)` uint8, small pictures enlarged.
    """
    factor = max(1, -(-_LEAST_SIDE // min(canvas.width, canvas.height)))
    large = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    sheet = Image.blend(Image.fromarray(large), Image.new("RGB", large.shape[1::-1], "white"), 0.7)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    named = [(region.name, region.rectangle) for region in canvas.regions]
    named += [(f"images[{i}]", image.rectangle) for i, image in enumerate(canvas.images)]
    for number, (name, place) in enumerate(named):
        colour = _COLOURS[number % len(_COLOURS)]
        _draw_border(draw, place, factor, colour, inset=2 * (number % 3))
        corner = factor * place.left + 4, factor * place.top + 4 + 12 * (number % 3)
        draw.text(corner, name, colour, font, stroke_width=2, stroke_fill="white")
    return np.asarray(sheet)


def _draw_border(
    draw: ImageDraw.ImageDraw, place: Rectangle, factor: int, colour: str, inset: int
) -> None:
    """Draw a rectangle's border; insets keep those apart that lie on each other."""
    left, top = factor * place.left + inset, factor * place.top + inset
    right = factor * (place.left + place.width) - 1 - inset
    bottom = factor * (place.top + place.height) - 1 - inset
    if left <= right and top <= bottom:
        draw.rectangle((left, top, right, bottom), outline=colour, width=2)
