"""The things that evaluation asks about: each in several modalities, as tokens."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from torchtitan_mixtures.checkpoint_loading import LoadedCheckpoint
from torchtitan_mixtures.data.captions import with_article
from torchtitan_mixtures.data.emoji import Drawing, EmojiCorpus
from torchtitan_mixtures.data.encoding import DocumentEncoder, Tokens
from torchtitan_mixtures.data.mixture import SourceTokenizers, build_ingredients
from torchtitan_mixtures.data.sources import Segment
from torchtitan_mixtures.data.spoken import voices_of

NAMES_PER_GROUP = 16


@dataclass(frozen=True)
class Item:
    """One thing, as tokens of each modality with their sentinels."""

    tokens: Mapping[str, Tokens]
    group: str = ""
    """What kind of thing it is; empty if the data does not say."""


@dataclass(frozen=True)
class Things:
    """What is asked about in one split."""

    items: Sequence[Item]
    bos: int
    """Id of the token that begins a document."""

    eos: int
    """Id of the token that ends it."""

    names: Mapping[str, Sequence[Tokens]] = field(default_factory=dict)
    """For each group the tokens of some names of things in it; empty without groups."""

    @property
    def modalities(self) -> list[str]:
        """Those that every item has."""
        first = next(iter(self.items), Item({}))
        return [name for name in first.tokens if all(name in item.tokens for item in self.items)]


def draw_things(checkpoint: LoadedCheckpoint, split: str, count: int, seed: int) -> Things:
    """Draw the things of a split to ask about.

    Of the embedded corpus: drawings, their plain names ("a red fox") and, for a model with speech,
    these names in the split's voices by turns; at most one of each family of near-duplicates, in
    random order. Of other data: the first documents.

    Args:
        checkpoint: Says which data, tokenizers and modalities.
        split: Name of the split.
        count: How many, at most.
        seed: Of what is drawn.
    """
    job_config = checkpoint.job_config
    encoder = DocumentEncoder(
        checkpoint.codecs.text,
        checkpoint.codecs.image,
        checkpoint.codecs.modalities,
        checkpoint.model_args.max_seq_len,
    )
    sentinels = checkpoint.codecs.text.sentinels
    if job_config.multimodal.source == "emoji":
        corpus = EmojiCorpus.load()
        drawings = choose_drawings(corpus.drawings(split), count, seed)
        names = choose_names(corpus, drawings, seed)
        voices = voices_of(split) if "speech" in checkpoint.codecs.modalities.names else ()
        return Things(
            _emoji_items(checkpoint, corpus, drawings, encoder, voices),
            sentinels.bos,
            sentinels.eos,
            {
                group: [encoder.encode_segment(Segment("text", name), name) for name in chosen]
                for group, chosen in names.items()
            },
        )
    codecs = checkpoint.codecs
    tokenizers = SourceTokenizers(codecs.text, codecs.image, codecs.speech)
    (ingredient,) = build_ingredients(
        job_config.multimodal, split, tokenizers, False, codecs.modalities.names
    )
    (documents,) = ingredient.source.shards([0], 1)
    items = []
    for document in islice(documents, count):
        first = {segment.modality: segment for segment in reversed(document.segments)}
        tokens = {name: encoder.encode_segment(first[name], document.key) for name in first}
        items.append(Item(tokens))
    return Things(items, sentinels.bos, sentinels.eos)


def choose_drawings(drawings: Sequence[Drawing], count: int, seed: int) -> list[Drawing]:
    """Choose drawings of things that differ: at most one of each family of near-duplicates.

    Returns:
        As many as there are families, `count` at most, in random order.
    """
    order = list(drawings)
    random.Random(seed).shuffle(order)
    by_family: dict[str, Drawing] = {}
    for drawing in order:
        by_family.setdefault(drawing.concept.family, drawing)
    return list(by_family.values())[:count]


def choose_names(
    corpus: EmojiCorpus, excluded: Collection[Drawing], seed: int
) -> dict[str, list[str]]:
    """Choose names of trained things for each group, with their article.

    None is of a family of the `excluded` drawings: an image is to be recognised by its kind.
    """
    rng = random.Random(seed)
    families = {drawing.concept.family for drawing in excluded}
    names = {}
    for group in corpus.groups:
        known = {
            with_article(concept.name)
            for concept in corpus.concepts
            if concept.group == group
            and concept.split == "train"
            and concept.family not in families
        }
        if known:
            names[group] = rng.sample(sorted(known), min(NAMES_PER_GROUP, len(known)))
    return names


def _emoji_items(
    checkpoint: LoadedCheckpoint,
    corpus: EmojiCorpus,
    drawings: Sequence[Drawing],
    encoder: DocumentEncoder,
    voices: Sequence[str],
) -> list[Item]:
    tokenizer = checkpoint.codecs.image
    images = tokenizer.encode(corpus.images(drawings, tokenizer.image_size))
    items = []
    for number, (drawing, image) in enumerate(zip(drawings, images, strict=True)):
        concept = drawing.concept
        segments = [Segment("text", with_article(concept.name)), Segment("image", image)]
        if voices:
            spoken = corpus.spoken(concept, voices[number % len(voices)])
            segments.append(Segment("speech", spoken))
        tokens = {s.modality: encoder.encode_segment(s, concept.slug) for s in segments}
        items.append(Item(tokens, concept.group))
    return items
