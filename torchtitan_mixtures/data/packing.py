"""Packing: documents become tokens with sentinels, tokens fill sequences, sequences make batches.

A document becomes `<bos> ... <eos>`: text as its tokens, an image as `<image_start> codes
<image_end>` (and so for every further modality). Text ids come first in the vocabulary, the codes
of each modality are shifted into the modality's range.

Sequences hold whole documents; what is left over is padding. A document longer than a sequence is
split into several, each with its own `<bos>` and `<eos>`: between segments where that suffices,
inside a text only if that text alone is too long. An image is never cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchtitan_mixtures.data.batch import IGNORE_INDEX
from torchtitan_mixtures.data.sources import Document, Segment
from torchtitan_mixtures.data.tokenizers import ImageTokenizer, TextTokenizer

BUFFER_DOCUMENTS = 32
"""Documents from which the packer chooses, more if they do not make one and a half sequences."""

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Modalities:
    """The modalities of a model and their half-open ranges of token ids, text first."""

    names: tuple[str, ...]
    vocab_ranges: tuple[tuple[int, int], ...]


class DocumentEncoder:
    """Turns a document into one or more token sequences that fit `seq_len`.

    Args:
        text_tokenizer: Encodes text and knows the sentinels.
        image_tokenizer: Encodes images that are not encoded yet.
        modalities: Names and token ranges.
        seq_len: Length of the packed sequences.
        seq_len_key: TOML key of `seq_len`, for the message.

    Raises:
        ValueError: An image does not fit into a sequence.
    """

    def __init__(
        self,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer,
        modalities: Modalities,
        seq_len: int,
        seq_len_key: str = "training.seq_len",
    ) -> None:
        needed = image_tokenizer.codes_per_image + 4
        if seq_len < needed:
            raise ValueError(
                f"{seq_len_key} = {seq_len} is too short: an image takes "
                f"{image_tokenizer.codes_per_image} codes and 4 sentinels, so at least {needed} "
                "positions. Raise it, or choose a multimodal.image_tokenizer with fewer codes."
            )
        self._text_tokenizer = text_tokenizer
        self._image_tokenizer = image_tokenizer
        self._modalities = modalities
        self._capacity = seq_len - 2  # beside <bos> and <eos>
        sentinels = text_tokenizer.sentinels
        self._bos = np.array([sentinels.bos], np.int64)
        self._eos = np.array([sentinels.eos], np.int64)
        # Text has no sentinels; neither has a modality that there are no tokenizers for.
        self._frames = {
            name: tuple(np.array([getattr(sentinels, f"{name}_{end}")]) for end in ("start", "end"))
            for name in modalities.names[1:]
            if hasattr(sentinels, f"{name}_start")
        }

    def encode(self, document: Document) -> list[Tokens]:
        """Encode one document; several arrays only if it is longer than a sequence.

        Raises:
            ValueError: The model has no such modality, or a code is outside its vocabulary.
        """
        blocks = [
            (segment.modality, self.encode_segment(segment, document.key))
            for segment in document.segments
        ]
        if sum(len(tokens) for _, tokens in blocks) <= self._capacity:
            pieces = [[tokens for _, tokens in blocks]]
        else:
            pieces = self._split(blocks, document.key)
        return [np.concatenate([self._bos, *piece, self._eos]) for piece in pieces]

    def encode_segment(self, segment: Segment, key: str) -> Tokens:
        """Encode one segment with its sentinels.

        Args:
            segment: Text, an image, or codes of any modality.
            key: Of its document, for the message.

        Raises:
            ValueError: See `encode`.
        """
        payload = segment.payload
        if isinstance(payload, str):
            return np.array(self._text_tokenizer.encode(payload), np.int64)
        names = self._modalities.names
        if segment.modality not in self._frames:
            raise ValueError(
                f"Document {key} has a segment of modality {segment.modality!r}; "
                f"the model's modalities are {', '.join(names)}. Choose another model.flavor."
            )
        codes = self._image_tokenizer.encode(payload[None])[0] if payload.ndim == 3 else payload
        start, end = self._modalities.vocab_ranges[names.index(segment.modality)]
        if len(codes) and not 0 <= codes.min() <= codes.max() < end - start:
            raise ValueError(
                f"Document {key}: {segment.modality} codes span [{codes.min()}, {codes.max()}]; "
                f"the vocabulary has codes 0 to {end - start - 1}."
            )
        before, after = self._frames[segment.modality]
        return np.concatenate([before, codes + start, after])

    def _split(self, blocks: Sequence[tuple[str, Tokens]], key: str) -> list[list[Tokens]]:
        """Distribute the blocks of a long document over pieces, in order."""
        pieces: list[list[Tokens]] = [[]]
        room = self._capacity
        for modality, block in blocks:
            if modality != self._modalities.names[0] and len(block) > self._capacity:
                raise ValueError(
                    f"Document {key} has {len(block)} tokens of {modality} in one segment; a "
                    f"sequence has room for {self._capacity}. Raise training.seq_len."
                )
            if len(block) > room and pieces[-1]:
                pieces.append([])
                room = self._capacity
            for start in range(0, len(block), self._capacity):
                part = block[start : start + self._capacity]
                if len(part) > room:
                    pieces.append([])
                    room = self._capacity
                pieces[-1].append(part)
                room -= len(part)
        return pieces


class Packer:
    """Chooses, out of a small buffer, documents that fill a sequence as fully as possible.

    The oldest document always goes first, so none waits for longer than there are documents in the
    buffer. The others are the subset whose lengths add up nearest to what is left (exactly, if any
    subset does), preferring older ones.

    Args:
        encoder: Turns documents into tokens.
        seq_len: Length of a sequence.
    """

    def __init__(self, encoder: DocumentEncoder, seq_len: int) -> None:
        self._encoder = encoder
        self._seq_len = seq_len
        self._buffer: list[Tokens] = []  # oldest first
        self._num_tokens = 0  # in the buffer

    def pack(self, documents: Iterator[Document]) -> Iterator[list[Tokens]]:
        """Yield sequences as lists of documents, at most `seq_len` tokens in all.

        The state between two sequences, together with the state of the source, is all it takes to
        continue.
        """
        while self._fill(documents) or self._buffer:
            chosen = choose_documents([len(tokens) for tokens in self._buffer], self._seq_len)
            sequence = [self._buffer[i] for i in chosen]
            taken = set(chosen)
            self._buffer = [doc for i, doc in enumerate(self._buffer) if i not in taken]
            self._num_tokens -= sum(len(tokens) for tokens in sequence)
            yield sequence

    def state_dict(self) -> dict[str, Any]:
        """The documents in the buffer, as arrays: a state is made for every sequence."""
        return {"buffer": list(self._buffer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, of arrays or of the lists that JSON makes of them."""
        self._buffer = [np.asarray(tokens, np.int64) for tokens in state["buffer"]]
        self._num_tokens = sum(len(tokens) for tokens in self._buffer)

    def _fill(self, documents: Iterator[Document]) -> bool:
        """Refill the buffer; False once there are no more documents."""
        while len(self._buffer) < BUFFER_DOCUMENTS or self._num_tokens < 1.5 * self._seq_len:
            document = next(documents, None)
            if document is None:
                return False
            pieces = self._encoder.encode(document)
            self._buffer.extend(pieces)
            self._num_tokens += sum(len(tokens) for tokens in pieces)
        return True


