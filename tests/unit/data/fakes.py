"""Small tokenizers and sources, so that tests of packing depend on no corpus."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchtitan_mixtures.data.encoding import DocumentEncoder, Modalities
from torchtitan_mixtures.data.sources import (
    Document,
    IndexedShard,
    IndexedSource,
    Segment,
    document_rng,
)
from torchtitan_mixtures.data.tokenizers import Sentinels

SENTINELS = Sentinels(pad=0, bos=1, eos=2, image_start=3, image_end=4, speech_start=5, speech_end=6)
MODALITIES = Modalities(("text", "image"), ((0, 300), (300, 316)))


class ByteTokenizer:
    """Text as its bytes, after the sentinels."""

    sentinels = SENTINELS
    vocab_size = 263

    def encode(self, text: str) -> list[int]:
        return [7 + byte for byte in text.encode()]

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        names = {} if skip_special else {i: f"<{i}>".encode() for i in range(7)}
        octets = (names.get(i, b"") if i < 7 else bytes([i - 7]) for i in ids)
        return b"".join(octets).decode(errors="replace")


class GreyTokenizer:
    """An 8 px image as the brightness of its four quarters."""

    image_size = 8
    num_codes = 16
    codes_per_image = 4

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        quarters = images.reshape(len(images), 2, 4, 2, 4, 3).mean((2, 4, 5))
        return (quarters // 16).astype(np.int64).reshape(len(images), 4)


def make_encoder(
    seq_len: int, modalities: Modalities = MODALITIES, **options: Any
) -> DocumentEncoder:
    return DocumentEncoder(ByteTokenizer(), GreyTokenizer(), modalities, seq_len, **options)


def random_document(rng: random.Random, key: str, max_text: int = 40) -> Document:
    """One to four segments, text of up to `max_text` bytes or an image of 4 codes."""
    segments = []
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.5:
            segments.append(Segment("text", "x" * rng.randint(1, max_text)))
        else:
            segments.append(Segment("image", np.array([rng.randrange(16) for _ in range(4)])))
    return Document(tuple(segments), key)


def random_documents(seed: int, count: int, max_text: int = 40) -> Iterator[Document]:
    rng = random.Random(seed)
    return (random_document(rng, str(i), max_text) for i in range(count))


class RandomSource(IndexedSource):
    """Random documents that carry epoch and index in their first text."""

    def shards(self, indices: Sequence[int], count: int) -> list[IndexedShard]:
        return [IndexedShard(self, index, count, self.build_document) for index in indices]

    def build_document(self, epoch: int, index: int) -> Document:
        rng = document_rng(self.seed, epoch, index)
        document = random_document(rng, f"{epoch}:{index}")
        return Document((Segment("text", f"{epoch}:{index}"), *document.segments), document.key)

    def fingerprint(self) -> dict[str, Any]:
        return {"multimodal.seed": self.seed}
