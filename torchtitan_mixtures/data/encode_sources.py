"""What images are encoded into latents: those of class folders, or a captioned data set's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchtitan_mixtures.data.aspect_ratios import Bucket, make_buckets
from torchtitan_mixtures.data.image_files import BrokenImageError
from torchtitan_mixtures.data.image_sets import ClassFolders, ClassImage, FolderImages, to_tensor
from torchtitan_mixtures.job_config import Multimodal

if TYPE_CHECKING:
    from torchtitan_mixtures.data.prompt_datasets import CaptionedPictures

SHARD_BYTES = 1 << 28
"""About how large shards are; one is in memory while it is made."""


@dataclass(frozen=True)
class Encoding:
    """What is to be encoded, and how."""

    path: str
    """Folder of images, see `ClassFolders`, all splits of which are encoded; with `caption_column`
    a data set, as in `multimodal.path`."""

    vae: str
    """Local folder of the VAE."""

    out: Path
    """Folder to write."""

    size: int = 256
    """Height and width of the pictures, of which latents have a fraction."""

    flip: bool = False
    """Encode mirrored pictures as well, for `multimodal.random_flip`."""

    half: bool = False
    """Store float16: half the size, and an error far below the posterior's deviation."""

    max_bad_fraction: float = 0.01
    """Share of broken images above which encoding stops."""

    batch_size: int = 32
    """Pictures that the VAE encodes at a time."""

    num_workers: int = 0
    """Processes that decode files."""

    shard_bytes: int = SHARD_BYTES
    """About how large shards are."""

    caption_column: str = ""
    """Of a data set with captions: the column of them."""

    image_column: str = "image"
    """Of a data set: the column of images."""

    name: str = ""
    """Of a data set: as in `multimodal.name`."""

    data_files: tuple[str, ...] = ()
    """Of a data set: as in `multimodal.data_files`."""

    splits: tuple[str, ...] = ("train",)
    """Of a data set: splits to encode, named as training will."""

    aspect_ratios: tuple[str, ...] = ()
    """Of a data set: shapes to crop to, as in `multimodal.aspect_ratios`; none = square."""

    patch_size: int = 2
    """Of the model that will be trained; heights and widths of latents are multiples of it."""


_CAPTIONED_KEYS = ("image_column", "name", "data_files", "splits", "aspect_ratios", "patch_size")


class EncodableImages(Protocol):
    """The images of a split."""

    def __len__(self) -> int:
        """Count the images."""
        ...

    def read(self, index: int) -> ClassImage | CaptionedImage:
        """Read an image.

        Raises:
            BrokenImageError: It cannot be read.
        """
        ...

    def key(self, index: int) -> str:
        """What finds the image again, for messages."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What tells these images from others."""
        ...


class CaptionedImage(NamedTuple):
    """A picture, `(3, height, width)`, its captions, and which row of the data set it is."""

    image: Tensor
    captions: list[str]
    row: int


@dataclass(frozen=True)
class Sources:
    """What is to be encoded, of all splits.

    Attributes:
        splits: Their images.
        buckets: Number of the shape of each image of each split.
        shapes: Height and width of the pictures of each shape.
        plan: What the latents depend on, beside the fingerprints of the images.
        index: What `latents.json` says of classes or captions.
    """

    splits: Mapping[str, EncodableImages]
    buckets: dict[str, NDArray[np.int64]]
    shapes: tuple[tuple[int, int], ...]
    plan: dict[str, Any]
    index: dict[str, Any]


def describe(read: Sequence[Any], is_captioned: bool) -> dict[str, Tensor]:
    """What a shard says of some images beside their latents: their classes or their captions."""
    if not is_captioned:
        return {"labels": torch.tensor([item.label for item in read], dtype=torch.int64)}
    lists = [json.dumps(item.captions, ensure_ascii=False).encode() for item in read]
    return {
        "captions": torch.from_numpy(np.frombuffer(b"".join(lists), np.uint8).copy()),
        "caption_lengths": torch.tensor([len(each) for each in lists], dtype=torch.int64),
        "rows": torch.tensor([item.row for item in read], dtype=torch.int64),
    }


class _CaptionedSplit:
    """The images of a split of a data set."""

    def __init__(self, pictures: CaptionedPictures) -> None:
        self._pictures = pictures
        self.captions_sha256 = pictures.hash_captions()

    def __len__(self) -> int:
        return len(self._pictures)

    def read(self, index: int) -> CaptionedImage:
        pixels, captions = self._pictures.read(index)
        if not captions:
            raise BrokenImageError("it has no caption, or an empty one")
        return CaptionedImage(to_tensor(pixels), captions, index)

    def key(self, index: int) -> str:
        return self._pictures.key(index)

    def fingerprint(self) -> dict[str, Any]:
        return {**self._pictures.fingerprint(), "hash of the captions": self.captions_sha256}


def open_folders(encoding: Encoding) -> Sources:
    """Open a folder with one folder of images for each class.

    Raises:
        ValueError: There is none, or `encoding` asks for what only data sets have.
    """
    for field in fields(encoding):
        value = getattr(encoding, field.name)
        if field.name in _CAPTIONED_KEYS and value != field.default:
            key = field.name.replace("_", "-")
            raise ValueError(
                f"--{key} {value}: is about data sets with captions; name the --caption-column, or "
                "leave it out for a folder with one folder of images per class."
            )
    folders = ClassFolders(encoding.path, key="--path")
    for split in folders.splits:
        folders.check_split("--path", split)
    splits = {split: FolderImages(folders, split, encoding.size) for split in folders.splits}
    return Sources(
        splits,
        {split: np.zeros(len(images), np.int64) for split, images in splits.items()},
        ((encoding.size, encoding.size),),
        {"classes": list(folders.class_names)},
        {"class_names": folders.class_names},
    )


def open_captioned(encoding: Encoding, factor: int) -> Sources:
    """Open a data set with captions.

    Args:
        encoding: Says which.
        factor: By which latents are smaller than pictures.

    Raises:
        ValueError: There is none, or a column, a split or a shape is wrong.
    """
    # Imported late: `datasets` takes a second, which folders of classes need not pay.
    from torchtitan_mixtures.data.prompt_datasets import CaptionedPictures

    if encoding.patch_size < 1:
        raise ValueError(f"--patch-size {encoding.patch_size}: must be at least 1.")
    of_latents = make_buckets(
        encoding.aspect_ratios, encoding.size // factor, encoding.patch_size, "--aspect-ratios"
    )
    buckets = [Bucket(b.name, b.height * factor, b.width * factor) for b in of_latents]
    config = Multimodal(
        source="datasets",
        path=encoding.path,
        name=encoding.name,
        data_files=list(encoding.data_files),
        image_column=encoding.image_column,
        caption_column=encoding.caption_column,
    )
    pictures = {
        split: CaptionedPictures(config, f"--splits {split}", split, buckets)
        for split in encoding.splits
    }
    splits = {split: _CaptionedSplit(of_split) for split, of_split in pictures.items()}
    return Sources(
        splits,
        {split: of_split.buckets for split, of_split in pictures.items()},
        tuple((bucket.height, bucket.width) for bucket in buckets),
        {"shapes": [[bucket.name, bucket.height, bucket.width] for bucket in of_latents]},
        {
            "class_names": (),
            "captions_sha256": {split: i.captions_sha256 for split, i in splits.items()},
            "buckets": of_latents,
        },
    )
