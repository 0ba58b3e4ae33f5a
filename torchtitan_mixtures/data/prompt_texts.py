"""Captions and spoken names made into the prompts of a batch, as the `PromptSpec`s of a job say.

| key                   | shape of a sample, dtype | prompt                                    |
|-----------------------|--------------------------|-------------------------------------------|
| `prompt_text`         | `(length,)` int64        | tokens, for an encoder inside the model   |
| `prompt_text_ids_{e}` | `(window_e,)` int64      | token ids, for frozen encoder number e    |
| `prompt_text`         | `(length, dim)` float32  | embeddings that were made before          |
| `prompt_text_pooled`  | `(pooled_dim,)` float32  | likewise, if they have such               |
| `prompt_speech`       | `(length,)` int64        | units of speech; all null: nothing spoken |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.data.prompts import PromptTokens, fill_units
from torchtitan_mixtures.data.tokenizers import build_text_tokenizer

if TYPE_CHECKING:
    from torchtitan_mixtures.job_config import Multimodal

TEXT = "prompt_text"
SPEECH = "prompt_speech"

_TOKENIZER_FILES = (".json", ".txt", ".model")
"""Of an encoder's folder; small, unlike its weights."""


class Caption(NamedTuple):
    """A text, and where it stands.

    Attributes:
        text: The caption.
        image: Number of its image in the split.
        number: Its own number among the image's captions.
    """

    text: str
    image: int = 0
    number: int = 0


class Prompts(NamedTuple):
    """The prompts of a sample by their keys in a batch, and how many of them were cut."""

    tensors: dict[str, Tensor]
    num_truncated: int


class _Texts(Protocol):
    """One way from captions to the tensors of a text prompt."""

    def make(self, caption: Caption) -> Prompts: ...

    def blank(self) -> dict[str, Tensor]:
        """What stands where there is no sample."""
        ...


class Prompter:
    """Makes the prompts of samples.

    Args:
        config: The `[multimodal]` section.
        specs: The prompts of the model.
        split: Name of the split, of which there may be embeddings.

    Attributes:
        hears: Whether one of them is spoken.
        blank: The prompts of a row of a batch that has no sample.
    """

    def __init__(self, config: Multimodal, specs: Sequence[PromptSpec], split: str) -> None:
        lengths = {spec.name: spec.length for spec in specs}
        self.hears = "speech" in lengths
        self._speech_length = lengths.get("speech", 0)
        (text,) = (spec for spec in specs if spec.name == "text")
        self._texts = _build_texts(config, text, split)
        self.blank = self._texts.blank()
        if self.hears:
            self.blank[SPEECH] = fill_units([], self._speech_length)

    def make(self, caption: Caption, units: NDArray[np.int64] | Sequence[int] = ()) -> Prompts:
        """Make the prompts of one sample.

        Args:
            caption: What its text says.
            units: What is spoken, for a model that hears; none: nothing.

        Raises:
            ValueError: The text is too long, and long ones are refused.
        """
        tensors, num_truncated = self._texts.make(caption)
        if self.hears:
            tensors[SPEECH] = fill_units(units, self._speech_length)
            num_truncated += len(units) > self._speech_length
        return Prompts(tensors, num_truncated)


def prompt_fingerprint(config: Multimodal, specs: Sequence[PromptSpec]) -> dict[str, Any]:
    """What the prompts of a job depend on, beside its images and captions."""
    found: dict[str, Any] = {"prompts": json.loads(json.dumps([asdict(spec) for spec in specs]))}
    if config.text_embeddings:
        index = Path(config.text_embeddings).expanduser() / "text_embeddings.json"
        found["hash of the text embeddings"] = _hash_files([index])
    elif config.text_encoders:
        folders = [Path(folder).expanduser() for folder in config.text_encoders]
        found["hashes of the text encoders' tokenizers"] = [
            _hash_files(p for p in sorted(folder.rglob("*")) if p.suffix in _TOKENIZER_FILES)
            for folder in folders
        ]
    else:
        found["multimodal.text_tokenizer"] = config.text_tokenizer
    return found


def _hash_files(paths: Any) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _build_texts(config: Multimodal, spec: PromptSpec, split: str) -> _Texts:
    if config.text_embeddings:
        return _EmbeddedTexts(config.text_embeddings, spec, split)
    if config.text_encoders:
        return _FrozenTexts(config)
    return _TokenTexts(config, spec)


class _TokenTexts:
    """Tokens for an encoder inside the model."""

    def __init__(self, config: Multimodal, spec: PromptSpec) -> None:
        tokenizer = build_text_tokenizer(config.text_tokenizer)
        self._tokens = PromptTokens(tokenizer, spec.length, config.long_prompts == "refuse")
        self._spec = spec

    def make(self, caption: Caption) -> Prompts:
        before = self._tokens.num_truncated
        ids = self._tokens.encode(caption.text)
        return Prompts({TEXT: ids}, self._tokens.num_truncated - before)

    def blank(self) -> dict[str, Tensor]:
        return {TEXT: torch.full((self._spec.length,), self._spec.null_token)}


class _FrozenTexts:
    """Token ids for frozen encoders, which run beside the model."""

    def __init__(self, config: Multimodal) -> None:
        # Imported late: `transformers` takes seconds, and is an extra.
        from torchtitan_mixtures.data.text_encoders import PromptTokenizers

        self._tokenizers = PromptTokenizers(config.text_encoders, config.long_prompts)

    def make(self, caption: Caption) -> Prompts:
        before = self._tokenizers.truncated
        ids = self._tokenizers.tokenize(caption.text)
        is_truncated = self._tokenizers.truncated > before  # by one encoder or several
        return Prompts({f"{TEXT}_ids_{e}": part for e, part in enumerate(ids)}, is_truncated)

    def blank(self) -> dict[str, Tensor]:
        return self.make(Caption("")).tensors


class _EmbeddedTexts:
    """Embeddings that were made before."""

    def __init__(self, folder: str, spec: PromptSpec, split: str) -> None:
        from torchtitan_mixtures.data.text_embeddings import TextEmbeddings

        self._embeddings = TextEmbeddings(folder)
        self._spec = spec

    def make(self, caption: Caption) -> Prompts:
        row = self._embeddings.row(caption.image, caption.number)
        embeddings, pooled = self._embeddings.read(row)
        tensors = {TEXT: embeddings.float()}
        if self._spec.pooled_dim:
            tensors[f"{TEXT}_pooled"] = pooled.float()
        return Prompts(tensors, 0)

    def blank(self) -> dict[str, Tensor]:
        tensors = {TEXT: torch.zeros(self._spec.length, self._spec.dim)}
        if self._spec.pooled_dim:
            tensors[f"{TEXT}_pooled"] = torch.zeros(self._spec.pooled_dim)
        return tensors
