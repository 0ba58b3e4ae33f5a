"""Start-up checks of models that draw images to prompts; `checks.py` says what they are in general.

What is wrong with the data itself is found in `data/prompt_loader.py`.
"""

from __future__ import annotations

from typing import Any

from torchtitan_mixtures.classifier_checks import refuse_keys
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.objectives.denoising import is_mixture_of_diffusers

PROMPT_KEYS = (
    *("prompt_length", "long_prompts", "text_encoders", "text_encoder_dtype"),
    *("text_embeddings", "aspect_ratios"),
)
"""Keys of `[multimodal]` that only models with prompts read."""

_DOCUMENT_KEYS = (
    *("max_pairs", "shards", "reset_positions", "image_tokenizer", "speech_tokenizer"),
    *("text_weight", "image_weight", "speech_weight"),
)
_CLASS_KEYS = ("label_column", "class_of")


def refuse_prompt_keys(job_config: MixtureJobConfig) -> None:
    """Refuse keys about prompts, in a job whose model has none.

    Raises:
        ValueError: Names the key and its value.
    """
    refuse_keys(job_config, "multimodal", "prompts", PROMPT_KEYS)
    refuse_keys(job_config, "objective", "prompts", ("prompt_dropout",))


def check_prompted(job_config: MixtureJobConfig, model_args: Any) -> None:
    """Refuse keys that a model with prompts does not read.

    Args:
        job_config: The job.
        model_args: The flavour's arguments, complete.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    if not is_mixture_of_diffusers(model_args):
        refuse_keys(job_config, "mixture", "experts and no towers that these keys are about")
        refuse_keys(job_config, "objective", "router", ("balance_weight", "z_weight"))
    refuse_keys(job_config, "multimodal", "tokens of documents", _DOCUMENT_KEYS)
    refuse_keys(job_config, "multimodal", "classes", _CLASS_KEYS)
    refuse_keys(job_config, "objective", "classes", ("class_dropout",))
    data = job_config.multimodal
    if data.source == "emoji":
        refuse_keys(job_config, "multimodal", "columns on emoji", ("caption_column",))
    elif data.scene_fraction != type(data)().scene_fraction:
        raise ValueError(
            f"multimodal.scene_fraction = {data.scene_fraction}: scenes are composed of emoji, "
            f"not of multimodal.source = {data.source!r}; remove the key."
        )
    if any(spec.name == "text" and spec.kind == "embeddings" for spec in model_args.prompts):
        what = "encoder of its own for the texts here"
        refuse_keys(job_config, "multimodal", what, ("text_tokenizer", "prompt_length"))
