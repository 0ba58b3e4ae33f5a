"""The data loaders of models of images; what a batch is says `image_batches.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import DataLoader
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config import JobConfig

from torchtitan_mixtures.data.augment import AUGMENTATION_KEYS, Augmentation
from torchtitan_mixtures.data.batch import IGNORE_INDEX
from torchtitan_mixtures.data.domains import Domains, domain_fingerprint, open_domains
from torchtitan_mixtures.data.image_batches import (
    CollatedDraws,
    Collator,
    EndlessImages,
    ImagePass,
    TrainingImages,
    ValidationImages,
)
from torchtitan_mixtures.data.image_counter import BrokenImageCounter
from torchtitan_mixtures.data.image_data import image_spec, open_images
from torchtitan_mixtures.data.image_sets import ImageSet
from torchtitan_mixtures.data.loader import multimodal_section, worker_options
from torchtitan_mixtures.data.model_flavor import model_flavor
from torchtitan_mixtures.data.sequences import Batch
from torchtitan_mixtures.data.shards import Share, check_fingerprint
from torchtitan_mixtures.data.workers import end_with_parent

if TYPE_CHECKING:
    from torchtitan_mixtures.job_config import MixtureJobConfig

_IDENTITY = (
    "source",
    "path",
    "train_split",
    "image_size",
    "class_of",
    "random_flip",
    "vae",
    "seed",
)
"""Keys on which the samples depend."""


class ImageDataLoader(BaseDataLoader):
    """Endless loader whose state is the number of samples consumed, the same on all ranks.

    A state is refused if the run differs from the one that saved it in anything the samples depend
    on; the number of ranks and the batch sizes may differ.

    Args:
        dataset: The microbatches of this rank.
        counter: Counts its images.
        fingerprint: TOML keys and values that must not change between save and resume.
        **options: Options of `DataLoader` about worker processes.
    """

    def __init__(
        self,
        dataset: EndlessImages,
        counter: BrokenImageCounter,
        fingerprint: dict[str, Any],
        **options: Any,
    ) -> None:
        self.fingerprint = fingerprint
        self._dataset = dataset
        self._counter = counter
        self._options = options

    def __iter__(self) -> Iterator[Batch]:
        """Continue after the last batch that was handed out, or from the loaded state."""
        data, size = self._dataset, self._dataset.samples_of_epoch
        for batch in _make_loader(data, self._options):
            self._counter.add(batch)
            if (batch.labels == IGNORE_INDEX).any():
                raise ValueError(
                    f"{len(batch.broken)} images in a row cannot be read, the last of them "
                    f"{batch.broken[-1][0]}: {batch.broken[-1][1]}. Repair multimodal.path."
                )
            # Batches that workers have read ahead are in no state: only those handed out count.
            before = data.num_consumed
            data.num_consumed += data.samples_of_round
            if data.num_consumed // size > before // size:
                self._counter.end_epoch()
            yield batch.input_dict, batch.labels

    def state_dict(self) -> dict[str, Any]:
        """How many samples all ranks have consumed, as JSON."""
        return {
            "fingerprint": json.dumps(self.fingerprint),
            "num_consumed": json.dumps(self._dataset.num_consumed),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: The run that saved it differs in a way that would change or repeat data.
        """
        if not state_dict:  # TorchTitan's convention for "nothing was saved"
            return
        check_fingerprint(json.loads(state_dict["fingerprint"]), self.fingerprint)
        self._dataset.num_consumed = json.loads(state_dict["num_consumed"])


