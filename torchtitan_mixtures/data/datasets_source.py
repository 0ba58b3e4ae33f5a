"""Documents from anything that `datasets.load_dataset` opens, local or remote, streamed or not.

Rows are what they are in other files, see `documents.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
from datasets.distributed import split_dataset_by_node
from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.documents import Columns, DocumentBuilder
from torchtitan_mixtures.data.media import MediaReader
from torchtitan_mixtures.data.opening import (
    LocalFiles,
    Naming,
    keep_columns,
    local_files,
    open_split,
)
from torchtitan_mixtures.data.sample_reader import DatasetFinder, Reading, SampleReader
from torchtitan_mixtures.data.samples import SampleJudge
from torchtitan_mixtures.data.source_files import hash_of
from torchtitan_mixtures.data.sources import (
    Document,
    IndexedShard,
    IndexedSource,
    PairOrder,
    Source,
    document_rng,
    epoch_order,
)
from torchtitan_mixtures.source_entries import COLUMN_KEYS, SourceEntry

if TYPE_CHECKING:
    from torchtitan_mixtures.job_config import Multimodal

SHUFFLE_BLOCK = 1024
"""Samples of a stream that are shuffled together; still undecoded while they wait."""

SHUFFLE_BYTES = 1 << 26
"""Of them at most, but for the last."""

_IDENTITY = ("image_column", "caption_column", "source", "path", "data_files")
"""Keys that say where documents are, if they are those of `[multimodal]` and not of an entry."""

# `datasets` warns that its shuffle buffer is lost on resume. Ours holds one sample, already used.
logging.getLogger("datasets.iterable_dataset").addFilter(
    lambda record: "state dict of a shuffle buffer" not in record.getMessage()
)


class MappedSource(IndexedSource):
    """Samples with an index: every epoch visits all of them in a new global order.

    Args:
        data: The split; only the columns needed, images and sounds not decoded.
        reading: How documents are made of samples.
        config: The `[multimodal]` section.
        identity: What tells these data from others; see `Source.fingerprint`.
        local: The files it is read from, if they are on this machine.
        is_endless: See `Source`.
        naming: Of the keys and of the split, for messages.
    """

    def __init__(
        self,
        data: datasets.Dataset,
        reading: Reading,
        config: Multimodal,
        identity: dict[str, Any],
        local: LocalFiles | None,
        is_endless: bool,
        naming: Naming,
    ) -> None:
        super().__init__(len(data), config.seed, is_endless)
        self._data = data
        self._reading = reading, config.max_bad_fraction, naming
        self._identity = identity
        self.local = local
        self._samples_key = _counted("samples in the split", naming)

    def shards(self, indices: Sequence[int], count: int) -> list[IndexedShard]:
        """See `Source.shards`."""
        readers = _readers(len(indices), count, *self._reading)
        return [
            MappedShard(self, index, count, self._data, reader)
            for index, reader in zip(indices, readers, strict=True)
        ]

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        return {**self._identity, self._samples_key: self.num_documents}


class MappedShard(IndexedShard):
    """One shard of a `MappedSource`; its reader counts bad samples."""

    def __init__(
        self,
        source: MappedSource,
        index: int,
        count: int,
        data: datasets.Dataset,
        reader: SampleReader,
    ) -> None:
        super().__init__(
            source,
            index,
            count,
            lambda epoch, place: reader.read(lambda: data[place], epoch, place),
        )
        self._reader = reader

    def end_epoch(self) -> None:
        """See `IndexedShard.end_epoch`."""
        self._reader.end_epoch()

    def reject(self, document: Document, error: ValueError) -> None:
        """See `Shard.reject`."""
        self._reader.reject(document, error)

    def progress(self) -> dict[str, float]:
        """See `Shard.progress`."""
        return {**super().progress(), **self._reader.progress()}

    def state_dict(self) -> dict[str, Any]:
        """See `Shard.state_dict`."""
        return {**super().state_dict(), "counts": self._reader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Shard.load_state_dict`."""
        super().load_state_dict(state)
        self._reader.load_state_dict(state["counts"])


