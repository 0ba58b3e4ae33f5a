"""Streams of packed sequences: endless in shards for training, one pass in batches for validation.

Training: an order that depends neither on ranks nor on workers nor on the batch size
(`data/shards.py`). Validation: all ranks pack the same documents and take turns at the sequences,
so that every rank has the same number of batches (collectives would hang otherwise) and the result
does not depend on the number of ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from torchtitan_mixtures.data.batch import check_batch
from torchtitan_mixtures.data.batch_builder import BatchBuilder
from torchtitan_mixtures.data.encoding import Tokens
from torchtitan_mixtures.data.mixing import MixedShard, Mixture
from torchtitan_mixtures.data.packing import Packer
from torchtitan_mixtures.data.shards import Share

Batch = tuple[dict[str, Tensor], Tensor]


class PackedSequence(NamedTuple):
    """One sequence of a shard, and how to continue after it."""

    documents: list[Tokens]
    shard: int
    state: dict[str, Any]
    """Of the shard after this sequence; JSON but for the arrays of the packer."""


class TrainingSequences(IterableDataset):
    """The sequences of one data-parallel rank, in ascending order of their global number.

    With worker processes, iterating yields every w-th of them, such that `DataLoader`, which asks
    its workers in turn, has them all in order.

    Args:
        mixture: Of endless sources.
        make_packer: Makes the packer of a shard.
        rank: Data-parallel rank.
        num_shards: How many there are of all ranks; a multiple of ranks times workers.
    """

    def __init__(
        self, mixture: Mixture, make_packer: Callable[[], Packer], rank: Share, num_shards: int
    ) -> None:
        self.mixture = mixture
        self._make_packer = make_packer
        self._rank = rank
        self.num_shards = num_shards
        self.states: dict[int, dict[str, Any]] = {
            shard: {"taken": 0} for shard in range(rank.index, num_shards, rank.count)
        }
        """Where the next iteration starts, by shard; of an untouched shard only `taken`."""

    def __iter__(self) -> Iterator[PackedSequence]:
        worker = Share(0, 1)
        if info := get_worker_info():
            worker = Share(info.id, info.num_workers)
        next_of_rank = min(
            shard + state["taken"] * self.num_shards for shard, state in self.states.items()
        )
        first = next_of_rank + worker.index * self._rank.count
        stride = worker.count * self._rank.count
        numbers = range(first % stride, self.num_shards, stride)
        shards = {
            number: _PackedShard(number, documents, self._make_packer(), self.states[number])
            for number, documents in zip(
                numbers, self.mixture.shards(numbers, self.num_shards), strict=True
            )
        }
        for number in itertools.count(first, stride):
            yield next(shards[number % self.num_shards])


class _PackedShard:
    """The documents of one shard and their packer, from a state on."""

    def __init__(
        self, number: int, documents: MixedShard, packer: Packer, state: dict[str, Any]
    ) -> None:
        self._number = number
        self._documents = documents
        self._packer = packer
        self._num_taken = state["taken"]
        self._num_tokens = state.get("tokens", 0)
        if self._num_taken:
            documents.load_state_dict(state["source"])
            packer.load_state_dict(state["packer"])
        self._sequences = packer.pack(iter(documents), lambda: documents.latest)

    def __next__(self) -> PackedSequence:
        documents = next(self._sequences)
        self._num_taken += 1
        self._num_tokens += sum(map(len, documents))
        state = {
            "taken": self._num_taken,
            "tokens": self._num_tokens,
            "source": self._documents.state_dict(),
            "packer": self._packer.state_dict(),
        }
        return PackedSequence(documents, self._number, state)


class ValidationBatches(IterableDataset):
    """One pass over a split, the same in every iteration.

    Args:
        mixture: Of finite sources.
        make_packer: Makes the packer of a pass.
        builder: Makes batches.
        rank: Data-parallel rank whose share is yielded.
        batch_size: Sequences of a batch.
        max_batches: Batches of a pass at most; -1 = no limit.
        checked_ranges: See `make_batch`.
    """

    def __init__(
        self,
        mixture: Mixture,
        make_packer: Callable[[], Packer],
        builder: BatchBuilder,
        rank: Share,
        batch_size: int,
        max_batches: int = -1,
        checked_ranges: tuple[tuple[int, int], ...] | None = None,
    ) -> None:
        self._mixture = mixture
        self._make_packer = make_packer
        self._builder = builder
        self._rank = rank
        self._batch_size = batch_size
        self._max_batches = max_batches
        self._checked_ranges = checked_ranges
        self.documents: MixedShard | None = None
        """What the latest iteration in this process reads; its state counts bad samples."""

    def __iter__(self) -> Iterator[Batch]:
        """All pack the same; ranks share the sequences of a round, workers alternate in rounds."""
        worker = Share(0, 1)
        if info := get_worker_info():
            worker = Share(info.id, info.num_workers)
        (self.documents,) = self._mixture.shards([0], 1)
        sequences = self._make_packer().pack(iter(self.documents))
        for number in itertools.count():
            of_all_ranks = list(itertools.islice(sequences, self._rank.count * self._batch_size))
            if number == self._max_batches or not of_all_ranks:
                return
            if number % worker.count == worker.index:
                batch = of_all_ranks[self._rank.index :: self._rank.count]
                missing = self._batch_size - len(batch)
                yield make_batch(self._builder, [*batch, *([[]] * missing)], self._checked_ranges)


def make_batch(
    builder: BatchBuilder,
    sequences: Sequence[Sequence[Tokens]],
    checked_ranges: tuple[tuple[int, int], ...] | None = None,
) -> Batch:
    """Make the tensors of a batch (`data/batch.py`).

    Args:
        builder: Makes the arrays.
        sequences: Documents of each sequence.
        checked_ranges: Vocabulary ranges to check the batch against; None = no check.
    """
    arrays, labels = builder.build(sequences)
    batch = (
        {key: torch.from_numpy(array) for key, array in arrays.items()},
        torch.from_numpy(labels),
    )
    if checked_ranges is not None:
        check_batch(*batch, checked_ranges)
    return batch
