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
made of and with which tokenizers, and of each file its size and checksum.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
from numpy.typing import NDArray

MANIFEST = "manifest.json"
PLAN = "plan.json"
"""What was to be tokenised, written first. A folder that has it but no `MANIFEST` is incomplete."""

FORMAT_VERSION = 1
TOKENIZE_COMMAND = "python scripts/prepare_data.py tokenize"

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

_MAX_HEADER = 1 << 24  # bytes; a header of ours has a few hundred


@dataclass(frozen=True)
class ShardModality:
    """A modality of shards: what made its codes, and how many there are."""

    name: str
    tokenizer: str
    """What the configuration called it."""
    fingerprint: str
    vocab_size: int
    documents: int
    """Those with a segment of it."""
    segments: int
    codes: int


@dataclass(frozen=True)
class ShardFile:
    """One file of shards."""

    file: str
    bytes: int
    sha256: str
    documents: int
    segments: int
    codes: dict[str, int]
    """Of each modality."""

    @property
    def num_codes(self) -> int:
        """Codes of all modalities."""
        return sum(self.codes.values())


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says."""

    documents: int
    modalities: tuple[ShardModality, ...]
    files: tuple[ShardFile, ...]
    source: dict[str, Any]
    """Name and settings of what was tokenised."""
    samples: int
    """Of the source, bad ones too."""
    bad_samples: int
    """Those skipped."""
    bad_keys: tuple[str, ...]
    """Some of them."""

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read and check `manifest.json`.

        Raises:
            ValueError: There is none, or it is corrupt or of another version; says what to do.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise _missing_manifest(folder)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content.pop("format_version")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise shard_error(path, f"is corrupt ({error!r})") from None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: has format version {version!r}, and this program reads "
                f"{FORMAT_VERSION}; use the program that wrote it, or tokenize again into a new "
                f"folder with `{TOKENIZE_COMMAND}`."
            )
        try:
            content["modalities"] = tuple(ShardModality(**m) for m in content["modalities"])
            content["files"] = tuple(ShardFile(**f) for f in content["files"])
            content["bad_keys"] = tuple(content["bad_keys"])
            manifest = Manifest(**content)
            manifest._check()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise shard_error(path, f"is corrupt ({error})") from None
        return manifest

    def _check(self) -> None:
        for part in (self, *self.modalities, *self.files):
            _check_types(part)
        names = [modality.name for modality in self.modalities]
        if not 0 < len(set(names)) == len(names) <= 256:
            raise ValueError(f"modalities {names}")
        for file in self.files:
            if Path(file.file).name != file.file or set(file.codes) - set(names):
                raise ValueError(f"file {file.file!r} with codes of {', '.join(file.codes)}")
            if not all(type(n) is int and n >= 0 for n in file.codes.values()):
                raise ValueError(f"file {file.file!r} with codes {file.codes}")
        if len({file.file for file in self.files}) < len(self.files):
            raise ValueError("a file is named twice")
        totals = {m.name: m.codes for m in self.modalities}
        found = {name: sum(file.codes.get(name, 0) for file in self.files) for name in names}
        documents = sum(file.documents for file in self.files)
        segments = sum(file.segments for file in self.files)
        if (totals, self.documents, sum(m.segments for m in self.modalities)) != (
            found,
            documents,
            segments,
        ):
            raise ValueError("its totals are not those of its files")


def _check_types(part: Any) -> None:
    """Check that fields are what they are declared to be, and that numbers count something."""
    hints = get_type_hints(type(part))
    for field in fields(part):
        value, kind = getattr(part, field.name), hints[field.name]
        kind = getattr(kind, "__origin__", kind)
        if type(value) is not kind or (kind is int and value < 0):
            raise ValueError(f"{field.name} = {value!r}")


def shard_error(path: Path, problem: str) -> ValueError:
    """What is wrong with a file of shards, and how to make it anew."""
    return ValueError(
        f"{path}: {problem}. Delete it and {MANIFEST} and run `{TOKENIZE_COMMAND}` as before, "
        "which writes what is missing; or copy the folder again."
    )


def _missing_manifest(folder: Path) -> ValueError:
    if (folder / PLAN).is_file():
        return ValueError(
            f"{folder}: its shards are not complete; run `{TOKENIZE_COMMAND}` as before, which "
            "goes on where it ended."
        )
    problem = f"has no {MANIFEST}" if folder.is_dir() else "no such folder"
    return ValueError(
        f"{folder}: {problem}; name a folder that `{TOKENIZE_COMMAND}` wrote, or write one."
    )


class ShardHeader(NamedTuple):
    """Where the entries of a file are."""

    entries: dict[str, tuple[np.dtype, int, int]]
    """Type, number of items, and the byte of the file at which they begin."""
    notes: dict[str, str]
    size: int
    """Bytes of the file."""


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
    return ShardHeader(entries, notes, size)


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
    """One file, memory-mapped; its checksum was found to be right.

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
            if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                raise shard_error(path, f"is damaged: its checksum is not that of {MANIFEST}")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays = {
            name: np.frombuffer(data, dtype, count, start)
            for name, (dtype, count, start) in header.entries.items()
        }
        self._codes = arrays["codes"]
        self._modality, self._loss = arrays["segment_modality"], arrays["segment_loss"]
        self._segment_ends, self._document_ends = arrays["segment_ends"], arrays["document_ends"]
        self._is_pair = arrays["is_pair"]
        ends = ((self._segment_ends, self._codes), (self._document_ends, self._modality))
        if not all(_are_ends(array, len(items)) for array, items in ends):
            raise shard_error(path, "is no file of shards (its segments do not add up)")
        if len(self._modality) and int(self._modality.max()) >= num_modalities:
            raise shard_error(path, "is no file of shards (it has an unknown modality)")

    def read(self, number: int) -> StoredDocument:
        """Read a document.

        Args:
            number: In the file.
        """
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
    """Check that a file is as long as the manifest says and holds what it says.

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


def _limits(ends: NDArray[np.uint64], number: int) -> tuple[int, int]:
    """Where an item begins and ends."""
    return int(ends[number - 1]) if number else 0, int(ends[number])


def _are_ends(ends: NDArray[np.uint64], count: int) -> bool:
    """Whether ends ascend to the number of what they divide."""
    last = int(ends[-1]) if len(ends) else 0
    return last == count and bool((ends[1:] >= ends[:-1]).all())


class TokenizedShards:
    """A folder of shards. Opening it reads the manifest and the headers of the files.

    A file is mapped when a document of it is first read in a process; its checksum is compared
    then, which reads it once.

    Args:
        folder: Has a `manifest.json`.

    Raises:
        ValueError: It or a file is missing, cut off, or of other shards; says what to do.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._open: dict[int, OpenShard] = {}
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
        if number not in self._open:
            expected = self.manifest.files[number]
            path = self.folder / expected.file
            self._open[number] = OpenShard(path, expected, len(self.manifest.modalities))
        return self._open[number]
