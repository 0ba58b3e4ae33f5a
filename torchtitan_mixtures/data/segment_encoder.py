"""Codes of segments, each in the vocabulary of its own modality, for many documents at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from torchtitan_mixtures.data.sources import Document, Segment

if TYPE_CHECKING:
    from torchtitan_mixtures.data.mixture import SourceTokenizers

Codes = NDArray[np.integer]


class SegmentEncoder:
    """Encodes what documents hold, without sentinels and before any layout of the vocabulary.

    Args:
        tokenizers: Of the run.
    """

    def __init__(self, tokenizers: SourceTokenizers) -> None:
        self._tokenizers = tokenizers
        speech = tokenizers.speech
        self.vocab_sizes = {"text": tokenizers.text.vocab_size, "image": tokenizers.image.num_codes}
        self.vocab_sizes |= {"speech": speech.num_codes} if speech else {}

    def encode_documents(self, documents: Sequence[Document]) -> list[list[Codes] | ValueError]:
        """Encode documents, their images together: one at a time is slow.

        Args:
            documents: Any.

        Returns:
            Of each the codes of its segments, or what is wrong with it.
        """
        images = [
            segment.payload
            for document in documents
            for segment in document.segments
            if not isinstance(segment.payload, str) and segment.payload.ndim == 3
        ]
        encoded = self._encode_images(images)
        return [self._encode_document(document, encoded) for document in documents]

    def encode_segment_codes(self, segment: Segment, images: dict[int, Codes]) -> Codes:
        """The codes of a segment.

        Args:
            segment: Text, an image, sound, or codes.
            images: Codes of images that were encoded before, by the `id` of their pixels.

        Returns:
            `(codes,)` integers in `range(vocab_sizes[segment.modality])`.

        Raises:
            ValueError: It cannot be encoded, there is no such modality, or codes are out of range.
        """
        name, payload = segment.modality, segment.payload
        if name not in self.vocab_sizes:
            raise ValueError(
                f"there is a segment of {name!r}; the model's modalities with a tokenizer are "
                f"{', '.join(self.vocab_sizes)}. Choose another model.flavor."
            )
        if isinstance(payload, str):
            codes: Codes = np.array(self._tokenizers.text.encode(payload), np.int64)
        elif payload.ndim == 3:
            known = images.get(id(payload))
            codes = self._tokenizers.image.encode(payload[None])[0] if known is None else known
        elif np.issubdtype(payload.dtype, np.floating):
            assert self._tokenizers.speech is not None  # the modality is known
            codes = self._tokenizers.speech.encode(payload)
        else:
            codes = payload
        size = self.vocab_sizes[name]
        if len(codes) and not 0 <= codes.min() <= codes.max() < size:
            raise ValueError(
                f"{name} codes span [{codes.min()}, {codes.max()}]; its tokenizer has codes 0 to "
                f"{size - 1}"
            )
        return codes

    def _encode_images(self, images: Sequence[NDArray[np.uint8]]) -> dict[int, Codes]:
        """Codes by the `id` of the pixels; none if one of the images is bad."""
        if len({image.shape for image in images}) != 1:
            return {}
        try:
            codes = self._tokenizers.image.encode(np.stack(images))
        except ValueError:
            return {}  # each is encoded alone then, so that the bad one is known
        return {id(image): row for image, row in zip(images, codes, strict=True)}

    def _encode_document(
        self, document: Document, images: dict[int, Codes]
    ) -> list[Codes] | ValueError:
        try:
            codes = [self.encode_segment_codes(segment, images) for segment in document.segments]
        except ValueError as error:
            return ValueError(f"Document {document.key}: {error}")
        # What else goes wrong is a mistake of ours or of a tokenizer: say with what.
        except Exception as error:
            raise ValueError(f"{document.key}: {type(error).__name__}: {error}") from error
        if not any(map(len, codes)):
            return ValueError(f"Document {document.key} is empty.")
        return codes
