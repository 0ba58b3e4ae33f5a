"""Images as files hold them, made into the square RGB pixels that image tokenizers take."""

from __future__ import annotations

import re
import warnings
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError


def decode_image(value: Any, size: int) -> NDArray[np.uint8]:
    """Decode, put on white, crop to the centre square and resize.

    Args:
        value: A PIL image, `{"bytes", "path"}`, the bytes of a file, or a path (local, or one that
            `datasets` can open while streaming).
        size: Height and width of the result.

    Returns:
        `(size, size, 3)` uint8, RGB.

    Raises:
        ValueError: A broken file, a picture that unpacks to an absurd size, or a value of another
            kind; the cause is what the library below raised.
    """
    image = open_image(value)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), np.uint8)


def open_image(value: Any) -> Image.Image:
    """Decode and put on white.

    Args:
        value: See `decode_image`.

    Returns:
        An RGB image, upright.

    Raises:
        ValueError: See `decode_image`.
    """
    if isinstance(value, bytes) and not value:
        raise ValueError("the file is empty")
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice its limit: enough to fill the memory of many workers.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _to_rgb(_open_image(value))
    except MemoryError:
        raise  # of this machine, not of the file
    except UnidentifiedImageError as error:
        raise ValueError(
            "not an image in a known format (UnidentifiedImageError); convert it to JPEG, PNG or "
            "WebP"
        ) from error
    # On broken bytes Pillow's formats raise OSError, SyntaxError, struct.error, zlib.error,
    # IndexError and more, and a remote path what its file system raises: no class is narrower.
    except Exception as error:
        # Without the addresses of objects, which say nothing and differ from run to run.
        reason = re.sub(r"<\S+ object at 0x\w+>", "it", str(error))
        is_plain = type(error) is ValueError and reason
        raise ValueError(reason if is_plain else f"{type(error).__name__}: {reason}") from error


def _open_image(value: Any) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, bytes):
        value = {"bytes": value, "path": None}
    elif isinstance(value, str):
        value = {"bytes": None, "path": value}
    if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
        raise ValueError(f"not an image, its bytes or a path but {type(value).__name__}")
    # Opens local and remote paths, loads all pixels and turns them upright.
    return datasets.Image().decode_example({"bytes": value.get("bytes"), "path": value.get("path")})


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey of more bits, which Pillow would clip at 255.

    Raises:
        ValueError: Nothing says which of its values is white.
    """
    grey = np.asarray(image)
    # Mode I holds a PGM of more than 8 bits, scaled to 16, and a TIFF of 32 bit integers as it is.
    if image.mode == "F" or (image.mode == "I" and (grey.min() < 0 or grey.max() >= 2**16)):
        kind = "floats" if image.mode == "F" else "32 bit integers"
        raise ValueError(
            f"its values are {kind} from {grey.min():g} to {grey.max():g}, of which nothing says "
            "how bright they are; convert it to 8 or 16 bits"
        )
    return Image.fromarray((grey >> 8).astype(np.uint8))
