"""Images in folders, each with its caption in a file beside it, or all in `metadata.jsonl`.

`cat.jpg` has its caption in `cat.txt`, `cat.caption` or `cat.json` ({"caption": ...}), whichever
comes first. A `metadata.jsonl` has {"file_name": "cats/cat.jpg", "caption": "..."} (or "text", as
`imagefolder` of `datasets` has it) a line; if there is any, it alone says which images are read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.blocks import BlockSource
from torchtitan_mixtures.data.documents import DocumentBuilder, find_beside, parse_json
from torchtitan_mixtures.data.image_files import SUFFIXES as IMAGE_SUFFIXES
from torchtitan_mixtures.data.jsonl_source import JsonlSource
from torchtitan_mixtures.data.media import decode_text, read_file
from torchtitan_mixtures.data.source_files import (
    FileSettings,
    find_data_files,
    find_paths,
    hash_of,
)
from torchtitan_mixtures.data.sources import Document

METADATA = "metadata.jsonl"

CAPTION_SUFFIXES = (".txt", ".caption", ".json")
"""Of files beside an image, in the order in which they are looked for."""

BLOCK_IMAGES = 256
"""Images of a block; fewer if there are few."""

_MANY_BLOCKS = 1024
_MAX_CAPTION_BYTES = 1 << 20


class ImageFolderSource(BlockSource[str]):
    """Images with captions beside them. A block is some neighbours in the order of names.

    Args:
        images: Of each the name below the folder, and the path.
        settings: See there.
    """

    def __init__(self, images: Sequence[tuple[str, Path]], settings: FileSettings) -> None:
        self._paths = [str(path) for _, path in images]
        self._settings = settings
        self._block_images = max(1, min(BLOCK_IMAGES, len(images) // _MANY_BLOCKS))
        # Names only: the sizes of millions of files would take minutes to ask for.
        self._files = hash_of([name for name, _ in images])
        super().__init__(
            -(-len(images) // self._block_images),
            settings.config.seed,
            settings.is_endless,
            settings.entry.name,
            settings.config.max_bad_fraction,
            settings.entry.max_epochs,
        )
        self._builder = DocumentBuilder(settings.media, settings.order)

    def read_block(self, block: int) -> Sequence[str]:
        """See `BlockSource.read_block`: the paths of its images."""
        start = block * self._block_images
        return self._paths[start : start + self._block_images]

    def sample_key(self, block: int, number: int, sample: str) -> str:
        """See `BlockSource.sample_key`: the path."""
        return sample

    def build(self, sample: str, key: str, rng: Random) -> Document:
        """See `BlockSource.build`."""
        path = Path(sample)
        row = {"image": path.name, "caption": read_caption(path)}
        return self._builder.build(row, key, rng, find_beside(path.parent))

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        return self._settings.fingerprint(self._files)


class MetadataSource(JsonlSource):
    """Images with captions in `metadata.jsonl`."""

    def read_row(self, value: Any) -> Any:
        """See `JsonlSource.read_row`: with the names that the columns of pairs have."""
        if not isinstance(value, dict):
            return value
        if not isinstance(value.get("file_name"), str):
            raise ValueError('expected "file_name", the path of an image beside this file')
        caption = value.get("caption")
        return {
            "image": value["file_name"],
            "caption": value.get("text") if caption is None else caption,
        }


def build_folder_source(settings: FileSettings) -> ImageFolderSource | MetadataSource:
    """Open a folder of images.

    Raises:
        ValueError: There are none; names the entry.
    """
    path = Path(settings.entry.path).expanduser()
    if path.is_file():
        raise ValueError(
            f"{settings.key}.path = {settings.entry.path!r}: is a file; kind 'folder' reads a "
            "folder of images with captions beside them. Name the folder, or change the kind."
        )
    found = find_paths(settings, (*IMAGE_SUFFIXES, METADATA))
    if any(path.name == METADATA for _, path in found):
        files = find_data_files(settings, (METADATA,))
        return MetadataSource(files, settings)
    if path.is_dir():
        _warn_of_unread(path, settings.key)
    return ImageFolderSource(found, settings)


def _warn_of_unread(folder: Path, key: str) -> None:
    """Say which files have captions as images do, but a suffix that is not read."""
    unread = _count_unread(folder)
    if unread:
        counts = ", ".join(f"{number} {suffix}" for suffix, number in sorted(unread.items()))
        logger.warning(
            f"{key}: {unread.total()} files with captions beside them are not read ({counts}); "
            f"only {' '.join(IMAGE_SUFFIXES)} are. Convert them to JPEG, PNG or WebP."
        )


def _count_unread(folder: Path) -> Counter[str]:
    """Count, by suffix, the files that have a caption but neither an image's suffix nor an image.

    Names alone are compared: of millions of files that takes a twentieth of the time to find them.
    """
    unread: Counter[str] = Counter()
    known = (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES)
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # through a loop of links
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        if all(name.lower().endswith(known) for name in names):
            continue
        images, captions, others = set(), set(), []
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                images.add(stem)
            elif suffix in CAPTION_SUFFIXES:
                captions.add(stem)
            elif suffix and not name.startswith("."):
                others.append((stem, suffix.lower()))
        captions -= images  # what has the name of an image is something beside it
        unread.update(suffix for stem, suffix in others if stem in captions)
    return unread


def read_caption(image: Path) -> Any:
    """Read the caption beside an image.

    Args:
        image: Its path.

    Returns:
        A string, or what "caption" in JSON is.

    Raises:
        ValueError: There is no caption, or it cannot be read.
    """
    for suffix in CAPTION_SUFFIXES:
        path = image.with_suffix(suffix)
        if not path.exists():
            continue
        try:
            text = decode_text(read_file(path, _MAX_CAPTION_BYTES))
            if suffix != ".json":
                return text.strip()
            described = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        if not isinstance(described, dict) or described.get("caption") is None:
            raise ValueError(f'{path.name}: has no "caption"')
        return described["caption"]
    expected = ", ".join(image.with_suffix(suffix).name for suffix in CAPTION_SUFFIXES)
    raise ValueError(f"has no caption; expected one of {expected} beside it")
