"""What images a model of images trains on: their size, their classes and their splits.

`multimodal.source` is `emoji` (the embedded drawings), `datasets` (anything that
`datasets.load_dataset` opens and that has an index), or `folder`: pictures in one folder for each
class, or latents that were encoded before. With `multimodal.vae` pictures become latents during
training: the loaders yield pictures that are larger by the factor of the VAE.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.assumed_images import assumed_images
from torchtitan_mixtures.data.emoji import SIZES, SPLITS
from torchtitan_mixtures.data.image_sets import (
    ClassFolders,
    EmojiImages,
    FolderImages,
    ImageSet,
    emoji_classes,
)
from torchtitan_mixtures.data.latents import (
    ENCODE_COMMAND,
    LatentImages,
    LatentIndex,
    is_latent_folder,
)
from torchtitan_mixtures.data.vae import read_vae_config

if TYPE_CHECKING:
    from torchtitan_mixtures.data.image_datasets import ClassDataset
    from torchtitan_mixtures.job_config import MixtureJobConfig, Multimodal


@dataclass(frozen=True)
class ImageSpec:
    """What a model sees: pixels or latents, square."""

    channels: int
    size: int
    num_classes: int
    class_names: tuple[str, ...]


def image_spec(job_config: JobConfig) -> ImageSpec:
    """Say what the images of a job are, without reading any.

    Args:
        job_config: The whole configuration; read is its section multimodal, and whether images
            may have several classes.

    Raises:
        ValueError: Names the key that does not fit, its value and the remedy.
    """
    config = _multimodal(job_config)
    refuse_mixture(config)
    if (assumed := assumed_images()) is not None:
        return ImageSpec(assumed.channels, assumed.size, assumed.num_classes, ())
    if config.source == "emoji":
        check_emoji_images(config)
        return _pixel_spec(config, emoji_classes(config.class_of))
    if config.source == "datasets":
        return _pixel_spec(config, _class_dataset(job_config).class_names)
    if not config.path:
        raise ValueError(
            'multimodal.path = "": multimodal.source = "folder" needs a folder with one folder of '
            f"images per class, or latents of `{ENCODE_COMMAND}`."
        )
    folder = Path(config.path).expanduser()
    if is_latent_folder(folder):
        return _latent_spec(config, _latent_index(folder))
    return _pixel_spec(config, _class_folders(config.path, config.train_split).class_names)


def picture_size(config: Multimodal) -> int:
    """Height and width of what the loader yields: of pictures, if a VAE encodes them afterwards."""
    return config.image_size * (read_vae_config(config.vae).factor if config.vae else 1)


def check_splits(job_config: JobConfig) -> None:
    """Check that the splits of a job exist.

    Raises:
        ValueError: Names the key, the split and those there are.
    """
    config = _multimodal(job_config)
    check_split(job_config, "multimodal.train_split", config.train_split)
    if job_config.validation.enable:
        for split in config.validation_splits:
            check_split(job_config, "multimodal.validation_splits", split)


def warn_of_thumbnails(job_config: JobConfig) -> None:
    """Say if pictures are shrunk to the size of latents, which may not be meant."""
    config = _multimodal(job_config)
    if config.source == "emoji" or config.vae:
        return
    if config.source == "datasets" or not is_latent_folder(Path(config.path).expanduser()):
        logger.warning(
            f"multimodal.path = {config.path!r} holds pictures: the model sees {config.image_size} "
            f"x {config.image_size} pixels of each. Latents of larger ones come from "
            f"multimodal.vae, or from `{ENCODE_COMMAND}`."
        )


def check_split(job_config: JobConfig, key: str, split: str) -> None:
    """Check that a job's images have a split.

    Args:
        job_config: The whole configuration.
        key: The key that names the split, for the message.
        split: The split.

    Raises:
        ValueError: They do not, or its classes are others than those of training.
    """
    config = _multimodal(job_config)
    image_spec(job_config)
    if config.source == "emoji":
        _check_emoji_split(config, key, split)
        return
    if config.source == "datasets":
        _class_dataset(job_config).open(key, split)
        return
    folder = Path(config.path).expanduser()
    if not is_latent_folder(folder):
        _class_folders(config.path, config.train_split).check_split(key, split)
    elif split not in (splits := _latent_index(folder).splits):
        raise ValueError(
            f'{key}: the latents in "{folder}" have no split "{split}"; their splits are '
            f"{', '.join(splits)}."
        )


def list_splits(job_config: JobConfig) -> list[str]:
    """List the splits of a job's images that have no other classes than training; that one first.

    Of `datasets` those that the job names.

    Raises:
        ValueError: The images are not there; names the key of the section that does not fit.
    """
    config = _multimodal(job_config)
    image_spec(job_config)
    folder = Path(config.path).expanduser()
    if config.source == "emoji":
        names = SPLITS
    elif config.source == "datasets":
        names = tuple(dict.fromkeys([config.train_split, *config.validation_splits]))
    elif is_latent_folder(folder):
        names = tuple(_latent_index(folder).splits)
    else:
        names = _class_folders(config.path, config.train_split).splits
    known = []
    for name in sorted(names, key=lambda name: name != config.train_split):
        with suppress(ValueError):
            check_split(job_config, "", name)
            known.append(name)
    return known


def open_images(job_config: JobConfig, key: str, split: str) -> ImageSet:
    """Open a split of a job's images.

    Args:
        job_config: The whole configuration.
        key: The key that names the split, for messages.
        split: The split.

    Raises:
        ValueError: Names the key that does not fit, or the file that is broken.
    """
    check_split(job_config, key, split)
    config = _multimodal(job_config)
    if config.source == "emoji":
        return EmojiImages(split, config.class_of, picture_size(config))
    if config.source == "datasets":
        # Imported late: `datasets` takes a second, which other runs need not pay.
        from torchtitan_mixtures.data.image_datasets import DatasetImages

        return DatasetImages(config, key, split, picture_size(config))
    folder = Path(config.path).expanduser()
    if is_latent_folder(folder):
        return LatentImages(folder, split)
    folders = _class_folders(config.path, config.train_split)
    return FolderImages(folders, split, picture_size(config))


def _multimodal(job_config: JobConfig) -> Multimodal:
    """The section that this plugin adds to TorchTitan's configuration when it is parsed."""
    return cast("MixtureJobConfig", job_config).multimodal


