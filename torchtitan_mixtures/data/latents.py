"""Latents of a folder of images, encoded before training: safetensors shards and a `latents.json`.

`scripts/prepare_data.py encode-latents` writes them (`encode_latents.py`). A shard holds, for some
images in a row, `labels` `(images,)` int64 and the moments of their posterior, scaled to unit
variance: `mean` and `std`, `(images, channels, size, size)` in float32 or float16, and of the
mirrored pictures `mean_flipped` and `std_flipped` if they were asked for. Training draws new
latents from them each time, as with a VAE at hand.

`latents.json` is written last, so a folder that has one is complete. It says what the latents are,
and for every split which shards there are, with their images and bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchtitan_mixtures.data.image_files import Crop
from torchtitan_mixtures.data.image_sets import ClassImage

INDEX = "latents.json"
PLAN = "encoding.json"
"""What was to be encoded, written first. A folder that has it but not `INDEX` is incomplete."""

FORMAT_VERSION = 1
ENCODE_COMMAND = "python scripts/prepare_data.py encode-latents"


@dataclass(frozen=True)
class LatentShard:
    """One file."""

    file: str
    images: int
    bytes: int


@dataclass(frozen=True)
class LatentIndex:
    """What `latents.json` says."""

    channels: int
    size: int
    picture_size: int
    scaling_factor: float
    shift_factor: float
    vae_sha256: str
    dtype: str
    is_flipped: bool  # mirrored pictures are encoded as well
    class_names: tuple[str, ...]
    splits: dict[str, tuple[LatentShard, ...]]

    def write(self, folder: Path) -> None:
        """Write `latents.json`, whole or not at all."""
        write_json(folder / INDEX, {"format_version": FORMAT_VERSION, **asdict(self)})

    @staticmethod
    def read(folder: Path) -> LatentIndex:
        """Read `latents.json` and check that the shards have their size.

        Raises:
            ValueError: It is corrupt or of another version, or a shard is missing or truncated.
        """
        path = folder / INDEX
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            version = entries.pop("format_version")
        except (ValueError, KeyError, AttributeError) as error:
            raise _file_error(path, f"corrupt ({error!r})") from None
        if version != FORMAT_VERSION:
            raise _file_error(path, f"of format version {version}, not {FORMAT_VERSION}")
        try:
            entries["class_names"] = tuple(entries["class_names"])
            entries["splits"] = {
                split: tuple(LatentShard(**shard) for shard in shards)
                for split, shards in entries["splits"].items()
            }
            index = LatentIndex(**entries)
        except (KeyError, TypeError, AttributeError) as error:
            raise _file_error(path, f"corrupt ({error!r})") from None
        for shards in index.splits.values():
            for shard in shards:
                index._check_size(folder / shard.file, shard.bytes)
        return index

    @staticmethod
    def _check_size(path: Path, expected: int) -> None:
        if not path.is_file():
            raise _file_error(path, "missing")
        if path.stat().st_size != expected:
            raise _file_error(path, f"{path.stat().st_size} bytes long, not {expected}")


def is_latent_folder(folder: Path) -> bool:
    """Say whether a folder holds latents.

    Raises:
        ValueError: It is being encoded, or was and the process ended early.
    """
    if (folder / INDEX).is_file():
        return True
    if (folder / PLAN).is_file():
        raise ValueError(
            f'multimodal.path = "{folder}": its latents are not complete; run '
            f"`{ENCODE_COMMAND}` as before, which goes on where it ended."
        )
    return False


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


class LatentImages:
    """The latents of a split, read from memory-mapped files.

    Args:
        folder: Has a `latents.json`.
        split: One of its splits.
    Raises:
        ValueError: A file is missing or corrupt; names it.
    """

    has_std = True
    max_labels = 1

    def __init__(self, folder: Path, split: str) -> None:
        self._folder = folder
        self._index = LatentIndex.read(folder)
        self.shape = (self._index.channels, self._index.size, self._index.size)
        self._shards = self._index.splits[split]
        self._starts = np.array([0, *accumulate(shard.images for shard in self._shards)])
        self._open: dict[int, _ShardReader] = {}
        for number in range(len(self._shards)):  # for what is wrong with any of them
            self._reader(number)
        if not len(self):
            raise _file_error(folder / INDEX, f'without images of split "{split}"')

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files, which another process opens itself."""
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        """See `ImageSet.__len__`."""
        return int(self._starts[-1])

    def read(self, index: int, is_flipped: bool = False, crop: Crop | None = None) -> ClassImage:
        """See `ImageSet.read`."""
        assert crop is None
        number, row = self._find(index)
        return self._reader(number).read(row, is_flipped)

    def key(self, index: int) -> str:
        """See `ImageSet.key`."""
        number, row = self._find(index)
        return f"{self._folder / self._shards[number].file}[{row}]"

    def fingerprint(self) -> dict[str, Any]:
        """See `ImageSet.fingerprint`."""
        shards = [(shard.file, shard.images, shard.bytes) for shard in self._shards]
        content = json.dumps([self._index.class_names, shards]).encode()
        return {
            "images of the split": len(self),
            "hash of the VAE": self._index.vae_sha256,
            "hash of the shards' names and sizes": hashlib.sha256(content).hexdigest()[:16],
        }

    def _find(self, index: int) -> tuple[int, int]:
        """The shard of an image, and its row there."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, index - int(self._starts[number])

    def _reader(self, number: int) -> _ShardReader:
        if number not in self._open:
            path = self._folder / self._shards[number].file
            self._open[number] = _ShardReader(path, self._index, self._shards[number].images)
        return self._open[number]


class _ShardReader:
    """One open shard; only what is read of it is brought into memory."""

    def __init__(self, path: Path, index: LatentIndex, images: int) -> None:
        size = index.size
        kinds = ("", "_flipped") if index.is_flipped else ("",)
        try:
            file = safe_open(path, framework="pt")
            self._labels = file.get_tensor("labels").tolist()
            self._slices = {
                name + kind: file.get_slice(name + kind)
                for kind in kinds
                for name in ("mean", "std")
            }
            shapes = {tuple(part.get_shape()) for part in self._slices.values()}
        except (OSError, SafetensorError) as error:
            raise _file_error(path, f"corrupt ({error})") from error
        if shapes != {(images, index.channels, size, size)} or len(self._labels) != images:
            raise _file_error(path, f"not as {INDEX} says (tensors of shape {sorted(shapes)})")
        if any(not 0 <= label < len(index.class_names) for label in self._labels):
            raise _file_error(
                path, f"corrupt (a label is not in 0 to {len(index.class_names) - 1})"
            )

    def read(self, row: int, is_flipped: bool) -> ClassImage:
        kind = "_flipped" if is_flipped else ""
        mean, std = (self._row(name + kind, row) for name in ("mean", "std"))
        return ClassImage(mean, self._labels[row], std)

    def _row(self, name: str, row: int) -> Tensor:
        return self._slices[name][row : row + 1][0].to(torch.float32)


def _file_error(path: Path, problem: str) -> ValueError:
    return ValueError(
        f"latents: {path} is {problem}; delete the folder and encode it again with "
        f"`{ENCODE_COMMAND}`."
    )
