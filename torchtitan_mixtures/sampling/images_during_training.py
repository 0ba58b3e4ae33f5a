"""Sheets of images that a denoising model draws every so many steps of its training.

As with models over tokens every rank draws the same images, and those that have a log write them;
nothing drawn comes from a global generator, so the training is the same with and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.image_data import image_spec
from torchtitan_mixtures.data.vae import load_vae, read_vae_config
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.media import Media
from torchtitan_mixtures.metrics import MixtureMetricsProcessor
from torchtitan_mixtures.objectives.denoising import build_process
from torchtitan_mixtures.sampling.images import (
    ImageSettings,
    check_classes,
    check_image_settings,
    draw_images,
    in_batches,
)
from torchtitan_mixtures.sampling.pictures import SheetRow, contact_sheet

DEFAULT_CLASSES = 8
"""Where no classes are named, the first so many are drawn."""

BATCH = 16


def check_image_sampling(job_config: MixtureJobConfig, model_args: Any) -> ImageSettings:
    """Check `[sampling]` of a model of images.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    config, objective = job_config.sampling, job_config.objective
    if config.prompts:
        raise ValueError(
            f"sampling.prompts = {config.prompts}: model.name = {job_config.model.name!r} draws "
            "images of classes; use sampling.class_labels."
        )
    check_classes(config.class_labels, model_args.num_classes, "sampling.class_labels: class")
    if config.vae:
        _check_vae(config.vae, model_args.in_channels)
    process = build_process(objective, model_args.in_channels)
    return check_image_settings(config, process, model_args, objective.class_dropout, "sampling.")


def _check_vae(folder: str, channels: int) -> None:
    found = read_vae_config(folder).channels
    if found != channels:
        raise ValueError(
            f"sampling.vae = {folder!r}: its latents have {found} channels, the model's images "
            f"{channels}; name the VAE that encoded them."
        )


class ImageSampler:
    """Draws the images that `[sampling]` asks for."""

    def __init__(
        self, job_config: MixtureJobConfig, model_args: Any, processor: MixtureMetricsProcessor
    ) -> None:
        """Take a job that passed its checks, and where its metrics go."""
        self._config = job_config.sampling
        self._args = model_args
        self._settings = check_image_sampling(job_config, model_args)
        self._process = build_process(job_config.objective, model_args.in_channels)
        self._processor = processor
        self._names = image_spec(job_config).class_names
        self._vae_folder = job_config.multimodal.vae or job_config.sampling.vae

    def is_due(self, step: int) -> bool:
        """Whether images are to be drawn after this step."""
        return step % self._config.interval == 0

    def sample(self, model: nn.Module, step: int) -> None:
        """Draw images and log them; every rank must call this.

        Args:
            model: The model, which is left in training mode, and its parameters sharded.
            step: The training step, for the log.
        """
        classes = self._config.class_labels or list(
            range(min(DEFAULT_CLASSES, self._args.num_classes))
        )
        count = self._config.num_samples
        device = utils.device_type
        vae = load_vae(self._vae_folder, device) if self._vae_folder else None
        model.eval()
        try:
            draw = partial(self._draw, model, settings=self._settings, device=device, vae=vae)
            with torch.no_grad():
                pictures = in_batches(draw, [c for c in classes for _ in range(count)], BATCH)
        finally:
            model.train()
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # the last group stays gathered until a backward pass
        if self._processor.loggers:
            rows = [
                SheetRow(self._name(label), list(pictures[row * count : (row + 1) * count]))
                for row, label in enumerate(classes)
            ]
            self._processor.log_media(Media({"samples/images": contact_sheet(rows)}), step)
        self._processor.restart_clock(step)

    def _draw(
        self, model: nn.Module, labels: Sequence[int], numbers: Sequence[int], **options: Any
    ) -> torch.Tensor:
        return draw_images(model, self._args, self._process, labels, numbers, **options)

    def _name(self, label: int) -> str:
        return self._names[label] if label < len(self._names) else str(label)


def build_image_sampler(
    job_config: MixtureJobConfig, model_args: Any, processor: MixtureMetricsProcessor
) -> ImageSampler | None:
    """Build the sampler of a job; None if its pictures cannot be drawn, or channels not shown."""
    degree = job_config.parallelism.context_parallel_degree
    reason = None
    if degree > 1:
        reason = (
            f"a rank has a part of every image with parallelism.context_parallel_degree = {degree}"
        )
    elif model_args.in_channels != 3 and not (job_config.multimodal.vae or job_config.sampling.vae):
        reason = (
            f"the model's images have {model_args.in_channels} channels: latents, which the VAE "
            "that sampling.vae names would make pictures of"
        )
    if reason is not None:
        logger.warning(
            f"No samples are drawn although sampling.interval > 0: {reason}; use scripts/sample.py "
            "on the checkpoints."
        )
        return None
    return ImageSampler(job_config, model_args, processor)