# A start-up looks into the folder several times: for the model, the checks and each loader.
_class_folders = functools.lru_cache(maxsize=4)(ClassFolders)
_latent_index = functools.lru_cache(maxsize=4)(LatentIndex.read)


def _class_dataset(job_config: JobConfig) -> ClassDataset:
    from torchtitan_mixtures.data.image_datasets import class_dataset

    config = _multimodal(job_config)
    dataset = class_dataset(config)
    section = cast("MixtureJobConfig", job_config).classification
    if dataset.is_multi_label and not section.multi_label:
        raise ValueError(
            f'classification.multi_label = false: multimodal.label_column = "{config.label_column}"'
            " holds lists of classes; train a classifier and set multi_label to true, or name a "
            "column with one class per image."
        )
    return dataset


def _pixel_spec(config: Multimodal, class_names: tuple[str, ...]) -> ImageSpec:
    channels = read_vae_config(config.vae).channels if config.vae else 3
    return ImageSpec(channels, config.image_size, len(class_names), class_names)


def _latent_spec(config: Multimodal, index: LatentIndex) -> ImageSpec:
    check_latents(config, index)
    if index.is_captioned:
        raise ValueError(
            f'multimodal.path = "{config.path}": its latents have captions and no classes; only '
            "models with prompts can be trained on them."
        )
    return ImageSpec(index.channels, index.size, len(index.class_names), index.class_names)


def check_latents(config: Multimodal, index: LatentIndex) -> None:
    """Check that latents are what a job asks for.

    Raises:
        ValueError: Names the key that does not fit, its value and the remedy.
    """
    if config.vae:
        raise ValueError(
            f'multimodal.vae = "{config.vae}": multimodal.path = "{config.path}" holds latents, '
            "which need no VAE in training; remove multimodal.vae."
        )
    if config.image_size != index.size:
        raise ValueError(
            f"multimodal.image_size = {config.image_size}: the latents in multimodal.path = "
            f'"{config.path}" are {index.size} x {index.size}. Set it to {index.size}, or encode '
            f"pictures of another size: {ENCODE_COMMAND} --size "
            f"{config.image_size * index.picture_size // index.size}"
        )
    if config.random_flip and not index.is_flipped:
        raise ValueError(
            f'multimodal.random_flip = true: "{config.path}" has no latents of mirrored pictures; '
            f"encode it with {ENCODE_COMMAND} --flip, or set it to false."
        )


def check_emoji_images(config: Multimodal) -> None:
    """Check the size that emoji are asked for in, and that they stay as they are.

    Raises:
        ValueError: Names the key, its value and the remedy.
    """
    if config.random_flip:
        raise ValueError(
            "multimodal.random_flip = true: mirrored emoji would lie (arrows, letters, flags); "
            "set it to false."
        )
    factor = picture_size(config) // config.image_size
    if config.image_size * factor not in SIZES:
        allowed = [str(size // factor) for size in SIZES if size % factor == 0]
        why = f" with a VAE of factor {factor}" if config.vae else ""
        remedy = f"set it to {', '.join(allowed)}" if allowed else "use another VAE"
        raise ValueError(
            f"multimodal.image_size = {config.image_size}: emoji have "
            f"{', '.join(map(str, SIZES))} pixels; {remedy}{why}."
        )


def _check_emoji_split(config: Multimodal, key: str, split: str) -> None:
    if split not in SPLITS:
        raise ValueError(
            f'{key}: the emoji corpus has no split "{split}" for models of images; its splits are '
            f"{', '.join(SPLITS)}."
        )
    if config.class_of == "concept" and split == "unseen_concept":
        raise ValueError(
            f'{key}: the concepts of "unseen_concept" are no classes of training with '
            'multimodal.class_of = "concept"; leave the split out ("unseen_style" has known '
            'concepts), or set class_of = "group".'
        )


def refuse_mixture(config: Multimodal) -> None:
    """Raise ValueError if the data are a mixture of sources, which has documents and no images."""
    if config.source == "mixture":
        raise ValueError(
            "multimodal.source = 'mixture': is of documents, for models over tokens; set 'emoji', "
            "'datasets' or 'folder'."
        )
