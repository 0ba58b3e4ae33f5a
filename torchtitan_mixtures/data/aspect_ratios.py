"""Shapes of about one area that images are cropped to, each image to the one nearest to its own.

An aspect ratio is written "width:height", so "4:3" is wider than high.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_RATIO = 4
"""Of the long side to the short one of a shape."""

_KEY = "multimodal.aspect_ratios"
_ALLOWED = f'two whole numbers "width:height" from "1:{MAX_RATIO}" to "{MAX_RATIO}:1", as "4:3"'


@dataclass(frozen=True)
class Bucket:
    """A shape that images are cropped to.

    Attributes:
        name: Its aspect ratio as the user writes it.
        height: Of what the model sees: pixels, or latents.
        width: Likewise.
    """

    name: str
    height: int
    width: int


def parse_ratio(text: str, key: str = _KEY) -> float:
    """Read "width:height" as width / height.

    Args:
        text: What the user wrote.
        key: Where, for the message.

    Raises:
        ValueError: It is not two whole numbers, or one side is too long; says what is allowed.
    """
    match = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", text) if isinstance(text, str) else None
    width, height = map(int, match.groups()) if match else (0, 0)
    if not width or not height or max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"{key}: {text!r} is no aspect ratio it takes; allowed are {_ALLOWED}.")
    return width / height


def make_buckets(
    ratios: Sequence[str], size: int, patch_size: int, key: str = _KEY
) -> tuple[Bucket, ...]:
    """Lay out the shapes of a job, in the order of `ratios`.

    Args:
        ratios: Their aspect ratios; none = one square.
        size: Side of the square of their area, in what the model sees.
        patch_size: Sides are multiples of it.
        key: Where `ratios` stand, for messages.

    Raises:
        ValueError: A ratio is malformed or too long, or two make the same shape.
    """
    if not ratios:
        return (Bucket("1:1", size, size),)
    names: dict[tuple[int, int], str] = {}
    for text in ratios:
        root = math.sqrt(parse_ratio(text, key))
        shape = (_round(size / root, patch_size), _round(size * root, patch_size))
        if shape in names:
            raise ValueError(
                f"{key}: {names[shape]!r} and {text!r} are both {shape[0]} x {shape[1]} (height x "
                f"width) at a size of {size} in patches of {patch_size}; remove one of them."
            )
        names[shape] = text
    return tuple(Bucket(name, *shape) for shape, name in names.items())


def _round(side: float, patch_size: int) -> int:
    return max(1, math.floor(side / patch_size + 0.5)) * patch_size


def find_bucket(buckets: Sequence[Bucket], name: str) -> Bucket:
    """Find a shape by its aspect ratio, for sampling.

    Raises:
        ValueError: The model was not trained with it; lists those that it was.
    """
    for bucket in buckets:
        if bucket.name == name:
            return bucket
    known = ", ".join(bucket.name for bucket in buckets)
    raise ValueError(f'--aspect-ratio "{name}": unknown aspect ratio; the model has {known}.')


def nearest_bucket(
    buckets: Sequence[Bucket], heights: NDArray[np.integer], widths: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Find the shape of which least of a picture is cut away.

    Args:
        buckets: The shapes.
        heights: Of pictures, `(pictures,)`, in any unit.
        widths: Likewise.

    Returns:
        Number of the shape of each, `(pictures,)` int64; the first of those equally near.
    """
    shapes = np.array([math.log(bucket.width / bucket.height) for bucket in buckets])
    pictures = np.log(np.asarray(widths, np.float64) / np.asarray(heights, np.float64))
    # Rounded, so that the last bit of a logarithm does not decide between equals.
    distances = np.abs(pictures[:, None] - shapes).round(9)  # (pictures, buckets)
    return distances.argmin(1)
