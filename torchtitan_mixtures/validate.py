"""Validation: the loss of every split, per modality.

TorchTitan's own validator reads one text split, shards the batch twice under context parallelism
and expects every value of a batch to be a tensor on the right device; this one shares the
trainer's handling of a batch instead.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from torchtitan.components.validate import BaseValidator
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import ModelProtocol
from torchtitan.tools import utils

from torchtitan_mixtures.data.loader import build_multimodal_validation_dataloader
from torchtitan_mixtures.data.tokenizers import TextTokenizer
from torchtitan_mixtures.ema import EMA
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.metrics import MixtureMetricsProcessor, reduce_meter
from torchtitan_mixtures.objectives.next_token import NextTokenLoss
from torchtitan_mixtures.pipeline import Pipeline


class MixtureValidator(BaseValidator):
    """Loss of each validation split, reduced over all ranks.

    Attributes:
        ema: The average to validate instead of the parameters; the trainer sets it.
    """

    ema: EMA | None = None

    def __init__(
        self,
        job_config: MixtureJobConfig,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: TextTokenizer,
        parallel_dims: ParallelDims,
        loss_fn: NextTokenLoss,
        validation_context: Callable[[], AbstractContextManager[None]],
        maybe_enable_amp: AbstractContextManager[None],
        metrics_processor: MixtureMetricsProcessor,
        pp_schedule: Pipeline | None = None,
        **unused: Any,
    ):
        super().__init__(job_config)
        self.mixture_config = job_config
        self.tokenizer = tokenizer
        self.parallel_dims = parallel_dims
        self.loss_fn = loss_fn
        self.validation_context = validation_context
        self.maybe_enable_amp = maybe_enable_amp
        self.metrics_processor = metrics_processor
        self.pipeline = pp_schedule
        splits = job_config.multimodal.validation_splits
        self.dataloaders = {
            split: build_multimodal_validation_dataloader(
                dp_world_size, dp_rank, tokenizer, job_config, split
            )
            for split in splits
        }

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Score every split and log it; the model is left in training mode.

        Args:
            model_parts: The model, or this rank's stages of it.
            step: The training step, for the log.
        """
        meter, self.loss_fn.meter = self.loss_fn.meter, self.loss_fn.meter.empty()
        for part in model_parts:
            part.eval()
        try:
            with nullcontext() if self.ema is None else self.ema.swapped():
                for split in self.dataloaders:
                    self._validate_split(model_parts[0], split, step)
        finally:
            self.loss_fn.meter = meter
            for part in model_parts:
                part.train()
        self.metrics_processor.restart_clock(step)

    def _validate_split(self, model: nn.Module, split: str, step: int) -> None:
        self.loss_fn.meter.reset()
        limit = self.job_config.validation.steps
        for index, (input_dict, labels) in enumerate(self.dataloaders[split]):
            if limit != -1 and index >= limit:
                break
            input_dict = {k: v.to(utils.device_type) for k, v in input_dict.items()}
            inputs, targets, extra_inputs, extra_kwargs = self.loss_fn.prepare(
                cast(ModelProtocol, model),
                self.tokenizer,
                input_dict,
                labels.to(utils.device_type),
                self.parallel_dims,
                self.mixture_config,
            )
            if self.pipeline is not None:
                with self.validation_context():
                    self.pipeline.evaluate(inputs, extra_kwargs, targets)
                continue
            with self.validation_context(), self.maybe_enable_amp:
                self.loss_fn(model(inputs, **extra_inputs, **extra_kwargs), targets)
        losses = reduce_meter(self.loss_fn.meter, self.parallel_dims)
        count = sum(targets for _, targets in losses.values())
        total = sum(loss * targets for loss, targets in losses.values())
        self.metrics_processor.log_validation(
            loss=total / count if count else float("nan"), step=step, split=split, losses=losses
        )


def build_validator(**arguments: Any) -> MixtureValidator:
    """Build the validator for a TrainSpec (`build_validator_fn`)."""
    return MixtureValidator(**arguments)
