"""Captions and spoken names made into the prompts of a batch, as the `PromptSpec`s of a job say.

| key                   | shape of a sample, dtype | prompt                                    |
|-----------------------|--------------------------|-------------------------------------------|
| `prompt_text`         | `(length,)` int64        | tokens, for an encoder inside the model   |
| `prompt_text_ids_{e}` | `(window_e,)` int64      | token ids, for frozen encoder number e    |
| `prompt_text`         | `(length, dim)`          | embeddings made before, as they are kept  |
| `prompt_text_pooled`  | `(pooled_dim,)`          | likewise, if they have such               |
| `prompt_speech`       | `(length,)` int64        | units of speech; all null: nothing spoken |

Embeddings keep the type they are stored in, which halves what is moved; the model casts them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.data.prompts import PromptTokens, fill_units
from torchtitan_mixtures.data.text_embeddings import TextEmbeddings
from torchtitan_mixtures.data.text_encoder_families import read_encoder_files
from torchtitan_mixtures.data.text_encoder_files import EncoderFiles
from torchtitan_mixtures.data.tokenizers import build_text_tokenizer

if TYPE_CHECKING:
    from torchtitan_mixtures.job_config import Multimodal

TEXT = "prompt_text"
SPEECH = "prompt_speech"


class Caption(NamedTuple):
    """A text, and where it stands.

    Attributes:
        text: The caption.
        image: Row of its image in the split of the data set.
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

    def fingerprint(self) -> dict[str, Any]: ...


class Prompter:
    """Makes the prompts of samples.

    Args:
        config: The `[multimodal]` section.
        specs: The prompts of the model.
        split: Name of the split, of which there may be embeddings.

    Attributes:
        hears: Whether one of them is spoken.
    """

    def __init__(self, config: Multimodal, specs: Sequence[PromptSpec], split: str) -> None:
        lengths = {spec.name: spec.length for spec in specs}
        self.hears = "speech" in lengths
        self._speech_length = lengths.get("speech", 0)
        (text,) = (spec for spec in specs if spec.name == "text")
        self._specs = tuple(specs)
        self._texts = _build_texts(config, text, split)

    @cached_property
    def blank(self) -> dict[str, Tensor]:
        """The prompts of a row of a batch that has no sample."""
        blank = self._texts.blank()
        if self.hears:
            blank[SPEECH] = fill_units([], self._speech_length)
        return blank

    def check_captions(self, hash_captions: Callable[[], str]) -> None:
        """Check that embeddings that were made before are those of a split's captions.

        Args:
            hash_captions: Hashes these as `digest_captions` does; called only if need be.

        Raises:
            ValueError: They are others'.
        """
        if isinstance(self._texts, _EmbeddedTexts):
            self._texts.check_captions(hash_captions())

    def fingerprint(self) -> dict[str, Any]:
        """What prompts depend on, beside captions."""
        specs = json.loads(json.dumps([asdict(spec) for spec in self._specs]))
        return {"prompts": specs, **self._texts.fingerprint()}

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


def _build_texts(config: Multimodal, spec: PromptSpec, split: str) -> _Texts:
    if config.text_embeddings:
        return _EmbeddedTexts(config.text_embeddings, spec, split)
    if config.text_encoders:
        return _FrozenTexts(config)
    return _TokenTexts(config, spec)


class _TokenTexts:
    """Tokens for an encoder inside the model."""

    def __init__(self, config: Multimodal, spec: PromptSpec) -> None:
        self._name = config.text_tokenizer
        tokenizer = build_text_tokenizer(config.text_tokenizer)
        self._tokens = PromptTokens(tokenizer, spec.length, config.long_prompts == "refuse")
        self._spec = spec

    def make(self, caption: Caption) -> Prompts:
        before = self._tokens.num_truncated
        ids = self._tokens.encode(caption.text)
        return Prompts({TEXT: ids}, self._tokens.num_truncated - before)

    def blank(self) -> dict[str, Tensor]:
        return {TEXT: torch.full((self._spec.length,), self._spec.null_token)}

    def fingerprint(self) -> dict[str, Any]:
        return {"multimodal.text_tokenizer": self._name}


class _FrozenTexts:
    """Token ids for frozen encoders, which run beside the model."""

    def __init__(self, config: Multimodal) -> None:
        # Imported late: `transformers` takes seconds, and is an extra.
        from torchtitan_mixtures.data.text_encoders import PromptTokenizers

        self._folders = tuple(config.text_encoders)
        self._tokenizers = PromptTokenizers(self._folders, config.long_prompts)

    def make(self, caption: Caption) -> Prompts:
        before = sum(self._tokenizers.truncated)
        ids = self._tokenizers.tokenize(caption.text)
        is_truncated = sum(self._tokenizers.truncated) > before  # by one encoder or several
        return Prompts({f"{TEXT}_ids_{e}": part for e, part in enumerate(ids)}, is_truncated)

    def blank(self) -> dict[str, Tensor]:
        return self.make(Caption("")).tensors

    def fingerprint(self) -> dict[str, Any]:
        files = [read_encoder_files(folder) for folder in self._folders]
        return {"hashes of the text encoders' JSON files": [_hash_json(each) for each in files]}


class _EmbeddedTexts:
    """Embeddings that were made before."""

    def __init__(self, folder: str, spec: PromptSpec, split: str) -> None:
        self._embeddings = TextEmbeddings(folder, split)
        self._spec = spec

    def make(self, caption: Caption) -> Prompts:
        row = self._embeddings.row(caption.image, caption.number)
        embeddings, pooled = self._embeddings.read(row)
        return Prompts(self._name(embeddings, pooled), 0)

    def blank(self) -> dict[str, Tensor]:
        spec, dtype = self._spec, self._embeddings.dtype
        embeddings = torch.zeros(spec.length, spec.dim, dtype=dtype)
        return self._name(embeddings, torch.zeros(spec.pooled_dim, dtype=dtype))

    def fingerprint(self) -> dict[str, Any]:
        return self._embeddings.fingerprint()

    def check_captions(self, sha256: str) -> None:
        self._embeddings.check_captions(sha256)

    def _name(self, embeddings: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        pooled_only = {f"{TEXT}_pooled": pooled} if self._spec.pooled_dim else {}
        return {TEXT: embeddings, **pooled_only}


def _hash_json(files: EncoderFiles) -> str:
    """Hash what decides which tokens an encoder reads, not its weights, which take long."""
    digest = hashlib.sha256()
    names = {files.folder / "config.json", *files.tokenizer.glob("*.json")}
    for path in sorted({*names, *files.tokenizer.glob("*.txt"), *files.tokenizer.glob("*.model")}):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
