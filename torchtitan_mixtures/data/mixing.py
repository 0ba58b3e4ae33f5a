"""Mixing: documents of several sources in given shares of tokens, whatever their lengths.

Mixing before packing by documents gets the shares of tokens wrong as soon as one source has longer
documents. Here the source comes next that is furthest behind in tokens it has given, per weight
(stride scheduling), after encoding: what is dropped or cut is counted as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torchtitan_mixtures.data.encoding import DocumentEncoder, Tokens
from torchtitan_mixtures.data.sources import Document, Shard, Source


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
    has_ended: bool = False


class Mixture:
    """Sources of documents, how they are mixed, and how they become tokens.

    Args:
        ingredients: The sources, at least one.
        encoder: Of all of them.
    """

    def __init__(self, ingredients: Sequence[Ingredient], encoder: DocumentEncoder) -> None:
        self.ingredients = tuple(ingredients)
        self.encoder = encoder

    def shards(self, indices: Sequence[int], count: int) -> list[MixedShard]:
        """Those of `count` disjoint shares that one process reads, each at its beginning."""
        of_sources = [part.source.shards(indices, count) for part in self.ingredients]
        return [
            MixedShard(self.ingredients, shards, self.encoder, count)
            for shards in zip(*of_sources, strict=True)
        ]

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
    """

    def __init__(
        self,
        ingredients: Sequence[Ingredient],
        shards: Sequence[Shard],
        encoder: DocumentEncoder,
        count: int,
    ) -> None:
        self._ingredients = ingredients
        self.shards = tuple(shards)
        self._encoder = encoder
        self._limits = [part.max_tokens / count for part in ingredients]
        self._counts = [StreamCounts() for _ in ingredients]

    def __iter__(self) -> Iterator[list[Tokens]]:
        """Encoded documents from the loaded state on, each as the pieces that fit a sequence.

        Raises:
            ValueError: Too many documents are bad, or no source of endless ones is left.
        """
        streams = [iter(shard) for shard in self.shards]
        while True:
            left = [i for i, counts in enumerate(self._counts) if not counts.has_ended]
            if not left:
                break
            number = min(left, key=self._lead)
            document = self._next(streams[number], number)
            if document is None:
                self._counts[number].has_ended = True
                continue
            try:
                pieces = self._encoder.encode(document)
                if len(pieces) == 1 and len(pieces[0]) == 2:
                    raise ValueError(f"Document {document.key} is empty.")
            except ValueError as error:
                self.shards[number].reject(document, error)
                continue
            self._count(number, pieces)
            if pieces:
                yield pieces
        if any(part.source.is_endless for part in self._ingredients):
            raise ValueError(
                "The training data have ended: every source of multimodal.sources has reached its "
                "max_epochs or max_tokens. Leave one without a limit, or lower training.steps."
            )

    def _next(self, stream: Iterator[Document], number: int) -> Document | None:
        """The next document of a source, None at its end.

        Raises:
            ValueError: It cannot be read; names the source or the sample.
        """
        try:
            return next(stream, None)
        except ValueError:
            raise  # says what is wrong with what
        # Whatever else libraries raise on damaged data says not where.
        except Exception as error:
            counts = self._counts[number]
            raise ValueError(
                f'source "{self._ingredients[number].name}", after {counts.documents} documents of '
                f"this shard: {type(error).__name__}: {error}. Repair the data, or leave the "
                "source out."
            ) from error

    def _lead(self, number: int) -> float:
        """How far a source is ahead of its share.

        Half of a usual document is added: a source is then on average neither ahead nor behind,
        instead of ahead by half of the document that it has given last.
        """
        counts = self._counts[number]
        half = counts.tokens / counts.documents / 2 if counts.documents else 0.0
        return (counts.tokens + half) / self._ingredients[number].weight

    def _count(self, number: int, pieces: Sequence[Tokens]) -> None:
        counts = self._counts[number]
        if not pieces:
            counts.dropped += 1
            return
        counts.documents += 1
        counts.split += len(pieces) > 1
        counts.tokens += sum(len(tokens) for tokens in pieces)
        if self._limits[number] and counts.tokens >= self._limits[number]:
            counts.has_ended = True

    def state_dict(self) -> dict[str, Any]:
        """See `Shard.state_dict`."""
        return {
            "shards": [shard.state_dict() for shard in self.shards],
            "counts": [asdict(counts) for counts in self._counts],
            "progress": [shard.progress() for shard in self.shards],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Shard.load_state_dict`."""
        for shard, own in zip(self.shards, state["shards"], strict=True):
            shard.load_state_dict(own)
        self._counts = [StreamCounts(**counts) for counts in state["counts"]]