class StreamedSource:
    """Samples without an index: files in a new order each epoch, samples shuffled in blocks.

    Each shard reads files of its own if the shards divide the number of files, else all files and
    of their samples every n-th.

    Args:
        data: The split; only the columns needed, images and sounds not decoded.
        reading: How documents are made of samples.
        config: The `[multimodal]` section.
        identity: What tells these data from others; see `Source.fingerprint`.
        local: The files it is read from, if they are on this machine.
        is_endless: See `Source`.
        naming: Of the keys and of the split, for messages.
    """

    def __init__(
        self,
        data: datasets.IterableDataset,
        reading: Reading,
        config: Multimodal,
        identity: dict[str, Any],
        local: LocalFiles | None,
        is_endless: bool,
        naming: Naming,
    ) -> None:
        self.is_endless = is_endless
        self.max_epochs = 0
        self.seed = config.seed
        self._data = data
        self._reading = reading, config.max_bad_fraction, naming
        self._identity = identity
        self.local = local
        self._files_key = _counted("files (shards) of the split", naming)
        self.naming, self.path = naming, config.path  # for messages

    def shards(self, indices: Sequence[int], count: int) -> list[StreamedShard]:
        """See `Source.shards`."""
        readers = _readers(len(indices), count, *self._reading)
        return [
            StreamedShard(self, index, count, reader)
            for index, reader in zip(indices, readers, strict=True)
        ]

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        return {**self._identity, self._files_key: self._data.num_shards}

    def epoch_data(self, epoch: int, index: int, count: int) -> datasets.IterableDataset:
        """What one shard reads in an epoch."""
        data = self._data
        if self.is_endless:
            # A buffer of one sample: this shuffles the files and has nothing to lose on resume.
            order_seed = document_rng(self.seed, epoch, "files").getrandbits(32)
            data = data.shuffle(order_seed, buffer_size=1, max_buffer_input_shards=1)
        return split_dataset_by_node(data, index, count)


