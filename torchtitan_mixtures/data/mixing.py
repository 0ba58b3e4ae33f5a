"""Mixing: documents of several sources in given shares of tokens, whatever their lengths.

Mixing before packing by documents gets the shares of tokens wrong as soon as one source has longer
documents. Here the source comes next that is furthest behind in tokens it has given, per weight
(stride scheduling), after encoding: what is dropped or cut is counted as it is.

Each shard starts every source at a random place inside a document's length. Otherwise all shards
would begin with a document of each source, however small its weight. With it the tokens that shards
are expected to give are in the right shares from the first one on, and so is a limit of tokens.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from torchtitan_mixtures.data.encoding import DocumentEncoder, Tokens
from torchtitan_mixtures.data.sources import Document, Shard, Source, document_rng

_TYPICAL = 8
"""Documents of a source of which its usual length is taken."""

_MAX_DROPPED = 1000
"""Documents running that may be too long."""


@dataclass(frozen=True)
class Ingredient:
    """A source of a mixture."""

    name: str
    source: Source
    weight: float = 1.0
    """Share of the tokens, relative to those of the others."""
    max_tokens: int = 0
    """Of all shards together; 0 = no limit."""


@dataclass
class StreamCounts:
    """What one shard of a source has given; sentinels count as tokens, padding does not."""

    tokens: int = 0
    documents: int = 0
    split: int = 0
    """Of the documents: longer than a sequence, and now several."""
    dropped: int = 0
    """Documents longer than a sequence, of which nothing is left."""
    mute: int = 0
    """Pieces of split documents left out, as nothing in them is to be predicted."""
    has_ended: bool = False


class Mixture:
    """Sources of documents, how they are mixed, and how they become tokens.

    Args:
        ingredients: The sources, at least one.
        encoder: Of all of them.
        seed: Of the places at which shards start.
    """

    def __init__(
        self, ingredients: Sequence[Ingredient], encoder: DocumentEncoder, seed: int = 0
    ) -> None:
        self.ingredients = tuple(ingredients)
        self.encoder = encoder
        self._seed = seed

    def shards(self, indices: Sequence[int], count: int) -> list[MixedShard]:
        """Those of `count` disjoint shares that one process reads, each at its beginning."""
        of_sources = [part.source.shards(indices, count) for part in self.ingredients]
        return [
            MixedShard(
                self.ingredients,
                shards,
                self.encoder,
                count,
                functools.partial(self._phases, index),
            )
            for index, shards in zip(indices, zip(*of_sources, strict=True), strict=True)
        ]

    def _phases(self, index: int) -> list[float]:
        """Tokens that a shard counts as given of each source before it begins."""
        if len(self.ingredients) == 1 and not self.ingredients[0].max_tokens:
            return [0.0]
        rng = document_rng(self._seed, 0, f"phases of shard {index}")
        return [rng.random() * length for length in self._lengths]

    @functools.cached_property
    def _lengths(self) -> list[float]:
        """Mean tokens of the first documents of each source, the same in every process."""
        means = []
        for part in self.ingredients:
            (shard,) = part.source.shards([0], 1)
            lengths = []
            for document in itertools.islice(iter(shard), _TYPICAL):
                with suppress(ValueError):  # is counted when its turn comes
                    lengths.append(sum(map(len, self.encoder.encode(document))))
            means.append(sum(lengths) / max(1, len(lengths)))
        return means

    def fingerprint(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its resumption."""
        prints = [part.source.fingerprint() for part in self.ingredients]
        if len(self.ingredients) == 1:
            return prints[0]
        merged: dict[str, Any] = {
            "names of multimodal.sources": [part.name for part in self.ingredients]
        }
        for part, own in zip(self.ingredients, prints, strict=True):
            key = f"multimodal.sources[{part.name}]"
            merged |= {f"{key}.weight": part.weight, f"{key}.max_tokens": part.max_tokens}
            merged |= {k if k.startswith(key) else f"{key}: {k}": v for k, v in own.items()}
        return merged


