"""Pre-tokenised shards: documents as codes in memory-mapped files, and a manifest of them.

`scripts/prepare_data.py tokenize` writes such a folder (`tokenize_source.py`). Each file is
safetensors with six entries, all of one axis:

- `codes`, uint16 or uint32: the codes of all segments one after the other, each in the vocabulary
  of its own modality, from 0. Text has the ids of its tokenizer, without sentinels.
- `segment_ends`, uint64: where each segment ends in `codes`.
- `segment_modality`, uint8: its number in the manifest's list of modalities.
- `segment_loss`, uint8: 1 if the model is trained to predict it.
- `document_ends`, uint64: where each document ends in the list of segments.
- `is_pair`, uint8: 1 if its order is free (`Document.is_pair`); the text is first in the file.

`manifest.json` is written last, so a folder that has one is complete. It says what the codes were
made of and with which tokenizers, and of each file its size and checksums: of the whole, and of the
header. That has the checksums of the entries, of `codes` one for every `CHUNK_BYTES`. So whoever
reads some documents can check those, without reading terabytes first.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchtitan_mixtures.data.shard_manifest import MANIFEST, Manifest, ShardFile, shard_error

CODE_DTYPES = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4")}
"""What `codes` may be, by the names that safetensors has for them."""

_ENDS, _BYTES = {"U64": np.dtype("<u8")}, {"U8": np.dtype("u1")}

ENTRIES = {
    "segment_ends": _ENDS,
    "document_ends": _ENDS,
    "codes": CODE_DTYPES,
    "segment_modality": _BYTES,
    "segment_loss": _BYTES,
    "is_pair": _BYTES,
}
"""The entries of a file and what they may be made of, in the order of the file: widest first, so
that each is aligned."""

CHUNK_BYTES = 1 << 20
"""Of codes that share a checksum."""

NOTE, NOTE_SHA256 = "part", "sha256 of part"
"""Names in the header of what its file says of itself: JSON with `sha256` of the entries, and what
`tokenized_writing.py` needs; and the checksum of that."""

_MAX_OPEN = 128
"""Files that a process has mapped. Each takes a descriptor, of which there may be 1,024."""

_MAX_HEADER = 1 << 24  # bytes; a header of ours has a few hundred, and 70 for every chunk


class ShardHeader(NamedTuple):
    """Where the entries of a file are."""

    entries: dict[str, tuple[np.dtype, int, int]]
    """Type, number of items, and the byte of the file at which they begin."""
    note: dict[str, Any]
    """What the file says of itself."""
    size: int
    """Bytes of the file."""
    sha256: str
    """Of all before the entries."""


def read_header(path: Path) -> ShardHeader:
    """Read the header of a file, and nothing else of it.

    Raises:
        ValueError: It is missing, cut off, or no file of shards.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            content = file.read(min(length, _MAX_HEADER))
    except FileNotFoundError:
        raise shard_error(path, "is missing") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    if size < 8 or len(content) < length:
        raise shard_error(path, f"is cut off or no safetensors ({size} bytes)")
    try:
        header = json.loads(content)
        notes = header.pop("__metadata__")
        if hashlib.sha256(notes[NOTE].encode()).hexdigest() != notes[NOTE_SHA256]:
            raise ValueError("the checksum of its notes is not theirs")
        note = json.loads(notes[NOTE])
        entries = {name: _parse_entry(header[name], ENTRIES[name]) for name in header}
        if set(entries) != set(ENTRIES):
            raise ValueError(f"entries {', '.join(entries)}")
        begin = 0
        for name in ENTRIES:
            dtype, count, start = entries[name]
            if start != begin:
                raise ValueError(f"offset of {name}")
            begin += count * dtype.itemsize
            entries[name] = dtype, count, start + 8 + length
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise shard_error(path, f"is no file of shards ({error})") from None
    if begin + 8 + length != size:
        raise shard_error(path, f"has {size} bytes, and its header says {begin + 8 + length}")
    digest = hashlib.sha256(length.to_bytes(8, "little") + content).hexdigest()
    return ShardHeader(entries, note, size, digest)


def _parse_entry(entry: Any, dtypes: Mapping[str, np.dtype]) -> tuple[np.dtype, int, int]:
    dtype = dtypes[entry["dtype"]]
    (count,) = entry["shape"]
    start, end = entry["data_offsets"]
    if type(count) is not int or count < 0 or end - start != count * dtype.itemsize:
        raise ValueError(f"an entry of shape {entry['shape']} in {end - start} bytes")
    return dtype, count, start


class StoredDocument(NamedTuple):
    """A document as a file has it."""

    codes: list[NDArray[np.int64]]
    """Of each segment, `(codes,)` int64."""
    modalities: list[int]
    """Of each segment, its number in the manifest."""
    losses: list[int]
    is_pair: bool


