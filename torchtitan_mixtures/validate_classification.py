"""Validation of classifiers: how often they are right on every split, at every capacity.

The loss is that of plain targets, without label smoothing or mixing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchtitan_mixtures.data.image_loader import (
    ImageValidationLoader,
    build_image_validation_dataloader,
)
from torchtitan_mixtures.metrics import sum_over_ranks
from torchtitan_mixtures.objectives.classification import TOP_K, ImageScores
from torchtitan_mixtures.validate import SplitValidator


class ClassificationValidator(SplitValidator):
    """Loss and accuracy of each split and capacity, of a classifier.

    With several capacities (`nested.validation_capacities`) each is like a split of its own, whose
    name ends on it: `unseen_style/capacity_0.5`.
    """

    def build_dataloader(
        self, dp_world_size: int, dp_rank: int, split: str
    ) -> ImageValidationLoader:
        """Build the loader of a split."""
        return build_image_validation_dataloader(dp_world_size, dp_rank, self.mixture_config, split)

    def validate_split(self, model: nn.Module, split: str, step: int) -> None:
        """Score a split and log it; arguments as in `validate`."""
        capacities = self.mixture_config.nested.validation_capacities or [self.loss_fn.own_capacity]
        device = self.parallel_dims.world_mesh.device_type
        # Of each capacity: sum of the losses, right answers, those among the likeliest, images.
        totals = torch.zeros(len(capacities), 4, dtype=torch.float64, device=device)
        for input_dict, labels in self.batches(split):
            for row, capacity in zip(totals, capacities, strict=True):
                row += _sums(self._score(model, input_dict, labels, capacity))
        # Ranks of context parallelism have all scored the same images.
        sum_over_ranks(totals.div_(self.parallel_dims.cp), self.parallel_dims)
        for capacity, row in zip(capacities, totals.tolist(), strict=True):
            name = split if len(capacities) == 1 else f"{split}/capacity_{capacity:.4g}"
            self._log(name, row, step)

    def _score(
        self, model: nn.Module, input_dict: dict[str, Tensor], labels: Tensor, capacity: float
    ) -> ImageScores:
        images, targets, extra_inputs, extra_kwargs = self.loss_fn.prepare(
            model, None, input_dict, labels, self.parallel_dims, self.mixture_config, capacity
        )
        with self.context():
            output = model(images, **extra_inputs, **extra_kwargs)
        return self.loss_fn.score(output, targets)

    def _log(self, name: str, sums: list[float], step: int) -> None:
        *values, count = sums
        loss, top_1, top_k = (value / count if count else float("nan") for value in values)
        is_multi_label = self.mixture_config.classification.multi_label
        shares = {"precision_at_1" if is_multi_label else "accuracy": top_1}
        if self.loss_fn.has_top_k:
            shares[f"top_{TOP_K}_accuracy"] = top_k
        self.metrics_processor.log_validation(loss=loss, step=step, split=name, shares=shares)


def _sums(scores: ImageScores) -> Tensor:
    """Sum the losses and the right answers of a batch's images, and count them: `(4,)` float64."""
    top_k = scores.top_1 if scores.top_k is None else scores.top_k
    columns = (scores.losses, scores.top_1, top_k, torch.ones_like(scores.losses))
    rows = torch.stack([column.double() for column in columns])
    return torch.where(scores.is_image, rows, 0.0).sum(1)


def build_classification_validator(**arguments: Any) -> ClassificationValidator:
    """Build the validator for a TrainSpec (`build_validator_fn`)."""
    return ClassificationValidator(**arguments)
