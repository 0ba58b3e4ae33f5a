"""Samples every so many steps of a training run, without any trace in the training itself.

Every rank draws the same samples and those that have a log write them: with sharded parameters no
rank could run the model alone. Nothing drawn comes from a global generator.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.codecs import build_codecs
from torchtitan_mixtures.data.sources import Segment
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.media import Media
from torchtitan_mixtures.metrics import MixtureMetricsProcessor
from torchtitan_mixtures.sampling.generate import Sample, encode_prompts, generate
from torchtitan_mixtures.sampling.images_during_training import (
    build_image_sampler,
    check_image_sampling,
)
from torchtitan_mixtures.sampling.results import Result, decode_speech, draw_sheet


def check_sampling(job_config: MixtureJobConfig, model_args: Any) -> None:
    """Refuse what no layout could draw.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    config = job_config.sampling
    if not config.interval:
        return
    if not hasattr(model_args, "modality_names"):
        check_image_sampling(job_config, model_args)
        return
    if config.negative_prompt:
        raise ValueError(
            f"sampling.negative_prompt = {config.negative_prompt!r}: is for models of prompted "
            "images; leave it out."
        )
    if not config.prompts:
        raise ValueError("sampling.prompts = []: sampling.interval > 0 needs at least one prompt.")
    try:
        encode_prompts(
            model_args,
            [(Segment("text", text),) for text in config.prompts],
            config.into,
            config,
            build_codecs(job_config),
        )
    except ValueError as error:
        raise ValueError(f"[sampling]: {error}") from error


class Sampler(Protocol):
    """Draws samples of a model while it trains."""

    def is_due(self, step: int) -> bool:
        """Whether samples are to be drawn after this step."""
        ...

    def sample(self, model: nn.Module, step: int) -> None:
        """Draw samples and log them; every rank must call this."""
        ...


class TrainingSampler:
    """Draws the samples of tokens that `[sampling]` asks for."""

    def __init__(self, job_config: MixtureJobConfig, processor: MixtureMetricsProcessor) -> None:
        """Take a job that passed `check_sampling`, and where its metrics go."""
        self._config = job_config.sampling
        self._codecs = build_codecs(job_config)
        self._processor = processor
        self._has_warned = False

    def is_due(self, step: int) -> bool:
        """Whether samples are to be drawn after this step."""
        return step % self._config.interval == 0

    def sample(self, model: nn.Module, step: int) -> None:
        """Draw samples and log them; every rank must call this.

        Args:
            model: The model, which is left in training mode, and its parameters sharded.
            step: The training step, for the log.
        """
        config = self._config
        model.eval()
        try:
            samples = generate(
                model,
                [(Segment("text", text),) for text in config.prompts],
                config.into,
                config,
                self._codecs,
                num_samples=config.num_samples,
                # Ranks may differ in a rounding, and so in a token, but not in their collectives.
                stops_early=dist.get_world_size() == 1,
                on_broken=self._warn,
            )
        finally:
            model.train()
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # the last group stays gathered until a backward pass
        if self._processor.loggers:
            self._processor.log_media(self._media(samples), step)
        self._processor.restart_clock(step)

    def _warn(self) -> None:
        if not self._has_warned:
            logger.warning(
                "The model's logits are not finite (did the run diverge?): its samples are noise."
            )
        self._has_warned = True

    def _media(self, samples: list[Sample]) -> Media:
        """Arrange samples by modality."""
        results = [
            Result(text, [sample for sample in samples if sample.prompt == prompt])
            for prompt, text in enumerate(self._config.prompts)
        ]
        sheet = draw_sheet(results, self._codecs)
        images = {} if sheet is None else {"samples/images": sheet}
        lines, sounds = [], {}
        for result in results:
            for sample in result.samples:
                for part, segment in enumerate(sample.segments):
                    if isinstance(segment.payload, str):
                        lines.append(f"    {result.prompt!r} -> {segment.payload!r}")
                    elif segment.modality == "speech":
                        name = f"samples/speech_{sample.number}_{part}"
                        lines.append(f"    {result.prompt!r} -> {name}")
                        sounds[name] = decode_speech(segment, self._codecs)
        return Media(images, {"samples/texts": "\n".join(lines)} if lines else {}, sounds)


def build_sampler(
    job_config: MixtureJobConfig, model_args: Any, processor: MixtureMetricsProcessor
) -> Sampler | None:
    """Build the sampler of a job; None if it asks for no samples or they cannot be drawn."""
    if not job_config.sampling.interval:
        return None
    metrics = job_config.metrics
    if not (metrics.enable_tensorboard or metrics.enable_wandb):
        logger.warning(
            "No samples are drawn although sampling.interval > 0: there is no place for them "
            "without metrics.enable_tensorboard or enable_wandb."
        )
        return None
    if not hasattr(model_args, "modality_names"):
        return build_image_sampler(job_config, model_args, processor)
    reason = _why_not(job_config, model_args)
    if reason is None:
        return TrainingSampler(job_config, processor)
    logger.warning(f"No samples are drawn although sampling.interval > 0: {reason}.")
    return None


def _why_not(job_config: MixtureJobConfig, model_args: Any) -> str | None:
    """Say why no samples of tokens can be drawn where the training itself works."""
    layout = job_config.parallelism
    for key in ("pipeline_parallel_degree", "context_parallel_degree"):
        if getattr(layout, key) > 1:
            return (
                f"a rank has a part of the model or of the sequence with parallelism.{key} = "
                f"{getattr(layout, key)}; use scripts/sample.py on the checkpoints"
            )
    if layout.tensor_parallel_degree > 1 and not model_args.is_untied:
        return (
            f"parallelism.tensor_parallel_degree = {layout.tensor_parallel_degree} cuts the "
            "sequences of a dense flavour, and a sample grows by one token; use scripts/sample.py "
            "on the checkpoints"
        )
    return None
