"""Encoding: documents become token ids with sentinels, in sequences no longer than the model's.

A document becomes `<bos> ... <eos>`: text as its tokens, an image as `<image_start> codes
<image_end>` (and so for every further modality). Text ids come first in the vocabulary, the codes
of each modality are shifted into the modality's range.

A token that the model is not trained to predict is `~id`, which is negative: so a document stays
one array wherever it waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from torchtitan_mixtures.data.sources import Document, Segment
from torchtitan_mixtures.data.speech import SpeechTokenizer
from torchtitan_mixtures.data.tokenizers import ImageTokenizer, TextTokenizer

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
        speech_tokenizer: Encodes sound that is not encoded yet; None: there is none.
        long_documents: What happens to a document that does not fit. `split`: it becomes several,
            each with its own `<bos>` and `<eos>`, cut between segments where that suffices, inside
            a text only if that text alone is too long, and never inside an image or sound. `drop`:
            nothing is left of it.

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
        speech_tokenizer: SpeechTokenizer | None = None,
        long_documents: Literal["split", "drop"] = "split",
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
        self._speech_tokenizer = speech_tokenizer
        self._modalities = modalities
        self._seq_len_key = seq_len_key
        self._splits = long_documents == "split"
        self._capacity = seq_len - 2  # beside <bos> and <eos>
        sentinels = text_tokenizer.sentinels
        self._bos = np.array([sentinels.bos], np.int64)
        self._eos = np.array([sentinels.eos], np.int64)
        self._ranges = dict(zip(modalities.names, modalities.vocab_ranges, strict=True))
        # Text has no sentinels; neither has a modality that there are no tokenizers for.
        self._frames = {
            name: tuple(np.array([getattr(sentinels, f"{name}_{end}")]) for end in ("start", "end"))
            for name in modalities.names[1:]
            if hasattr(sentinels, f"{name}_start")
        }

    def encode(self, document: Document) -> list[Tokens]:
        """Encode one document.

        Returns:
            Its tokens; several arrays if it is longer than a sequence and split, none if it is
            dropped for that.

        Raises:
            ValueError: The model has no such modality, a code is outside its vocabulary, or an
                image or sound alone is too long.
        """
        blocks = [
            (segment, self.encode_segment(segment, document.key)) for segment in document.segments
        ]
        length = sum(len(tokens) for _, tokens in blocks)
        if length <= self._capacity:
            return [self._frame([tokens for _, tokens in blocks])]
        if not self._splits:
            return []
        return [self._frame(piece) for piece in self._split(blocks, document.key)]

    def _frame(self, parts: Sequence[Tokens]) -> Tokens:
        """Put `<bos>` before, which is nobody's target, and `<eos>` behind, which the last is."""
        tokens = np.concatenate([self._bos, *parts, self._eos])
        if tokens[-2] < 0:
            tokens[-1] = ~tokens[-1]
        return tokens

    def encode_segment(self, segment: Segment, key: str) -> Tokens:
        """Encode one segment with its sentinels.

        Args:
            segment: Text, an image, sound, or codes of any modality.
            key: Of its document, for the message.

        Raises:
            ValueError: See `encode`.
        """
        name, payload = segment.modality, segment.payload
        if isinstance(payload, str):
            tokens = np.array(self._text_tokenizer.encode(payload), np.int64)
            return tokens if segment.has_loss else ~tokens
        if name not in self._frames and name != self._modalities.names[0]:
            raise ValueError(
                f"Document {key} has a segment of modality {name!r}; "
                f"the model's modalities are {', '.join(self._modalities.names)}. Choose another "
                "model.flavor."
            )
        codes = self._codes(payload, key)
        start, end = self._ranges[name]
        if len(codes) and not 0 <= codes.min() <= codes.max() < end - start:
            raise ValueError(
                f"Document {key}: {name} codes span [{codes.min()}, {codes.max()}]; "
                f"the vocabulary has codes 0 to {end - start - 1}."
            )
        if name in self._frames:
            before, after = self._frames[name]
            codes = np.concatenate([before, codes + start, after])
        return codes if segment.has_loss else ~codes

    def _codes(self, payload: NDArray, key: str) -> Tokens:
        if payload.ndim == 3:
            return self._image_tokenizer.encode(payload[None])[0]
        if payload.dtype.kind != "f":
            return payload.astype(np.int64, copy=False)
        if self._speech_tokenizer is None:
            raise ValueError(
                f"Document {key} has sound, and the model no speech. Choose another model.flavor."
            )
        return self._speech_tokenizer.encode(payload)

    def _split(self, blocks: Sequence[tuple[Segment, Tokens]], key: str) -> list[list[Tokens]]:
        """Distribute the blocks of a long document over pieces, in order."""
        pieces: list[list[Tokens]] = [[]]
        room = self._capacity
        for segment, block in blocks:
            is_text = segment.modality == self._modalities.names[0]
            if not is_text and len(block) > self._capacity:
                raise ValueError(
                    f"Document {key} has {len(block)} tokens of {segment.modality} in one segment; "
                    f"a sequence has room for {self._capacity}. Raise {self._seq_len_key}."
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