class MixedShard:
    """One shard of a mixture: encoded documents, and how to continue after each.

    Args:
        ingredients: The sources.
        shards: The shard of each.
        encoder: Makes tokens.
        count: How many shards there are.
        phases: Makes the tokens that count as given of each source before the first document; not
            asked if the shard goes on from a state. None: there are none.
    """

    def __init__(
        self,
        ingredients: Sequence[Ingredient],
        shards: Sequence[Shard],
        encoder: DocumentEncoder,
        count: int = 1,
        phases: Callable[[], list[float]] | None = None,
    ) -> None:
        self._ingredients = ingredients
        self.shards = tuple(shards)
        self._encoder = encoder
        self._limits = [part.max_tokens / count for part in ingredients]
        self._make_phases = phases or (lambda: [0.0] * len(ingredients))
        self._phases: list[float] = []
        self._counts = [StreamCounts() for _ in ingredients]
        self._dropped_in_a_row = [0] * len(ingredients)
        self.latest = 0
        """Number of the source that gave the latest document."""

    def __iter__(self) -> Iterator[list[Tokens]]:
        """Encoded documents from the loaded state on, each as the pieces that fit a sequence.

        Raises:
            ValueError: Too many documents are bad or too long, or no source of endless ones is
                left.
        """
        self._phases = self._phases or self._make_phases()
        streams = [iter(shard) for shard in self.shards]
        while left := [i for i in range(len(streams)) if not self._has_ended(i)]:
            number = min(left, key=self._lead)
            document = self._next(streams[number], number)
            if document is None:
                self._counts[number].has_ended = True
                continue
            try:
                pieces = self._encode(document, number)
            except ValueError as error:
                self.shards[number].reject(document, error)
                continue
            self._count(number, pieces)
            if pieces:
                self.latest = number
                yield pieces
        if any(part.source.is_endless for part in self._ingredients):
            raise ValueError(
                "The training data have ended: every source of multimodal.sources has reached its "
                "max_epochs or max_tokens. Leave one without a limit, or lower training.steps."
            )

    def _has_ended(self, number: int) -> bool:
        counts, limit = self._counts[number], self._limits[number]
        return counts.has_ended or (limit > 0 and counts.tokens + self._phases[number] >= limit)

    def _encode(self, document: Document, number: int) -> list[Tokens]:
        """Encode a document, and leave out pieces of it without anything to predict.

        Raises:
            ValueError: It cannot be encoded, or nothing of it is to be predicted.
        """
        pieces = self._encoder.encode(document)
        if len(pieces) == 1 and len(pieces[0]) == 2:
            raise ValueError(f"Document {document.key} is empty.")
        # The first token is nobody's target.
        audible = [piece for piece in pieces if (piece[1:] >= 0).any()]
        if pieces and not audible:
            raise ValueError(
                f'Document {document.key} has "loss": false throughout: nothing is to be predicted.'
            )
        self._counts[number].mute += len(pieces) - len(audible)
        return audible

    def _next(self, stream: Iterator[Document], number: int) -> Document | None:
        """The next document of a source, None at its end.

        Raises:
            ValueError: It cannot be read; names the source or the sample.
        """
        try:
            return next(stream, None)
        # Libraries raise anything on damaged data, classes that derive from ValueError too, and do
        # not say where. What is a ValueError itself is ours, and names the source or the sample.
        except Exception as error:
            if type(error) is ValueError:
                raise
            counts = self._counts[number]
            raise ValueError(
                f'source "{self._ingredients[number].name}", after {counts.documents} documents of '
                f"this shard: {type(error).__name__}: {error}. Repair the data, or leave the "
                "source out."
            ) from error

    def _lead(self, number: int) -> float:
        """How far a source is ahead of its share."""
        given = self._counts[number].tokens + self._phases[number]
        return given / self._ingredients[number].weight

    def _count(self, number: int, pieces: Sequence[Tokens]) -> None:
        counts = self._counts[number]
        if not pieces:
            counts.dropped += 1
            self._dropped_in_a_row[number] += 1
            if self._dropped_in_a_row[number] == _MAX_DROPPED:
                raise ValueError(
                    f'source "{self._ingredients[number].name}": {_MAX_DROPPED} documents running '
                    "are longer than a sequence, and multimodal.long_documents = 'drop'. Set "
                    "'split', raise training.seq_len, or leave the source out."
                )
            return
        self._dropped_in_a_row[number] = 0
        counts.documents += 1
        counts.split += len(pieces) > 1
        counts.tokens += sum(len(tokens) for tokens in pieces)

    def state_dict(self) -> dict[str, Any]:
        """See `Shard.state_dict`."""
        return {
            "shards": [shard.state_dict() for shard in self.shards],
            "counts": [asdict(counts) for counts in self._counts],
            "phases": self._phases,
            "progress": [shard.progress() for shard in self.shards],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Shard.load_state_dict`."""
        for shard, own in zip(self.shards, state["shards"], strict=True):
            shard.load_state_dict(own)
        self._counts = [StreamCounts(**counts) for counts in state["counts"]]
        self._phases = state["phases"]
