"""RandAugment on tensors: random operations of one strength on a training image.

Source: Cubuk, Zoph, Shlens, Le 2019, "RandAugment: Practical automated data augmentation with a
reduced search space", arXiv 1909.13719, whose operations and greatest strengths are those of
AutoAugment (arXiv 1805.09501, table 6).

Deviations: brightness, color, contrast and sharpness become stronger or weaker by a fair draw,
where the original makes them stronger alone and has no strength at which they do nothing; pictures
turn and shear about their middle, and by bilinear interpolation.

An operation takes and returns levels: `(3, height, width)` float32, whole numbers from 0 to 255. It
gives what Pillow gives for 8-bit pictures, but for how fractions are rounded.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FILL = 128.0
"""Level of what an operation moves into the picture from outside."""

MAX_MAGNITUDE = 10.0

_MAX_ANGLE = 30.0  # degrees
_MAX_SHEAR = 0.3
_MAX_SHIFT = 150 / 331  # share of the side; AutoAugment has 150 of 331 pixels
_MAX_ENHANCEMENT = 0.9
_MAX_LOST_BITS = 4

_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey


def rand_augment(image: Tensor, rng: random.Random, num_ops: int, magnitude: float) -> Tensor:
    """Apply `num_ops` operations, each drawn from all of them, one after the other.

    Args:
        image: Pixels in [-1, 1], `(3, height, width)`.
        rng: Draws the operations and the signs of those that have one.
        num_ops: How many.
        magnitude: Their strength, from 0 to `MAX_MAGNITUDE`.

    Returns:
        Like `image`, at 256 levels.
    """
    levels = _whole((image + 1) * 127.5)
    for name in rng.choices(list(OPERATIONS), k=num_ops):
        share = rng.choice((-1, 1)) * magnitude / MAX_MAGNITUDE
        levels = OPERATIONS[name](levels, share)
    return levels / 127.5 - 1


# --- levels ---------------------------------------------------------------------------------------


def autocontrast(levels: Tensor) -> Tensor:
    """Stretch each channel until it has the levels 0 and 255."""
    low, high = levels.amin((1, 2), keepdim=True), levels.amax((1, 2), keepdim=True)
    stretched = (levels - low) * (255 / (high - low).clamp(min=1))
    return _whole(torch.where(high > low, stretched, levels))


def equalize(levels: Tensor) -> Tensor:
    """Map the levels of each channel such that all are about as frequent."""
    return torch.stack([_equalize_channel(channel) for channel in levels])


def _equalize_channel(channel: Tensor) -> Tensor:
    indices = channel.long()
    counts = torch.bincount(indices.flatten(), minlength=256)
    # The last level that occurs becomes 255; so many pixels make each step up to there.
    step = int(counts.sum() - counts[indices.max()]) // 255
    if step == 0:
        return channel
    before = counts.cumsum(0) - counts
    return ((before + step // 2) // step).clamp(max=255)[indices].float()


def solarize(levels: Tensor, share: float) -> Tensor:
    """Invert the levels from 256 * (1 - share) on."""
    return torch.where(levels < 256 * (1 - share), levels, 255 - levels)


def posterize(levels: Tensor, share: float) -> Tensor:
    """Keep the upper bits of each level: all 8 down to 4."""
    unit = 2 ** round(share * _MAX_LOST_BITS)
    return (levels / unit).floor() * unit


# --- enhancements: from a picture that lacks something towards the picture, or away from it -------


def brightness(levels: Tensor, share: float) -> Tensor:
    """Add or remove light."""
    return _enhance(levels, torch.zeros_like(levels), share)


def color(levels: Tensor, share: float) -> Tensor:
    """Add or remove color."""
    return _enhance(levels, _grey(levels).expand_as(levels), share)


def contrast(levels: Tensor, share: float) -> Tensor:
    """Move levels away from the mean grey, or towards it."""
    return _enhance(levels, _whole(_grey(levels).mean()).expand_as(levels), share)


def sharpness(levels: Tensor, share: float) -> Tensor:
    """Sharpen or blur; the outermost pixels stay as they are."""
    blurred = levels.clone()
    if min(levels.shape[1:]) > 2:
        # Pillow's filter: the middle pixel weighs 5, its eight neighbours 1 each.
        around = F.avg_pool2d(levels, 3, stride=1) * 9 + levels[:, 1:-1, 1:-1] * 4
        blurred[:, 1:-1, 1:-1] = _whole(around / 13)
    return _enhance(levels, blurred, share)


def _enhance(levels: Tensor, lacking: Tensor, share: float) -> Tensor:
    return _whole(lacking + (1 + share * _MAX_ENHANCEMENT) * (levels - lacking))


def _grey(levels: Tensor) -> Tensor:
    """`(1, height, width)`."""
    weights = torch.tensor(_LUMA)[:, None, None]
    return _whole((levels * weights).sum(0, keepdim=True))


# --- geometry -------------------------------------------------------------------------------------


def rotate(levels: Tensor, share: float) -> Tensor:
    """Turn about the middle."""
    angle = math.radians(share * _MAX_ANGLE)
    sine, cosine = math.sin(angle), math.cos(angle)
    return _transform(levels, ((cosine, -sine, 0), (sine, cosine, 0)))


def shear_x(levels: Tensor, share: float) -> Tensor:
    """Move rows sideways, the more the farther they are from the middle one."""
    return _transform(levels, ((1, share * _MAX_SHEAR, 0), (0, 1, 0)))


def shear_y(levels: Tensor, share: float) -> Tensor:
    """Move columns up and down, the more the farther they are from the middle one."""
    return _transform(levels, ((1, 0, 0), (share * _MAX_SHEAR, 1, 0)))


def translate_x(levels: Tensor, share: float) -> Tensor:
    """Move sideways."""
    return _transform(levels, ((1, 0, share * _MAX_SHIFT * levels.shape[2]), (0, 1, 0)))


def translate_y(levels: Tensor, share: float) -> Tensor:
    """Move up or down."""
    return _transform(levels, ((1, 0, 0), (0, 1, share * _MAX_SHIFT * levels.shape[1])))


Row = tuple[float, float, float]


def _transform(levels: Tensor, matrix: tuple[Row, Row]) -> Tensor:
    """Sample a picture at other places.

    Args:
        levels: The picture, `(3, height, width)`.
        matrix: For each pixel where to sample: rows for x and y, of factors of the pixel's x and y
            and a shift, in pixels from the middle.
    """
    height, width = levels.shape[1:]
    (xx, xy, x), (yx, yy, y) = matrix
    # What PyTorch has as places: -1 and 1 are the edges of the picture.
    theta = torch.tensor(
        [[xx, xy * height / width, x * 2 / width], [yx * width / height, yy, y * 2 / height]]
    )
    places = F.affine_grid(theta[None], [1, 3, height, width], align_corners=False)
    moved = F.grid_sample(levels[None], places, padding_mode="border", align_corners=False)[0]
    is_inside = (places[0].abs() < 1).all(-1)  # (height, width)
    return torch.where(is_inside, _whole(moved), FILL)


def _whole(levels: Tensor) -> Tensor:
    return levels.round().clamp(0, 255)


# Of those without a sign the strength is taken as it is.
OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda levels, share: levels,
    "autocontrast": lambda levels, share: autocontrast(levels),
    "equalize": lambda levels, share: equalize(levels),
    "rotate": rotate,
    "solarize": lambda levels, share: solarize(levels, abs(share)),
    "color": color,
    "posterize": lambda levels, share: posterize(levels, abs(share)),
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
    "shear-x": shear_x,
    "shear-y": shear_y,
    "translate-x": translate_x,
    "translate-y": translate_y,
}
"""Operations by their names in the paper; each takes levels and a strength from -1 to 1."""
