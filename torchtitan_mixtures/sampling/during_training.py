"""Samples every so many steps of a training run, without any trace in the training itself.

Every rank draws the same samples and those that have a log write them: with sharded parameters no
rank could run the model alone. Nothing drawn comes from a global generator.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.sources import Segment
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.metrics import Media, MixtureMetricsProcessor
from torchtitan_mixtures.sampling.codecs import build_codecs
from torchtitan_mixtures.sampling.generate import Sample, encode_prompts, generate
from torchtitan_mixtures.sampling.results import Result, decode_speech, draw_sheet
from torchtitan_mixtures.sampling.settings import SamplingSettings


def check_sampling(job_config: MixtureJobConfig, model_args: Any) -> None:
    """Refuse samples that could not be drawn.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    config, layout = job_config.sampling, job_config.parallelism
    if not _draws_samples(job_config):
        return
    if not hasattr(model_args, "modality_names"):
        raise ValueError(
            f"sampling.interval = {config.interval}: model.name = {job_config.model.name!r} is no "
            "model over tokens; set it to 0."
        )
    for key in ("pipeline_parallel_degree", "context_parallel_degree"):
        if getattr(layout, key) > 1:
            raise ValueError(
                f"sampling.interval = {config.interval}: samples cannot be drawn with "
                f"parallelism.{key} = {getattr(layout, key)}; set sampling.interval = 0 and use "
                "scripts/sample.py on the checkpoints."
            )
    if layout.tensor_parallel_degree > 1 and not model_args.is_untied:
        raise ValueError(
            f"sampling.interval = {config.interval}: parallelism.tensor_parallel_degree = "
            f"{layout.tensor_parallel_degree} cuts the sequences of a dense flavour, and a sample "
            "grows by one token; set sampling.interval = 0."
        )
    if not config.prompts:
        raise ValueError("sampling.prompts = []: sampling.interval > 0 needs at least one prompt.")
    try:
        encode_prompts(
            model_args,
            [(Segment("text", text),) for text in config.prompts],
            config.into,
            SamplingSettings.of(config),
            build_codecs(job_config),
        )
    except ValueError as error:
        raise ValueError(f"[sampling]: {error}") from error


class TrainingSampler:
    """Draws the samples that `[sampling]` asks for."""

    def __init__(self, job_config: MixtureJobConfig, processor: MixtureMetricsProcessor) -> None:
        """Take a job that passed `check_sampling`, and where its metrics go."""
        self._config = job_config.sampling
        self._settings = SamplingSettings.of(self._config)
        self._codecs = build_codecs(job_config)
        self._processor = processor

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
                self._settings,
                self._codecs,
                num_samples=config.num_samples,
                # Ranks may differ in a rounding, and so in a token, but not in their collectives.
                stops_early=dist.get_world_size() == 1,
            )
        finally:
            model.train()
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # the last group stays gathered until a backward pass
        if self._processor.loggers:
            self._processor.log_media(self._media(samples), step)
        self._processor.restart_clock(step)

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
                        sounds[name] = decode_speech(segment, self._codecs)
        return Media(images, {"samples/texts": "\n".join(lines)} if lines else {}, sounds)


def build_sampler(
    job_config: MixtureJobConfig, processor: MixtureMetricsProcessor
) -> TrainingSampler | None:
    """Build the sampler of a job; None if it asks for no samples or has no place for them."""
    if _draws_samples(job_config):
        return TrainingSampler(job_config, processor)
    if job_config.sampling.interval:
        logger.info(
            "No samples are drawn: neither metrics.enable_tensorboard nor metrics.enable_wandb is "
            "true, so there is no place for them."
        )
    return None


def _draws_samples(job_config: MixtureJobConfig) -> bool:
    metrics = job_config.metrics
    return job_config.sampling.interval > 0 and (metrics.enable_tensorboard or metrics.enable_wandb)
