"""Start-up checks of classifiers; `checks.py` says what they are in general."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchtitan_mixtures import device
from torchtitan_mixtures.classifier_config import Nested
from torchtitan_mixtures.data import image_data
from torchtitan_mixtures.data.domains import DOMAIN_KEYS
from torchtitan_mixtures.data.latents import is_latent_folder
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.objectives.mixing import check_mixing

TOKEN_KEYS = (
    *("caption_column", "scene_fraction", "max_pairs", "shards", "reset_positions"),
    *("text_tokenizer", "image_tokenizer", "speech_tokenizer"),
    *("text_weight", "image_weight", "speech_weight"),
    *("sources", "validation_sources", "caption_first", "condition_dropout"),
    *("packing", "long_documents"),
)
"""Keys of `[multimodal]` that are about documents of tokens."""


def refuse_keys(
    job_config: MixtureJobConfig,
    section: str,
    what: str,
    keys: Sequence[str] = (),
    *,
    owner: str = "model.name",
) -> None:
    """Refuse keys that are about something a model does not have, unless they have their defaults.

    Args:
        job_config: The job.
        section: Section of the keys.
        what: What the model does not have.
        keys: Their names; none for all of the section.
        owner: The key that names the model.

    Raises:
        ValueError: Names the key and its value.
    """
    values = getattr(job_config, section)
    defaults = type(values)()
    for key in keys or [field.name for field in dataclasses.fields(values)]:
        value = getattr(values, key)
        if value != getattr(defaults, key):
            model = getattr(job_config.model, owner.removeprefix("model."))
            raise ValueError(
                f"{section}.{key} = {value!r}: {owner} = {model!r} has no {what}; remove the key."
            )


def check_classifier(job_config: MixtureJobConfig, model_args: Any) -> None:
    """Check what the batches and the loss of a classifier depend on.

    Args:
        job_config: The job.
        model_args: The flavour's arguments, complete.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    refuse_keys(job_config, "mixture", "mixers and no towers of modalities")
    refuse_keys(job_config, "multimodal", "tokens of documents", TOKEN_KEYS)
    refuse_keys(job_config, "multimodal", "experts for domains of images", DOMAIN_KEYS)
    refuse_keys(job_config, "objective", "noise to remove")
    if model_args.num_experts == 1:
        refuse_keys(job_config, "nested", "nested experts", owner="model.flavor")
    if job_config.sampling.interval > 0:
        raise ValueError(
            f"sampling.interval = {job_config.sampling.interval}: model.name = "
            f"{job_config.model.name!r} classifies images and draws none; set it to 0."
        )
    _check_pixels(job_config)
    if model_args.num_classes < 2 and not job_config.classification.multi_label:
        raise ValueError(
            f"multimodal.path = {job_config.multimodal.path!r}: has one class alone, of which "
            "nothing can be learned; name the folder above, with one folder for each class."
        )
    image_data.check_splits(job_config)
    check_mixing(job_config.classification, job_config.training.local_batch_size)
    if job_config.nested.kernels == "triton" and not device.has_accelerator():
        raise ValueError(
            'nested.kernels = "triton": needs a GPU, and this machine has none; set "plain".'
        )
    _check_capacities(job_config, model_args)


def _check_pixels(job_config: MixtureJobConfig) -> None:
    """Refuse latents, which nothing decodes and no augmentation is for."""
    data = job_config.multimodal
    if data.vae:
        raise ValueError(
            f"multimodal.vae = {data.vae!r}: model.name = {job_config.model.name!r} classifies "
            "pixels; remove the key."
        )
    if data.source == "folder" and is_latent_folder(Path(data.path).expanduser()):
        raise ValueError(
            f"multimodal.path = {data.path!r}: holds latents, but model.name = "
            f"{job_config.model.name!r} classifies pixels; name the folder of pictures."
        )


def _check_capacities(job_config: MixtureJobConfig, model_args: Any) -> None:
    """Check that the model can have every capacity that training or validation will ask for."""
    nested = job_config.nested
    if nested.routing == "argmax":
        keys = ("capacity", "schedule", "validation_capacities", "same_flops", "allocation")
        for key in keys:
            value = getattr(nested, key)
            if value != getattr(Nested(), key):
                raise ValueError(
                    f"nested.{key} = {value!r}: with nested.routing = 'argmax' tokens choose, "
                    "whatever the capacity; remove the key."
                )
    asked = {"validation_capacities": nested.validation_capacities}
    if nested.schedule == "adaptive":
        asked["capacities"] = nested.capacities
    elif nested.schedule != "constant":
        asked["start_capacity"] = [nested.start_capacity]
        if nested.start_capacity < model_args.capacity:
            raise ValueError(
                f"nested.start_capacity = {nested.start_capacity}: must be nested.capacity = "
                f"{model_args.capacity:g} or more, as nested.schedule = {nested.schedule!r} goes "
                "down."
            )
    for key, capacities in asked.items():
        for capacity in capacities:
            try:
                model_args.budget(capacity)
            except ValueError as error:
                raise ValueError(
                    f"nested.{key} = {getattr(nested, key)}: {capacity} is not possible: {error}"
                ) from None
