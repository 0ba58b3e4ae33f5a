"""Validation of denoising models: the loss of every split at fixed levels of noise.

At each level every sample has noise of its own that is the same in every validation, so that
numbers of different steps, runs and layouts can be compared.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.image_loader import (
    ImageValidationLoader,
    build_image_validation_dataloader,
)
from torchtitan_mixtures.data.model_flavor import model_flavor
from torchtitan_mixtures.data.prompt_loader import build_prompt_validation_dataloader
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.objectives.levels import score_levels
from torchtitan_mixtures.objectives.meter import LossMeter
from torchtitan_mixtures.validate import SplitValidator


class DenoisingValidator(SplitValidator):
    """Loss of each split by noise level, of a denoising model."""

    def build_dataloader(
        self, dp_world_size: int, dp_rank: int, split: str
    ) -> ImageValidationLoader:
        """Build the loader of a split."""
        return build_denoising_validation_dataloader(
            dp_world_size, dp_rank, self.mixture_config, split
        )

    def make_meter(self) -> LossMeter:
        """Make a meter of fixed noise levels."""
        return self.loss_fn.validation_meter()

    def validate_split(self, model: nn.Module, split: str, step: int) -> None:
        """Score a split and log it; arguments as in `validate`."""
        self.loss_fn.reset()
        for input_dict, labels in self.batches(split):
            scores = score_levels(
                model,
                self.loss_fn,
                input_dict,
                labels,
                self.parallel_dims,
                self.mixture_config,
                self.context,
            )
            for score in scores:
                self.loss_fn.book_level(score.losses, score.targets, score.level)
        self.log_meter(split, step)
        self.log_routing(split, step)

    def log_routing(self, split: str, step: int) -> None:
        """Log what a mixture of diffusers did with the domains of a split."""
        if self.loss_fn.routing is None:
            return
        prefix = f"validation/{split}" if split else "validation"
        scalars = self.loss_fn.routing.meter.scalars()
        found = {f"{prefix}/{name}": value for name, value in scalars.items()}
        self.metrics_processor.logger.log(found, step)
        losses = [
            f"{name.split('/')[1]} {value:.5f}"
            for name, value in scalars.items()
            if name.startswith("domain/") and name.endswith("/loss")
        ]
        accuracy = scalars.get("router/accuracy")
        if losses:
            right = "" if accuracy is None else f"; the router is right in {accuracy:.1%}"
            logger.info(f"  {split} by domain: {', '.join(losses)}{right}")


def build_denoising_validation_dataloader(
    dp_world_size: int, dp_rank: int, job_config: MixtureJobConfig, split: str
) -> ImageValidationLoader:
    """Build the loader of a split for models of classes or of prompts, whichever the job has."""
    is_prompted = getattr(model_flavor(job_config), "is_prompted", False)
    build = build_prompt_validation_dataloader if is_prompted else build_image_validation_dataloader
    return build(dp_world_size, dp_rank, job_config, split)


def build_denoising_validator(**arguments: Any) -> DenoisingValidator:
    """Build the validator for a TrainSpec (`build_validator_fn`)."""
    return DenoisingValidator(**arguments)
