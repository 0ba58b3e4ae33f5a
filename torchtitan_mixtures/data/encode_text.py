"""Embeds the captions of a data set with frozen encoders, once, so that training needs none.

The result is described in `text_embeddings.py`, how it is written in `encoding_folder.py`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast
from urllib.parse import quote

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchtitan_mixtures.data.encoding_folder import begin_folder, read_shard, write_shard
from torchtitan_mixtures.data.opening import open_split
from torchtitan_mixtures.data.prompt_datasets import check_texts, iterate_column
from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.data.text_embeddings import (
    DTYPES,
    FORMAT_VERSION,
    INDEX,
    EmbeddingIndex,
    EmbeddingShard,
    EmbeddingSplit,
    digest_captions,
    usable_captions,
)
from torchtitan_mixtures.data.text_encoder_families import join_encoders, read_encoder_files
from torchtitan_mixtures.data.text_encoder_files import hash_encoder
from torchtitan_mixtures.data.text_encoders import FrozenTextEncoders, LongPrompts
from torchtitan_mixtures.job_config import Multimodal

SHARD_BYTES = 1 << 28
"""About how large shards are; one is in memory while it is made."""

_TRUNCATED = "truncated"
"""A shard's note: for each encoder the captions that were cut."""


@dataclass(frozen=True)
class TextEncoding:
    """What is to be encoded, and how."""

    path: str
    """The data set, as in `multimodal.path`."""

    encoders: tuple[str, ...]
    """Local folders of the encoders."""

    out: Path
    """Folder to write."""

    name: str = ""
    """As in `multimodal.name`."""

    data_files: tuple[str, ...] = ()
    """As in `multimodal.data_files`."""

    splits: tuple[str, ...] = ("train",)
    """Splits to encode, named as training will."""

    caption_column: str = "caption"
    """Column with the caption, or a list of captions, all of which are encoded."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """How embeddings are stored."""

    compute_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What encoders compute in, as in `multimodal.text_encoder_dtype`."""

    long_prompts: LongPrompts = "truncate"
    """What happens to a caption that is longer than an encoder's window."""

    batch_size: int = 32
    """Captions that are encoded at a time."""

    shard_bytes: int = SHARD_BYTES
    """About how large shards are."""


@dataclass(frozen=True)
class Captions:
    """The captions of a split; see `digest_captions`."""

    column: datasets.Dataset
    starts: NDArray[np.int64]
    sha256: str

    @property
    def count(self) -> int:
        """All captions."""
        return int(self.starts[-1])

    def list(self, rows: range) -> tuple[list[str], NDArray[np.int64]]:
        """Some captions in a row, and the image of each."""
        numbers = np.arange(rows.start, rows.stop)
        images = np.searchsorted(self.starts, numbers, side="right") - 1
        wanted = np.unique(images)
        values = self.column[wanted.tolist()][self.column.column_names[0]]
        of_image = {image: usable_captions(v) for image, v in zip(wanted, values, strict=True)}
        within = numbers - self.starts[images]
        texts = [of_image[image][place] for image, place in zip(images, within, strict=True)]
        return texts, images


