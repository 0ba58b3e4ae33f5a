"""Sources whose samples come in blocks: ranges of files that can be read without what is before.

A block is what is read at once: some lines of a file, a part of an archive, a group of rows. The
blocks of all epochs form one endless line that the shards deal out like cards, in a new order each
epoch; inside a block the samples are shuffled. So a shard resumes by reading one block again,
whatever the size of the data, and nothing needs to know how many samples there are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from random import Random
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from torchtitan_mixtures.data.samples import SampleJudge
from torchtitan_mixtures.data.sources import Document, document_rng, epoch_order

_PATIENCE = 100
"""Rounds over all blocks without a sample, after which there are none."""

Sample = TypeVar("Sample")


class BlockSource(ABC, Generic[Sample]):
    """A source of numbered blocks; see `Source`.

    Args:
        num_blocks: Blocks of an epoch.
        seed: Seed of the order and of what is drawn inside documents.
        max_epochs: The source ends after so many; 0 = never. One epoch without an order of its own,
            for validation and for tokenizing: `is_endless` = False.
        is_endless: See `Source`.
        name: What messages call the source.
        max_bad_fraction: Share of bad samples above which the run stops.
    """

    def __init__(
        self,
        num_blocks: int,
        seed: int,
        is_endless: bool,
        name: str,
        max_bad_fraction: float,
        max_epochs: int = 0,
    ) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self.seed = seed
        self.is_endless = is_endless
        self.name = name
        self.max_epochs = max_epochs if is_endless else 1
        self._max_bad_fraction = max_bad_fraction
        self._orders: dict[int, NDArray[np.int64]] = {}  # of the latest epochs

    @abstractmethod
    def read_block(self, block: int) -> Sequence[Sample]:
        """Read what the samples of a block are made of; cheap parts of it, if possible.

        Args:
            block: In `range(num_blocks)`.

        Returns:
            The same samples in the same order whenever it is asked for. May be empty.

        Raises:
            ValueError: The block cannot be read at all; counts as one bad sample.
        """

    @abstractmethod
    def sample_key(self, block: int, number: int, sample: Sample) -> str:
        """What finds a sample again: file and line, archive and name, file and row."""

    @abstractmethod
    def build(self, sample: Sample, key: str, rng: Random) -> Document:
        """Build the document of a sample.

        Args:
            sample: One of `read_block`.
            key: Of `sample_key`.
            rng: For all that is drawn; the same one whenever the sample is built in an epoch.

        Raises:
            ValueError: The sample is bad; says why, not which.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""

    def shards(self, indices: Sequence[int], count: int) -> Sequence[BlockShard[Sample]]:
        """See `Source.shards`."""
        judge = SampleJudge(
            self._max_bad_fraction, f'source "{self.name}"', is_alone=len(indices) == count
        )
        return [BlockShard(self, index, count, judge) for index in indices]

    def block_at(self, epoch: int, place: int) -> int:
        """Which block stands at a place of an epoch."""
        if not self.is_endless:
            return place
        order = self._orders.get(epoch)
        if order is None:
            order = epoch_order(self.seed, epoch, self.num_blocks, self.name)
            self._orders[epoch] = order
            for finished in sorted(self._orders)[:-2]:  # shards may be in neighbouring epochs
                del self._orders[finished]
        return int(order[place])


class BlockShard(Generic[Sample]):
    """One shard of a `BlockSource`; see `Shard`.

    Args:
        source: Reads the blocks.
        index: Number of the shard.
        count: How many there are.
        judge: Of all shards of this source in this process.
    """

    def __init__(
        self, source: BlockSource[Sample], index: int, count: int, judge: SampleJudge
    ) -> None:
        self._source = source
        self._index = index
        self._count = count
        self._judge = judge
        self._counts = judge.new_counts()
        self._num_finished = 0  # blocks
        self._num_taken = 0  # samples of the block after those
        self._num_empty = 0  # blocks without samples, one after the other

    def __iter__(self) -> Iterator[Document]:
        """See `Shard.__iter__`."""
        source = self._source
        while True:
            epoch, place = divmod(self._index + self._num_finished * self._count, source.num_blocks)
            if source.max_epochs and epoch >= source.max_epochs:
                return
            yield from self._read(epoch, source.block_at(epoch, place))
            self._num_finished += 1
            self._num_taken = 0
            if place + self._count >= source.num_blocks:
                self._judge.end_epoch(self._counts)

    def _read(self, epoch: int, block: int) -> Iterator[Document]:
        """The documents of a block that are left."""
        source = self._source
        try:
            samples = source.read_block(block)
        except (ValueError, OSError) as error:
            self._counts.seen += 1
            self._judge.count_bad(self._counts, f"{source.name}, block {block}", error)
            return
        self._require_samples(len(samples))
        order = np.arange(len(samples))
        if source.is_endless and len(samples) > 1:
            order = epoch_order(source.seed, epoch, len(samples), f"{source.name}.{block}")
        for number in order[self._num_taken :].tolist():
            self._num_taken += 1
            self._counts.seen += 1
            key = source.sample_key(block, number, samples[number])
            rng = document_rng(source.seed, epoch, f"{source.name}.{block}.{number}")
            try:
                document = source.build(samples[number], key, rng)
            except (ValueError, OSError) as error:
                self._judge.count_bad(self._counts, key, error)
                continue
            # What else goes wrong is a mistake of ours, of a worker process at that: say with what.
            except Exception as error:
                raise ValueError(f"{key}: {type(error).__name__}: {error}") from error
            self._counts.good_in_epoch += 1
            yield document

    def _require_samples(self, num_samples: int) -> None:
        """Raise ValueError if all blocks are empty, which would be read forever."""
        self._num_empty = 0 if num_samples else self._num_empty + 1
        # Blocks come in random order: one with samples is missed so often once in e^100 runs.
        if self._num_empty > _PATIENCE * self._source.num_blocks:
            raise ValueError(
                f'source "{self._source.name}": holds no samples; check multimodal.sources.path, '
                "or leave the source out."
            )

    def reject(self, document: Document, error: ValueError) -> None:
        """See `Shard.reject`."""
        self._counts.good_in_epoch -= 1
        self._judge.count_bad(self._counts, document.key, error)

    def state_dict(self) -> dict[str, Any]:
        """See `Shard.state_dict`."""
        return {
            "num_finished": self._num_finished,
            "num_taken": self._num_taken,
            "counts": asdict(self._counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Shard.load_state_dict`."""
        self._num_finished, self._num_taken = state["num_finished"], state["num_taken"]
        for name, value in state["counts"].items():
            setattr(self._counts, name, list(value) if isinstance(value, list) else value)

    def progress(self) -> dict[str, float]:
        """See `Shard.progress`."""
        return {
            "epochs": self._num_finished * self._count / self._source.num_blocks,
            "samples": self._counts.seen,
            "bad": self._counts.bad,
        }
