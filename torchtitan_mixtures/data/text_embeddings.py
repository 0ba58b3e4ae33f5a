"""Embeddings of captions, made before training: safetensors shards and a `text_embeddings.json`.

`scripts/prepare_data.py encode-text` writes them (`encode_text.py`). A shard holds, for some
captions of a split in a row, `embeddings` `(captions, length, dim)` and `pooled`
`(captions, pooled_dim)` in float32, float16 or bfloat16, and `images` `(captions,)` int64: the row
of the split that each caption is of, which has one or several captions, or none.

`text_embeddings.json` is written last, so a folder that has one is complete. It says what the
embeddings are, and for every split a hash of its captions and which shards there are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchtitan_mixtures.data.latents import PLAN, write_json
from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.data.samples import usable_captions

INDEX = "text_embeddings.json"
FORMAT_VERSION = 1
ENCODE_COMMAND = "python scripts/prepare_data.py encode-text"

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Those that embeddings are stored in."""

_KEY = "multimodal.text_embeddings"


@dataclass(frozen=True)
class EmbeddingShard:
    """One file."""

    file: str
    captions: int
    bytes: int


@dataclass(frozen=True)
class EmbeddingSplit:
    """What is there of one split."""

    images: int
    captions: int
    captions_sha256: str
    truncated: tuple[int, ...]  # for each encoder the captions that were cut
    shards: tuple[EmbeddingShard, ...]


