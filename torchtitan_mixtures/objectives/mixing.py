"""Mixing pairs of images and of their classes, on the device and without a loop over pixels.

mixup (Zhang et al. 2018, arXiv 1710.09412) blends two images; CutMix (Yun et al. 2019, arXiv
1905.04899) puts a rectangle of one into the other. Deviation from both: partners are neighbours in
the order of a run's samples instead of a permutation of a batch, and each pair draws for itself. So
what becomes of a sample depends on its number and the seed alone, not on ranks, batches or devices.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchtitan_mixtures.classifier_config import Classification
from torchtitan_mixtures.data.sources import document_rng


class Mix(NamedTuple):
    """What is drawn for pairs of images.

    Attributes:
        blend: Share of an image that is left after mixup, `(pairs,)` float32; else 1.
        box: Rectangle that CutMix swaps, `(pairs, 4)` int64: top, bottom, left, right; else empty.
        share: Share of an image's own classes in its targets, `(pairs,)` float32.
    """

    blend: Tensor
    box: Tensor
    share: Tensor


def is_mixed(config: Classification) -> bool:
    """Say whether training images are mixed."""
    return config.mixup > 0 or config.cutmix > 0


def check_mixing(config: Classification, local_batch_size: int) -> None:
    """Check that each image has its partner in the same batch.

    Raises:
        ValueError: Names the keys.
    """
    if is_mixed(config) and local_batch_size % 2:
        key = "mixup" if config.mixup > 0 else "cutmix"
        raise ValueError(
            f"training.local_batch_size = {local_batch_size}: must be even with "
            f"classification.{key} = {getattr(config, key)}, as images are mixed in pairs."
        )


def draw_mix(seed: int, samples: Tensor, size: tuple[int, int], mixup: float, cutmix: float) -> Mix:
    """Draw how the images of a batch are mixed.

    Args:
        seed: Of the run.
        samples: Number of each sample in the run, `(batch,)` int64, on the CPU; an even number, and
            each second one the successor of that before it, its partner.
        size: Height and width of the images.
        mixup: Parameter of the beta distribution of the share that an image keeps; 0: no mixup.
        cutmix: Parameter of that of the area that an image keeps; 0: no CutMix. With both, a pair
            does one of them by a fair coin.

    Returns:
        Of each pair, on the CPU.
    """
    # Drawn by NumPy, as PyTorch's beta distribution takes no generator.
    kept, cuts, places = [], [], []
    for number in samples[::2].tolist():
        rng = np.random.default_rng(document_rng(seed, number // 2, "mix").getrandbits(64))
        does_cut = mixup == 0 or (cutmix > 0 and rng.random() < 0.5)
        parameter = cutmix if does_cut else mixup
        kept.append(rng.beta(parameter, parameter))
        cuts.append(does_cut)
        places.append(rng.random(2))
    share, does_cut = np.array(kept), np.array(cuts)
    extent, place = np.array([size]), np.array(places).reshape(-1, 2)
    # A rectangle of that area around a pixel anywhere, as far as it lies in the image.
    half = np.sqrt(1 - share)[:, None] * extent / 2
    centre = np.floor(place * extent) + 0.5
    first, last = (np.clip(np.round(centre + s * half), 0, extent) for s in (-1, 1))
    last = np.where(does_cut[:, None], last, first)  # empty
    area = (last - first).prod(1) / extent.prod()
    box = np.stack([first[:, 0], last[:, 0], first[:, 1], last[:, 1]], 1)
    return Mix(
        blend=torch.from_numpy(np.where(does_cut, 1.0, share)).float(),
        box=torch.from_numpy(box).long(),
        share=torch.from_numpy(np.where(does_cut, 1 - area, share)).float(),
    )


def swap_partners(tensor: Tensor) -> Tensor:
    """Put into each row of a batch `(batch, ...)` its partner's."""
    return tensor.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """Mix each image with its partner, and that one with it.

    Args:
        images: `(batch, channels, height, width)`.
        mix: What was drawn, on the same device.

    Returns:
        As `images`.
    """
    partners = swap_partners(images)
    blend, box = (rows.repeat_interleave(2, 0) for rows in (mix.blend, mix.box))
    mixed = torch.lerp(images, partners, (1 - blend)[:, None, None, None].to(images.dtype))
    top, bottom, left, right = box[:, :, None].unbind(1)  # (batch, 1) each
    y, x = (torch.arange(n, device=images.device) for n in images.shape[2:])
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    is_inside = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(is_inside, partners, mixed)