def encode(encoding: TextEncoding, report: Callable[[str], None]) -> EmbeddingIndex:
    """Encode the captions of a data set, or what is left of them.

    Args:
        encoding: What to encode.
        report: Is told of sizes and progress, in lines.

    Returns:
        What was written as `text_embeddings.json`.

    Raises:
        ValueError: Something is missing or does not fit, the folder to write holds something else,
            or there is not enough room.
    """
    if encoding.batch_size < 1:
        raise ValueError(f"--batch-size {encoding.batch_size}: must be at least 1.")
    encoders = [read_encoder_files(folder) for folder in encoding.encoders]
    spec = join_encoders(encoders)
    about = {
        "spec": asdict(spec),
        "dtype": encoding.dtype,
        "caption_column": encoding.caption_column,
        "encoders_sha256": [hash_encoder(files) for files in encoders],
    }
    splits = {split: _open_captions(encoding, split) for split in encoding.splits}
    caption_bytes = (spec.length * spec.dim + spec.pooled_dim) * DTYPES[encoding.dtype].itemsize
    per_shard = max(1, encoding.shard_bytes // caption_bytes)
    for split, captions in splits.items():
        report(f"{split}: {captions.count} captions of {len(captions.starts) - 1} images")
    total = sum(captions.count for captions in splits.values()) * caption_bytes
    report(f"{caption_bytes} bytes per caption, {total / 1e9:.3f} GB in all")
    plan = {
        "format_version": FORMAT_VERSION,
        **about,
        "captions in a shard": per_shard,
        "long_prompts": encoding.long_prompts,
        "compute_dtype": encoding.compute_dtype,
        "splits": {split: captions.sha256 for split, captions in splits.items()},
    }
    _check_room(encoding, total)
    begin_folder(encoding.out, plan, "embeddings", {"splits": "other captions or splits"})
    if (encoding.out / INDEX).is_file():
        report(f"{encoding.out} is complete already")
        return EmbeddingIndex.read(encoding.out)
    encoder = _Encoder(encoding, spec, report)
    index = EmbeddingIndex(
        spec=spec,
        dtype=encoding.dtype,
        caption_column=encoding.caption_column,
        encoders_sha256=tuple(about["encoders_sha256"]),
        splits={split: encoder.encode_split(split, splits[split], per_shard) for split in splits},
    )
    index.write(encoding.out)
    return index


class _Encoder:
    """Encodes one split after the other."""

    def __init__(
        self, encoding: TextEncoding, spec: PromptSpec, report: Callable[[str], None]
    ) -> None:
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self._encoding = encoding
        self._spec = spec
        self._report = report
        self._encoders = FrozenTextEncoders(
            encoding.encoders, device, encoding.long_prompts, DTYPES[encoding.compute_dtype]
        )
        self._next_report = time.monotonic()

    def encode_split(self, split: str, captions: Captions, per_shard: int) -> EmbeddingSplit:
        """Encode what is not encoded yet, and list all shards of the split."""
        shards = []
        truncated = np.zeros(len(self._spec.spans), np.int64)
        for start in range(0, captions.count, per_shard):
            rows = range(start, min(start + per_shard, captions.count))
            # A split may be a slice, such as train[:90%].
            path = self._encoding.out / f"{quote(split, safe='')}-{len(shards):05d}.safetensors"
            if not path.is_file():
                self._write_shard(path, split, captions, rows)
            count, cut = read_shard(path, "images", _TRUNCATED)
            truncated += cut
            shards.append(EmbeddingShard(path.name, count, path.stat().st_size))
        for span, count in zip(self._spec.spans, truncated, strict=True):
            if count:
                self._report(
                    f"{split}: {count} of {captions.count} captions are longer than the window of "
                    f"{span.rows[1] - span.rows[0]} tokens of {span.name}; their end was cut off"
                )
        return EmbeddingSplit(
            images=len(captions.starts) - 1,
            captions=captions.count,
            captions_sha256=captions.sha256,
            truncated=tuple(truncated.tolist()),
            shards=tuple(shards),
        )

    def _write_shard(self, path: Path, split: str, captions: Captions, rows: range) -> None:
        before = np.array(self._encoders.tokenizers.truncated)
        texts, images = captions.list(rows)
        parts: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(texts), self._encoding.batch_size):
            batch = texts[start : start + self._encoding.batch_size]
            parts.append(self._embed(batch))
            done = rows.start + start + len(batch)
            if time.monotonic() >= self._next_report or done == captions.count:
                self._report(f"{split}: {done} of {captions.count} captions")
                self._next_report = time.monotonic() + 10
        embeddings, pooled = (torch.cat(part) for part in zip(*parts, strict=True))
        tensors = {
            "embeddings": embeddings,
            "pooled": pooled,
            "images": torch.from_numpy(images.astype(np.int64)),
        }
        cut = (np.array(self._encoders.tokenizers.truncated) - before).tolist()
        write_shard(path, tensors, {_TRUNCATED: cut})

    def _embed(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        dtype = DTYPES[self._encoding.dtype]
        embeddings, pooled = (part.to("cpu", dtype) for part in self._encoders.encode(texts))
        if not (embeddings.isfinite().all() and pooled.isfinite().all()):
            remedy = "use other encoders"
            if dtype == torch.float16:
                remedy = "encode with --half bfloat16 or without --half, or " + remedy
            raise ValueError(
                f"--encoders {' '.join(self._encoding.encoders)}: return embeddings that are not "
                f"finite numbers; {remedy}."
            )
        return embeddings, pooled


def _open_captions(encoding: TextEncoding, split: str) -> Captions:
    """Open the captions of a split and read them once."""
    config = Multimodal(
        source="datasets",
        path=encoding.path,
        name=encoding.name,
        data_files=list(encoding.data_files),
    )
    try:
        data = cast(datasets.Dataset, open_split(config, split, is_training=True))
    except ValueError as error:
        raise ValueError(f"--splits {split}: {error}") from error
    column = encoding.caption_column
    if column not in data.column_names:
        raise ValueError(
            f'--caption-column "{column}": "{encoding.path}" has no such column; its columns are '
            f"{', '.join(data.column_names)}."
        )
    check_texts(data, column, f'--caption-column "{column}"')
    selected = cast(datasets.Dataset, data.select_columns([column]))
    starts, sha256 = digest_captions(iterate_column(selected, column))
    if not starts[-1]:
        raise ValueError(
            f'--caption-column "{column}": split "{split}" of "{encoding.path}" has no captions.'
        )
    return Captions(selected, starts, sha256)


def _check_room(encoding: TextEncoding, total: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        encoding: What to encode.
        total: Bytes of all embeddings, those that are written already included.
    """
    out = encoding.out.absolute()
    done = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    existing = next(folder for folder in (out, *out.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if total - done > free:
        remedy = " or --half" if encoding.dtype == "float32" else ""
        raise ValueError(
            f"--out {encoding.out}: the embeddings need {(total - done) / 1e9:.3f} GB more, the "
            f"disk has {free / 1e9:.3f} GB left; take another disk, fewer captions{remedy}."
        )
