"""The tokenizers of a model, all in one hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torchtitan_mixtures.data.encoding import Modalities
from torchtitan_mixtures.data.loader import build_multimodal_tokenizer, find_modalities
from torchtitan_mixtures.data.speech import SpeechTokenizer, build_speech_tokenizer
from torchtitan_mixtures.data.tokenizers import (
    ImageTokenizer,
    TextTokenizer,
    build_image_tokenizer,
    build_text_tokenizer,
)
from torchtitan_mixtures.job_config import MixtureJobConfig, Multimodal


@dataclass(frozen=True)
class Codecs:
    """What turns text, images and speech into tokens of a model, and back."""

    modalities: Modalities
    text: TextTokenizer
    image: ImageTokenizer
    speech: SpeechTokenizer | None
    """None: the model has no speech."""


def tokenizer_fingerprints(config: Multimodal, modality_names: Sequence[str]) -> dict[str, str]:
    """What the tokenizers of a configuration hold, whatever their files are called.

    Args:
        config: The `[multimodal]` section.
        modality_names: The model's modalities; those without a tokenizer are left out.

    Returns:
        A hash for each key of the section that names a tokenizer.
    """
    builders = {
        "text": build_text_tokenizer,
        "image": build_image_tokenizer,
        "speech": build_speech_tokenizer,
    }
    keys = {f"{name}_tokenizer": builders[name] for name in modality_names if name in builders}
    return {key: _fingerprint(build, getattr(config, key)) for key, build in keys.items()}


@functools.cache
def _fingerprint(build: Callable[[str], Any], name: str) -> str:
    return build(name).fingerprint()


def build_codecs(job_config: MixtureJobConfig) -> Codecs:
    """Build the tokenizers that a job trains with.

    Raises:
        ValueError: One of them cannot be read, or does not fit the flavour.
    """
    text = build_multimodal_tokenizer(job_config)
    modalities = find_modalities(job_config, text)
    image = build_image_tokenizer(job_config.multimodal.image_tokenizer)
    speech = None
    if "speech" in modalities.names:
        speech = build_speech_tokenizer(job_config.multimodal.speech_tokenizer)
    return Codecs(modalities, text, image, speech)
