"""The tokenizers of a model, all in one hand."""

from __future__ import annotations

from dataclasses import dataclass

from torchtitan_mixtures.data.encoding import Modalities
from torchtitan_mixtures.data.loader import build_multimodal_tokenizer, find_modalities
from torchtitan_mixtures.data.speech import SpeechTokenizer, build_speech_tokenizer
from torchtitan_mixtures.data.tokenizers import (
    ImageTokenizer,
    TextTokenizer,
    build_image_tokenizer,
)
from torchtitan_mixtures.job_config import MixtureJobConfig


@dataclass(frozen=True)
class Codecs:
    """What turns text, images and speech into tokens of a model, and back."""

    modalities: Modalities
    text: TextTokenizer
    image: ImageTokenizer
    speech: SpeechTokenizer | None
    """None: the model has no speech."""


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
