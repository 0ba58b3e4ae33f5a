"""Files of a source: finding them, and blocks that are parts of them."""

from __future__ import annotations

import glob
import hashlib
import os
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan_mixtures.data.blocks import BlockSource, Sample
from torchtitan_mixtures.data.media import MediaReader
from torchtitan_mixtures.data.sources import PairOrder
from torchtitan_mixtures.source_entries import SourceEntry

if TYPE_CHECKING:
    from torchtitan_mixtures.multimodal_config import Multimodal

COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".lz4", ".br", ".zip")
"""Suffixes of files that cannot be read from the middle."""


@dataclass(frozen=True)
class FileSettings:
    """What every source of files is told.

    Attributes:
        entry: Of the source.
        config: The section it is in.
        media: Reads pictures and sounds.
        order: Of pairs.
        is_endless: See `Source`.
    """

    entry: SourceEntry
    config: Multimodal
    media: MediaReader
    order: PairOrder
    is_endless: bool

    @property
    def key(self) -> str:
        """What messages call the entry."""
        return f"multimodal.sources[{self.entry.name}]"

    def fingerprint(self, files: str, columns: Sequence[str] = ()) -> dict[str, Any]:
        """See `Source.fingerprint`.

        Args:
            files: Hash of what is there.
            columns: Keys of the entry that say what is read of it.
        """
        values = {
            f"{self.key}.kind": self.entry.kind,
            f"{self.key}.path: hash of the files": files,
            f"{self.key}.max_epochs": self.entry.max_epochs if self.is_endless else 1,
            "multimodal.seed": self.config.seed,
        }
        return values | {f"{self.key}.{column}": getattr(self.entry, column) for column in columns}


@dataclass(frozen=True)
class DataFile:
    """A file as it was at start-up.

    Attributes:
        path: Where it is.
        name: Its path below what the entry names, which moves with the data.
        size: Bytes.
    """

    path: Path
    name: str
    size: int

    def check_unchanged(self) -> None:
        """Check that the file is what the blocks were made for.

        Raises:
            ValueError: It is gone, or has another size.
        """
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise ValueError(f"{self.path} is gone since start-up ({error.strerror})") from error
        if size != self.size:
            raise ValueError(
                f"{self.path} has {size} bytes and had {self.size} at start-up. Files must not "
                "change while they are read: write new data into new files, and start again."
            )


class FileSource(BlockSource[Sample]):
    """A source whose blocks are parts of files.

    Args:
        files: In their order.
        num_parts: Blocks of each; a file may have none.
        settings: See there.
    """

    column_keys: tuple[str, ...] = ()
    """Keys of the entry that say what is read of the files."""

    def __init__(
        self, files: Sequence[DataFile], num_parts: Sequence[int], settings: FileSettings
    ) -> None:
        self.files = files
        self.settings = settings
        self._starts = [0, *accumulate(num_parts)]
        super().__init__(
            self._starts[-1],
            settings.config.seed,
            settings.is_endless,
            settings.entry.name,
            settings.config.max_bad_fraction,
            settings.entry.max_epochs,
        )

    @abstractmethod
    def read_part(self, file: DataFile, part: int, num_parts: int) -> Sequence[Sample]:
        """See `BlockSource.read_block`.

        Args:
            file: To read.
            part: In `range(num_parts)`.
            num_parts: Of that file.
        """

    def read_block(self, block: int) -> Sequence[Sample]:
        """See `BlockSource.read_block`."""
        return self.read_part(*self.find(block))

    def block_at(self, epoch: int, place: int) -> int:
        """See `BlockSource.block_at`; looks whether its file is still the same.

        That ends the run, whatever share of bad samples is allowed: nothing could be resumed.

        Raises:
            ValueError: It is not.
        """
        block = super().block_at(epoch, place)
        file, *_ = self.find(block)
        file.check_unchanged()
        return block

    def find(self, block: int) -> tuple[DataFile, int, int]:
        """The file of a block, which part of it the block is, and of how many."""
        number = bisect_right(self._starts, block) - 1
        start, end = self._starts[number : number + 2]
        return self.files[number], block - start, end - start

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        files = hash_of([f"{file.name}\0{file.size}" for file in self.files])
        return self.settings.fingerprint(files, self.column_keys)


def hash_of(names: Sequence[str]) -> str:
    """A short hash of a list of names."""
    joined = "\n".join(names).encode("utf-8", "surrogateescape")  # names of files may be any bytes
    return hashlib.sha256(joined).hexdigest()[:16]


