"""Documents in JSON Lines, read by ranges of bytes: one object a line, see `documents.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, BinaryIO, NamedTuple

from torchtitan_mixtures.data.documents import (
    Columns,
    DocumentBuilder,
    Finder,
    find_beside,
    parse_json,
)
from torchtitan_mixtures.data.media import decode_text
from torchtitan_mixtures.data.source_files import DataFile, FileSettings, FileSource
from torchtitan_mixtures.data.sources import Document
from torchtitan_mixtures.source_entries import COLUMN_KEYS

SUFFIXES = (".jsonl", ".ndjson")

BLOCK_BYTES = 1 << 20
"""Of a block; less if the data are small, so that all shards find something."""

MAX_LINE_BYTES = 1 << 28
"""Of a line; one that is longer is a bad sample."""

_MANY_BLOCKS = 1024
_LEAST_BYTES = 256
_CHUNK_BYTES = 1 << 12
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A line of a file.

    Attributes:
        file: It is in.
        start: Byte at which it begins.
        content: None if it is too long to be read.
    """

    file: DataFile
    start: int
    content: bytes | None


class JsonlSource(FileSource[Line]):
    """Lines of files. A block is a range of bytes, and has the lines that begin there.

    Args:
        files: At least one is not empty.
        settings: See there.

    Raises:
        ValueError: All lines are blank.
    """

    column_keys = COLUMN_KEYS

    def __init__(self, files: Sequence[DataFile], settings: FileSettings) -> None:
        entry = settings.entry
        files = [file for file in files if file.size]
        if all(_is_blank(file) for file in files):
            raise ValueError(
                f"{settings.key}.path = {entry.path!r}: an empty source, its {len(files)} files "
                "have blank lines only. Remove the entry, or name other files."
            )
        wanted = sum(file.size for file in files) // _MANY_BLOCKS
        self._block_bytes = min(max(wanted, _LEAST_BYTES), BLOCK_BYTES)
        super().__init__(files, [-(-file.size // self._block_bytes) for file in files], settings)
        self._media_folder = Path(entry.media_folder).expanduser() if entry.media_folder else None
        self._builder = DocumentBuilder(settings.media, settings.order, Columns.of(entry))

    def read_part(self, file: DataFile, part: int, num_parts: int) -> Sequence[Line]:
        """See `FileSource.read_part`: the lines that begin in the range, with no blank ones."""
        start = part * self._block_bytes
        return read_lines(file, start, min(start + self._block_bytes, file.size))

    def sample_key(self, block: int, number: int, sample: Line) -> str:
        """See `BlockSource.sample_key`: the file and the byte at which the line begins."""
        return f"{sample.file.path}, byte {sample.start}"

    def build(self, sample: Line, key: str, rng: Random) -> Document:
        """See `BlockSource.build`."""
        if sample.content is None:
            raise ValueError(f"the line has more than {MAX_LINE_BYTES} bytes")
        row = self.read_row(parse_json(decode_text(sample.content)))
        return self._builder.build(row, key, rng, self._find(sample.file))

    def read_row(self, value: Any) -> Any:
        """The row of what a line says."""
        return value

    def _find(self, file: DataFile) -> Finder:
        return find_beside(self._media_folder or file.path.parent)


def read_lines(file: DataFile, start: int, end: int) -> list[Line]:
    """Read the lines of a file that begin in a range of bytes; blank ones are left out.

    Args:
        file: Of the size that it had at start-up.
        start: First byte.
        end: Byte after the last one.

    Raises:
        ValueError: The file has become shorter.
    """
    with file.path.open("rb") as stream:
        before = 1 if start else 0  # a line that begins at `start` has its predecessor's end there
        stream.seek(start - before)
        content = stream.read(end - start + before)
        if len(content) != end - start + before:
            raise ValueError(f"{file.path} ends before byte {end}, which it had at start-up")
        if before:
            first = content.find(b"\n") + 1
            if not first:
                return []
        else:
            first = len(_BYTE_ORDER_MARK) if content.startswith(_BYTE_ORDER_MARK) else 0
        position = start - before + first
        *whole, last = content[first:].split(b"\n")
        lines = []
        for line in whole:
            if line and not line.isspace():
                lines.append(Line(file, position, line))
            position += len(line) + 1
        if position < end:
            rest = _read_line_end(stream, last)
            if rest is None or rest.strip():
                lines.append(Line(file, position, rest))
    return lines


def _is_blank(file: DataFile) -> bool:
    with file.path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            if not chunk.isspace():
                return False
    return True


def _read_line_end(stream: BinaryIO, beginning: bytes) -> bytes | None:
    """The whole of a line of which the beginning is read; None if it is too long."""
    line = beginning + stream.readline(max(MAX_LINE_BYTES - len(beginning), 0) + 1)
    return line if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n") else None
