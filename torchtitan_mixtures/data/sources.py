"""Where documents come from: typed segments, the source interface, and sources with an index.

A document is an ordered list of segments, each of one modality. A source deals its documents into
shards. Each shard can say where it stands, as plain JSON, so that a resumed run continues with
exactly the next document, whichever process reads the shard then.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torchtitan_mixtures.multimodal_config import Multimodal


@dataclass(frozen=True)
class Segment:
    """One stretch of a document in one modality.

    `payload` is a string (text), a `(size, size, 3)` uint8 array (an image that is not encoded
    yet), a `(samples,)` float32 array (sound that is not, at the tokenizer's rate) or a `(codes,)`
    integer array (already encoded: codes of the modality's own tokenizer, from 0).
    """

    modality: str
    payload: str | NDArray[Any]
    has_loss: bool = True
    """False: the model sees it and is not trained to predict it, nor its sentinels."""


@dataclass(frozen=True)
class Document:
    """Segments in reading order, and a key that finds the document again, for messages."""

    segments: tuple[Segment, ...]
    key: str
    is_pair: bool = False
    """Says and shows (or sounds) one thing: a text and what it is about, whose order is free."""


class Shard(Protocol):
    """A resumable stream of documents: one of the disjoint shares of a source."""

    def __iter__(self) -> Iterator[Document]:
        """Iterate from the loaded state on.

        A state taken while the iterator is between two documents resumes with the second.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the shard stands, as plain JSON that later reading does not change."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start from a state that this shard of a source of the same fingerprint gave."""
        ...

    def reject(self, document: Document, error: ValueError) -> None:
        """Count a document that was yielded as a bad one: it cannot be encoded.

        Raises:
            ValueError: Too many are bad, or none may be.
        """
        ...

    def progress(self) -> dict[str, float]:
        """What to report: `epochs` begun or a part of one, `samples` seen, `bad` ones of them."""
        ...


class Source(Protocol):
    """What a split holds: opened once in a process and shared by the shards read there."""

    is_endless: bool
    """True: epoch after epoch, shuffled anew each time. False: once, in a fixed order."""

    max_epochs: int
    """Of an endless source: it ends after so many all the same; 0 = never."""

    def shards(self, indices: Sequence[int], count: int) -> Sequence[Shard]:
        """Those of `count` disjoint shares that one process reads, each at its beginning."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its resumption: TOML keys and values."""
        ...


def document_rng(seed: int, epoch: int, number: int | str) -> random.Random:
    """The generator of everything that is drawn inside one document.

    It depends on nothing that was drawn before, so a resumed run, another number of workers and
    another order of reading all draw the same.
    """
    return random.Random(f"{seed}/{epoch}/{number}")


def epoch_order(seed: int, epoch: int, size: int, name: str = "all") -> NDArray[np.int64]:
    """The order in which an epoch visits `size` things called `name`, `(size,)`, int64."""
    seed_of_order = document_rng(seed, epoch, f"{name}.order").getrandbits(64)
    return np.random.default_rng(seed_of_order).permutation(size)


class IndexedSource(ABC):
    """A source whose documents can be built in any order from their index.

    The documents of all epochs form one endless line, which the shards deal out like cards: shard
    `s` of `n` takes places s, s + n, s + 2n and so on. So shards are disjoint, together they cover
    every epoch, and none runs dry even if there are more shards than documents.

    Args:
        num_documents: Documents of an epoch.
        seed: Seed of the order and of what is drawn inside documents.
        is_endless: See `Source`. False: one epoch in index order.
    """

    def __init__(self, num_documents: int, seed: int, is_endless: bool) -> None:
        assert num_documents > 0
        self.num_documents = num_documents
        self.seed = seed
        self.is_endless = is_endless
        self.max_epochs = 0
        self._orders: dict[int, NDArray[np.int64]] = {}  # of the latest epochs

    @abstractmethod
    def shards(self, indices: Sequence[int], count: int) -> Sequence[IndexedShard]:
        """See `Source.shards`."""

    def index_at(self, epoch: int, place: int) -> int:
        """Which document stands at a place of an epoch."""
        if not self.is_endless:
            return place
        order = self._orders.get(epoch)
        if order is None:
            order = self._orders[epoch] = epoch_order(self.seed, epoch, self.num_documents)
            for finished in sorted(self._orders)[:-2]:  # shards may be in neighbouring epochs
                del self._orders[finished]
        return int(order[place])


class IndexedShard:
    """One shard of an indexed source.

    Args:
        source: Knows the order of every epoch.
        index: Number of the shard.
        count: How many there are.
        build: Builds a document from its epoch and index, the same one whenever it is asked for;
            None to skip it.
    """

    def __init__(
        self,
        source: IndexedSource,
        index: int,
        count: int,
        build: Callable[[int, int], Document | None],
    ) -> None:
        self._source = source
        self._index = index
        self._count = count
        self._build = build
        self._num_taken = 0  # places of the line

    def __iter__(self) -> Iterator[Document]:
        """See `Shard.__iter__`."""
        size = self._source.num_documents
        while True:
            epoch, place = divmod(self._index + self._num_taken * self._count, size)
            limit = self._source.max_epochs if self._source.is_endless else 1
            if limit and epoch >= limit:
                return
            self._num_taken += 1
            document = self._build(epoch, self._source.index_at(epoch, place))
            if place + self._count >= size:
                self.end_epoch()
            if document is not None:
                yield document

    def end_epoch(self) -> None:
        """Called when this shard has taken its last place of an epoch."""

    def reject(self, document: Document, error: ValueError) -> None:
        """See `Shard.reject`: nothing of an own corpus may be bad."""
        raise error

    def progress(self) -> dict[str, float]:
        """See `Shard.progress`."""
        return {
            "epochs": self._num_taken * self._count / self._source.num_documents,
            "samples": self._num_taken,
            "bad": 0,
        }

    def state_dict(self) -> dict[str, Any]:
        """See `Shard.state_dict`."""
        return {"num_taken": self._num_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Shard.load_state_dict`."""
        self._num_taken = state["num_taken"]


@dataclass(frozen=True)
class PairOrder:
    """How a text and what it is about follow each other.

    Attributes:
        caption_first: Share of pairs whose text comes first.
        condition_dropout: Share of those that lose the text, so that the model learns what is to be
            seen if nothing is said. Guidance needs it.
    """

    caption_first: float = 0.5
    condition_dropout: float = 0.0

    @classmethod
    def of(cls, config: Multimodal, is_training: bool) -> PairOrder:
        """What the section `[multimodal]` says; validation drops nothing."""
        return cls(config.caption_first, config.condition_dropout if is_training else 0.0)

    def arrange(
        self, rng: random.Random, caption: Segment, *others: Segment
    ) -> tuple[Segment, ...]:
        """Order a text and what it is about.

        Args:
            rng: Drawn from once, and once more if there is dropout.
            caption: The text.
            others: What it is about.
        """
        caption_first = rng.random() < self.caption_first
        is_dropped = self.condition_dropout > 0 and rng.random() < self.condition_dropout
        if not caption_first:
            return (*others, caption)
        return others if is_dropped else (caption, *others)


def caption_and_image(
    rng: random.Random, caption: str, image: NDArray[Any], order: PairOrder = PairOrder()
) -> tuple[Segment, ...]:
    """Segments that say and show one thing, the text first or the image first."""
    return order.arrange(rng, Segment("text", caption), Segment("image", image))
