"""One flat vocabulary over all modalities: which token ids belong to which modality.

Text comes first and keeps the flavour's `vocab_size`; the codes of every further modality are
appended in the order of `modality_names`. With 128,256 text tokens and 8,192 image codes the
ranges are `[(0, 128256), (128256, 136448)]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures.data.speech import build_speech_tokenizer
from torchtitan_mixtures.data.tokenizers import build_image_tokenizer
from torchtitan_mixtures.job_config import Multimodal


class TokenModelArgs(Protocol):
    """What the arguments of a model over tokens say about its vocabulary."""

    vocab_size: int
    """Number of text tokens."""

    modality_names: list[str]
    """Name of each modality, text first."""

    @property
    def vocab_ranges(self) -> list[tuple[int, int]]:
        """Half-open range of token ids of each modality."""
        ...

    def update_from_config(self, job_config: JobConfig) -> None:
        """Take over what the TOML decides, the vocabularies among it."""
        ...


def token_model_args(job_config: JobConfig) -> TokenModelArgs:
    """Look up the arguments of a job's flavour and complete them from its configuration."""
    spec = get_train_spec(job_config.model.name)
    model_args = cast(TokenModelArgs, spec.model_args[job_config.model.flavor])
    model_args.update_from_config(job_config)
    return model_args


def code_vocab_sizes(modality_names: Sequence[str], config: Multimodal) -> list[int]:
    """Count the codes of every modality after text, as the configured tokenizers have them.

    Args:
        modality_names: Names of the model's modalities; the first is text.
        config: The `[multimodal]` section.

    Returns:
        One number per modality after the first. A modality without a tokenizer has 0 codes: its
        tower is built and stays idle.
    """
    sizes = {
        "image": lambda: build_image_tokenizer(config.image_tokenizer).num_codes,
        "speech": lambda: build_speech_tokenizer(config.speech_tokenizer).num_codes,
    }
    return [sizes[name]() if name in sizes else 0 for name in modality_names[1:]]