class ImageValidationLoader:
    """Passes once over a split, the same way in every iteration.

    Args:
        dataset: The batches of this rank.
        make_counter: Makes what counts the images of a pass.
        **options: Options of `DataLoader` about worker processes.
    """

    def __init__(
        self, dataset: ImagePass, make_counter: Callable[[], BrokenImageCounter], **options: Any
    ) -> None:
        self._dataset = dataset
        self._make_counter = make_counter
        self._loader = _make_loader(dataset, options)

    def __len__(self) -> int:
        """Count the batches of a pass."""
        return self._dataset.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Begin a pass."""
        counter = self._make_counter()
        for batch in self._loader:
            counter.add(batch)
            yield batch.input_dict, batch.labels
        counter.end_epoch()


def build_image_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: JobConfig
) -> ImageDataLoader:
    """Build the endless loader of `multimodal.train_split` for a TrainSpec (`build_dataloader_fn`).

    Args:
        dp_world_size: Number of data-parallel ranks.
        dp_rank: Index of this one.
        tokenizer: Not used.
        job_config: The whole configuration; read are its sections multimodal, training, model and,
            for a classifier, classification.

    Raises:
        ValueError: A key does not fit the others, or data is broken; names it and the remedy.
    """
    config = multimodal_section(job_config)
    key, split = "multimodal.train_split", config.train_split
    images = open_images(job_config, key, split)
    domains = open_domains(job_config, key, split, images)
    collator = _collator(job_config, images, job_config.training.local_batch_size, domains)
    fingerprint = {f"multimodal.{key}": getattr(config, key) for key in _IDENTITY}
    if config.source == "folder":  # which may have moved; names in it say what it is
        del fingerprint["multimodal.path"]
    augmentation = None
    if _is_classifier(job_config):
        section = cast("MixtureJobConfig", job_config).classification
        augmentation = Augmentation.of(section)
        for key in AUGMENTATION_KEYS:
            fingerprint[f"classification.{key}"] = getattr(section, key)
    rank = Share(dp_rank, dp_world_size)
    dataset = TrainingImages(images, config, rank, collator, augmentation, domains)
    return ImageDataLoader(
        dataset,
        BrokenImageCounter(config, split, dataset.num_images),
        {**fingerprint, **images.fingerprint(), **domain_fingerprint(config)},
        **worker_options(job_config, "training"),
    )


def build_image_validation_dataloader(
    dp_world_size: int, dp_rank: int, job_config: JobConfig, split: str
) -> ImageValidationLoader:
    """Build a loader that passes once over `split`.

    It ends after `validation.steps` batches, or after all images. Every rank has the same number of
    batches; the last ones may have padding, without loss.

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
    images = open_images(job_config, key, split)
    domains = open_domains(job_config, key, split, images)
    collator = _collator(job_config, images, settings.local_batch_size, domains)
    rank = Share(dp_rank, dp_world_size)
    dataset = ValidationImages(images, rank, collator, settings.steps, domains)
    return ImageValidationLoader(
        dataset,
        partial(BrokenImageCounter, config, split, dataset.num_images),
        **worker_options(job_config, "validation"),
    )


def _collator(
    job_config: JobConfig, images: ImageSet, batch_size: int, domains: Domains | None
) -> Collator:
    num_tokens = 1  # a classifier is supervised once per image
    if not _is_classifier(job_config):
        num_tokens = (image_spec(job_config).size // model_flavor(job_config).patch_size) ** 2
    has_domains = domains is not None
    shape, has_std, labels = images.shape, images.has_std, images.max_labels
    return Collator(shape, has_std, num_tokens, batch_size, labels, has_domains)


def _is_classifier(job_config: JobConfig) -> bool:
    return getattr(model_flavor(job_config), "is_classifier", False)


def _make_loader(
    dataset: EndlessImages | ImagePass, options: dict[str, Any]
) -> DataLoader[CollatedDraws]:
    options = dict(options)
    options["pin_memory"] = options["pin_memory"] and torch.accelerator.is_available()
    # A generator of its own: the default one would be advanced by every new iterator, and the
    # random numbers of the training would depend on when validation ran.
    return DataLoader(
        dataset,
        batch_size=None,
        generator=torch.Generator(),
        worker_init_fn=end_with_parent,
        **options,
    )
