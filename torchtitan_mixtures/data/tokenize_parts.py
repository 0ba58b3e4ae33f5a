"""What one process does to tokenise a source: its parts, each of which becomes a file."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from torchtitan_mixtures.data.blocks import BlockSource
from torchtitan_mixtures.data.mixture import SourceTokenizers
from torchtitan_mixtures.data.segment_encoder import SegmentEncoder
from torchtitan_mixtures.data.source_files import FileSource
from torchtitan_mixtures.data.sources import Document, IndexedSource, Segment, Shard, Source
from torchtitan_mixtures.data.tokenized_writing import (
    FinishedPart,
    PartNotes,
    ShardWriter,
    inspect_part,
    open_writer,
)
from torchtitan_mixtures.user_errors import user_error

_BATCH_DOCUMENTS = 256
_BATCH_BYTES = 1 << 25  # of pixels and sound that wait to be encoded

_FEW_FILES, _FEW_TOKENS = 16, 1 << 20
"""A source that does not fill as many files has as many of fewer tokens, but not of fewer than
these: processes share them, and what a kill costs is a file for each."""

_PROBED_UNITS, _PROBED_DOCUMENTS = 16, 4  # what the size of a source is guessed from


@dataclass(frozen=True)
class Tokenizable:
    """A source, opened, and what makes codes of it.

    Attributes:
        source: Ends.
        tokenizers: Of the run.
        tokenizer_names: What the configuration calls them, by modality.
        settings: Everything that decides what the documents are, for the plan.
        max_bad_fraction: Share of bad samples above which to stop.
    """

    source: Source
    tokenizers: SourceTokenizers
    tokenizer_names: Mapping[str, str]
    settings: Mapping[str, Any]
    max_bad_fraction: float


Recipe = Callable[[], Tokenizable]
"""Opens the same source in any process; can be pickled."""


class PartPlan(NamedTuple):
    """What a process must know to make any part."""

    out: Path
    plan: str
    """Hash of the plan."""
    count: int
    """Parts of the source."""

    def path(self, part: int) -> Path:
        """The file of a part."""
        return self.out / f"shard-{part:06d}.safetensors"


class Tally:
    """Counts that all processes add to.

    Args:
        numbers: Four of them, shared; from `multiprocessing`'s `Array("q", 4)`.
    """

    def __init__(self, numbers: Any) -> None:
        self._numbers = numbers

    def add(self, documents: int, codes: int, bad: int) -> None:
        """Count some more."""
        with self._numbers.get_lock():
            for place, number in enumerate((documents, codes, bad)):
                self._numbers[place] += number

    def read(self) -> tuple[int, int, int]:
        """Documents, codes and bad samples. Takes no lock: a process may have died with it."""
        documents, codes, bad, _ = self._numbers.get_obj()
        return documents, codes, bad

    def stop(self) -> None:
        """Tell all processes to drop what they are at."""
        self._numbers.get_obj()[3] = 1

    @property
    def is_stopped(self) -> bool:
        """Whether they were told."""
        return bool(self._numbers.get_obj()[3])


class PartMaker:
    """Makes parts of one source.

    Args:
        opened: The source.
        plan: Which parts there are.
        tally: What is done is added to it.
    """

    def __init__(self, opened: Tokenizable, plan: PartPlan, tally: Tally) -> None:
        self._source = opened.source
        self._encoder = SegmentEncoder(opened.tokenizers)
        self._plan = plan
        self._tally = tally

    def make(self, part: int) -> FinishedPart | None:
        """Make a part, or look at it if it was made before.

        Args:
            part: Its number.

        Returns:
            What is in it; None if all were told to stop.

        Raises:
            ValueError: Too many samples are bad, or the file is damaged or cannot be written.
        """
        path = self._plan.path(part)
        if path.is_file():
            return inspect_part(path, self._plan.plan, part)
        sizes = self._encoder.vocab_sizes
        shard = open_part(self._source, part, self._plan.count)
        with open_writer(path, code_dtype(sizes), tuple(sizes)) as writer:
            num_bad = 0
            for batch in _batches(shard):
                if self._tally.is_stopped:
                    return None
                added = self._add(writer, batch, shard)
                bad = int(shard.progress()["bad"])
                self._tally.add(*added, bad - num_bad)
                num_bad = bad
            progress = shard.progress()
            keys = shard.state_dict().get("counts", {}).get("bad_keys", [])
            notes = PartNotes(
                self._plan.plan, part, int(progress["samples"]), int(progress["bad"]), list(keys)
            )
            self._tally.add(0, 0, notes.bad_samples - num_bad)
            return writer.finish(notes)

    def _add(self, writer: ShardWriter, batch: Sequence[Document], shard: Shard) -> tuple[int, int]:
        """Write what can be encoded of a batch; how many documents and codes that are."""
        num_documents = num_codes = 0
        pairs = [_text_first(document) for document in batch]
        for document, codes in zip(pairs, self._encoder.encode_documents(pairs), strict=True):
            if isinstance(codes, ValueError):
                shard.reject(document, codes)
                continue
            segments = document.segments
            writer.add(
                codes,
                [segment.modality for segment in segments],
                [segment.has_loss for segment in segments],
                document.is_pair,
            )
            num_documents += 1
            num_codes += sum(map(len, codes))
        return num_documents, num_codes


def _text_first(document: Document) -> Document:
    """A pair as shards have it; training decides how it is ordered."""
    if not document.is_pair:
        return document
    texts = [segment for segment in document.segments if segment.modality == "text"]
    others = [segment for segment in document.segments if segment.modality != "text"]
    if len(texts) != 1 or not others:  # has no order to choose
        return Document(document.segments, document.key)
    return Document((*texts, *others), document.key, is_pair=True)


def code_dtype(vocab_sizes: Mapping[str, int]) -> np.dtype:
    """The narrowest type that has all codes."""
    return np.dtype("<u2" if max(vocab_sizes.values()) <= 1 << 16 else "<u4")


def open_part(source: Source, part: int, count: int) -> Shard:
    """One of the shards that a source is dealt into.

    The shards of a process are judged together whenever each has ended an epoch. A second one that
    nobody reads keeps a part from being judged by itself then: it may be small, or empty.
    """
    return source.shards((part, part), count)[0]


def files_state(source: Source) -> str | None:
    """A hash of when the files of a source were last changed, and of how large they are.

    Training does not compare it: data may be copied between two runs, which makes all files new. A
    folder of images has no state unless `metadata.jsonl` lists them: to ask for the times of
    millions of files would take minutes. Neither have data sets that are elsewhere.

    Args:
        source: Opened.

    Returns:
        None: It is read from no files, or from too many.

    Raises:
        OSError: A file is gone.
    """
    if isinstance(source, FileSource):
        paths = {file.name: file.path for file in source.files}
    # Without an import of `datasets`, which takes a second.
    elif (local := getattr(source, "local", None)) is not None:
        paths = {name: local.folder / name for name, _ in local.files}
    else:
        return None
    digest = hashlib.sha256()
    for name, path in paths.items():
        status = path.stat()
        octets = name.encode("utf-8", "surrogateescape")  # may be any bytes
        digest.update(b"%s\0%d %d\n" % (octets, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()


def count_parts(opened: Tokenizable, shard_tokens: int) -> int:
    """Choose into how many parts a source is divided, from some of its documents.

    Args:
        opened: The source.
        shard_tokens: What a file should hold of tokens.
    """
    source = opened.source
    if isinstance(source, BlockSource):
        units = source.num_blocks
    elif isinstance(source, IndexedSource):
        units = source.num_documents
    else:
        # A stream: a part that has files of its own reads nothing twice.
        from torchtitan_mixtures.data.datasets_source import StreamedSource

        return cast(StreamedSource, source).epoch_data(0, 0, 1).num_shards
    encoder, lengths, samples = SegmentEncoder(opened.tokenizers), [], []
    for unit in sorted({unit * units // _PROBED_UNITS for unit in range(_PROBED_UNITS)}):
        samples.append(_count_samples(source, unit))
        documents = []
        for document in open_part(source, unit, units):
            documents.append(document)
            if len(documents) == min(_PROBED_DOCUMENTS, samples[-1]):
                break
        encoded = encoder.encode_documents(documents)
        lengths += [sum(map(len, codes)) for codes in encoded if isinstance(codes, list)]
    mean = sum(lengths) / len(lengths) if lengths else 0.0
    epochs = source.max_epochs if source.is_endless else 1
    tokens = mean * units * sum(samples) / len(samples) * epochs
    wanted = max(tokens / shard_tokens, min(_FEW_FILES, tokens / _FEW_TOKENS))
    return min(max(1, round(wanted)), units)


def _count_samples(source: BlockSource[Any] | IndexedSource, unit: int) -> int:
    if isinstance(source, IndexedSource):
        return 1
    try:
        return len(source.read_block(source.block_at(0, unit)))
    except (ValueError, OSError):
        return 0  # is counted as bad when its part is made


def _batches(shard: Shard) -> Iterator[list[Document]]:
    """The documents of a shard, as many at a time as memory has room for, undecoded as they are."""
    batch: list[Document] = []
    size = 0
    for document in shard:
        batch.append(document)
        size += sum(_payload_bytes(segment) for segment in document.segments)
        if len(batch) >= _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _payload_bytes(segment: Segment) -> int:
    payload = segment.payload
    return len(payload) if isinstance(payload, str) else payload.nbytes


_maker: PartMaker | None = None  # of a worker process


def start_worker(recipe: Recipe, plan: PartPlan, numbers: Any) -> None:
    """Begin a worker process: open the source, and end when the process that began it does."""
    global _maker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that process is told, and tells us
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)  # killed, else it would have ended us; a second run may begin

    threading.Thread(target=follow, daemon=True).start()
    _maker = PartMaker(recipe(), plan, Tally(numbers))


def make_in_worker(part: int) -> FinishedPart | str | None:
    """`PartMaker.make` in a worker process.

    Returns:
        See there; in place of a `ValueError` its message. An error that comes out of another
        process no longer says that it is ours.
    """
    assert _maker is not None
    try:
        return _maker.make(part)
    except ValueError as error:
        if (message := user_error(error)) is None:
            raise
        return message
