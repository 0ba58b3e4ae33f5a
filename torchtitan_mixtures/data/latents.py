"""Latents of a folder of images, encoded before training: safetensors shards and a `latents.json`.

`scripts/prepare_data.py encode-latents` writes them (`encode_latents.py`). A shard holds, for some
images in a row, `labels` `(images,)` int64 and the moments of their posterior, scaled to unit
variance: `mean` and `std`, `(images, channels, size, size)` in float32 or float16, and of the
mirrored pictures `mean_flipped` and `std_flipped` if they were asked for. Training draws new
latents from them each time, as with a VAE at hand.

Latents of images with captions have no `labels` but `captions` `(bytes,)` uint8, a JSON list of
strings for each image one after the other, `caption_lengths` `(images,)` int64, the bytes of each,
and `rows` `(images,)` int64, which rows of the data set the images were. They may be of several
shapes (`aspect_ratios.py`), but a shard holds one.

`latents.json` is written last, so a folder that has one is complete. It says what the latents are,
and for every split which shards there are, with their images and bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchtitan_mixtures.data.aspect_ratios import Bucket
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
    bucket: int = 0  # number of the shape of its images


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
    captions_sha256: dict[str, str] = field(default_factory=dict)  # of splits; if there are any
    buckets: tuple[Bucket, ...] = ()  # shapes of captioned ones; none = square

    @property
    def is_captioned(self) -> bool:
        """Whether images have captions instead of classes."""
        return bool(self.captions_sha256)

    def shape_of(self, bucket: int) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a shape."""
        if not self.buckets:
            return self.channels, self.size, self.size
        return self.channels, self.buckets[bucket].height, self.buckets[bucket].width

    def write(self, folder: Path) -> None:
        """Write `latents.json`, whole or not at all."""
        entries = asdict(self)
        if not self.is_captioned:  # as it was before there were captions
            del entries["captions_sha256"], entries["buckets"]
            for shards in entries["splits"].values():
                for shard in shards:
                    del shard["bucket"]
        write_json(folder / INDEX, {"format_version": FORMAT_VERSION, **entries})

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
            entries["buckets"] = tuple(Bucket(**entry) for entry in entries.get("buckets", ()))
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


class Latents:
    """The latents of a split, read from memory-mapped files.

    Args:
        folder: Has a `latents.json`.
        split: One of its splits.

    Raises:
        ValueError: A file is missing or corrupt; names it.
    """

    has_std = True

    def __init__(self, folder: Path, split: str) -> None:
        self._folder = folder
        self._index = LatentIndex.read(folder)
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
        """Count the images."""
        return int(self._starts[-1])

    def key(self, index: int) -> str:
        """What finds an image again, for messages."""
        number, row = self._find(index)
        return f"{self._folder / self._shards[number].file}[{row}]"

    def relative_key(self, index: int) -> str:
        """What finds an image again within the folder."""
        number, row = self._find(index)
        return f"{self._shards[number].file}[{row}]"

    def fingerprint(self) -> dict[str, Any]:
        """What tells these latents from others."""
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
            shard = self._shards[number]
            self._open[number] = _ShardReader(self._folder / shard.file, self._index, shard)
        return self._open[number]


class LatentImages(Latents):
    """The latents of a split, with their classes; see `Latents`."""

    max_labels = 1

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__(folder, split)
        self.shape = self._index.shape_of(0)

    def labels(self) -> NDArray[np.int64]:
        """See `ImageSet.labels`."""
        readers = [self._reader(number) for number in range(len(self._shards))]
        return np.array([label for reader in readers for label in reader.labels], np.int64)

    def read(self, index: int, is_flipped: bool = False, crop: Crop | None = None) -> ClassImage:
        """See `ImageSet.read`."""
        assert crop is None
        number, row = self._find(index)
        reader = self._reader(number)
        mean, std = reader.read(row, is_flipped)
        return ClassImage(mean, reader.labels[row], std)


class CaptionedLatents(Latents):
    """The latents of a split, with their captions; see `Latents`.

    Attributes:
        shapes: Channels, height and width of each shape.
        buckets: Number of the shape of each image, `(images,)` int64.
        rows: Which row of the split of the data set each image was, `(images,)` int64.
        captions_sha256: Of all captions of that, see `text_embeddings.digest_captions`.
    """

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__(folder, split)
        self.captions_sha256 = self._index.captions_sha256[split]
        self.rows = np.concatenate([self._reader(i).rows for i in range(len(self._shards))])
        numbers = range(max(1, len(self._index.buckets)))
        self.shapes = tuple(self._index.shape_of(number) for number in numbers)
        of_shards = np.array([shard.bucket for shard in self._shards], np.int64)
        self.buckets = np.repeat(of_shards, [shard.images for shard in self._shards])

    def captions(self, index: int) -> list[str]:
        """All captions of an image."""
        number, row = self._find(index)
        return self._reader(number).captions(row)

    def moments(self, index: int, is_flipped: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of an image's latents, `(channels, height, width)`."""
        number, row = self._find(index)
        return self._reader(number).read(row, is_flipped)


class _ShardReader:
    """One open shard; only what is read of it is brought into memory."""

    def __init__(self, path: Path, index: LatentIndex, shard: LatentShard) -> None:
        kinds = ("", "_flipped") if index.is_flipped else ("",)
        self.labels: list[int] = []
        self.rows = np.zeros(0, np.int64)
        self._caption_ends = np.zeros(0, np.int64)
        self._path = path
        try:
            file = safe_open(path, framework="pt")
            if index.is_captioned:
                self._caption_ends = file.get_tensor("caption_lengths").cumsum(0).numpy()
                self.rows = file.get_tensor("rows").numpy()
                self._captions = file.get_slice("captions")
            else:
                self.labels = file.get_tensor("labels").tolist()
            self._slices = {
                name + kind: file.get_slice(name + kind)
                for kind in kinds
                for name in ("mean", "std")
            }
            shapes = {tuple(part.get_shape()) for part in self._slices.values()}
        except (OSError, SafetensorError) as error:
            raise _file_error(path, f"corrupt ({error})") from error
        num_named = len(self._caption_ends if index.is_captioned else self.labels)
        if shapes != {(shard.images, *index.shape_of(shard.bucket))} or num_named != shard.images:
            raise _file_error(path, f"not as {INDEX} says (tensors of shape {sorted(shapes)})")
        if any(not 0 <= label < len(index.class_names) for label in self.labels):
            raise _file_error(
                path, f"corrupt (a label is not in 0 to {len(index.class_names) - 1})"
            )

    def captions(self, row: int) -> list[str]:
        start, stop = int(self._caption_ends[row - 1]) if row else 0, int(self._caption_ends[row])
        try:
            return json.loads(self._captions[start:stop].numpy().tobytes())
        except ValueError as error:
            raise _file_error(self._path, f"corrupt (captions of row {row}: {error})") from None

    def read(self, row: int, is_flipped: bool) -> tuple[Tensor, Tensor]:
        kind = "_flipped" if is_flipped else ""
        return self._row("mean" + kind, row), self._row("std" + kind, row)

    def _row(self, name: str, row: int) -> Tensor:
        return self._slices[name][row : row + 1][0].to(torch.float32)


def _file_error(path: Path, problem: str) -> ValueError:
    return ValueError(
        f"latents: {path} is {problem}; delete the folder and encode it again with "
        f"`{ENCODE_COMMAND}`."
    )