def find_data_files(settings: FileSettings, suffixes: Sequence[str]) -> list[DataFile]:
    """Find the files of an entry, sorted by name.

    Args:
        settings: Its `entry.path` is a file, a folder (all files below it that have one of the
            suffixes), or a pattern of files and folders, with `**` for any folders.
        suffixes: Of the entry's kind.

    Raises:
        ValueError: There are none, all are empty, or some are compressed.
        OSError: A folder or file cannot be read.
    """
    found = find_paths(settings, suffixes)
    files = [DataFile(path, name, path.stat().st_size) for name, path in found]
    if not any(file.size for file in files):
        raise ValueError(
            f"{settings.key}.path = {settings.entry.path!r}: an empty source, its {len(files)} "
            "files have no bytes. Remove the entry, or name other files."
        )
    return files


def find_paths(settings: FileSettings, suffixes: Sequence[str]) -> list[tuple[str, Path]]:
    """Find the files of an entry, sorted by name; see `find_data_files`.

    Returns:
        Of each its path below what the entry names, and the path to open.
    """
    key = f"{settings.key}.path = {settings.entry.path!r}"
    named = Path(settings.entry.path).expanduser()
    if named.is_dir():
        root, matches = named, [named]
    elif named.exists():
        root, matches = named.parent, [named]
    else:
        root, matches = _expand(str(named))
    if not matches:
        raise ValueError(
            f"{key}: there is no such file or folder, and it matches none. "
            "Correct it; relative paths start at the current folder, and ** matches any depth."
        )
    is_explicit = not named.is_dir() and not glob.has_magic(named.suffix) and named.suffix != ""
    wanted = tuple(suffix.lower() for suffix in suffixes)
    found: dict[str, Path] = {}
    for match in matches:
        for path in walk(match) if match.is_dir() else [match]:
            is_named = is_explicit and not match.is_dir()
            if is_named or path.name.lower().endswith((*wanted, *_compressed(wanted))):
                found[path.relative_to(root).as_posix()] = path
    _refuse_compressed(key, found, settings.entry.kind)
    plain = {name: path for name, path in found.items() if not _is_compressed(name)}
    if not plain:
        raise ValueError(
            f"{key}: an empty source, with no files of kind {settings.entry.kind!r} "
            f"({', '.join(suffixes)}). Name another folder, or change the kind."
        )
    return sorted(plain.items())


def walk(folder: Path) -> Iterator[Path]:
    """All regular files below a folder but hidden ones, each folder once.

    Links are followed; a folder that is reached again, through a loop of links too, is left out.

    Raises:
        OSError: A folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        status = place.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(place) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        folders = []
        for entry in found:
            if entry.name.startswith("."):
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                continue
            if is_folder:
                folders.append(Path(entry.path))
            elif is_file:
                yield Path(entry.path)
        waiting += reversed(folders)


def _expand(pattern: str) -> tuple[Path, list[Path]]:
    """The folder up to the first wildcard of a pattern, and what the pattern matches."""
    parts = Path(pattern).parts
    num_plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    root = Path(*parts[:num_plain])
    if "**" not in parts:
        return root, [Path(match) for match in sorted(glob.glob(pattern))]
    # `glob` would follow a loop of links as far as the system lets it.
    before = parts.index("**")
    matches = []
    for start in sorted(glob.glob(str(Path(*parts[:before])))):
        for path in walk(Path(start)):
            if _matches(path.relative_to(start).parts, parts[before:]):
                matches.append(path)
    return root, matches


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_matches(names[i:], patterns[1:]) for i in range(len(names) + 1))
    is_match = bool(names) and fnmatchcase(names[0], patterns[0])
    return is_match and _matches(names[1:], patterns[1:])


def _compressed(suffixes: Sequence[str]) -> list[str]:
    doubled = [suffix + packed for suffix in suffixes for packed in COMPRESSED]
    return doubled + ([".tgz", ".tbz2", ".txz"] if ".tar" in suffixes else [])


def _is_compressed(name: str) -> bool:
    return name.lower().endswith(COMPRESSED)


def _refuse_compressed(key: str, found: dict[str, Path], kind: str) -> None:
    """Refuse files whose middle cannot be read, unless they lie unpacked beside."""
    for name, path in found.items():
        if _is_compressed(name) and name[: name.rindex(".")] not in found:
            other = "; or read it with kind = 'datasets'" if kind == "jsonl" else ""
            raise ValueError(
                f"{key}: {path} is compressed, and would have to be read from its beginning after "
                f"every resumption. Decompress it (gunzip, zstd -d, ...){other}."
            )
