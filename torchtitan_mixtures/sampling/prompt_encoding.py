"""Texts as the prompts of a model: tokens for its own encoder, or embeddings of frozen ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import cache
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.captions import with_article
from torchtitan_mixtures.data.emoji import Concept, EmojiCorpus
from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.data.prompts import PromptTokens, fill_units
from torchtitan_mixtures.data.spoken import VOICES
from torchtitan_mixtures.data.tokenizers import build_text_tokenizer
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.sampling.conditions import EncodedPrompts

VOICE = VOICES[0]
"""Which speaks the names that are to be spoken."""

Warn = Callable[[str], None]


def needs_text_encoders(job_config: MixtureJobConfig) -> bool:
    """Say whether new texts need encoders that the configuration of a run does not name."""
    config = job_config.multimodal
    return bool(config.text_embeddings) and not config.text_encoders


def choose_text_encoders(
    job_config: MixtureJobConfig, specs: Sequence[PromptSpec], wanted: Sequence[str], flag: str
) -> list[str]:
    """Find the folders of frozen encoders that new texts need.

    Args:
        job_config: That of the run.
        specs: The prompts of its model.
        wanted: Folders that the user names; none: those of the run.
        flag: What the user calls them, for messages.

    Returns:
        None if the model encodes texts itself.

    Raises:
        ValueError: None are named that are needed, or those that are named do not fit the model.
    """
    spec = next(spec for spec in specs if spec.name == "text")
    if spec.kind == "tokens":
        if wanted:
            raise ValueError(
                f"{flag} {' '.join(wanted)}: the model encodes texts itself; leave it out."
            )
        return []
    if not wanted and needs_text_encoders(job_config):
        raise ValueError(
            f"{flag}: the run had embeddings of its texts (multimodal.text_embeddings = "
            f"{job_config.multimodal.text_embeddings!r}); name the folders of the encoders that "
            "made them, in that order."
        )
    from torchtitan_mixtures.data.text_encoders import frozen_prompt_spec

    folders = list(wanted or job_config.multimodal.text_encoders)
    found = frozen_prompt_spec(folders)
    if _layout(found) != _layout(spec):
        raise ValueError(
            f"{flag} {' '.join(folders)}: they make {found.length} x {found.dim} embeddings and "
            f"{found.pooled_dim} pooled, the model takes {spec.length} x {spec.dim} and "
            f"{spec.pooled_dim}; name the encoders it was trained with, in that order."
        )
    return folders


def _layout(spec: PromptSpec) -> tuple[Any, ...]:
    """What embeddings consist of, whatever their encoders are called."""
    spans = tuple((tuple(s.rows), tuple(s.channels), tuple(s.pooled)) for s in spec.spans)
    return spec.length, spec.dim, spec.pooled_dim, spans


def check_prompts(
    job_config: MixtureJobConfig, specs: Sequence[PromptSpec], texts: Sequence[str]
) -> None:
    """Refuse prompts that are too long, where a run refuses such; reads tokenizers alone.

    Raises:
        ValueError: Names the prompt.
    """
    _tokenize(job_config, specs, texts, job_config.multimodal.text_encoders, lambda message: None)


class PromptEncoder:
    """Makes the prompts of a model out of texts.

    Args:
        job_config: That of the run.
        specs: The prompts of its model.
        device: Where frozen encoders are to run.
        text_encoders: Their folders, see `choose_text_encoders`.
        speaks: Whether a text that is the name of an emoji is spoken too, for a model that hears.
        warn: Told of each text that is cut.
    """

    def __init__(
        self,
        job_config: MixtureJobConfig,
        specs: Sequence[PromptSpec],
        device: torch.device | str,
        text_encoders: Sequence[str] = (),
        *,
        speaks: bool = False,
        warn: Warn = logger.warning,
    ) -> None:
        self._config = job_config
        self._specs = tuple(specs)
        self._folders = list(text_encoders)
        self._speaks = speaks
        self._warn = warn
        self._encoders: Any = None
        if text_encoders:
            from torchtitan_mixtures.data.text_encoders import FrozenTextEncoders

            long_prompts = job_config.multimodal.long_prompts
            self._encoders = FrozenTextEncoders(self._folders, device, long_prompts)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> EncodedPrompts:
        """Encode texts; the results are on the CPU.

        Raises:
            ValueError: A text is too long, and the run refuses such.
        """
        tensors: dict[str, Tensor] = {}
        kept = []
        is_spoken = [False] * len(texts)
        for spec in self._specs:
            is_kept = torch.ones(len(texts), spec.num_encoders, dtype=torch.bool)
            if spec.name == "speech":
                rows = [self._speak(text, spec) for text in texts]
                is_spoken = [units is not None for units in rows]
                silence = torch.full((spec.length,), spec.null_token)
                tensors["speech"] = torch.stack([silence if r is None else r for r in rows])
                is_kept[:] = torch.tensor(is_spoken)[:, None]
            else:
                tensors |= self._encode_texts(texts, spec)
            kept.append(is_kept)
        return EncodedPrompts(tensors, torch.cat(kept, 1), tuple(is_spoken))

    def _encode_texts(self, texts: Sequence[str], spec: PromptSpec) -> dict[str, Tensor]:
        ids = _tokenize(self._config, self._specs, texts, self._folders, self._warn)
        if self._encoders is None:
            return {spec.name: ids[0]}
        # One by one: then a prompt's embedding does not depend on the others.
        parts = [
            self._encoders.encode_ids([rows[n : n + 1] for rows in ids]) for n in range(len(texts))
        ]
        embeddings, pooled = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        found = {spec.name: embeddings}
        return found | {f"{spec.name}_pooled": pooled} if spec.pooled_dim else found

    def _speak(self, text: str, spec: PromptSpec) -> Tensor | None:
        concept = _spoken_names().get(text.strip()) if self._speaks else None
        if concept is None:
            return None
        return fill_units(EmojiCorpus.load().spoken(concept, VOICE), spec.length)


@cache
def _spoken_names() -> dict[str, Concept]:
    """Every emoji by its name, with and without its article."""
    concepts = EmojiCorpus.load().concepts
    plain = {concept.name: concept for concept in concepts}
    return {with_article(concept.name): concept for concept in concepts} | plain


def _tokenize(
    job_config: MixtureJobConfig,
    specs: Sequence[PromptSpec],
    texts: Sequence[str],
    folders: Sequence[str],
    warn: Warn,
) -> list[Tensor]:
    """Tokens of texts for the model's own encoder, or for each frozen one.

    Returns:
        One `(texts, window)` int64 for each encoder.
    """
    config = job_config.multimodal
    spec = next(spec for spec in specs if spec.name == "text")
    if spec.kind == "tokens":
        tokens = PromptTokens(
            build_text_tokenizer(config.text_tokenizer),
            spec.length,
            config.long_prompts == "refuse",
        )
        rows = _note_cuts(
            lambda text: [tokens.encode(text)], lambda: tokens.num_truncated, texts, warn
        )
    elif folders:
        from torchtitan_mixtures.data.text_encoders import PromptTokenizers

        tokenizers = PromptTokenizers(folders, config.long_prompts)
        rows = _note_cuts(tokenizers.tokenize, lambda: copy(tokenizers.truncated), texts, warn)
    else:
        return []
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def _note_cuts(
    tokenize: Callable[[str], Sequence[Tensor]],
    count: Callable[[], Any],
    texts: Sequence[str],
    warn: Warn,
) -> list[Sequence[Tensor]]:
    """Tokenize texts; warn of each that raises the count of those that are cut."""
    rows = []
    for text in texts:
        before = count()
        rows.append(tokenize(text))
        if count() != before:
            warn(f"The prompt {shorten(text, 80)!r} is too long for the model: its end is cut off.")
    return rows
