"""What a batch holds, read back from its arrays: documents, their pieces, and statistics.

Nothing here knows the documents that were packed: what is wrong in a batch is seen to be wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchtitan_mixtures.data.batch import IGNORE_INDEX
from torchtitan_mixtures.data.encoding import Modalities
from torchtitan_mixtures.data.tokenizers import Sentinels

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Row:
    """One sequence of a batch: all `(seq,)`, int64 but for `weights`, float32."""

    tokens: Ints
    modality: Ints
    """Index of the modality whose mask is True."""
    document_ids: Ints
    image_ids: Ints
    positions: Ints
    labels: Ints
    weights: NDArray[np.float32]
    """Loss weight of the target; 1 everywhere if the batch has none."""

    @property
    def has_loss(self) -> Bools:
        """Positions with a label, `(seq,)`."""
        return self.labels != IGNORE_INDEX


@dataclass(frozen=True)
class Piece:
    """Neighbouring positions `[start, stop)` of one document that belong together.

    `content` is a text, or the codes of one image or speech; a `sentinel` stands alone.
    """

    kind: Literal["content", "sentinel", "padding"]
    modality: int
    start: int
    stop: int


@dataclass(frozen=True)
class DocumentView:
    """One document of a row, in positions `[start, stop)`, or the padding at its end."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]

    @property
    def is_padding(self) -> bool:
        """Whether there is nothing but padding."""
        return self.pieces[0].kind == "padding"

    def order(self) -> tuple[int, ...]:
        """Modalities of the contents, as they follow each other."""
        return tuple(piece.modality for piece in self.pieces if piece.kind == "content")


@dataclass(frozen=True)
class ModalityStatistics:
    """Statistics of one modality; sentinels count as text, padding as nothing."""

    tokens: int
    share: float
    """Of all positions, padding among them."""
    targets: int
    """Positions with loss whose label is of the modality."""
    mean_weight: float | None
    """Loss weight of the targets; None without targets."""
    segments: int
    """Texts, images and so on, without sentinels."""
    mean_length: float | None
    """Tokens of a segment; None without segments."""
    max_length: int
    distinct: int
    """Different token ids."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of several rows."""

    modalities: tuple[ModalityStatistics, ...]
    documents: tuple[int, ...]
    """Of each row."""
    sentinels: int
    padding_share: float
    no_loss_share: float
    """Share of positions without a label, padding among them."""
    orders: Counter[tuple[int, ...]]
    """How many documents have their modalities in this order."""


def read_rows(input_dict: Mapping[str, Tensor], labels: Tensor) -> list[Row]:
    """Take a batch of the contract (`data/batch.py`) apart into its sequences.

    Args:
        input_dict: Tensors with the keys of the contract.
        labels: `(batch, seq)` int64.
    """
    arrays = {key: tensor.numpy() for key, tensor in input_dict.items()}
    tokens = arrays["input"]
    weights = arrays.get("loss_weights", np.ones(tokens.shape, np.float32))
    return [
        Row(
            tokens[i],
            arrays["modality_masks"][i].argmax(0),
            arrays["document_ids"][i],
            arrays["image_ids"][i],
            arrays["positions"][i],
            labels[i].numpy(),
            weights[i],
        )
        for i in range(len(tokens))
    ]


def runs(*arrays: NDArray) -> Iterator[tuple[int, int]]:
    """Yield the longest `[start, stop)` in which none of the arrays, `(seq,)`, changes."""
    changes = np.zeros(len(arrays[0]), bool)
    for array in arrays:
        changes[1:] |= array[1:] != array[:-1]
    starts = [0, *np.flatnonzero(changes).tolist()]
    yield from zip(starts, [*starts[1:], len(changes)], strict=True)


def split_documents(row: Row, sentinels: Sentinels) -> list[DocumentView]:
    """Split a row where `document_ids` change, and each document into its pieces.

    Args:
        row: A sequence.
        sentinels: Ids that the text tokenizer gives them.
    """
    documents = []
    for first, last in runs(row.document_ids):
        inside = slice(first, last)
        tokens, modality = row.tokens[inside], row.modality[inside]
        if (tokens == sentinels.pad).all():
            documents.append(DocumentView(first, last, (Piece("padding", 0, first, last),)))
            continue
        is_sentinel = np.isin(tokens, astuple(sentinels)) & (modality == 0)
        # A number of its own for every sentinel, 0 outside.
        alone = np.where(is_sentinel, np.arange(1, len(tokens) + 1), 0)
        pieces = tuple(
            Piece(
                "sentinel" if is_sentinel[start] else "content",
                int(modality[start]),
                first + start,
                first + stop,
            )
            for start, stop in runs(alone, modality, row.image_ids[inside])
        )
        documents.append(DocumentView(first, last, pieces))
    return documents


def find_mistakes(row: Row) -> list[str]:
    """Describe labels that cannot be meant: those not of the next token of the same document."""
    has_loss = row.has_loss
    has_next = np.append(row.document_ids[1:] == row.document_ids[:-1], False)
    is_next = np.append(row.labels[:-1] == row.tokens[1:], False)
    mistakes = {
        "have a label although their document ends there": has_loss & ~has_next,
        "have a label that is not the next token": has_loss & has_next & ~is_next,
    }
    return [
        f"{where.sum()} positions {what}, first at {where.argmax()}"
        for what, where in mistakes.items()
        if where.any()
    ]


def compute_statistics(
    rows: Sequence[Row], documents: Sequence[Sequence[DocumentView]], modalities: Modalities
) -> Statistics:
    """Compute the statistics of several rows.

    Args:
        rows: Sequences, at least one.
        documents: Of each row, from `split_documents`.
        modalities: Names and token ranges.
    """
    views = [view for of_row in documents for view in of_row]
    pieces = [piece for view in views for piece in view.pieces]
    is_padding = np.zeros((len(rows), len(rows[0].tokens)), bool)
    for row_padding, of_row in zip(is_padding, documents, strict=True):
        for view in of_row:
            row_padding[view.start : view.stop] = view.is_padding
    stacked = {
        key: np.stack([getattr(row, key) for row in rows])
        for key in ("tokens", "modality", "labels", "weights")
    }
    return Statistics(
        tuple(
            _of_modality(index, limits, stacked, is_padding, pieces)
            for index, limits in enumerate(modalities.vocab_ranges)
        ),
        tuple(sum(not view.is_padding for view in of_row) for of_row in documents),
        sum(piece.kind == "sentinel" for piece in pieces),
        float(is_padding.mean()),
        float((stacked["labels"] == IGNORE_INDEX).mean()),
        Counter(view.order() for view in views if not view.is_padding),
    )


def _of_modality(
    index: int,
    limits: tuple[int, int],
    stacked: Mapping[str, NDArray],
    is_padding: Bools,
    pieces: Sequence[Piece],
) -> ModalityStatistics:
    tokens = stacked["tokens"][(stacked["modality"] == index) & ~is_padding]
    is_target = (stacked["labels"] >= limits[0]) & (stacked["labels"] < limits[1])
    weights = stacked["weights"][is_target]
    lengths = [p.stop - p.start for p in pieces if p.kind == "content" and p.modality == index]
    return ModalityStatistics(
        len(tokens),
        len(tokens) / is_padding.size,
        len(weights),
        float(weights.mean(dtype=np.float64)) if len(weights) else None,
        len(lengths),
        sum(lengths) / len(lengths) if lengths else None,
        max(lengths, default=0),
        len(np.unique(tokens)),
    )
