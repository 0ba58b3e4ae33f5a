"""Encodes images into latents, once, so that training needs no VAE.

Images are those of a folder with one folder for each class, or a data set's that has captions.

The result is described in `latents.py`, how it is written in `encoding_folder.py`. Images that
cannot be read are left out and named.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torchtitan_mixtures.data.encode_sources import (
    CaptionedImage,
    EncodableImages,
    Encoding,
    Sources,
    describe,
    open_captioned,
    open_folders,
)
from torchtitan_mixtures.data.encoding_folder import begin_folder, read_shard, write_shard
from torchtitan_mixtures.data.image_batches import split_evenly
from torchtitan_mixtures.data.image_files import BrokenImageError
from torchtitan_mixtures.data.image_sets import ClassImage
from torchtitan_mixtures.data.latents import (
    FORMAT_VERSION,
    INDEX,
    LatentIndex,
    LatentShard,
)
from torchtitan_mixtures.data.vae import Vae, load_vae, read_vae_config

_BROKEN = "broken"
"""A shard's note: the images left out of it."""


def encode(encoding: Encoding, report: Callable[[str], None]) -> LatentIndex:
    """Encode a folder of images, or what is left of it.

    Args:
        encoding: What to encode.
        report: Is told of progress and of broken images, in lines.

    Returns:
        What was written as `latents.json`.

    Raises:
        ValueError: Something is missing or does not fit, the folder to write holds something else,
            or too many images are broken.
    """
    config = read_vae_config(encoding.vae)
    if encoding.size < 1 or encoding.size % config.factor:
        raise ValueError(
            f"--size {encoding.size}: must be a multiple of {config.factor}, by which latents of "
            f'"{encoding.vae}" are smaller.'
        )
    if encoding.batch_size < 1:
        raise ValueError(f"--batch-size {encoding.batch_size}: must be at least 1.")
    if encoding.caption_column:
        sources = open_captioned(encoding, config.factor)
    else:
        sources = open_folders(encoding)
    size = encoding.size // config.factor
    moments = 4 if encoding.flip else 2
    image_bytes = config.channels * size**2 * moments * (2 if encoding.half else 4)
    per_shard = max(1, encoding.shard_bytes // image_bytes)
    about = {
        "channels": config.channels,
        "size": size,
        "picture_size": encoding.size,
        "scaling_factor": config.scaling,
        "shift_factor": config.shift,
        "vae_sha256": _hash_vae(Path(encoding.vae).expanduser()),
        "dtype": "float16" if encoding.half else "float32",
        "is_flipped": encoding.flip,
    }
    names = {split: images.fingerprint() for split, images in sources.splits.items()}
    plan = {"format_version": FORMAT_VERSION, **about, "images in a shard": per_shard}
    others = {split: f"other {'training' if split == 'train' else split} images" for split in names}
    begin_folder(encoding.out, {**plan, **sources.plan, **names}, "latents", others)
    if (encoding.out / INDEX).is_file():
        report(f"{encoding.out} is complete already")
        return LatentIndex.read(encoding.out)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    encoder = _Encoder(encoding, load_vae(encoding.vae, device), device, report)
    shards = {split: encoder.encode_split(split, sources, per_shard) for split in sources.splits}
    index = LatentIndex(**about, splits=shards, **sources.index)
    index.write(encoding.out)
    return index


class _Encoder:
    """Encodes one split after the other, and counts over all of them."""

    def __init__(
        self, encoding: Encoding, vae: Vae, device: torch.device, report: Callable[[str], None]
    ) -> None:
        self._encoding = encoding
        self._vae = vae
        self._device = device
        self._dtype = torch.float16 if encoding.half else torch.float32
        self._report = report
        self._num_seen = 0
        self._broken: list[str] = []
        self._next_report = time.monotonic()

    def encode_split(self, split: str, sources: Sources, per_shard: int) -> tuple[LatentShard, ...]:
        """Encode what is not encoded yet, and list all shards of the split."""
        images, buckets = sources.splits[split], sources.buckets[split]
        parts = [
            _Part(split, bucket, shape, numbers)
            for bucket, shape in enumerate(sources.shapes)
            for numbers in split_evenly(np.flatnonzero(buckets == bucket), per_shard)
        ]
        shards, num_done = [], 0
        for part in parts:
            path = self._encoding.out / f"{split}-{len(shards):05d}.safetensors"
            if not path.is_file():
                self._write_shard(path, images, part, num_done)
            num_images, broken = read_shard(path, "mean", _BROKEN)
            num_done += len(part.numbers)
            self._num_seen += len(part.numbers)
            self._broken += broken
            self._judge(is_end=num_done == len(images))
            shards.append(LatentShard(path.name, num_images, path.stat().st_size, part.bucket))
        return tuple(shards)

    def _write_shard(self, path: Path, images: EncodableImages, part: _Part, num_done: int) -> None:
        loader = DataLoader(
            _Pictures(images, part.numbers),
            self._encoding.batch_size,
            num_workers=self._encoding.num_workers,
            collate_fn=list,
        )
        batches: list[dict[str, Tensor]] = []
        broken: list[str] = []
        for batch in loader:
            broken += [item for item in batch if isinstance(item, str)]
            read = [item for item in batch if not isinstance(item, str)]
            if read:
                batches.append(self._encode_batch(read))
            num_done += len(batch)
            if time.monotonic() >= self._next_report or num_done == len(images):
                self._report(f"{part.split}: {num_done} of {len(images)} images")
                self._next_report = time.monotonic() + 10
        for name in broken:
            self._report(f"broken image left out: {name}")
        batches = batches or [self._encode_nothing(part.shape)]
        tensors = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        write_shard(path, tensors, {_BROKEN: broken})

    def _encode_batch(self, read: list[Any]) -> dict[str, Tensor]:
        """The tensors of a shard for some images."""
        pixels = torch.stack([item.image for item in read]).to(self._device)
        tensors = dict(zip(("mean", "std"), self._vae.moments(pixels), strict=True))
        if self._encoding.flip:
            flipped = self._vae.moments(pixels.flip(-1))
            tensors |= dict(zip(("mean_flipped", "std_flipped"), flipped, strict=True))
        tensors = {key: part.to("cpu", self._dtype).contiguous() for key, part in tensors.items()}
        if not all(part.isfinite().all() for part in tensors.values()):
            remedy = "encode without --half, or use" if self._encoding.half else "use"
            raise ValueError(
                f"--vae {self._encoding.vae}: returns latents that are not finite numbers; "
                f"{remedy} another VAE."
            )
        return {**tensors, **describe(read, bool(self._encoding.caption_column))}

    def _encode_nothing(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        """The tensors of a shard of whose images, `shape` each, none can be read."""
        sides = [side // self._vae.factor for side in shape]
        names = ("mean", "std", "mean_flipped", "std_flipped")[: 4 if self._encoding.flip else 2]
        tensors = {
            name: torch.zeros(0, self._vae.channels, *sides, dtype=self._dtype) for name in names
        }
        return {**tensors, **describe([], bool(self._encoding.caption_column))}

    def _judge(self, is_end: bool) -> None:
        """Stop if too many images are broken, once there are enough of them to tell."""
        limit = self._encoding.max_bad_fraction
        if len(self._broken) > limit * self._num_seen and (is_end or self._num_seen >= 100):
            raise ValueError(
                f"{len(self._broken)} of {self._num_seen} images are broken; --max-bad-fraction "
                f"{limit} allows {limit:.1%}. Among them: {'; '.join(self._broken[:5])}. Repair "
                "them and delete what was written, or raise the limit."
            )


class _Part(NamedTuple):
    """What becomes one shard: images of a split, all of one shape."""

    split: str
    bucket: int
    shape: tuple[int, int]
    numbers: NDArray[np.int64]


class _Pictures(Dataset):
    """Some images of a split; in place of a broken one what is wrong with it."""

    def __init__(self, images: EncodableImages, numbers: NDArray[np.int64]) -> None:
        self._images = images
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> ClassImage | CaptionedImage | str:
        number = int(self._numbers[index])
        try:
            return self._images.read(number)
        except BrokenImageError as error:
            return f"{self._images.key(number)} ({error})"


def _hash_vae(folder: Path) -> str:
    """Hash the files that decide what latents look like."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
