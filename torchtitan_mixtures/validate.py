"""Validation: what all validators share, and that of models over tokens.

TorchTitan's own validator reads one text split, shards the batch twice under context parallelism
and expects every value of a batch to be a tensor on the right device; these share the trainer's
handling of a batch instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchtitan.components.validate import BaseValidator
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import ModelProtocol
from torchtitan.tools import utils

from torchtitan_mixtures.data.loader import build_multimodal_validation_dataloader
from torchtitan_mixtures.data.tokenizers import TextTokenizer
from torchtitan_mixtures.ema import EMA
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.metrics import MixtureMetricsProcessor, reduce_meter
from torchtitan_mixtures.objectives.meter import LossMeter
from torchtitan_mixtures.pipeline import Pipeline


class SplitValidator(BaseValidator, ABC):
    """Scores validation splits one after the other; what that means is up to subclasses.

    Args:
        job_config: The job's configuration.
        dp_world_size: Number of data-parallel ranks.
        dp_rank: Index of this one.
        parallel_dims: The job's parallel layout.
        loss_fn: Prepares and scores batches; its meter is replaced while validation goes on.
        validation_context: Makes the context of forward passes.
        maybe_enable_amp: Another context of them.
        metrics_processor: Logs what is found.
        tokenizer: The text tokenizer, for models over tokens.
        pp_schedule: Runs a model that is cut into stages.
        **unused: What else TorchTitan says.

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
        loss_fn: Any,
        validation_context: Callable[[], AbstractContextManager[None]],
        maybe_enable_amp: AbstractContextManager[None],
        metrics_processor: MixtureMetricsProcessor,
        tokenizer: TextTokenizer | None = None,
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
        self.dataloaders = {
            split: self.build_dataloader(dp_world_size, dp_rank, split)
            for split in job_config.multimodal.validation_splits
        }

    @abstractmethod
    def build_dataloader(self, dp_world_size: int, dp_rank: int, split: str) -> Any:
        """Build what passes once over a split, each time it is iterated over."""

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Score every split and log it; the model is left in training mode, its weights as before.

        Args:
            model_parts: The model, or this rank's stages of it.
            step: The training step, for the log.
        """
        meter, self.loss_fn.meter = self.loss_fn.meter, self.make_meter()
        for part in model_parts:
            part.eval()
        try:
            with nullcontext() if self.ema is None else self.ema.swapped():
                for split in self.dataloaders:
                    self.validate_split(model_parts[0], split, step)
        finally:
            self.loss_fn.meter = meter
            for part in model_parts:
                part.train()
        self.metrics_processor.restart_clock(step)

    @abstractmethod
    def validate_split(self, model: nn.Module, split: str, step: int) -> None:
        """Score a split and log it; arguments as in `validate`."""

    def make_meter(self) -> LossMeter:
        """Make the meter that the loss has while validation goes on."""
        return self.loss_fn.meter.empty()

    def batches(self, split: str) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Iterate over the batches of a split, on the model's device."""
        limit = self.job_config.validation.steps
        for index, (input_dict, labels) in enumerate(self.dataloaders[split]):
            if limit != -1 and index >= limit:
                break
            input_dict = {k: v.to(utils.device_type) for k, v in input_dict.items()}
            yield input_dict, labels.to(utils.device_type)

    @contextmanager
    def context(self) -> Iterator[None]:
        """Context of a forward pass."""
        with self.validation_context(), self.maybe_enable_amp:
            yield

    def log_meter(self, split: str, step: int) -> None:
        """Log what the loss's meter holds, reduced over all ranks."""
        meter = self.loss_fn.meter
        losses = reduce_meter(meter, self.parallel_dims)
        count = sum(targets for _, targets in losses.values())
        total = sum(loss * targets for loss, targets in losses.values())
        self.metrics_processor.log_validation(
            loss=total / count if count else float("nan"),
            step=step,
            split=split,
            losses=losses,
            group=meter.group,
            in_bits=meter.in_bits,
        )


class MixtureValidator(SplitValidator):
    """Loss of each split by modality, of a model over tokens."""

    def build_dataloader(self, dp_world_size: int, dp_rank: int, split: str) -> Any:
        """Build the loader of a split."""
        assert self.tokenizer is not None
        return build_multimodal_validation_dataloader(
            dp_world_size, dp_rank, self.tokenizer, self.mixture_config, split
        )

    def validate_split(self, model: nn.Module, split: str, step: int) -> None:
        """Score a split and log it; arguments as in `validate`."""
        self.loss_fn.meter.reset()
        for input_dict, labels in self.batches(split):
            inputs, targets, extra_inputs, extra_kwargs = self.loss_fn.prepare(
                cast(ModelProtocol, model),
                self.tokenizer,
                input_dict,
                labels,
                self.parallel_dims,
                self.mixture_config,
            )
            if self.pipeline is not None:
                with self.validation_context():
                    self.pipeline.evaluate(inputs, extra_kwargs, targets)
                continue
            with self.context():
                self.loss_fn(model(inputs, **extra_inputs, **extra_kwargs), targets)
        self.log_meter(split, step)


def build_validator(**arguments: Any) -> MixtureValidator:
    """Build the validator for a TrainSpec (`build_validator_fn`)."""
    return MixtureValidator(**arguments)
