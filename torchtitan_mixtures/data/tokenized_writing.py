"""Writes the files of pre-tokenised shards, each whole or not at all; see `tokenized_shards.py`."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from torchtitan_mixtures.data.shard_manifest import ShardFile, shard_error
from torchtitan_mixtures.data.tokenized_shards import (
    CHUNK_BYTES,
    ENTRIES,
    NOTE,
    NOTE_SHA256,
    read_header,
)

_FLUSHED_CODES = 1 << 20  # written at a time
_COPIED_BYTES = 1 << 20


@dataclass(frozen=True)
class PartNotes:
    """What is known of a finished part beside its documents; in the header of its file."""

    plan: str
    """Hash of the plan that the part belongs to."""
    part: int
    samples: int
    bad_samples: int
    bad_keys: list[str]
    """Some of them."""


@dataclass(frozen=True)
class PartCounts:
    """Documents, segments and codes of a part by modality."""

    documents: dict[str, int]
    segments: dict[str, int]
    codes: dict[str, int]


@dataclass(frozen=True)
class FinishedPart:
    """A part whose file is there."""

    file: ShardFile
    counts: PartCounts
    notes: PartNotes


class ShardWriter:
    """Collects the documents of one file; see `open_writer`.

    Args:
        path: The file to be.
        dtype: Of the codes.
        modalities: Names, in the manifest's order.
        codes: An open file without a name, where they wait.
    """

    def __init__(
        self, path: Path, dtype: np.dtype, modalities: Sequence[str], codes: io.BufferedRandom
    ) -> None:
        self._path = path
        self._dtype = dtype.newbyteorder("<")
        self._modalities = tuple(modalities)
        self._waiting: list[NDArray[Any]] = []
        self._num_waiting = 0
        self._lengths, self._numbers, self._losses = array("Q"), array("B"), array("B")
        self._document_segments, self._is_pair = array("Q"), array("B")
        self._codes = codes

    def add(
        self,
        codes: Sequence[NDArray[np.integer]],
        modalities: Sequence[str],
        losses: Sequence[bool],
        is_pair: bool,
    ) -> None:
        """Append a document.

        Args:
            codes: Of each segment, `(codes,)` integers in range.
            modalities: Of each segment.
            losses: Of each segment, whether it is predicted.
            is_pair: See `Document.is_pair`.

        Raises:
            ValueError: The disk is full, or the like.
        """
        self._lengths.extend(map(len, codes))
        self._numbers.extend(map(self._modalities.index, modalities))
        self._losses.extend(losses)
        self._document_segments.append(len(codes))
        self._is_pair.append(is_pair)
        self._waiting.extend(codes)
        self._num_waiting += sum(map(len, codes))
        if self._num_waiting >= _FLUSHED_CODES:
            self._flush()

    def finish(self, notes: PartNotes) -> FinishedPart:
        """Write the file.

        Raises:
            ValueError: The disk is full, or the like.
        """
        self._flush()
        arrays = {
            "segment_ends": np.cumsum(np.frombuffer(self._lengths, "u8"), dtype="<u8"),
            "document_ends": np.cumsum(np.frombuffer(self._document_segments, "u8"), dtype="<u8"),
            "segment_modality": np.frombuffer(self._numbers, "u1"),
            "segment_loss": np.frombuffer(self._losses, "u1"),
            "is_pair": np.frombuffer(self._is_pair, "u1"),
        }
        counts = self._count(arrays)
        with naming(self._path):
            sizes = {name: items.nbytes for name, items in arrays.items()}
            sizes["codes"] = self._codes.tell()
            sums: dict[str, Any] = {
                name: hashlib.sha256(items.data).hexdigest() for name, items in arrays.items()
            }
            sums["codes"] = self._hash_codes()
        note = {**asdict(notes), "counts": asdict(counts), "sha256": sums}
        header = self._header(sizes, json.dumps(note))

        def write(file: IO[bytes]) -> None:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in ENTRIES:
                if name == "codes":
                    self._codes.seek(0)
                    shutil.copyfileobj(self._codes, file, _COPIED_BYTES)
                else:
                    file.write(arrays[name].data)

        write_whole(self._path, write)
        return FinishedPart(
            ShardFile(
                self._path.name,
                8 + len(header) + sum(sizes.values()),
                _hash_file(self._path),
                hashlib.sha256(len(header).to_bytes(8, "little") + header).hexdigest(),
                len(self._is_pair),
                len(self._lengths),
                counts.codes,
            ),
            counts,
            notes,
        )

    def _flush(self) -> None:
        if self._waiting:
            with naming(self._path):
                self._codes.write(np.concatenate(self._waiting).astype(self._dtype).data)
        self._waiting, self._num_waiting = [], 0

    def _hash_codes(self) -> list[str]:
        self._codes.seek(0)
        chunks = iter(lambda: self._codes.read(CHUNK_BYTES), b"")
        return [hashlib.sha256(chunk).hexdigest() for chunk in chunks]

    def _header(self, sizes: Mapping[str, int], note: str) -> bytes:
        checksum = hashlib.sha256(note.encode()).hexdigest()
        header: dict[str, Any] = {"__metadata__": {NOTE: note, NOTE_SHA256: checksum}}
        begin = 0
        for name, dtypes in ENTRIES.items():
            code = next(c for c in dtypes if name != "codes" or dtypes[c] == self._dtype)
            count = sizes[name] // dtypes[code].itemsize
            offsets = [begin, begin := begin + sizes[name]]
            header[name] = {"dtype": code, "shape": [count], "data_offsets": offsets}
        content = json.dumps(header).encode()
        return content + b" " * (-len(content) % 8)  # so that entries are aligned

    def _count(self, arrays: Mapping[str, NDArray[Any]]) -> PartCounts:
        numbers, kinds = arrays["segment_modality"], len(self._modalities)
        lengths = np.frombuffer(self._lengths, "u8").astype(np.int64)
        sizes = np.frombuffer(self._document_segments, "u8").astype(np.int64)
        documents = np.repeat(np.arange(len(sizes)), sizes)  # of each segment
        owners = np.unique(documents * kinds + numbers) % kinds
        codes = [int(lengths[numbers == kind].sum()) for kind in range(kinds)]
        counted = (np.bincount(owners, minlength=kinds), np.bincount(numbers, minlength=kinds))
        by_name = [
            dict(zip(self._modalities, values, strict=True))
            for values in (*(items.tolist() for items in counted), codes)
        ]
        return PartCounts(*by_name)


@contextlib.contextmanager
def open_writer(path: Path, dtype: np.dtype, modalities: Sequence[str]) -> Iterator[ShardWriter]:
    """Begin a file of shards; what was collected is dropped at the end.

    Memory has the ends of segments only: codes wait in a file that the system removes whatever
    happens to the process.

    Args:
        path: The file to be.
        dtype: Of the codes.
        modalities: Names, in the manifest's order.

    Raises:
        ValueError: The folder cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        with naming(path):
            codes = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
        yield ShardWriter(path, dtype, modalities, codes)


