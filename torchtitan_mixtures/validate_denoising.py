"""Validation of denoising models: the loss of every split at fixed levels of noise.

At each level every sample has noise of its own that is the same in every validation, so that
numbers of different steps, runs and layouts can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from torchtitan.components.validate import BaseValidator
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils

from torchtitan_mixtures.data.image_loader import build_image_validation_dataloader
from torchtitan_mixtures.ema import EMA
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.metrics import MixtureMetricsProcessor, reduce_meter
from torchtitan_mixtures.objectives.denoising import DenoisingLoss
from torchtitan_mixtures.objectives.levels import score_levels


class DenoisingValidator(BaseValidator):
    """Loss of each validation split and noise level, reduced over all ranks.

    Attributes:
        ema: The average to validate instead of the parameters; the trainer sets it.
    """

    ema: EMA | None = None

    def __init__(
        self,
        job_config: MixtureJobConfig,
        dp_world_size: int,
        dp_rank: int,
        parallel_dims: ParallelDims,
        loss_fn: DenoisingLoss,
        validation_context: Callable[[], AbstractContextManager[None]],
        maybe_enable_amp: AbstractContextManager[None],
        metrics_processor: MixtureMetricsProcessor,
        **unused: Any,
    ):
        super().__init__(job_config)
        self.mixture_config = job_config
        self.parallel_dims = parallel_dims
        self.loss_fn = loss_fn
        self.validation_context = validation_context
        self.maybe_enable_amp = maybe_enable_amp
        self.metrics_processor = metrics_processor
        self.dataloaders = {
            split: build_image_validation_dataloader(dp_world_size, dp_rank, job_config, split)
            for split in job_config.multimodal.validation_splits
        }

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Score every split and log it; the model is left in training mode, its weights as before.

        Args:
            model_parts: The model.
            step: The training step, for the log.
        """
        (model,) = model_parts
        meter, self.loss_fn.meter = self.loss_fn.meter, self.loss_fn.validation_meter()
        model.eval()
        try:
            with nullcontext() if self.ema is None else self.ema.swapped():
                for split in self.dataloaders:
                    self._validate_split(model, split, step)
        finally:
            self.loss_fn.meter = meter
            model.train()
        self.metrics_processor.restart_clock(step)

    def _validate_split(self, model: nn.Module, split: str, step: int) -> None:
        self.loss_fn.meter.reset()
        limit = self.job_config.validation.steps
        for index, (input_dict, labels) in enumerate(self.dataloaders[split]):
            if limit != -1 and index >= limit:
                break
            input_dict = {k: v.to(utils.device_type) for k, v in input_dict.items()}
            scores = score_levels(
                model,
                self.loss_fn,
                input_dict,
                labels.to(utils.device_type),
                self.parallel_dims,
                self.mixture_config,
                self._context,
            )
            for score in scores:
                self.loss_fn.book_level(score.losses, score.targets, score.level)
        losses = reduce_meter(self.loss_fn.meter, self.parallel_dims)
        count = sum(targets for _, targets in losses.values())
        total = sum(loss * targets for loss, targets in losses.values())
        self.metrics_processor.log_validation(
            loss=total / count if count else float("nan"),
            step=step,
            split=split,
            losses=losses,
            in_bits=False,
        )

    @contextmanager
    def _context(self) -> Iterator[None]:
        with self.validation_context(), self.maybe_enable_amp:
            yield


def build_denoising_validator(**arguments: Any) -> DenoisingValidator:
    """Build the validator for a TrainSpec (`build_validator_fn`)."""
    return DenoisingValidator(**cast(Any, arguments))
