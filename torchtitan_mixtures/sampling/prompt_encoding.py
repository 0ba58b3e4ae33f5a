"""Texts as the prompts of a model: tokens for its own encoder, or embeddings of frozen ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.captions import with_article
from torchtitan_mixtures.data.emoji import Concept, EmojiCorpus
from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.data.prompts import PromptTokens, fill_units
from torchtitan_mixtures.data.spoken import VOICES
from torchtitan_mixtures.data.tokenizers import build_text_tokenizer
from torchtitan_mixtures.job_config import MixtureJobConfig, Multimodal
from torchtitan_mixtures.sampling.conditions import EncodedPrompts

if TYPE_CHECKING:
    from torchtitan_mixtures.data.text_encoders import FrozenTextEncoders

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
        The folders; none if the model encodes texts itself.

    Raises:
        ValueError: None are named that are needed, or those that are named do not fit the model.
    """
    spec = _text_spec(specs)
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
    """Refuse prompts that are too long, where a run refuses such; reads no weights.

    Raises:
        ValueError: Names the prompt.
    """
    config = job_config.multimodal
    spec = _text_spec(specs)
    if spec.kind == "tokens":
        tokenizer: Tokenizer = _OwnTokens(config, spec)
    elif config.text_encoders:
        from torchtitan_mixtures.data.text_encoders import PromptTokenizers

        tokenizer = PromptTokenizers(config.text_encoders, config.long_prompts)
    else:  # embeddings that are there already: see `needs_text_encoders`
        return
    for text in texts:
        tokenizer.tokenize(text)


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
        config = job_config.multimodal
        self._specs = tuple(specs)
        self._speaks = speaks
        self._warn = warn
        self._encoders: FrozenTextEncoders | None = None
        if text_encoders:
            from torchtitan_mixtures.data.text_encoders import FrozenTextEncoders

            dtype = getattr(torch, config.text_encoder_dtype)
            self._encoders = FrozenTextEncoders(text_encoders, device, config.long_prompts, dtype)
            self._tokenizer: Tokenizer = self._encoders.tokenizers
        else:
            self._tokenizer = _OwnTokens(config, _text_spec(specs))

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
        rows = [self._tokenize(text) for text in texts]
        if self._encoders is None:
            return {spec.name: torch.stack([ids for (ids,) in rows])}
        # One by one: then a prompt's embedding does not depend on the others.
        parts = [self._encoders.encode_ids([ids[None] for ids in row]) for row in rows]
        embeddings, pooled = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        found = {spec.name: embeddings}
        return found | {f"{spec.name}_pooled": pooled} if spec.pooled_dim else found

    def _tokenize(self, text: str) -> list[Tensor]:
        """Tokens for each encoder; warns if one of them does not see all of the text."""
        before = list(self._tokenizer.truncated)
        ids = self._tokenizer.tokenize(text)
        if list(self._tokenizer.truncated) != before:
            self._warn(f"The prompt {text!r} is too long for the model: its end is cut off.")
        return ids

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


def _text_spec(specs: Sequence[PromptSpec]) -> PromptSpec:
    return next(spec for spec in specs if spec.name == "text")


class Tokenizer(Protocol):
    """Makes tokens of texts; see `PromptTokenizers`."""

    @property
    def truncated(self) -> Sequence[int]:
        """For each encoder the texts that were cut."""
        ...

    def tokenize(self, text: str) -> list[Tensor]:
        """Tokens for each encoder, `(window,)` int64."""
        ...


class _OwnTokens:
    """Tokens for the encoder inside a model."""

    def __init__(self, config: Multimodal, spec: PromptSpec) -> None:
        tokenizer = build_text_tokenizer(config.text_tokenizer)
        self._tokens = PromptTokens(tokenizer, spec.length, config.long_prompts == "refuse")

    @property
    def truncated(self) -> list[int]:
        return [self._tokens.num_truncated]

    def tokenize(self, text: str) -> list[Tensor]:
        return [self._tokens.encode(text)]