class OpenShard:
    """One file, memory-mapped. What is read of it was found to have the right checksum.

    Args:
        path: The file.
        expected: What the manifest says of it.
        num_modalities: Of the manifest.

    Raises:
        ValueError: It is damaged, or of other shards.
    """

    def __init__(self, path: Path, expected: ShardFile, num_modalities: int) -> None:
        header = read_header(path)
        check_file(path, header, expected)
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays = {
            name: np.frombuffer(data, dtype, count, start)
            for name, (dtype, count, start) in header.entries.items()
        }
        self._path = path
        self._sums: list[str | None] = list(_sums_of(path, header)["codes"])  # None: was compared
        for name, sha256 in _sums_of(path, header).items():
            if name != "codes" and hashlib.sha256(arrays[name].data).hexdigest() != sha256:
                raise _damaged(path, name)
        self._codes = arrays["codes"]
        self._modality, self._loss = arrays["segment_modality"], arrays["segment_loss"]
        self._segment_ends, self._document_ends = arrays["segment_ends"], arrays["document_ends"]
        self._is_pair = arrays["is_pair"]
        ends = ((self._segment_ends, self._codes), (self._document_ends, self._modality))
        if not all(_are_ends(array, len(items)) for array, items in ends):
            raise shard_error(path, "is no file of shards (its segments do not add up)")
        if len(self._modality) and int(self._modality.max()) >= num_modalities:
            raise shard_error(path, "is no file of shards (it has an unknown modality)")

    def check(self, first: int, end: int) -> None:
        """Compare the checksums of documents, if that has not been done.

        Args:
            first: Number in the file.
            end: Of the one behind the last.

        Raises:
            ValueError: They are damaged.
        """
        if first == end:
            return
        first_segment = _limits(self._document_ends, first)[0]
        last_segment = _limits(self._document_ends, end - 1)[1]
        if first_segment == last_segment:
            return
        size = self._codes.itemsize
        begin = _limits(self._segment_ends, first_segment)[0] * size
        stop = int(self._segment_ends[last_segment - 1]) * size
        for chunk in range(begin // CHUNK_BYTES, -(-stop // CHUNK_BYTES)):
            if (expected := self._sums[chunk]) is None:
                continue
            part = slice(chunk * CHUNK_BYTES // size, (chunk + 1) * CHUNK_BYTES // size)
            if hashlib.sha256(self._codes[part].data).hexdigest() != expected:
                raise _damaged(self._path, "codes")
            self._sums[chunk] = None

    def read(self, number: int) -> StoredDocument:
        """Read a document.

        Args:
            number: In the file.

        Raises:
            ValueError: It is damaged.
        """
        self.check(number, number + 1)
        first, last = _limits(self._document_ends, number)
        ends = self._segment_ends[first:last].tolist()
        begin = _limits(self._segment_ends, first)[0] if ends else 0
        codes = self._codes[begin : ends[-1] if ends else begin].astype(np.int64)
        parts, start = [], begin
        for end in ends:
            parts.append(codes[start - begin : end - begin])
            start = end
        return StoredDocument(
            parts,
            self._modality[first:last].tolist(),
            self._loss[first:last].tolist(),
            bool(self._is_pair[number]),
        )


def check_file(path: Path, header: ShardHeader, expected: ShardFile) -> None:
    """Check that a file is as long as the manifest says, and that its header is that of then.

    Raises:
        ValueError: It does not.
    """
    if header.size != expected.bytes:
        raise shard_error(path, f"has {header.size} bytes, and {MANIFEST} says {expected.bytes}")
    counts = {
        "codes": expected.num_codes,
        **dict.fromkeys(("segment_ends", "segment_modality", "segment_loss"), expected.segments),
        **dict.fromkeys(("document_ends", "is_pair"), expected.documents),
    }
    for name, count in counts.items():
        if header.entries[name][1] != count:
            raise shard_error(
                path,
                f"belongs to other shards: {name} has {header.entries[name][1]} items, and "
                f"{MANIFEST} says {count}",
            )
    if header.sha256 != expected.header_sha256:
        raise shard_error(path, f"is damaged: its checksum is not that of {MANIFEST}")


def _sums_of(path: Path, header: ShardHeader) -> dict[str, Any]:
    """The checksums of the entries of a file.

    Raises:
        ValueError: They are not there.
    """
    sums = header.note.get("sha256")
    dtype, count, _ = header.entries["codes"]
    if (
        not isinstance(sums, dict)
        or set(sums) != set(ENTRIES)
        or not isinstance(sums["codes"], list)
        or len(sums["codes"]) != -(-count * dtype.itemsize // CHUNK_BYTES)
    ):
        raise shard_error(path, "is no file of shards (it has no checksums)")
    return sums


def _damaged(path: Path, name: str) -> ValueError:
    return shard_error(path, f"is damaged: the checksum of its {name} is another one")


def _limits(ends: NDArray[np.uint64], number: int) -> tuple[int, int]:
    """Where an item begins and ends."""
    return int(ends[number - 1]) if number else 0, int(ends[number])


def _are_ends(ends: NDArray[np.uint64], count: int) -> bool:
    """Whether ends ascend to the number of what they divide."""
    last = int(ends[-1]) if len(ends) else 0
    return last == count and bool((ends[1:] >= ends[:-1]).all())


class TokenizedShards:
    """A folder of shards. Opening it reads the manifest and the headers of the files.

    A file is mapped when a document of it is first read in a process, and unmapped when many others
    were since; checksums are compared of what is read.

    Args:
        folder: Has a `manifest.json`.

    Raises:
        ValueError: It or a file is missing, cut off, or of other shards; says what to do.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._open: dict[int, OpenShard] = {}  # the one used last at the end
        for file in self.manifest.files:
            check_file(folder / file.file, read_header(folder / file.file), file)

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped files, which another process maps itself."""
        return {**self.__dict__, "_open": {}}

    def file(self, number: int) -> OpenShard:
        """A file of the manifest, mapped.

        Raises:
            ValueError: It is damaged.
        """
        opened = self._open.pop(number, None)
        if opened is None:
            expected = self.manifest.files[number]
            path = self.folder / expected.file
            opened = OpenShard(path, expected, len(self.manifest.modalities))
            if len(self._open) == _MAX_OPEN:
                del self._open[next(iter(self._open))]
        self._open[number] = opened
        return opened