def choose_documents(lengths: Sequence[int], space: int) -> list[int]:
    """Choose the documents of one sequence.

    Args:
        lengths: Lengths of the waiting documents, oldest first, each at most `space`.
        space: Length of the sequence.

    Returns:
        Ascending indices, 0 among them, whose lengths add up to the most that `space` admits.
    """
    # Bit t of a reach says that some subset has t tokens: sets of sums as big integers, for which
    # adding a document is one shift.
    within = (1 << (space + 1)) - 1
    reaches = [1 << lengths[0]]
    for length in lengths[:0:-1]:  # newest to second oldest
        reaches.append((reaches[-1] | reaches[-1] << length) & within)
    total = reaches[-1].bit_length() - 1
    chosen = [0]
    for index in range(1, len(lengths)):
        without = reaches[len(lengths) - 1 - index]
        rest = total - lengths[index]
        if rest >= 0 and without >> rest & 1:
            chosen.append(index)
            total = rest
    return chosen


def number_runs(is_image: NDArray[np.bool_]) -> Tokens:
    """Number the images of each sequence: runs of codes, which sentinels keep apart.

    Args:
        is_image: Whether a token is a code of an image, `(batch, seq)`.

    Returns:
        `(batch, seq)` int64, from 0 on in each sequence, -1 outside images.
    """
    is_start = is_image.copy()
    is_start[:, 1:] &= ~is_image[:, :-1]
    return np.where(is_image, is_start.cumsum(axis=1) - 1, -1)


