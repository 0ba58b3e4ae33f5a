"""Random changes of the training images of a classifier: crops, RandAugment and erasing.

They are made of the square pictures that models see, and after mirroring (`multimodal.random_flip`)
in this order. What is drawn for a sample follows from the seed and its number alone, so it is the
same on any rank, in any worker and after a resume.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_mixtures.classifier_config import Classification
from torchtitan_mixtures.data.rand_augment import rand_augment
from torchtitan_mixtures.data.sources import document_rng

_TRIALS = 10
"""Rectangles that are drawn until one fits into the picture."""

_CROP_ASPECTS = (3 / 4, 4 / 3)
_ERASED_AREAS = (0.02, 0.33)
_ERASED_ASPECTS = (0.3, 3.3)


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed: keys of `[classification]`, which say what they mean."""

    random_crop: float
    rand_augment_ops: int
    rand_augment_magnitude: float
    rand_augment_share: float
    random_erasing: float

    @staticmethod
    def of(config: Classification) -> Augmentation:
        """Take the keys of a section."""
        return Augmentation(**{key: getattr(config, key) for key in AUGMENTATION_KEYS})

    def apply(self, image: Tensor, seed: int, number: int) -> Tensor:
        """Change an image.

        Args:
            image: Pixels in [-1, 1], `(3, height, width)`; stays as it is.
            seed: `multimodal.seed`.
            number: Of the sample in the run.

        Returns:
            Like `image`.
        """
        if self.random_crop < 1:
            image = random_crop(image, document_rng(seed, number, "crop"), self.random_crop)
        if self.rand_augment_ops:
            rng = document_rng(seed, number, "rand_augment")
            if rng.random() < self.rand_augment_share:
                ops, magnitude = self.rand_augment_ops, self.rand_augment_magnitude
                image = rand_augment(image, rng, ops, magnitude)
        if self.random_erasing:
            rng = document_rng(seed, number, "erasing")
            if rng.random() < self.random_erasing:
                image = random_erasing(image, rng)
        return image


AUGMENTATION_KEYS = tuple(field.name for field in fields(Augmentation))
"""Keys of `[classification]` on which the samples of a classifier depend."""


def random_crop(image: Tensor, rng: random.Random, least_area: float) -> Tensor:
    """Cut out a random rectangle and scale it to the size of the picture, by bicubic interpolation.

    Args:
        image: Pixels in [-1, 1], `(3, height, width)`.
        rng: Draws the rectangle: its share of the area evenly, its aspect evenly in the logarithm.
        least_area: Least share.

    Returns:
        Like `image`.
    """
    rectangle = _draw_rectangle(image, rng, (least_area, 1), _CROP_ASPECTS)
    if rectangle is None:
        return image
    top, left, height, width = rectangle
    part = image[None, :, top : top + height, left : left + width]
    size = image.shape[1:]
    scaled = F.interpolate(part, size, mode="bicubic", align_corners=False, antialias=True)[0]
    return scaled.clamp(-1, 1)  # bicubic interpolation overshoots


def random_erasing(image: Tensor, rng: random.Random) -> Tensor:
    """Replace a random rectangle by even noise (Zhong et al. 2017, arXiv 1708.04896, algorithm 1).

    Args:
        image: Pixels in [-1, 1], `(3, height, width)`.
        rng: Draws the rectangle, as that of `random_crop`, and the noise.

    Returns:
        Like `image`.
    """
    rectangle = _draw_rectangle(image, rng, _ERASED_AREAS, _ERASED_ASPECTS)
    if rectangle is None:
        return image
    top, left, height, width = rectangle
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    noise = torch.rand(image.shape[0], height, width, generator=generator)
    erased = image.clone()
    erased[:, top : top + height, left : left + width] = noise * 2 - 1
    return erased


def _draw_rectangle(
    image: Tensor,
    rng: random.Random,
    areas: tuple[float, float],
    aspects: tuple[float, float],
) -> tuple[int, int, int, int] | None:
    """Draw top, left, height and width; None if those that were drawn do not fit."""
    full_height, full_width = image.shape[1:]
    for _ in range(_TRIALS):
        area = rng.uniform(*areas) * full_height * full_width
        aspect = math.exp(rng.uniform(*map(math.log, aspects)))
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < height <= full_height and 0 < width <= full_width:
            top, left = rng.randint(0, full_height - height), rng.randint(0, full_width - width)
            return top, left, height, width
    return None
