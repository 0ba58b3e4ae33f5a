"""Image files made into square pictures, cropped as is usual for models of ImageNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif",
    ".tiff", ".webp",
)  # fmt: skip

_MAX_RATIO = 8
"""Of the long side to the short one; what is beyond it is cut off before anything is enlarged."""


Rectangle = tuple[int, int, int, int]
"""Top, left, height and width."""

Crop = Callable[[int, int], Rectangle | None]
"""Given height and width of a picture: what to keep of it; None: as `crop_centre` does."""


class BrokenImageError(ValueError):
    """An image that cannot be read, among others that can; says why, not which."""


def read_picture(path: str, size: int, crop: Crop | None = None) -> NDArray[np.uint8]:
    """Decode a file, put it on white and crop it.

    Args:
        path: The file.
        size: Height and width of the result.
        crop: See `crop_picture`.

    Returns:
        `(size, size, 3)` uint8, RGB.

    Raises:
        BrokenImageError: A broken file, or a picture that unpacks to an absurd size; the cause is
            what the library below raised.
    """
    # Imported late: `datasets`, which opens what it reads, takes a second.
    from torchtitan_mixtures.data.images import open_image

    try:
        content = Path(path).read_bytes()
        if not content:
            raise ValueError("empty file")
        picture = open_image(content)
    except (OSError, ValueError) as error:
        raise BrokenImageError(str(error)) from error
    return crop_picture(picture, size, crop)


def crop_picture(picture: Image.Image, size: int, crop: Crop | None = None) -> NDArray[np.uint8]:
    """Make a picture square.

    Args:
        picture: RGB, of any size.
        size: Height and width of the result.
        crop: Chooses a rectangle, which is scaled by bicubic interpolation; None: `crop_centre`.

    Returns:
        `(size, size, 3)` uint8.
    """
    rectangle = None if crop is None else crop(picture.height, picture.width)
    if rectangle is None:
        return np.asarray(crop_centre(picture, size), np.uint8)
    top, left, height, width = rectangle
    box = (left, top, left + width, top + height)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box), np.uint8)


def crop_centre(picture: Image.Image, size: int) -> Image.Image:
    """Shrink a picture until its short side is `size`, and keep the square in its middle.

    As in guided diffusion (ADM) and DiT, so that statistics of the same images agree.

    Args:
        picture: Of any size.
        size: Height and width of the result.
    """
    return crop_to_cover(picture, size, size)


def crop_to_cover(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Shrink a picture until it just covers a rectangle, and keep what is in the middle.

    Halved by the mean of 2 x 2 pixels while it is at least twice as large as needed, then resized
    once by bicubic interpolation. Smaller pictures are enlarged.

    Args:
        picture: Of any size.
        height: Of the result.
        width: Of the result.
    """
    longest = _MAX_RATIO * min(picture.size)
    if max(picture.size) > longest:
        # A line of 1 x 60,000 pixels would otherwise be enlarged along its whole length.
        picture = _cut(picture, *(min(side, longest) for side in picture.size))
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    resized = round(picture.width * scale), round(picture.height * scale)
    return _cut(picture.resize(resized, Image.Resampling.BICUBIC), width, height)


def _cut(picture: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
