"""Documents from the embedded emoji corpus: a caption and a drawing, or a composed scene."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from torchtitan_mixtures.data.emoji import SPLITS, EmojiCorpus
from torchtitan_mixtures.data.sources import (
    Document,
    IndexedShard,
    IndexedSource,
    Segment,
    caption_and_image,
    document_rng,
)

if TYPE_CHECKING:
    from torchtitan_mixtures.data.tokenizers import ImageTokenizer
    from torchtitan_mixtures.job_config import Multimodal


_BULK = 16
"""Drawings encoded at a time: one alone is slow, all of them would delay the first step."""


class EmojiSource(IndexedSource):
    """One document per drawing of a split, in a new order and with a new caption each epoch.

    A document interleaves one to `multimodal.max_pairs` pairs of a caption and an image, each in
    random order; the first is of its own drawing, the others of any. A share of the pairs
    (`multimodal.scene_fraction`) shows a composed scene in place of the drawing. A drawing is
    encoded when it is first shown, a scene always.

    Args:
        config: The `[multimodal]` section.
        split: A split of the corpus.
        image_tokenizer: Tokenizer of the run.
        is_endless: See `Source`.

    Raises:
        ValueError: The corpus has no such split.
    """

    def __init__(
        self, config: Multimodal, split: str, image_tokenizer: ImageTokenizer, is_endless: bool
    ) -> None:
        if split not in SPLITS:
            key = "train_split" if is_endless else "validation_splits"
            raise ValueError(
                f'multimodal.{key}: the emoji corpus has no split "{split}"; '
                f"its splits are {', '.join(SPLITS)}."
            )
        self._corpus = EmojiCorpus.load()
        self._drawings = self._corpus.drawings(split)
        super().__init__(len(self._drawings), config.seed, is_endless)
        self._config = config
        self._split = split
        self._tokenizer = image_tokenizer
        self._codes: dict[int, NDArray[np.int64]] = {}  # of drawings, by the first of a bulk

    def shards(self, indices: Sequence[int], count: int) -> list[IndexedShard]:
        """See `Source.shards`."""
        return [IndexedShard(self, index, count, self.build_document) for index in indices]

    def build_document(self, epoch: int, index: int) -> Document:
        """Build the document of one drawing."""
        rng = document_rng(self.seed, epoch, index)
        key = f"emoji:{self._split}[{index}] of epoch {epoch}"
        segments = self._pair(rng, index)
        # Half of the documents go on after each pair, with another drawing of the split.
        for _ in range(self._config.max_pairs - 1):
            if rng.random() < 0.5:
                break
            segments += self._pair(rng, rng.randrange(len(self._drawings)))
        return Document(segments, key)

    def _pair(self, rng: random.Random, index: int) -> tuple[Segment, ...]:
        """A drawing, or a scene in place of it, and its caption, in random order."""
        if rng.random() < self._config.scene_fraction:
            scene = self._corpus.compose_scene(rng, self._split, self._tokenizer.image_size)
            codes = self._tokenizer.encode(scene.image[None])[0]
            return caption_and_image(rng, scene.caption, codes)
        caption = self._corpus.caption(self._drawings[index], rng)
        return caption_and_image(rng, caption, self._code(index))

    def _code(self, index: int) -> NDArray[np.int64]:
        """The `(codes,)` of a drawing, encoded together with its neighbours the first time."""
        start = index - index % _BULK
        if start not in self._codes:
            drawings = self._drawings[start : start + _BULK]
            images = self._corpus.images(drawings, self._tokenizer.image_size)
            self._codes[start] = self._tokenizer.encode(images)  # (drawings, codes)
        return self._codes[start][index - start]

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        return {
            "multimodal.source": "emoji",
            "multimodal.seed": self.seed,
            "multimodal.train_split": self._split,
            "multimodal.scene_fraction": self._config.scene_fraction,
            "multimodal.max_pairs": self._config.max_pairs,
            "drawings in the corpus": self.num_documents,
        }
