"""Documents from the embedded emoji corpus: a concept said, shown and spoken, or a scene."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from torchtitan_mixtures.data.emoji import SPLITS, EmojiCorpus
from torchtitan_mixtures.data.sources import (
    Document,
    IndexedShard,
    IndexedSource,
    PairOrder,
    Segment,
    caption_and_image,
    document_rng,
)
from torchtitan_mixtures.data.spoken import UNSEEN_VOICE, voices_of

if TYPE_CHECKING:
    from torchtitan_mixtures.data.tokenizers import ImageTokenizer
    from torchtitan_mixtures.job_config import Multimodal


_BULK = 16
"""Drawings encoded at a time: one alone is slow, all of them would delay the first step."""

SPEECH_TOKENIZER = "emoji_25hz"
"""The tokenizer whose units the corpus holds; of sound it has none that another could encode."""

ORDERS = tuple(
    order for count in (2, 3) for order in permutations(("text", "image", "speech"), count)
)
"""The orders of two or three modalities, equally likely in a document of a model with speech."""


def check_emoji(config: Multimodal, key: str, split: str, modality_names: Sequence[str]) -> None:
    """Check that the corpus has a split for a model, and units in its tokenizer.

    Args:
        config: The `[multimodal]` section.
        key: The key of it that names the split.
        split: The split.
        modality_names: The model's modalities.

    Raises:
        ValueError: Names the key, its value and the remedy.
    """
    has_speech = "speech" in modality_names
    if split == UNSEEN_VOICE and not has_speech:
        raise ValueError(
            f"multimodal.{key} = {split!r}: a voice is unseen only where there is speech, and the "
            f"model has {', '.join(modality_names)}. Leave the split out, or choose a model.flavor "
            "with speech."
        )
    splits = (*SPLITS, UNSEEN_VOICE) if has_speech else SPLITS
    if split not in splits:
        raise ValueError(
            f'multimodal.{key} = {split!r}: the emoji corpus has no split "{split}"; '
            f"its splits are {', '.join(splits)}."
        )
    if has_speech and config.speech_tokenizer != SPEECH_TOKENIZER:
        raise ValueError(
            f"multimodal.speech_tokenizer = {config.speech_tokenizer!r}: the emoji corpus holds "
            f'units of "{SPEECH_TOKENIZER}" and no sound; use that.'
        )


def check_speech_fits(seq_lens: Mapping[str, int]) -> None:
    """Check that every spoken name fits into a sequence.

    Args:
        seq_lens: Length of the sequences by the TOML key that sets it.

    Raises:
        ValueError: One of them is too short.
    """
    needed = EmojiCorpus.load().longest_speech + 4
    for key, seq_len in seq_lens.items():
        if seq_len < needed:
            raise ValueError(
                f"{key} = {seq_len} is too short: the longest spoken name of the emoji corpus "
                f"takes {needed - 4} units and 4 sentinels. Raise it to {needed} or more."
            )


class EmojiSource(IndexedSource):
    """One document per drawing of a split, in a new order and with a new caption each epoch.

    A document interleaves one to `multimodal.max_pairs` pairs of a caption and an image, each in
    random order; the first is of its own drawing, the others of any. A share of the pairs
    (`multimodal.scene_fraction`) shows a composed scene in place of the drawing. A drawing is
    encoded when it is first shown, a scene always.

    For a model with speech a pair that is no scene becomes a group in one of `ORDERS`: two or three
    of the drawing's caption, image and name as the document's voice speaks it. That voice is drawn
    from those of the split.

    Args:
        config: The `[multimodal]` section.
        split: A split of the corpus.
        image_tokenizer: Tokenizer of the run.
        is_endless: See `Source`.
        modality_names: The model's modalities.

    Raises:
        ValueError: The corpus has no such split, or no units in the configured tokenizer.
    """

    def __init__(
        self,
        config: Multimodal,
        split: str,
        image_tokenizer: ImageTokenizer,
        is_endless: bool,
        modality_names: Sequence[str],
    ) -> None:
        key = "train_split" if is_endless else "validation_splits"
        check_emoji(config, key, split, modality_names)
        self._voices = voices_of(split) if "speech" in modality_names else ()
        self._corpus = EmojiCorpus.load()
        self._drawings = self._corpus.drawings(split)
        super().__init__(len(self._drawings), config.seed, is_endless)
        self._config = config
        self._order = PairOrder.of(config, is_endless)
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
        voice = rng.choice(self._voices) if self._voices else None
        segments = self._group(rng, index, voice)
        # Half of the documents go on after each pair, with another drawing of the split.
        for _ in range(self._config.max_pairs - 1):
            if rng.random() < 0.5:
                break
            segments += self._group(rng, rng.randrange(len(self._drawings)), voice)
        return Document(segments, key)

    def _group(self, rng: random.Random, index: int, voice: str | None) -> tuple[Segment, ...]:
        """What is said, shown and, if there is a voice, spoken of one thing, in random order."""
        if rng.random() < self._config.scene_fraction:
            scene = self._corpus.compose_scene(rng, self._split, self._tokenizer.image_size)
            codes = self._tokenizer.encode(scene.image[None])[0]
            return caption_and_image(rng, scene.caption, codes, self._order)
        drawing = self._drawings[index]
        caption = self._corpus.caption(drawing, rng)
        if voice is None:
            return caption_and_image(rng, caption, self._code(index), self._order)
        payloads = {
            "text": caption,
            "image": self._code(index),
            "speech": self._corpus.spoken(drawing.concept, voice),
        }
        return tuple(Segment(name, payloads[name]) for name in rng.choice(ORDERS))

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
