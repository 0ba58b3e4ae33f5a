"""What images and prompts a model of prompted images trains on, and its data loaders.

`multimodal.source` is `emoji` (the embedded drawings and scenes of them), `datasets` (anything with
a column of captions that `datasets.load_dataset` opens and that has an index), or `folder`: latents
that were encoded of such before. With `multimodal.vae` pictures become latents during training: the
loaders yield pictures that are larger by the factor of the VAE. What a batch is says
`prompt_batches.py`.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.aspect_ratios import Bucket, make_buckets
from torchtitan_mixtures.data.assumed_images import assumed_images
from torchtitan_mixtures.data.domains import Domains, domain_fingerprint, open_domains
from torchtitan_mixtures.data.emoji import SPLITS
from torchtitan_mixtures.data.emoji_source import check_emoji
from torchtitan_mixtures.data.image_data import (
    check_emoji_images,
    check_latents,
    picture_size,
    refuse_mixture,
)
from torchtitan_mixtures.data.image_loader import ImageDataLoader, ImageValidationLoader
from torchtitan_mixtures.data.latents import ENCODE_COMMAND, LatentIndex, is_latent_folder
from torchtitan_mixtures.data.loader import multimodal_section, worker_options
from torchtitan_mixtures.data.model_flavor import model_flavor
from torchtitan_mixtures.data.prompt_batches import (
    PromptCollator,
    PromptCounter,
    PromptTraining,
    PromptValidation,
)
from torchtitan_mixtures.data.prompt_sets import PromptedEmoji, PromptedLatents, PromptedSet
from torchtitan_mixtures.data.prompt_texts import Prompter
from torchtitan_mixtures.data.prompts import prompt_specs
from torchtitan_mixtures.data.shards import Share
from torchtitan_mixtures.data.spoken import UNSEEN_VOICE
from torchtitan_mixtures.data.vae import read_vae_config

if TYPE_CHECKING:
    from torchtitan_mixtures.job_config import Multimodal

_IDENTITY = (
    "source",
    "path",
    "train_split",
    "image_size",
    "aspect_ratios",
    "random_flip",
    "vae",
    "seed",
)
"""Keys on which the samples depend."""


@dataclass(frozen=True)
class PromptedImageSpec:
    """What a model sees: pixels or latents.

    Attributes:
        channels: Of an image.
        size: Height and width of a square one.
        buckets: The shapes of all; one square without `multimodal.aspect_ratios`.
    """

    channels: int
    size: int
    buckets: tuple[Bucket, ...]


def prompted_image_spec(job_config: JobConfig) -> PromptedImageSpec:
    """Say what the images of a job are, without reading any.

    Args:
        job_config: The whole configuration; read are its sections multimodal and model.

    Raises:
        ValueError: Names the key that does not fit, its value and the remedy.
    """
    config = multimodal_section(job_config)
    refuse_mixture(config)
    buckets = make_buckets(
        config.aspect_ratios, config.image_size, model_flavor(job_config).patch_size
    )
    if (assumed := assumed_images()) is not None:
        return PromptedImageSpec(assumed.channels, assumed.size, buckets)
    if config.source == "emoji":
        _check_emoji(config)
    if config.source == "folder":
        index = _latent_index(_latent_folder(config))
        check_latents(config, index)
        _check_captioned(config, index, buckets)
        return PromptedImageSpec(index.channels, index.size, buckets)
    channels = read_vae_config(config.vae).channels if config.vae else 3
    return PromptedImageSpec(channels, config.image_size, buckets)


def check_prompt_splits(job_config: JobConfig) -> None:
    """Check that the splits of a job exist.

    Raises:
        ValueError: Names the key, the split and those there are.
    """
    config = multimodal_section(job_config)
    check_prompt_split(job_config, "multimodal.train_split", config.train_split)
    if job_config.validation.enable:
        for split in config.validation_splits:
            check_prompt_split(job_config, "multimodal.validation_splits", split)


def check_prompt_split(job_config: JobConfig, key: str, split: str) -> None:
    """Check that a job's images have a split.

    Args:
        job_config: The whole configuration.
        key: The key that names the split, for the message.
        split: The split.

    Raises:
        ValueError: They do not.
    """
    config = multimodal_section(job_config)
    prompted_image_spec(job_config)
    if config.source == "emoji":
        names = (*model_flavor(job_config).prompt_names, "image")
        check_emoji(config, key.removeprefix("multimodal."), split, names)
    elif config.source == "datasets":
        # Imported late: `datasets` takes a second, which other runs need not pay.
        from torchtitan_mixtures.data.prompt_datasets import open_captioned

        open_captioned(config, key, split)
    elif split not in (splits := _latent_index(_latent_folder(config)).splits):
        raise ValueError(
            f'{key}: the latents in "{config.path}" have no split "{split}"; their splits are '
            f"{', '.join(splits)}."
        )


def list_prompt_splits(job_config: JobConfig) -> list[str]:
    """List the splits of a job's images, that of training first; of `datasets` those it names.

    Raises:
        ValueError: The images are not there; names the key of the section that does not fit.
    """
    config = multimodal_section(job_config)
    prompted_image_spec(job_config)
    names = tuple(dict.fromkeys([config.train_split, *config.validation_splits]))
    if config.source == "emoji":
        names = (*SPLITS, UNSEEN_VOICE)
    elif config.source == "folder":
        names = tuple(_latent_index(_latent_folder(config)).splits)
    known = []
    for name in sorted(names, key=lambda name: name != config.train_split):
        with suppress(ValueError):
            check_prompt_split(job_config, "", name)
            known.append(name)
    return known


def open_prompted_images(job_config: JobConfig, key: str, split: str) -> PromptedSet:
    """Open a split of a job's images.

    Args:
        job_config: The whole configuration.
        key: The key that names the split, for messages.
        split: The split.

    Raises:
        ValueError: Names the key that does not fit, or the file that is broken.
    """
    check_prompt_split(job_config, key, split)
    config = multimodal_section(job_config)
    prompter = Prompter(config, prompt_specs(job_config), split)
    if config.source == "emoji":
        by_style = config.domains == "style"
        return PromptedEmoji(split, picture_size(config), config.scene_fraction, prompter, by_style)
    if config.source == "folder":
        return PromptedLatents(_latent_folder(config), split, prompter)
    from torchtitan_mixtures.data.prompt_datasets import CaptionedPictures, PromptedPictures

    factor = picture_size(config) // config.image_size
    buckets = [
        Bucket(bucket.name, bucket.height * factor, bucket.width * factor)
        for bucket in prompted_image_spec(job_config).buckets
    ]
    return PromptedPictures(CaptionedPictures(config, key, split, buckets), prompter)


def build_prompt_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: JobConfig
) -> ImageDataLoader:
    """Build the endless loader of `multimodal.train_split` for a TrainSpec (`build_dataloader_fn`).

    Args:
        dp_world_size: Number of data-parallel ranks.
        dp_rank: Index of this one.
        tokenizer: Not used: what texts become is said by the job's prompts.
        job_config: The whole configuration; read are its sections multimodal, training and model.

    Raises:
        ValueError: A key does not fit the others, or data is broken; names it and the remedy.
    """
    config, settings = multimodal_section(job_config), job_config.training
    key, split = "multimodal.train_split", config.train_split
    images = open_prompted_images(job_config, key, split)
    domains = open_domains(job_config, key, split, images, is_prompted=True)
    global_batch_size = settings.global_batch_size
    if global_batch_size == -1:
        global_batch_size = settings.local_batch_size * dp_world_size
    dataset = PromptTraining(
        images,
        config,
        Share(dp_rank, dp_world_size),
        _collator(job_config, images, settings.local_batch_size, domains),
        global_batch_size,
        domains,
    )
    fingerprint = {f"multimodal.{key}": getattr(config, key) for key in _IDENTITY}
    if config.source == "folder":  # which may have moved; names in it say what it is
        del fingerprint["multimodal.path"]
    fingerprint |= images.fingerprint() | images.prompter.fingerprint()
    fingerprint |= domain_fingerprint(config)
    if dataset.has_buckets:
        fingerprint["training.global_batch_size"] = global_batch_size
        fingerprint["images of each aspect ratio"] = dataset.bucket_sizes
        logger.info(
            f"Images of each of multimodal.aspect_ratios {config.aspect_ratios}: "
            f"{dataset.bucket_sizes}; {dataset.samples_of_epoch} samples fill an epoch of "
            f"{dataset.num_images} images"
        )
    return ImageDataLoader(
        dataset,
        PromptCounter(config, split, dataset.num_images),
        fingerprint,
        **worker_options(job_config, "training"),
    )


def build_prompt_validation_dataloader(
    dp_world_size: int, dp_rank: int, job_config: JobConfig, split: str
) -> ImageValidationLoader:
    """Build a loader that passes once over `split`.

    It ends after `validation.steps` batches, or after all images. Every rank has the same number of
    batches; some may have padding, without loss.

    Args:
        dp_world_size: Number of data-parallel ranks.
        dp_rank: Index of this one.
        job_config: The whole configuration; read are its sections multimodal, validation and model.
        split: One of `multimodal.validation_splits`.

    Raises:
        ValueError: A key does not fit the others, or data is broken; names it and the remedy.
    """
    config, settings = multimodal_section(job_config), job_config.validation
    key = "multimodal.validation_splits"
    images = open_prompted_images(job_config, key, split)
    domains = open_domains(job_config, key, split, images, is_prompted=True)
    collator = _collator(job_config, images, settings.local_batch_size, domains)
    rank = Share(dp_rank, dp_world_size)
    dataset = PromptValidation(images, rank, collator, settings.steps, domains)
    return ImageValidationLoader(
        dataset,
        partial(PromptCounter, config, split, dataset.num_images),
        **worker_options(job_config, "validation"),
    )


# A start-up looks into the folder several times: for the model, the checks and each loader.
_latent_index = functools.lru_cache(maxsize=4)(LatentIndex.read)


def _collator(
    job_config: JobConfig, images: PromptedSet, batch_size: int, domains: Domains | None
) -> PromptCollator:
    config = multimodal_section(job_config)
    patch = model_flavor(job_config).patch_size * (picture_size(config) // config.image_size)
    return PromptCollator(images, patch, batch_size, domains is not None)


def _check_emoji(config: Multimodal) -> None:
    check_emoji_images(config)
    if config.aspect_ratios not in ([], ["1:1"]):
        raise ValueError(
            f"multimodal.aspect_ratios = {config.aspect_ratios}: the drawings of emoji are square; "
            "set it to []."
        )
    if config.text_embeddings:
        raise ValueError(
            f'multimodal.text_embeddings = "{config.text_embeddings}": captions of emoji are new '
            "in each epoch, so nothing can be made of them before; use multimodal.text_encoders."
        )


def _latent_folder(config: Multimodal) -> Path:
    folder = Path(config.path).expanduser()
    if not config.path or not is_latent_folder(folder):
        raise ValueError(
            f'multimodal.path = "{config.path}": holds no latents of images with captions, which '
            'multimodal.source = "folder" must for a model with prompts. Make them with '
            f'`{ENCODE_COMMAND} --caption-column ...`, or read pictures with source = "datasets" '
            "(a folder with a metadata.jsonl is one)."
        )
    return folder


def _check_captioned(config: Multimodal, index: LatentIndex, buckets: tuple[Bucket, ...]) -> None:
    if not index.is_captioned:
        raise ValueError(
            f'multimodal.path = "{config.path}": its latents have classes and no captions, which '
            f"a model with prompts needs; encode it again with `{ENCODE_COMMAND} "
            "--caption-column ...`."
        )
    names = [bucket.name for bucket in index.buckets]
    if sorted(names) != sorted(bucket.name for bucket in buckets):
        raise ValueError(
            f"multimodal.aspect_ratios = {config.aspect_ratios}: the latents in multimodal.path = "
            f'"{config.path}" have {names}; set it to those, or encode the images again.'
        )
    wanted = {bucket.name: bucket for bucket in buckets}
    for bucket in index.buckets:
        if bucket != wanted[bucket.name]:
            raise ValueError(
                f'multimodal.path = "{config.path}": its latents of {bucket.name} are '
                f"{bucket.height} x {bucket.width}, the model takes {wanted[bucket.name].height} x "
                f"{wanted[bucket.name].width}; encode them again with the flavour's --patch-size."
            )