def inspect_part(path: Path, plan: str, part: int) -> FinishedPart:
    """Read what a finished file says of itself, and compare its content with its checksums.

    Args:
        path: The file.
        plan: Hash of the plan it must belong to.
        part: Which part it must be.

    Raises:
        ValueError: It is damaged, or is of something else.
    """
    header = read_header(path)
    note = dict(header.note)
    try:
        sums, counts = note.pop("sha256"), PartCounts(**note.pop("counts"))
        notes = PartNotes(**note)
    except (KeyError, TypeError) as error:
        raise shard_error(path, f"is no part of shards ({error!r})") from None
    if (notes.plan, notes.part) != (plan, part):
        raise shard_error(path, "was made with other settings")
    whole = hashlib.sha256()
    with naming(path, "read"), path.open("rb") as file:
        whole.update(file.read(min(start for _, _, start in header.entries.values())))
        for name in ENTRIES:
            dtype, count, _ = header.entries[name]
            found = []
            own = hashlib.sha256()
            left = count * dtype.itemsize
            while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                left -= len(chunk)
                own.update(chunk)
                whole.update(chunk)
                found.append(hashlib.sha256(chunk).hexdigest() if name == "codes" else "")
            if (found if name == "codes" else own.hexdigest()) != sums.get(name):
                raise shard_error(path, f"is damaged: the checksum of its {name} is another one")
    documents, segments = header.entries["is_pair"][1], header.entries["segment_loss"][1]
    file_entry = ShardFile(
        path.name,
        header.size,
        whole.hexdigest(),
        header.sha256,
        documents,
        segments,
        counts.codes,
    )
    return FinishedPart(file_entry, counts, notes)


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file, whole or not at all, and wait until it is on the disk.

    Args:
        path: The file; beside it there is a temporary one for a while.
        write: Writes the content.

    Raises:
        ValueError: It cannot be written; names it and the reason.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path, what: str = "written") -> Iterator[None]:
    """Turn errors of the system into ones that say of which file they are."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be {what} ({error.strerror or error}). Finished files are kept: make "
            "room, or whatever is needed, and run the same again."
        ) from error


def _hash_file(path: Path) -> str:
    with naming(path, "read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