class BatchBuilder:
    """Turns packed sequences into the arrays of the batch contract (`data/batch.py`).

    Args:
        modalities: Names and token ranges.
        weights: Loss weight of targets of each modality; a weight of 0 makes labels -100.
        pad: Id of the padding token.
        seq_len: Length of a sequence.
        resets_positions: Count positions from 0 in every document.
    """

    def __init__(
        self,
        modalities: Modalities,
        weights: Sequence[float],
        pad: int,
        seq_len: int,
        resets_positions: bool,
    ) -> None:
        if not any(weights):
            keys = ", ".join(f"multimodal.{name}_weight" for name in modalities.names)
            raise ValueError(
                f"{keys} are all 0: nothing would be supervised. Give at least one a positive "
                "weight."
            )
        sizes = [end - start for start, end in modalities.vocab_ranges]
        self._modality_of_token = np.repeat(np.arange(len(sizes), dtype=np.int8), sizes)
        self._num_modalities = len(sizes)
        names = modalities.names
        self._image = names.index("image") if "image" in names else -1  # no token's modality
        self._weights = np.array(weights, np.float32)
        self._has_unsupervised = 0 in weights
        self._has_weights = any(weight not in (0, 1) for weight in weights)
        self._pad = pad
        self._seq_len = seq_len
        self._resets_positions = resets_positions

    def build(self, sequences: Sequence[Sequence[Tokens]]) -> tuple[dict[str, NDArray], Tokens]:
        """Build a batch.

        Args:
            sequences: Documents of each sequence; none at all makes a sequence of padding, without
                loss.

        Returns:
            Arrays of `input_dict` and the labels. Padding is one more document, of text.
        """
        tokens = np.full((len(sequences), self._seq_len), self._pad, np.int64)
        document_ids = np.empty_like(tokens)
        is_padding = np.zeros(tokens.shape, bool)
        for row, sequence in enumerate(sequences):
            lengths = [len(document) for document in sequence]
            used = sum(lengths)
            if sequence:
                np.concatenate(sequence, out=tokens[row, :used])
            is_padding[row, used:] = True
            lengths.append(self._seq_len - used)
            document_ids[row] = np.repeat(np.arange(len(lengths)), lengths)

        is_last = np.ones(tokens.shape, bool)  # of its document: nothing follows, no loss
        is_last[:, :-1] = document_ids[:, 1:] != document_ids[:, :-1]
        labels = np.full_like(tokens, IGNORE_INDEX)
        labels[:, :-1] = tokens[:, 1:]
        labels[is_last | is_padding] = IGNORE_INDEX

        modality = self._modality_of_token[tokens]  # (batch, seq)
        masks = modality[:, None] == np.arange(self._num_modalities)[:, None]
        arrays = {
            "input": tokens,
            "modality_masks": masks,
            "document_ids": document_ids,
            "image_ids": number_runs(modality == self._image),
            "positions": self._positions(is_last),
        }
        if self._has_unsupervised or self._has_weights:
            weights = self._weights[self._modality_of_token[np.maximum(labels, 0)]]
            labels[weights == 0] = IGNORE_INDEX
            if self._has_weights:
                weights[labels == IGNORE_INDEX] = 0
                arrays["loss_weights"] = weights
        return arrays, labels

    def _positions(self, is_last: NDArray[np.bool_]) -> Tokens:
        positions = np.broadcast_to(np.arange(self._seq_len), is_last.shape)
        if not self._resets_positions:
            return positions.copy()
        starts = np.zeros_like(positions)
        starts[:, 1:] = np.where(is_last[:, :-1], positions[:, 1:], 0)
        return positions - np.maximum.accumulate(starts, axis=1)