class StreamedShard:
    """One shard of a `StreamedSource`.

    The shuffle buffer of `datasets` is lost on resume. Here a block of samples is read, shuffled
    by a permutation that follows from (seed, epoch, shard, block), and handed out; the state is
    where the block began and how far it is handed out, so resuming reads the block again and
    continues exactly. The first block of an epoch has a random length: otherwise the same samples
    would share a block in every epoch.
    """

    def __init__(
        self, source: StreamedSource, index: int, count: int, reader: SampleReader
    ) -> None:
        self._source = source
        self._index = index
        self._count = count
        self._reader = reader
        self._epoch = 0
        self._block = 0  # blocks of the epoch that are finished
        self._block_start: dict[str, Any] | None = None  # state of the data there; None: the start
        self._num_taken = 0  # samples of the block that are handed out

    def __iter__(self) -> Iterator[Document]:
        """See `Shard.__iter__`."""
        limit = self._source.max_epochs if self._source.is_endless else 1
        while not limit or self._epoch < limit:
            for number, sample in self._epoch_samples():
                document = self._reader.read(
                    lambda row=sample: row, self._epoch, f"{self._index}.{number}"
                )
                if document is not None:
                    yield document
            self._require_samples()
            self._reader.end_epoch()
            self._epoch, self._block, self._block_start, self._num_taken = (
                self._epoch + 1,
                0,
                None,
                0,
            )

    def reject(self, document: Document, error: ValueError) -> None:
        """See `Shard.reject`."""
        self._reader.reject(document, error)

    def progress(self) -> dict[str, float]:
        """See `Shard.progress`."""
        return {"epochs": self._epoch, **self._reader.progress()}

    def state_dict(self) -> dict[str, Any]:
        """See `Shard.state_dict`."""
        return {
            "epoch": self._epoch,
            "block": self._block,
            "block_start": self._block_start,
            "num_taken": self._num_taken,
            "counts": self._reader.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Shard.load_state_dict`."""
        self._epoch, self._block = state["epoch"], state["block"]
        self._block_start, self._num_taken = state["block_start"], state["num_taken"]
        self._reader.load_state_dict(state["counts"])

    def _epoch_samples(self) -> Iterator[tuple[str, pa.Table]]:
        """The rest of this epoch: samples with a number, counted as taken before each yield."""
        data = self._source.epoch_data(self._epoch, self._index, self._count)
        if self._block_start is not None:
            data.load_state_dict(self._block_start)
        # `iter` and not `__iter__`, which would split by worker once more.
        rows = iter(data.iter(batch_size=1))
        while block := self._next_block(rows):
            next_start = data.state_dict()
            order = range(len(block))
            if self._source.is_endless:
                name = f"{self._index}.{self._block}"
                order = epoch_order(self._source.seed, self._epoch, len(block), name)
            for place in order[self._num_taken :]:
                self._num_taken += 1
                yield f"{self._block}.{place}", block[place]
            self._block, self._block_start, self._num_taken = self._block + 1, next_start, 0

    def _next_block(self, rows: Iterator[pa.Table]) -> list[pa.Table]:
        """Read the samples of a block, each a table of one row.

        Raises:
            ValueError: A file cannot be read; nothing behind that place can.
        """
        block: list[pa.Table] = []
        size, wanted = 0, self._block_size()
        try:
            while len(block) < wanted and size < SHUFFLE_BYTES:
                if (row := next(rows, None)) is None:
                    break
                block.append(row)
                size += row.nbytes
        # Every format has classes of errors of its own (ArrowInvalid, ParserError, EOFError, ...),
        # and none says in which file.
        except Exception as error:
            naming = self._source.naming
            raise ValueError(
                f"{naming.key('path')} = {self._source.path!r}: shard {self._index} of "
                f"{self._count} cannot be read on behind {self._reader.progress()['samples']} "
                f"samples and {len(block)} more ({type(error).__name__}: {error}). Repair or "
                "leave out the file; of a mixture, kinds jsonl, parquet and webdataset skip and "
                "count what is bad."
            ) from error
        return block

    def _block_size(self) -> int:
        if self._block > 0 or not self._source.is_endless:
            return SHUFFLE_BLOCK
        length_rng = document_rng(self._source.seed, self._epoch, f"{self._index}.length")
        return length_rng.randint(1, SHUFFLE_BLOCK)

    def _require_samples(self) -> None:
        if self._block == 0:
            raise ValueError(
                f"{self._source.naming.key('streaming')}: shard {self._index} of {self._count} of "
                f"{self._source.path!r} has no samples; use fewer multimodal.shards (0 makes as "
                "many as data-parallel ranks times training.dataloader.num_workers), or more data."
            )


def build_datasets_source(
    config: Multimodal,
    split: str,
    media: MediaReader,
    is_endless: bool,
    entry: SourceEntry | None = None,
) -> Source:
    """Open what `path` names and build the source that reads it; see `build_source`.

    Args:
        config: The `[multimodal]` section, or what it would be for an entry of a mixture alone.
        split: Which split to read.
        media: Reads pictures and sounds.
        is_endless: See `Source`.
        entry: Of a mixture; None: there are pictures and captions, in the columns that
            `[multimodal]` names.

    Raises:
        ValueError: There is no such path, split or column, or no sample; names the key.
    """
    naming = Naming(split, entry.name if entry else "")
    if entry is None:
        columns = Columns("", config.caption_column, config.image_column, "", "")
    else:
        columns = Columns.of(entry)
    opened = open_split(config, split, is_endless, naming)
    data = keep_columns(opened, config, columns, naming)
    local = local_files(config)
    if local and any(name.lower().endswith(".tar") for name, _ in local.files):
        logger.warning(
            f"{naming.key('path')} = {config.path!r}: `datasets` takes a tar that is cut off for a "
            "shorter one, without a word. In a mixture, kind = 'webdataset' counts it."
        )
    media_folder = Path(entry.media_folder).expanduser() if entry and entry.media_folder else None
    reading = Reading(
        DocumentBuilder(media, PairOrder.of(config, is_endless), columns),
        DatasetFinder(local.folder if local else None, media_folder),
        f"{config.path or config.data_files}:{split}",
        config.seed,
    )
    identity = _identity(config, naming, entry, local)
    if isinstance(data, datasets.IterableDataset):
        return StreamedSource(data, reading, config, identity, local, is_endless, naming)
    if not len(data):
        raise ValueError(f'{naming.key("path")} = "{config.path}": split "{split}" has no samples.')
    return MappedSource(data, reading, config, identity, local, is_endless, naming)


def _readers(
    num_own: int, count: int, reading: Reading, max_bad_fraction: float, naming: Naming
) -> list[SampleReader]:
    """Readers of all shards of one process, which are judged together."""
    judge = SampleJudge(max_bad_fraction, naming.samples(), is_alone=num_own == count)
    return [SampleReader(reading, judge) for _ in range(num_own)]


def _identity(
    config: Multimodal, naming: Naming, entry: SourceEntry | None, local: LocalFiles | None
) -> dict[str, Any]:
    keys = ("name", "streaming", *(() if entry else _IDENTITY))
    values = {naming.key(key): getattr(config, key) for key in keys}
    values |= {"multimodal.seed": config.seed, naming.key("train_split"): naming.split}
    if entry is None:
        return values
    values |= {naming.key(key): getattr(entry, key) for key in COLUMN_KEYS}
    return values | _location(config, naming, local)


def _location(config: Multimodal, naming: Naming, local: LocalFiles | None) -> dict[str, Any]:
    """What data an entry names, which may move if they are files on this machine."""
    values: dict[str, Any] = {naming.key("kind"): "datasets"}
    if not Path(config.path).exists():  # a format, or a name that holds everywhere
        values[naming.key("path")] = config.path
    if local is None:
        return values | {naming.key("data_files"): config.data_files}
    hashed = hash_of([f"{name}\0{size}" for name, size in local.files])
    return values | {f"{naming.key('path')}: hash of the files": hashed}


def _counted(what: str, naming: Naming) -> str:
    return f"{naming.key('path')}: {what}" if naming.entry else what
