"""What the configuration names as sources, opened and ready to be mixed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchtitan_mixtures.data.emoji_source import EmojiSource
from torchtitan_mixtures.data.media import MediaReader
from torchtitan_mixtures.data.mixing import Ingredient
from torchtitan_mixtures.data.sources import PairOrder, Source
from torchtitan_mixtures.data.speech import SpeechTokenizer
from torchtitan_mixtures.data.tokenizers import ImageTokenizer, TextTokenizer
from torchtitan_mixtures.source_entries import SourceEntry, parse_entries

if TYPE_CHECKING:
    from torchtitan_mixtures.multimodal_config import Multimodal


@dataclass(frozen=True)
class SourceTokenizers:
    """What makes tokens of documents; sources ask it for sizes and rates."""

    text: TextTokenizer
    image: ImageTokenizer
    speech: SpeechTokenizer | None
    """None: the model has no speech."""

    def media(self) -> MediaReader:
        """Reads pictures and sounds as they take them."""
        rate = self.speech.sample_rate if self.speech else None
        return MediaReader(self.image.image_size, rate)

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each, by modality."""
        found = {"text": self.text.fingerprint(), "image": self.image.fingerprint()}
        return found | ({"speech": self.speech.fingerprint()} if self.speech else {})


def build_ingredients(
    config: Multimodal,
    split: str,
    tokenizers: SourceTokenizers,
    is_endless: bool,
    modality_names: Sequence[str] = ("text", "image"),
) -> list[Ingredient]:
    """Open the sources of a split.

    Args:
        config: The `[multimodal]` section.
        split: Which to read; of a mixture all its sources to train on, or the source to validate on
            of that name.
        tokenizers: Of the run.
        is_endless: True to train, False for one pass of validation.
        modality_names: The model's modalities.

    Raises:
        ValueError: A source cannot be opened, has no such split, and so on.
    """
    if config.source != "mixture":
        source = build_source(config, split, tokenizers, is_endless, modality_names)
        return [Ingredient(config.source, source)]
    entries = training_entries(config) if is_endless else [_validation_entry(config, split)]
    return [
        Ingredient(
            entry.name,
            build_entry(entry, config, tokenizers, is_endless, modality_names),
            entry.weight,
            entry.max_tokens if is_endless else 0,
        )
        for entry in entries
    ]


def training_entries(config: Multimodal) -> list[SourceEntry]:
    """The entries of `multimodal.sources`, checked.

    Raises:
        ValueError: There are none, one is wrong, or all end.
    """
    entries = parse_entries("multimodal.sources", config.sources)
    if not entries:
        raise ValueError(
            'multimodal.sources = []: multimodal.source = "mixture" needs at least one '
            "[[multimodal.sources]] with name, kind and path."
        )
    if all(entry.max_epochs or entry.max_tokens for entry in entries):
        raise ValueError(
            "multimodal.sources: all have max_epochs or max_tokens, and ranks would run out of "
            "data at different steps. Leave one without a limit; training.steps ends the run."
        )
    return entries


def _validation_entry(config: Multimodal, name: str) -> SourceEntry:
    entries = parse_entries("multimodal.validation_sources", config.validation_sources, True)
    for entry in entries:
        if entry.name == name:
            return entry
    known = ", ".join(entry.name for entry in entries) or "there are none"
    raise ValueError(
        f"multimodal.validation_splits = {name!r}: is no name of [[multimodal.validation_sources]] "
        f"({known}); name one of them, or set validation.enable = false."
    )


def check_sources(config: Multimodal, modality_names: Sequence[str], validates: bool) -> None:
    """Check what a configuration says of sources, without opening any.

    Args:
        config: The `[multimodal]` section.
        modality_names: The model's modalities.
        validates: Whether there is validation.

    Raises:
        ValueError: Names the key, its value and the remedy.
    """
    if config.source != "mixture":
        for key in ("sources", "validation_sources"):
            if getattr(config, key):
                raise ValueError(
                    f"multimodal.{key}: is read with multimodal.source = 'mixture', which is "
                    f"{config.source!r}; set that, or remove the entries."
                )
    else:
        training_entries(config)
        for name in config.validation_splits if validates else ():
            _validation_entry(config, name)
    is_emoji = config.source == "emoji" or any(
        entry.get("kind") == "emoji" for entry in (*config.sources, *config.validation_sources)
    )
    if is_emoji and "speech" in modality_names:
        for key, neutral in (("caption_first", 0.5), ("condition_dropout", 0.0)):
            if getattr(config, key) != neutral:
                raise ValueError(
                    f"multimodal.{key} = {getattr(config, key)}: the emoji corpus has its "
                    "modalities in every order alike for a model with speech; remove the key."
                )


def build_source(
    config: Multimodal,
    split: str,
    tokenizers: SourceTokenizers,
    is_endless: bool,
    modality_names: Sequence[str] = ("text", "image"),
) -> Source:
    """Open the one source that `multimodal.source` names.

    Args:
        config: The `[multimodal]` section.
        split: Which split to read.
        tokenizers: Of the run.
        is_endless: True to train, False for one pass of validation.
        modality_names: The model's modalities.

    Raises:
        ValueError: The split is unknown (names the known ones), a column is missing, and so on.
    """
    if config.source == "emoji":
        return EmojiSource(config, split, tokenizers.image, is_endless, modality_names)

    # Imported late: `datasets` takes a second, which runs on the embedded corpus need not pay.
    from torchtitan_mixtures.data.datasets_source import build_datasets_source

    return build_datasets_source(config, split, tokenizers.media(), is_endless)


def build_entry(
    entry: SourceEntry,
    config: Multimodal,
    tokenizers: SourceTokenizers,
    is_endless: bool,
    modality_names: Sequence[str],
) -> Source:
    """Open the source of one entry.

    Args:
        entry: One of `[[multimodal.sources]]`.
        config: The section it is in.
        tokenizers: Of the run.
        is_endless: True to train, False for one pass.
        modality_names: The model's modalities.

    Raises:
        ValueError: It cannot be opened; names the entry.
    """
    order = PairOrder.of(config, is_endless)
    if entry.kind == "shards":
        from torchtitan_mixtures.data.shards_source import build_shards_source

        return build_shards_source(entry, config, tokenizers.fingerprints(), order, is_endless)
    if entry.kind in ("emoji", "datasets"):
        source = _build_own(entry, config, tokenizers, is_endless, modality_names)
        source.max_epochs = entry.max_epochs
        return source
    from torchtitan_mixtures.data.file_sources import build_file_source

    return build_file_source(entry, config, tokenizers.media(), order, is_endless)


def _build_own(
    entry: SourceEntry,
    config: Multimodal,
    tokenizers: SourceTokenizers,
    is_endless: bool,
    modality_names: Sequence[str],
) -> Source:
    """Open an entry that is read as `multimodal.source` would be, from a section of its own."""
    own = dataclasses.replace(
        config,
        source="emoji" if entry.kind == "emoji" else "datasets",
        sources=[],
        validation_sources=[],
        path=entry.path,
        name=entry.subset,
        data_files=list(entry.data_files),
        streaming=entry.streaming,
    )
    split = entry.split or "train"
    if entry.kind == "datasets":
        from torchtitan_mixtures.data.datasets_source import build_datasets_source

        return build_datasets_source(own, split, tokenizers.media(), is_endless, entry)
    try:
        return EmojiSource(own, split, tokenizers.image, is_endless, modality_names)
    except ValueError as error:
        raise ValueError(f"multimodal.sources[{entry.name}]: {error}") from error
