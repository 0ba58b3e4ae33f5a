"""Documents in Parquet, read by groups of rows: one document a row, see `documents.py`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from torchtitan_mixtures.data.documents import (
    Columns,
    DocumentBuilder,
    find_beside,
)
from torchtitan_mixtures.data.source_files import DataFile, FileSettings, FileSource
from torchtitan_mixtures.data.sources import Document
from torchtitan_mixtures.source_entries import COLUMN_KEYS

SUFFIXES = (".parquet",)

BLOCK_BYTES = 1 << 26
"""Unpacked, of a block; larger groups of rows are cut. Less if the data are small."""

CACHED_BYTES = 1 << 26
"""Unpacked, of a group of rows that is kept whole for its other parts: they come in any order."""

_NUM_CACHED = 4  # groups

_MANY_BLOCKS = 256
_BATCH_ROWS = 1024  # at most, at once, so that a group of rows is not held whole


class Rows(NamedTuple):
    """Rows of one file.

    Attributes:
        group: Of rows, that they are in.
        first: Of them, counted in the group.
        count: How many.
        row: Number of the first in the file, for messages.
        group_bytes: Of the whole group, encoded but not compressed.
    """

    group: int
    first: int
    count: int
    row: int
    group_bytes: int


class Row(NamedTuple):
    """One row.

    Attributes:
        folder: What its paths are relative to.
        content: By column; or why it cannot be read.
    """

    folder: Path
    content: dict[str, Any] | ValueError


class ParquetSource(FileSource[Row]):
    """Rows of files. A block is a group of rows, or a part of one.

    Args:
        files: Opened here, for the numbers of rows in their footers.
        settings: See there.

    Raises:
        ValueError: A file is damaged or has none of the columns, or there are no rows.
    """

    column_keys = COLUMN_KEYS

    def __init__(self, files: Sequence[DataFile], settings: FileSettings) -> None:
        entry = settings.entry
        self._columns = Columns.of(entry)
        footers = [_read_footer(file, self._columns, settings) for file in files]
        size = sum(
            footer.row_group(i).total_byte_size
            for footer in footers
            for i in range(footer.num_row_groups)
        )
        block_bytes = max(1, min(BLOCK_BYTES, size // _MANY_BLOCKS))
        self._parts = {
            file: _cut(footer, block_bytes) for file, footer in zip(files, footers, strict=True)
        }
        num_parts = [len(self._parts[file]) for file in files]
        if not any(num_parts):
            raise ValueError(
                f"{settings.key}.path = {entry.path!r}: an empty source, its {len(files)} files "
                "have no rows. Remove the entry, or name other files."
            )
        super().__init__(files, num_parts, settings)
        self._large: set[tuple[DataFile, int]] = set()  # groups that were found to be
        self._media_folder = Path(entry.media_folder).expanduser() if entry.media_folder else None
        self._builder = DocumentBuilder(settings.media, settings.order, self._columns)

    def read_part(self, file: DataFile, part: int, num_parts: int) -> Sequence[Row]:
        """See `FileSource.read_part`."""
        wanted = self._parts[file][part]
        rows: list[dict[str, Any] | ValueError] = []
        try:
            group = self._kept_group(file, wanted)
            if group is None:
                rows += self._read_rows(file, wanted)
            else:
                for batch in group.slice(wanted.first, wanted.count).to_batches():
                    rows += _to_rows(batch)
        # Arrow reports damage by all of its classes, running out of memory among them: a damaged
        # length asks for terabytes.
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{file.path}, rows {wanted.row} and on: {error}") from error
        if len(rows) != wanted.count:
            raise ValueError(
                f"{file.path}, rows {wanted.row} and on: {len(rows)} rows in place of "
                f"{wanted.count}"
            )
        folder = self._media_folder or file.path.parent
        return [Row(folder, row) for row in rows]

    def _kept_group(self, file: DataFile, wanted: Rows) -> pa.Table | None:
        """The whole group of some rows, unpacked; None if it is too large to be kept."""
        place = file, wanted.group
        # As it is stored; equal values may unpack to thousands of times that.
        if wanted.group_bytes > CACHED_BYTES or place in self._large:
            return None
        group = _read_group(*place, tuple(self._columns.names()))
        if group is None:
            self._large.add(place)
        return group

    def _read_rows(self, file: DataFile, wanted: Rows) -> list[dict[str, Any] | ValueError]:
        """Read rows of a large group, from its first row on."""
        rows: list[dict[str, Any] | ValueError] = []
        with _open(file) as opened:
            batches = opened.iter_batches(
                min(_BATCH_ROWS, wanted.count),
                row_groups=[wanted.group],
                columns=_present(opened, self._columns.names()),
                use_threads=False,
            )
            first = 0
            for batch in batches:
                begin = max(wanted.first - first, 0)
                end = min(wanted.first + wanted.count - first, len(batch))
                if begin < end:
                    rows += _to_rows(batch.slice(begin, end - begin))
                first += len(batch)
                if first >= wanted.first + wanted.count:
                    break
        return rows

    def sample_key(self, block: int, number: int, sample: Row) -> str:
        """See `BlockSource.sample_key`: the file and the number of the row."""
        file, part, _ = self.find(block)
        return f"{file.path}[{self._parts[file][part].row + number}]"

    def build(self, sample: Row, key: str, rng: Random) -> Document:
        """See `BlockSource.build`."""
        if isinstance(sample.content, ValueError):
            raise sample.content
        return self._builder.build(sample.content, key, rng, find_beside(sample.folder))


def _open(file: DataFile) -> pq.ParquetFile:
    # Mapped: otherwise Arrow reads a column of the whole group, whatever its buffer.
    return pq.ParquetFile(file.path, memory_map=True, page_checksum_verification=True)


def _present(opened: pq.ParquetFile, names: Sequence[str]) -> list[str]:
    present = set(opened.schema_arrow.names)
    return [name for name in names if name in present]


@lru_cache(maxsize=_NUM_CACHED)
def _read_group(file: DataFile, group: int, names: tuple[str, ...]) -> pa.Table | None:
    """Unpack a group of rows; None once it has become too large to be kept."""
    batches, size = [], 0
    with _open(file) as opened:
        for batch in opened.iter_batches(
            _BATCH_ROWS, row_groups=[group], columns=_present(opened, names), use_threads=False
        ):
            batches.append(batch)
            size += batch.nbytes
            if size > CACHED_BYTES:
                return None
    return pa.Table.from_batches(batches)


def _read_footer(file: DataFile, columns: Columns, settings: FileSettings) -> pq.FileMetaData:
    """Read what a file says of its rows.

    Raises:
        ValueError: It is damaged, or has none of the columns.
    """
    key = f"{settings.key}.path = {settings.entry.path!r}"
    try:
        footer = pq.read_metadata(file.path)
        names = footer.schema.to_arrow_schema().names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"{key}: {file.path} is no Parquet file, or is damaged ({error}). Copy it again, or "
            "leave it out."
        ) from error
    content = columns.content()
    if not set(content) & set(names):
        raise ValueError(
            f"{key}: {file.path} has none of the columns {', '.join(content)}; its columns are "
            f"{', '.join(names)}. Set segments_column, text_column, or caption_column with "
            "image_column or audio_column."
        )
    return footer


def _cut(footer: pq.FileMetaData, block_bytes: int) -> list[Rows]:
    """Cut the groups of rows of a file into parts of about so many bytes."""
    parts = []
    before = 0
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        if not group.num_rows:
            continue
        count = min(max(1, group.total_byte_size // block_bytes), group.num_rows)
        ends = [group.num_rows * (i + 1) // count for i in range(count)]
        for first, end in zip([0, *ends], ends, strict=False):
            parts.append(Rows(number, first, end - first, before + first, group.total_byte_size))
        before += group.num_rows
    return parts


def _to_rows(batch: pa.RecordBatch) -> list[dict[str, Any] | ValueError]:
    try:
        return batch.to_pylist()
    except ValueError:  # a string that is not UTF-8, in one of them
        return [_to_row(batch.slice(i, 1)) for i in range(len(batch))]


def _to_row(batch: pa.RecordBatch) -> dict[str, Any] | ValueError:
    try:
        return batch.to_pylist()[0]
    except ValueError as error:
        return error
