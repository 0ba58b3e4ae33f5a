"""Sheets of generated images: one row per prompt, its text in front."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CELL = 96
"""Least height and width of an image on a sheet; smaller ones are enlarged by a whole factor."""

COLUMNS = 16
"""Images side by side, at most."""

MAX_IMAGES = 1024
"""On a sheet; of more it says how many it leaves out."""

_GAP = 4
_LABEL_WIDTH = 180
_LETTERS_A_LINE = 28
_LINE_HEIGHT = 13


@dataclass(frozen=True)
class SheetRow:
    """The images of one prompt."""

    label: str
    images: Sequence[NDArray[np.uint8]]
    """Each `(height, width, 3)` uint8."""


def contact_sheet(rows: Sequence[SheetRow]) -> NDArray[np.uint8]:
    """Draw a sheet of images.

    Args:
        rows: What to draw; all images of one size. More than `COLUMNS` of them go on below.

    Returns:
        `(height, width, 3)` uint8, on white.
    """
    rows = _cut_rows(rows)
    pictures = [[_enlarge(image) for image in row.images] for row in rows]
    sizes = [picture.size for row in pictures for picture in row] or [(CELL, CELL)]
    cell, cell_height = map(max, zip(*sizes, strict=True))
    labels = [_wrap(row.label) for row in rows]
    heights = [max(cell_height, _LINE_HEIGHT * len(label)) for label in labels]
    columns = max(len(row) for row in pictures)
    size = (_LABEL_WIDTH + columns * (cell + _GAP) + _GAP, sum(heights) + _GAP * (len(rows) + 1))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    top = _GAP
    for row, label, height in zip(pictures, labels, heights, strict=True):
        for number, line in enumerate(label):
            draw.text((_GAP, top + _LINE_HEIGHT * number), line, fill="black", font=font)
        for column, picture in enumerate(row):
            sheet.paste(picture, (_LABEL_WIDTH + column * (cell + _GAP), top))
        top += height + _GAP
    return np.asarray(sheet)


def _cut_rows(rows: Sequence[SheetRow]) -> list[SheetRow]:
    """Cut rows into lines of `COLUMNS` images, without what exceeds `MAX_IMAGES`."""
    lines, room = [], MAX_IMAGES
    for row in rows:
        images = row.images[:room]
        for first in range(0, max(1, len(images)), COLUMNS):
            part = images[first : first + COLUMNS]
            lines.append(SheetRow("" if first else row.label, part))
        room -= len(images)
        if not room:
            break
    left_out = sum(len(row.images) for row in rows) - (MAX_IMAGES - room)
    return [*lines, SheetRow(f"and {left_out:,} more", [])] if left_out else lines


def _enlarge(image: NDArray[np.uint8]) -> Image.Image:
    factor = max(1, CELL // image.shape[1])
    return Image.fromarray(image.repeat(factor, axis=0).repeat(factor, axis=1))


def _wrap(label: str) -> list[str]:
    # Pillow's own font has no letters beyond these.
    known = label.encode("latin-1", "replace").decode("latin-1")
    return textwrap.wrap(known, _LETTERS_A_LINE)
