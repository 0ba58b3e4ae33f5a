"""What `scripts/evaluate.py` reports about a denoising model: its loss at fixed noise levels.

Noise and levels are those of validation during training, so over the same images the numbers are
the same too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchtitan.distributed import ParallelDims

from torchtitan_mixtures.checkpoint_loading import LoadedModel
from torchtitan_mixtures.data.batch import IGNORE_INDEX
from torchtitan_mixtures.data.image_data import check_split, list_splits
from torchtitan_mixtures.data.image_loader import build_image_validation_dataloader
from torchtitan_mixtures.data.prompt_loader import (
    build_prompt_validation_dataloader,
    check_prompt_split,
    list_prompt_splits,
)
from torchtitan_mixtures.objectives.denoising import build_denoising_loss
from torchtitan_mixtures.objectives.levels import score_levels
from torchtitan_mixtures.sampling.conditions import is_prompted


def splits_of(loaded: LoadedModel, wanted: Sequence[str]) -> list[str]:
    """The splits to evaluate.

    Args:
        loaded: Its data are those of the run.
        wanted: Their names; none for all.

    Raises:
        ValueError: The data has no such split, or one of other classes than the model's.
    """
    known, check = list_splits, check_split
    if is_prompted(loaded.model_args):
        known, check = list_prompt_splits, check_prompt_split
    # Not those that the run names: with validation off they may be of other data.
    chosen = list(dict.fromkeys(wanted or known(loaded.job_config)))
    for split in chosen:
        check(loaded.job_config, "--splits", split)
    return chosen


def evaluate_denoising(
    loaded: LoadedModel,
    splits: Sequence[str],
    *,
    max_batches: int = 32,
    progress: Callable[[str], None] = lambda message: None,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Evaluate a model on several splits.

    Args:
        loaded: The model and the configuration of its run.
        splits: See `splits_of`.
        max_batches: Batches of `validation.local_batch_size` to score of each split at most; -1 for
            all of it.
        progress: Told what is about to be done.
        keep: Given the report after each split, as far as it goes.

    Returns:
        Plain JSON: what was evaluated, and for each of `splits` what `summarise` says.
    """
    saved = loaded.job_config.model
    report: dict[str, Any] = {
        "checkpoint": str(loaded.path),
        "family": saved.name,
        "flavor": saved.flavor,
        "step": loaded.step,
        "averaged": loaded.is_averaged,
        "max_batches": max_batches,
        "splits": {},
    }
    for split in splits_of(loaded, splits):
        progress(f"{split}: loss by noise level")
        report["splits"][split] = summarise(level_losses(loaded, split, max_batches))
        keep(report)
    return report


@torch.no_grad()
def level_losses(loaded: LoadedModel, split: str, max_batches: int = -1) -> Tensor:
    """Score the images of a split at every noise level, as validation does.

    Args:
        loaded: The model and the configuration of its run.
        split: Name of the split.
        max_batches: See `evaluate_denoising`.

    Returns:
        Loss of each image at each level, `(images, levels)` float64, on the CPU.
    """
    config = loaded.job_config
    validation = dataclasses.replace(config.validation, steps=max_batches)
    config = dataclasses.replace(config, validation=validation)
    device = next(loaded.model.parameters()).device
    loss_fn = build_denoising_loss(config)
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    rows = []
    build_loader = build_image_validation_dataloader
    if is_prompted(loaded.model_args):
        build_loader = build_prompt_validation_dataloader
    for input_dict, labels in build_loader(1, 0, config, split):
        tensors = {key: value.to(device) for key, value in input_dict.items()}
        scores = score_levels(loaded.model, loss_fn, tensors, labels.to(device), dims, config)
        losses = torch.stack([score.losses.double().mean(1) for score in scores], 1)
        is_image = (labels != IGNORE_INDEX).all(1)  # what could not be read, and padding, is none
        rows.append(losses.cpu()[is_image])
    return torch.cat(rows)


def summarise(losses: Tensor) -> dict[str, Any]:
    """Average losses, with the standard error that the choice of images leaves.

    Args:
        losses: Loss of each image at each level, `(images, levels)`.

    Returns:
        Number of `images`; `loss` and `standard_error` of the mean over levels; and both for each
        of `levels`, named by their middle as in the log of a training.
    """
    levels = losses.shape[1]
    return {
        "images": len(losses),
        **_mean(losses.mean(1)),
        "levels": {f"{(n + 0.5) / levels:.4g}": _mean(losses[:, n]) for n in range(levels)},
    }


def _mean(values: Tensor) -> dict[str, float | None]:
    """Mean and standard error of `(images,)`; a single image has none."""
    error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else None
    return {"loss": values.mean().item(), "standard_error": error}


def format_denoising(report: dict[str, Any]) -> str:
    """Write a report as a Markdown table."""
    averaged = ", averaged" if report["averaged"] else ""
    splits = report["splits"]
    lines = [
        f"{report['family']}/{report['flavor']}, step {report['step']}{averaged} "
        f"({report['checkpoint']})",
        "",
        "| noise level | " + " | ".join(f"{s}, {splits[s]['images']:,} images" for s in splits),
        "|---" * (1 + len(splits)),
    ]
    for level in next(iter(splits.values()))["levels"]:
        cells = [_cell(found["levels"][level]) for found in splits.values()]
        lines.append(f"| {level} | " + " | ".join(cells))
    lines.append("| mean | " + " | ".join(_cell(found) for found in splits.values()))
    return "\n".join(line + " |" if line.startswith("|") else line for line in lines)


def _cell(found: dict[str, Any]) -> str:
    error = found["standard_error"]
    return f"{found['loss']:.4f}" + ("" if error is None else f" +- {error:.4f}")
