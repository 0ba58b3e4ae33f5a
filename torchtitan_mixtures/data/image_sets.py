"""Images with classes that can be read in any order: drawings of emoji, and files in folders."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from torchtitan_mixtures.data.emoji import STYLES, Drawing, EmojiCorpus
from torchtitan_mixtures.data.image_files import SUFFIXES, Crop, crop_picture, read_picture

if TYPE_CHECKING:
    from torchtitan_mixtures.multimodal_config import ClassOf

HELD_OUT_SPLITS = ("train", "val")
"""Splits of a folder that is not divided itself."""

_HELD_OUT = 20
"""One image in so many is in `val` of a folder that is not divided itself."""


class ClassImage(NamedTuple):
    """An image and its class.

    Attributes:
        image: `(channels, height, width)` float32; pixels in [-1, 1], or the mean of latents.
        label: Number of its class, or numbers of its classes where it may have several or none.
        std: Of latents, `(channels, height, width)` float32; None for pixels.
    """

    image: Tensor
    label: int | tuple[int, ...]
    std: Tensor | None = None


class ImageSet(Protocol):
    """The images of a split."""

    shape: tuple[int, int, int]
    """Of every image, `(channels, height, width)`."""

    has_std: bool
    """Whether images are latents with a standard deviation."""

    max_labels: int
    """Classes of an image at most; 1 = it has exactly one."""

    def __len__(self) -> int:
        """Count the images."""
        ...

    def read(self, index: int, is_flipped: bool = False, crop: Crop | None = None) -> ClassImage:
        """Read an image, mirrored if asked to.

        Args:
            index: Of the image.
            is_flipped: Whether to mirror it.
            crop: Chooses what is seen of a picture; None: its middle. Latents have none.

        Raises:
            BrokenImageError: The image cannot be read.
            ValueError: Nor can others.
        """
        ...

    def key(self, index: int) -> str:
        """What finds the image again, for messages."""
        ...

    def relative_key(self, index: int) -> str:
        """What finds the image again within its split, wherever that lies."""
        ...

    def labels(self) -> NDArray[np.int64]:
        """The class of each image, `(images,)`, of sets whose images have exactly one."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What the order of samples depends on, beside the keys of the TOML."""
        ...


def to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """Scale `(height, width, 3)` uint8 to `(3, height, width)` float32 in [-1, 1]."""
    return torch.tensor(pixels).permute(2, 0, 1).float().div_(127.5).sub_(1).contiguous()


# --- emoji ----------------------------------------------------------------------------------------


def emoji_classes(class_of: ClassOf) -> tuple[str, ...]:
    """Name the classes of the embedded corpus.

    Args:
        class_of: What is a class: its groups, its styles, each group in each style (as
            "noto/Objects"), or the concepts of its split `train`.
    """
    corpus = EmojiCorpus.load()
    if class_of == "group":
        return corpus.groups
    if class_of == "style":
        return STYLES
    if class_of == "style+group":
        return tuple(f"{style}/{group}" for style in STYLES for group in corpus.groups)
    return tuple(concept.name for concept in corpus.concepts if concept.split == "train")


def _emoji_class(drawing: Drawing, class_of: ClassOf) -> str:
    names = {
        "group": drawing.concept.group,
        "style": drawing.style,
        "concept": drawing.concept.name,
    }
    return names.get(class_of, f"{drawing.style}/{drawing.concept.group}")


def drawing_key(drawing: Drawing) -> str:
    """What finds a drawing of the embedded corpus again."""
    return f"{drawing.concept.slug} ({drawing.style})"


class EmojiImages:
    """The drawings of a split of the embedded corpus; never mirrored, which would make some false.

    Args:
        split: A split of the corpus whose concepts have classes.
        class_of: What is a class, see `emoji_classes`.
        size: Height and width: 16, 32 or 64.
    """

    has_std = False
    max_labels = 1

    def __init__(self, split: str, class_of: ClassOf, size: int) -> None:
        self._corpus = EmojiCorpus.load()
        self._drawings = self._corpus.drawings(split)
        self.shape = (3, size, size)
        number = {name: label for label, name in enumerate(emoji_classes(class_of))}
        self._labels = [number[_emoji_class(drawing, class_of)] for drawing in self._drawings]
        self._pixels: dict[int, NDArray[np.uint8]] = {}  # of drawings that were read before

    def __len__(self) -> int:
        """See `ImageSet.__len__`."""
        return len(self._drawings)

    def read(self, index: int, is_flipped: bool = False, crop: Crop | None = None) -> ClassImage:
        """See `ImageSet.read`."""
        assert not is_flipped
        if index not in self._pixels:
            self._pixels[index] = self._corpus.image(self._drawings[index], self.shape[-1])
        pixels = self._pixels[index]
        if crop is not None:
            pixels = crop_picture(Image.fromarray(pixels), self.shape[-1], crop)
        return ClassImage(to_tensor(pixels), self._labels[index])

    def key(self, index: int) -> str:
        """See `ImageSet.key`."""
        return drawing_key(self._drawings[index])

    def relative_key(self, index: int) -> str:
        """See `ImageSet.relative_key`."""
        return drawing_key(self._drawings[index])

    def labels(self) -> NDArray[np.int64]:
        """See `ImageSet.labels`."""
        return np.array(self._labels, np.int64)

    def fingerprint(self) -> dict[str, Any]:
        """See `ImageSet.fingerprint`."""
        return {"images of the split": len(self)}


# --- folders --------------------------------------------------------------------------------------


