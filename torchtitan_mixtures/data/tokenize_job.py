"""Which source of a training run `scripts/prepare_data.py tokenize` tokenises, and how it opens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from torchtitan_mixtures.checks import check_data
from torchtitan_mixtures.data.codecs import Codecs, build_codecs
from torchtitan_mixtures.data.mixture import SourceTokenizers, build_entry, build_source
from torchtitan_mixtures.data.sources import Source
from torchtitan_mixtures.data.tokenize_parts import Recipe, Tokenizable
from torchtitan_mixtures.multimodal_config import Multimodal
from torchtitan_mixtures.source_entries import SourceEntry, parse_entries
from torchtitan_mixtures.train import parse_job, quiet_the_host

_SETTINGS = ("scene_fraction", "max_pairs", "caption_first")  # beside what a source says of itself


def job_recipe(arguments: Sequence[str], name: str, epochs: int) -> Recipe:
    """How any process opens a source of a job.

    Args:
        arguments: Of the job, as for training.
        name: Of the source; empty: the only one.
        epochs: Passes over it. One is in the order of the source, several are shuffled and draw
            anew what is drawn.

    Raises:
        ValueError: `epochs` is not positive.
    """
    if epochs < 1:
        raise ValueError(f"--epochs {epochs}: must be at least 1.")
    return partial(open_job_source, tuple(arguments), name, epochs)


def open_job_source(arguments: Sequence[str], name: str, epochs: int) -> Tokenizable:
    """Open a source of a job; see `job_recipe`.

    Raises:
        ValueError: The configuration is wrong, there is no such source, or it cannot be opened.
    """
    quiet_the_host()  # in worker processes too
    job_config = parse_job(arguments, check_data)
    # What a caption and what it is about are to each other stays open; training drops captions.
    config = dataclasses.replace(job_config.multimodal, condition_dropout=0.0)
    codecs = build_codecs(job_config)
    tokenizers = SourceTokenizers(codecs.text, codecs.image, codecs.speech)
    source, chosen = _open(config, tokenizers, codecs, name, epochs)
    settings = {
        "name": chosen,
        "epochs": epochs,
        **{f"multimodal.{key}": getattr(config, key) for key in _SETTINGS},
        **source.fingerprint(),
    }
    names = {
        modality: str(getattr(config, f"{modality}_tokenizer"))
        for modality in ("text", "image", "speech")
    }
    return Tokenizable(source, tokenizers, names, settings, config.max_bad_fraction)


def _open(
    config: Multimodal, tokenizers: SourceTokenizers, codecs: Codecs, name: str, epochs: int
) -> tuple[Source, str]:
    """The source, and its name."""
    is_endless = epochs > 1
    if config.source == "mixture":
        entry = _find_entry(config, name)
        entry = dataclasses.replace(entry, max_epochs=epochs if is_endless else 0)
        names = codecs.modalities.names
        return build_entry(entry, config, tokenizers, is_endless, names), entry.name
    if name not in ("", config.source):
        raise ValueError(
            f"--source {name}: the configuration has the one source {config.source!r}; leave the "
            "option out."
        )
    source = build_source(
        config, config.train_split, tokenizers, is_endless, codecs.modalities.names
    )
    source.max_epochs = epochs if is_endless else 0
    return source, config.source


def _find_entry(config: Multimodal, name: str) -> SourceEntry:
    entries = [
        *parse_entries("multimodal.sources", config.sources),
        *parse_entries("multimodal.validation_sources", config.validation_sources, True),
    ]
    found = [entry for entry in entries if name in ("", entry.name)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(entry.name for entry in entries)
    if not found:
        raise ValueError(f"--source {name}: there is no such source; name one of {names}.")
    if name:
        raise ValueError(
            f"--source {name}: is in multimodal.sources and in multimodal.validation_sources; "
            "rename one."
        )
    raise ValueError(f"--source: the configuration has several, {names}; name one of them.")
