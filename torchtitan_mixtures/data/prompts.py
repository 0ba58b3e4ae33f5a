"""What prompts the data of a job has, and how texts and spoken names become their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchtitan.config import JobConfig

from torchtitan_mixtures.data.model_flavor import model_flavor
from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.data.tokenizers import TextTokenizer, build_text_tokenizer

if TYPE_CHECKING:
    from torchtitan_mixtures.job_config import MixtureJobConfig, Multimodal

SPEECH_UNITS = 512
"""Units of the embedded speech tokenizer; the number after them stands for "nothing"."""


def prompt_specs(job_config: JobConfig, model_args: Any = None) -> tuple[PromptSpec, ...]:
    """Say what prompts a job's data has, in the order of the flavour's `prompt_names`.

    Reads the descriptions of encoders and embeddings, not their weights.

    Args:
        job_config: The whole configuration; read are its sections multimodal and model.
        model_args: The flavour's arguments; None: those of the job's.

    Raises:
        ValueError: Names the key that does not fit, its value and the remedy.
    """
    config = cast("MixtureJobConfig", job_config).multimodal
    if model_args is None:
        model_args = model_flavor(job_config)
    return tuple(_spec(name, config, model_args) for name in model_args.prompt_names)


def _spec(name: str, config: Multimodal, args: Any) -> PromptSpec:
    if name == "text":
        return text_spec(config, args.prompt_length)
    if config.source != "emoji":
        raise ValueError(
            f"multimodal.source = {config.source!r}: has no spoken prompts, which the flavour "
            "takes; use 'emoji', or a flavour of text and image."
        )
    return PromptSpec("speech", "tokens", args.speech_length, SPEECH_UNITS + 1, SPEECH_UNITS)


def text_spec(config: Multimodal, flavor_length: int) -> PromptSpec:
    """Say what the text prompts of a job are.

    Args:
        config: The `[multimodal]` section.
        flavor_length: Tokens of a prompt if `prompt_length` does not say it.
    """
    if config.text_embeddings:
        from torchtitan_mixtures.data.text_embeddings import read_embedding_spec

        return read_embedding_spec(config.text_embeddings)
    if config.text_encoders:
        from torchtitan_mixtures.data.text_encoders import frozen_prompt_spec

        return frozen_prompt_spec(config.text_encoders)
    tokenizer = build_text_tokenizer(config.text_tokenizer)
    length = config.prompt_length or flavor_length
    return PromptSpec("text", "tokens", length, tokenizer.vocab_size, tokenizer.sentinels.pad)


class PromptTokens:
    """Makes tokens of texts, for the encoder inside a model.

    Args:
        tokenizer: The run's.
        length: Tokens of a prompt, sentinels included.
        refuse_long: Whether a longer text is an error; otherwise it is cut and counted.

    Attributes:
        num_truncated: Texts that were cut.
    """

    def __init__(self, tokenizer: TextTokenizer, length: int, refuse_long: bool = False) -> None:
        self.num_truncated = 0
        self._tokenizer = tokenizer
        self._length = length
        self._refuse_long = refuse_long

    def encode(self, text: str) -> Tensor:
        """Begin- and end-of-sequence around a text's tokens, filled up; `(length,)` int64.

        Raises:
            ValueError: The text is too long, and long ones are refused.
        """
        ids, sentinels = self._tokenizer.encode(text), self._tokenizer.sentinels
        room = self._length - 2
        if len(ids) > room:
            if self._refuse_long:
                raise ValueError(
                    f"the prompt {text[:80]!r} has {len(ids)} tokens, the model takes {room}; "
                    'shorten it, or set multimodal.long_prompts = "truncate" (or '
                    "multimodal.prompt_length)."
                )
            self.num_truncated += 1
        tokens = [sentinels.bos, *ids[:room], sentinels.eos]
        filled = tokens + [sentinels.pad] * (self._length - len(tokens))
        return torch.tensor(filled, dtype=torch.int64)


def fill_units(units: NDArray[np.int64] | Sequence[int], length: int) -> Tensor:
    """Cut or fill up units of speech, `(length,)` int64."""
    filled = torch.full((length,), SPEECH_UNITS, dtype=torch.int64)
    kept = torch.as_tensor(np.asarray(units, np.int64))[:length]
    filled[: len(kept)] = kept
    return filled