class ClassFolders:
    """A folder with one folder of images per class, as ImageNet has it, and its splits.

    If it has a folder of the name of the training split that holds folders itself, then each split
    is such a folder (`train/`, `val/`) and the classes are those of training. Otherwise its splits
    are `train` and `val`, and an image is in `val` by the hash of its path within the folder: one
    in twenty, the same ones wherever the folder lies and whatever else it holds.

    Args:
        path: The folder.
        train_split: Name of the training split.
        key: What the user calls the path, for messages.

    Raises:
        ValueError: There is no such folder, or none with classes in it.
    """

    def __init__(self, path: str, train_split: str = "train", key: str = "multimodal.path") -> None:
        self.path = Path(path).expanduser()
        self._train_split = train_split
        self._named = f'{key} = "{path}"'
        if not self.path.is_dir():
            raise ValueError(f"{self._named}: there is no such folder.")
        train = self.path / train_split
        self.is_divided = train.is_dir() and bool(_subfolders(train))
        self.class_names = _subfolders(train if self.is_divided else self.path)
        if not self.class_names:
            raise ValueError(
                f"{self._named}: has no folders in it; it must have one folder of "
                "images per class, or train/ and val/ with such folders."
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits there are."""
        if not self.is_divided:
            return HELD_OUT_SPLITS
        return tuple(name for name in _subfolders(self.path) if _subfolders(self.path / name))

    def check_split(self, key: str, split: str) -> None:
        """Check that a split exists and has no class that training does not have.

        Raises:
            ValueError: Names `key`, which names the split.
        """
        if split not in self.splits:
            why = "" if self.is_divided else " (one image in twenty is held out as val)"
            raise ValueError(
                f'{key}: "{self.path}" has no split "{split}"; its splits are '
                f"{', '.join(self.splits)}{why}."
            )
        if not self.is_divided:
            return
        unknown = sorted(set(_subfolders(self.path / split)) - set(self.class_names))
        if unknown:
            raise ValueError(
                f'{key}: split "{split}" of "{self.path}" has the class "{unknown[0]}", which the '
                "training split does not have. Remove its folder, or add it to training."
            )

    def list_images(self, split: str) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
        """List the images of a split by class and then by path.

        Returns:
            Their paths relative to the folder and their classes, both `(images,)`.

        Raises:
            ValueError: There are none, or a class has none in training.
        """
        root = self.path / split if self.is_divided else self.path
        paths, labels = _list_images(root, self.class_names)
        missing = np.setdiff1d(np.arange(len(self.class_names)), labels)
        must_have_all = not self.is_divided or split == self._train_split
        if not len(paths) or (must_have_all and len(missing)):
            name = self.class_names[missing[0]]
            raise ValueError(
                f"{self._named}: {root / name} has no images "
                f"({', '.join(SUFFIXES)}); add some, or remove the folder."
            )
        if not self.is_divided:
            is_held_out = np.array([_is_held_out(path) for path in paths])
            chosen = is_held_out if split == "val" else ~is_held_out
            paths, labels = paths[chosen], labels[chosen]
            if not len(paths):
                raise ValueError(
                    f"{self._named}: has too few images to hold out one in twenty: split "
                    f'"{split}" is empty. Divide them into train/ and val/.'
                )
        return paths, labels


class FolderImages:
    """The pictures of a split of a folder.

    Args:
        folders: The folder.
        split: One of its splits.
        size: Height and width that pictures are cropped to.
    """

    has_std = False
    max_labels = 1

    def __init__(self, folders: ClassFolders, split: str, size: int) -> None:
        self._root = folders.path / split if folders.is_divided else folders.path
        self._paths, self._labels = folders.list_images(split)
        self.shape = (3, size, size)

    def __len__(self) -> int:
        """See `ImageSet.__len__`."""
        return len(self._paths)

    def read(self, index: int, is_flipped: bool = False, crop: Crop | None = None) -> ClassImage:
        """See `ImageSet.read`."""
        image = to_tensor(read_picture(self.key(index), self.shape[-1], crop))
        return ClassImage(image.flip(-1) if is_flipped else image, int(self._labels[index]))

    def key(self, index: int) -> str:
        """See `ImageSet.key`."""
        return str(self._root / os.fsdecode(self._paths[index]))

    def relative_key(self, index: int) -> str:
        """See `ImageSet.relative_key`."""
        return Path(os.fsdecode(self._paths[index])).as_posix()

    def labels(self) -> NDArray[np.int64]:
        """See `ImageSet.labels`."""
        return self._labels

    def fingerprint(self) -> dict[str, Any]:
        """See `ImageSet.fingerprint`."""
        digest = hashlib.blake2b(b"\0".join(self._paths.tolist()), digest_size=8)
        return {"images of the split": len(self), "hash of their names": digest.hexdigest()}


def _subfolders(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    return tuple(sorted(names))


@functools.lru_cache(maxsize=2)  # both splits of a folder that is not divided need the same
def _list_images(
    root: Path, class_names: tuple[str, ...]
) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
    # One array of bytes: worker processes would copy the memory of a million strings by counting
    # their references.
    paths, labels = [], []
    for label, name in enumerate(class_names):
        found = [
            os.fsencode(os.path.relpath(os.path.join(folder, file), root))
            for folder, _, files in os.walk(root / name)
            for file in files
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        ]
        paths += sorted(found)
        labels += [label] * len(found)
    return np.array(paths, np.bytes_), np.array(labels, np.int64)


def _is_held_out(path: bytes) -> bool:
    digest = hashlib.blake2b(path, digest_size=8).digest()
    return int.from_bytes(digest, "little") % _HELD_OUT == 0
