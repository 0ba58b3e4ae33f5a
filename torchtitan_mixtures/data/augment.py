"""Random changes of the training images of a classifier: crops, RandAugment and erasing.

A crop is of the picture as its file has it; what follows is of the square that the model sees,
after mirroring (`multimodal.random_flip`). What is drawn for a sample follows from the seed and its
number alone, so it is the same on any rank, in any worker and after a resume.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from torchtitan_mixtures.classifier_config import Classification
from torchtitan_mixtures.data.image_files import Crop, Rectangle
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

    def crop(self, seed: int, number: int) -> Crop | None:
        """Choose what is seen of a picture: its area evenly, its aspect evenly in the logarithm.

        Args:
            seed: `multimodal.seed`.
            number: Of the sample in the run.
        """
        if self.random_crop == 1:
            return None
        rng, areas = document_rng(seed, number, "crop"), (self.random_crop, 1.0)
        return lambda height, width: _draw_rectangle(height, width, rng, areas, _CROP_ASPECTS)

    def apply(self, image: Tensor, seed: int, number: int) -> Tensor:
        """Change an image that was cropped.

        Args:
            image: Pixels in [-1, 1], `(3, height, width)`; stays as it is.
            seed: `multimodal.seed`.
            number: Of the sample in the run.

        Returns:
            Like `image`.
        """
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


def random_erasing(image: Tensor, rng: random.Random) -> Tensor:
    """Replace a random rectangle by even noise (Zhong et al. 2017, arXiv 1708.04896, algorithm 1).

    Args:
        image: Pixels in [-1, 1], `(3, height, width)`.
        rng: Draws the rectangle, as that of a crop, and the noise.

    Returns:
        Like `image`.
    """
    full_height, full_width = image.shape[1:]
    rectangle = _draw_rectangle(full_height, full_width, rng, _ERASED_AREAS, _ERASED_ASPECTS)
    if rectangle is None:
        return image
    top, left, height, width = rectangle
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    noise = torch.rand(image.shape[0], height, width, generator=generator)
    erased = image.clone()
    erased[:, top : top + height, left : left + width] = noise * 2 - 1
    return erased


def _draw_rectangle(
    full_height: int,
    full_width: int,
    rng: random.Random,
    areas: tuple[float, float],
    aspects: tuple[float, float],
) -> Rectangle | None:
    """Draw a rectangle; None if those that were drawn do not fit."""
    for _ in range(_TRIALS):
        area = rng.uniform(*areas) * full_height * full_width
        aspect = math.exp(rng.uniform(*map(math.log, aspects)))
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < height <= full_height and 0 < width <= full_width:
            top, left = rng.randint(0, full_height - height), rng.randint(0, full_width - width)
            return top, left, height, width
    return None
