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
from torchtitan_mixtures.data.vae import Vae, load_vae, read_vae_config
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.media import Media
from torchtitan_mixtures.metrics import MixtureMetricsProcessor
from torchtitan_mixtures.objectives.denoising import build_process
from torchtitan_mixtures.sampling.conditions import (
    Condition,
    EncodedPrompts,
    class_condition,
    is_prompted,
)
from torchtitan_mixtures.sampling.images import (
    ImageSettings,
    check_classes,
    check_image_settings,
    condition_dropout,
    draw_images,
    in_batches,
)
from torchtitan_mixtures.sampling.pictures import SheetRow, contact_sheet
from torchtitan_mixtures.sampling.prompt_encoding import (
    PromptEncoder,
    check_prompts,
    needs_text_encoders,
)

DEFAULT_CLASSES = 8
"""Where no classes are named, the first so many are drawn."""

EMOJI_PROMPTS = (
    "a red apple",
    "a grinning face",
    "a cat, drawn in the style of noto",
    "a cat, drawn in the style of blob",
    "a cat, drawn in the style of fluent",
    "a fox",
    "a guitar left of a cat",
    "a guitar right of a cat",
)
"""What is drawn where no prompts are named and the data are the emoji; foxes are not trained on."""

BATCH = 16


def check_image_sampling(job_config: MixtureJobConfig, model_args: Any) -> ImageSettings:
    """Check `[sampling]` of a model of images.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    config, objective = job_config.sampling, job_config.objective
    if is_prompted(model_args):
        _check_prompts(job_config, model_args)
    elif config.prompts:
        raise ValueError(
            f"sampling.prompts = {config.prompts}: model.name = {job_config.model.name!r} draws "
            "images of classes; use sampling.class_labels."
        )
    else:
        check_classes(config.class_labels, model_args.num_classes, "sampling.class_labels: class")
    if config.vae:
        _check_vae(config.vae, model_args.in_channels)
    process = build_process(objective, model_args.in_channels)
    dropout = condition_dropout(objective, model_args)
    return check_image_settings(config, process, model_args, dropout, "sampling.")


def _check_prompts(job_config: MixtureJobConfig, model_args: Any) -> None:
    config = job_config.sampling
    if config.class_labels:
        raise ValueError(
            f"sampling.class_labels = {config.class_labels}: model.name = "
            f"{job_config.model.name!r} draws images of prompts; use sampling.prompts."
        )
    prompts = prompts_of(job_config)
    if not prompts:
        raise ValueError(
            "sampling.prompts = []: sampling.interval > 0 needs at least one prompt, except with "
            'multimodal.source = "emoji".'
        )
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"sampling.prompts = {config.prompts}: a prompt is blank; write a text.")
    texts = [*prompts, *([config.negative_prompt] if config.negative_prompt else [])]
    try:
        check_prompts(job_config, model_args.prompts, texts)
    except ValueError as error:
        raise ValueError(f"[sampling]: {error}") from error


def prompts_of(job_config: MixtureJobConfig) -> list[str]:
    """The prompts that `[sampling]` asks for."""
    is_emoji = job_config.multimodal.source == "emoji"
    return list(job_config.sampling.prompts or (EMOJI_PROMPTS if is_emoji else ()))


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
        self._vae_folder = job_config.multimodal.vae or job_config.sampling.vae
        self._subjects = (
            _Prompts(job_config, model_args)
            if is_prompted(model_args)
            else _Classes(job_config, model_args)
        )

    def is_due(self, step: int) -> bool:
        """Whether images are to be drawn after this step."""
        return step % self._config.interval == 0

    def sample(self, model: nn.Module, step: int) -> None:
        """Draw images and log them; every rank must call this.

        Args:
            model: The model, which is left in training mode, and its parameters sharded.
            step: The training step, for the log.
        """
        labels, count = self._subjects.labels, self._config.num_samples
        device = utils.device_type
        vae = load_vae(self._vae_folder, device) if self._vae_folder else None
        draw = partial(self._draw, model, device=device, vae=vae)
        model.eval()
        try:
            with torch.no_grad():
                rows = [row for row in range(len(labels)) for _ in range(count)]
                pictures = in_batches(draw, rows, BATCH)
        finally:
            model.train()
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # the last group stays gathered until a backward pass
        if self._processor.loggers:
            rows = [
                SheetRow(label, list(pictures[row * count : (row + 1) * count]))
                for row, label in enumerate(labels)
            ]
            self._processor.log_media(Media({"samples/images": contact_sheet(rows)}), step)
        self._processor.restart_clock(step)

    def _draw(
        self,
        model: nn.Module,
        rows: Sequence[int],
        numbers: Sequence[int],
        device: str,
        vae: Vae | None,
    ) -> torch.Tensor:
        condition = self._subjects.condition(rows, device)
        return draw_images(
            model, self._args, self._process, condition, numbers, self._settings, device, vae
        )


class _Classes:
    """The classes that are drawn; in front of their rows their names."""

    def __init__(self, job_config: MixtureJobConfig, model_args: Any) -> None:
        self._num_classes = model_args.num_classes
        self._classes = job_config.sampling.class_labels or list(
            range(min(DEFAULT_CLASSES, self._num_classes))
        )
        names = image_spec(job_config).class_names
        self.labels = [names[c] if c < len(names) else str(c) for c in self._classes]

    def condition(self, rows: Sequence[int], device: str) -> Condition:
        """Condition of a batch, given the row of each image."""
        return class_condition([self._classes[row] for row in rows], self._num_classes, device)


class _Prompts:
    """The prompts that are drawn; in front of their rows their texts."""

    def __init__(self, job_config: MixtureJobConfig, model_args: Any) -> None:
        self.labels = prompts_of(job_config)
        self._job_config = job_config
        self._specs = model_args.prompts
        self._found: tuple[EncodedPrompts, EncodedPrompts | None] | None = None

    def condition(self, rows: Sequence[int], device: str) -> Condition:
        """Condition of a batch, given the row of each image."""
        if self._found is None:  # frozen encoders, which may be large, are gone after that
            self._found = self._encode(device)
        prompts, negative = self._found
        return prompts.condition(rows, device, negative)

    def _encode(self, device: str) -> tuple[EncodedPrompts, EncodedPrompts | None]:
        folders = self._job_config.multimodal.text_encoders
        encoder = PromptEncoder(self._job_config, self._specs, device, folders)
        negative = self._job_config.sampling.negative_prompt
        return encoder.encode(self.labels), encoder.encode([negative]) if negative else None


def build_image_sampler(
    job_config: MixtureJobConfig, model_args: Any, processor: MixtureMetricsProcessor
) -> ImageSampler | None:
    """Build the sampler of a job; None if its pictures cannot be drawn, or channels not shown."""
    degree = job_config.parallelism.context_parallel_degree
    reason, remedy = None, "use scripts/sample.py on the checkpoints"
    if degree > 1:
        reason = (
            f"a rank has a part of every image with parallelism.context_parallel_degree = {degree}"
        )
    elif model_args.in_channels != 3 and not (job_config.multimodal.vae or job_config.sampling.vae):
        reason = (
            f"the model's images have {model_args.in_channels} channels: latents, which the VAE "
            "that sampling.vae names would make pictures of"
        )
    elif getattr(model_args, "router_only", False):
        reason = "a router alone has no experts that could draw"
        remedy = "scripts/experts.py assemble puts them together"
    elif is_prompted(model_args) and needs_text_encoders(job_config):
        reason = (
            "multimodal.text_embeddings has no embeddings of other texts than those of the data; "
            "it takes --text-encoders"
        )
    if reason is not None:
        logger.warning(f"No samples are drawn although sampling.interval > 0: {reason}; {remedy}.")
        return None
    return ImageSampler(job_config, model_args, processor)