@dataclass(frozen=True)
class EmbeddingIndex:
    """What `text_embeddings.json` says."""

    spec: PromptSpec
    dtype: str
    caption_column: str
    encoders_sha256: tuple[str, ...]
    splits: dict[str, EmbeddingSplit]

    def write(self, folder: Path) -> None:
        """Write `text_embeddings.json`, whole or not at all."""
        write_json(folder / INDEX, {"format_version": FORMAT_VERSION, **asdict(self)})

    @staticmethod
    def read(folder: Path) -> EmbeddingIndex:
        """Read `text_embeddings.json`, not the shards.

        Raises:
            ValueError: It is missing, corrupt or of another version.
        """
        path = folder / INDEX
        if not path.is_file():
            remedy = f"name a folder that `{ENCODE_COMMAND}` wrote"
            problem = f"has no {INDEX}" if folder.is_dir() else "is not a local folder"
            if (folder / PLAN).is_file():
                problem = "is not complete"
                remedy = f"run `{ENCODE_COMMAND}` as before, which goes on where it ended"
            raise ValueError(f'{_KEY} = "{folder}": {problem}; {remedy}.')
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            version = entries.pop("format_version")
            if version != FORMAT_VERSION:
                raise _file_error(path, f"of format version {version}, not {FORMAT_VERSION}")
            DTYPES[entries["dtype"]]  # one that is unknown counts as corrupt
            splits = {split: _read_split(values) for split, values in entries["splits"].items()}
            return EmbeddingIndex(
                spec=PromptSpec.from_table(entries["spec"]),
                dtype=entries["dtype"],
                caption_column=entries["caption_column"],
                encoders_sha256=tuple(entries["encoders_sha256"]),
                splits=splits,
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as e:
            raise _file_error(path, f"corrupt ({e!r})") from None


def read_embedding_spec(folder: str) -> PromptSpec:
    """Say what the embeddings in a folder are; reads JSON alone.

    Args:
        folder: Has a `text_embeddings.json`.

    Raises:
        ValueError: The folder is missing, incomplete or corrupt.
    """
    return EmbeddingIndex.read(Path(folder).expanduser()).spec


def digest_captions(values: Iterable[Any]) -> tuple[NDArray[np.int64], str]:
    """Count and hash the captions of a split.

    Args:
        values: The column of captions, in the order of the images.

    Returns:
        The number of the first caption of each image, with the number of all at the end,
        `(images + 1,)`; and a hash of the captions.
    """
    digest = hashlib.sha256()
    starts = [0]
    for value in values:
        captions = usable_captions(value)
        digest.update(json.dumps(captions).encode() + b"\n")
        starts.append(starts[-1] + len(captions))
    return np.array(starts, np.int64), digest.hexdigest()


class TextEmbeddings:
    """The embeddings of the captions of a split, read from memory-mapped files.

    Args:
        folder: Has a `text_embeddings.json`.
        split: One of its splits.

    Attributes:
        spec: What the embeddings are.
        dtype: As they are stored.

    Raises:
        ValueError: The split or a file is missing, or a file is corrupt; names it.
    """

    def __init__(self, folder: str, split: str) -> None:
        self._folder = Path(folder).expanduser()
        self._index = EmbeddingIndex.read(self._folder)
        self.spec = self._index.spec
        self.dtype = DTYPES[self._index.dtype]
        if split not in self._index.splits:
            raise ValueError(
                f'{_KEY} = "{folder}": has no split "{split}"; its splits are '
                f"{', '.join(self._index.splits)}. Encode it: {ENCODE_COMMAND} --splits."
            )
        self._split_name = split
        self._split = self._index.splits[split]
        shards = self._split.shards
        self._shard_starts = np.array([0, *accumulate(shard.captions for shard in shards)])
        self._open: dict[int, _ShardReader] = {}
        # Opening all of them tells what is wrong with any; a mapped file holds no descriptor.
        images = [self._reader(number).images for number in range(len(shards))]
        self._starts = self._count(np.concatenate(images))

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files, which another process opens itself."""
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        """Captions of the split."""
        return self._split.captions

    def num_captions(self, image: int) -> int:
        """Captions of an image; 0 if none has anything but white space in it.

        Args:
            image: Row of the split of the data set.
        """
        return int(self._starts[image + 1] - self._starts[image])

    def row(self, image: int, caption: int) -> int:
        """The row of a caption, for `read`.

        Args:
            image: Row of the split of the data set.
            caption: Its number among those that `usable_captions` lists.
        """
        if not 0 <= caption < self.num_captions(image):
            raise IndexError(f"image {image} has no caption {caption}")
        return int(self._starts[image]) + caption

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Read the embeddings of one caption.

        Returns:
            `(length, dim)` and `(pooled_dim,)`, both of `dtype`.
        """
        number = int(np.searchsorted(self._shard_starts, row, side="right")) - 1
        return self._reader(number).read(row - int(self._shard_starts[number]))

    def check_captions(self, sha256: str) -> None:
        """Check that captions are those that were encoded.

        Args:
            sha256: Their hash; see `digest_captions`.

        Raises:
            ValueError: They are others.
        """
        if sha256 != self._split.captions_sha256:
            raise ValueError(
                f'{_KEY} = "{self._folder}": embeds other captions than split '
                f'"{self._split_name}" has; encode those of multimodal.path into a new folder with '
                f"`{ENCODE_COMMAND}`, or name the data and the caption_column that were encoded "
                f'("{self._index.caption_column}").'
            )

    def fingerprint(self) -> dict[str, Any]:
        """What the embeddings depend on, for a run that resumes."""
        return {
            "captions of the split": len(self),
            "hash of the captions": self._split.captions_sha256[:16],
            "hashes of the text encoders": [sha[:16] for sha in self._index.encoders_sha256],
            "type of the embeddings": self._index.dtype,
        }

    def _count(self, images: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first row of each image, out of the image of each row."""
        path = self._folder / INDEX
        if len(images) != len(self) or np.any(np.diff(images) < 0):
            raise _file_error(path, f'not of these shards of split "{self._split_name}"')
        return np.searchsorted(images, np.arange(self._split.images + 1)).astype(np.int64)

    def _reader(self, number: int) -> _ShardReader:
        if number not in self._open:
            shard = self._split.shards[number]
            self._open[number] = _ShardReader(self._folder / shard.file, self._index, shard)
        return self._open[number]


class _ShardReader:
    """One open shard; only what is read of it is brought into memory."""

    def __init__(self, path: Path, index: EmbeddingIndex, shard: EmbeddingShard) -> None:
        if not path.is_file():
            raise _file_error(path, "missing")
        if path.stat().st_size != shard.bytes:
            raise _file_error(path, f"{path.stat().st_size} bytes long, not {shard.bytes}")
        spec = index.spec
        try:
            file = safe_open(path, framework="pt")
            self.images: NDArray[np.int64] = file.get_tensor("images").numpy()
            self._parts = [file.get_slice(name) for name in ("embeddings", "pooled")]
            shapes = [tuple(part.get_shape()) for part in self._parts]
            dtypes = {part[:0].dtype for part in self._parts}
        except (OSError, SafetensorError) as error:
            raise _file_error(path, f"corrupt ({error})") from error
        count = shard.captions
        expected = [(count, spec.length, spec.dim), (count, spec.pooled_dim)]
        if shapes != expected or self.images.shape != (count,):
            raise _file_error(path, f"not as {INDEX} says (tensors of shape {shapes})")
        if dtypes != {DTYPES[index.dtype]}:
            raise _file_error(path, f"not as {INDEX} says (tensors of {dtypes})")

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        embeddings, pooled = (part[row : row + 1][0] for part in self._parts)
        return embeddings, pooled


def _read_split(values: dict[str, Any]) -> EmbeddingSplit:
    values["truncated"] = tuple(values["truncated"])
    values["shards"] = tuple(EmbeddingShard(**shard) for shard in values["shards"])
    return EmbeddingSplit(**values)


def _file_error(path: Path, problem: str) -> ValueError:
    return ValueError(
        f"{_KEY}: {path} is {problem}; delete the folder and encode it again with "
        f"`{ENCODE_COMMAND}`."
    )
