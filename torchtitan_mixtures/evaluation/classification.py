"""What `scripts/evaluate.py` reports about a classifier: how often it is right, at what cost.

Images are those of validation during training, so over the same images the numbers are the same
too. A nested model is asked at several capacities, and may be routed in another way than it was
trained with, to see what depends on its router.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchtitan.distributed import ParallelDims

from torchtitan_mixtures.checkpoint_loading import LoadedModel
from torchtitan_mixtures.data.image_loader import build_image_validation_dataloader
from torchtitan_mixtures.evaluation.denoising import splits_of
from torchtitan_mixtures.evaluation.rates import Rate
from torchtitan_mixtures.objectives.capacity import CapacitySchedule, own_capacity
from torchtitan_mixtures.objectives.classification import (
    NO_LABEL,
    TOP_K,
    VALIDATION_SEED,
    ClassificationLoss,
)

ONE_PROCESS = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "pp": 1, "ep": 1, "etp": 1}


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model made of the images of a split at one capacity, all on the CPU.

    Attributes:
        losses: `(images,)` float64.
        top_1: Whether the likeliest class is right, `(images,)` bool.
        top_k: Whether one of the `TOP_K` likeliest is; None if that is not counted.
        classes: Classes of each image, `(images, labels)` int64, -1 = none.
        capacity: Effective capacity that was realised, mean over the batches.
    """

    losses: Tensor
    top_1: Tensor
    top_k: Tensor | None
    classes: Tensor
    capacity: float


def with_routing(loaded: LoadedModel, routing: str) -> LoadedModel:
    """Let a model of the same weights route in another way.

    Args:
        loaded: The model.
        routing: As `nested.routing`; empty: as it was trained.

    Raises:
        ValueError: The model has no router.
    """
    if not routing:
        return loaded
    _require_nested(loaded, f"--routing {routing}")
    args = dataclasses.replace(loaded.model_args, routing=routing)
    device = next(loaded.model.parameters()).device
    with torch.device("meta"):
        model = type(loaded.model)(args)
    model.to_empty(device=device)
    model.load_state_dict(loaded.model.state_dict())
    return dataclasses.replace(loaded, model=model.eval(), model_args=args)


def capacities_of(loaded: LoadedModel, wanted: Sequence[float]) -> list[float]:
    """The capacities to evaluate at.

    Args:
        loaded: The model.
        wanted: Effective capacities; none for that of the run.

    Raises:
        ValueError: The model has no such capacity.
    """
    args = loaded.model_args
    if not wanted:
        return [own_capacity(args)]
    shown = ",".join(f"{capacity:g}" for capacity in wanted)
    _require_nested(loaded, f"--capacities {shown}")
    if args.routing == "argmax":
        raise ValueError(
            f"--capacities {shown}: with argmax tokens choose, whatever the capacity; leave the "
            "option out."
        )
    for capacity in wanted:
        try:
            args.budget(capacity)
        except ValueError as error:
            raise ValueError(f"--capacities {shown}: {error}") from None
    return list(dict.fromkeys(wanted))


def _require_nested(loaded: LoadedModel, option: str) -> None:
    if loaded.model_args.num_experts == 1:
        raise ValueError(
            f"{option}: {loaded.job_config.model.flavor} has no nested experts; leave the option "
            "out."
        )


def refuse_nested_options(capacities: Sequence[float], routing: str) -> None:
    """Refuse the options of nested classifiers for a model that is none.

    Raises:
        ValueError: One is set.
    """
    for option, value in (("--capacities", capacities), ("--routing", routing)):
        if value:
            raise ValueError(f"{option}: is about nested classifiers; leave the option out.")


def evaluate_classification(
    loaded: LoadedModel,
    splits: Sequence[str],
    *,
    capacities: Sequence[float] = (),
    routing: str = "",
    max_batches: int = 32,
    progress: Callable[[str], None] = lambda message: None,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Evaluate a model on several splits.

    Args:
        loaded: The model and the configuration of its run.
        splits: See `splits_of`.
        capacities: See `capacities_of`.
        routing: See `with_routing`.
        max_batches: Batches of `validation.local_batch_size` to score of each split at most; -1 for
            all of it.
        progress: Told what is about to be done.
        keep: Given the report after each split, as far as it goes.

    Returns:
        Plain JSON: what was evaluated, and for each of `splits` a list of what `summarise` says at
        each capacity.
    """
    loaded = with_routing(loaded, routing)
    chosen = capacities_of(loaded, capacities)
    saved, args = loaded.job_config.model, loaded.model_args
    report: dict[str, Any] = {
        "checkpoint": str(loaded.path),
        "family": saved.name,
        "flavor": saved.flavor,
        "step": loaded.step,
        "averaged": loaded.is_averaged,
        "routing": args.routing if args.num_experts > 1 else None,
        "dense_macs_per_image": args.dense_macs_per_image,
        "max_batches": max_batches,
        "splits": {},
    }
    for split in splits_of(loaded, splits):
        at = ", ".join(f"{capacity:g}" for capacity in chosen)
        progress(f"{split}: accuracy at capacity {at}")
        answers = answer(loaded, split, chosen, max_batches)
        report["splits"][split] = [
            {
                "capacity": capacity,
                "macs_per_image": args.macs_per_image(args.budget(capacity)),
                **summarise(found, is_multi_label(loaded)),
            }
            for capacity, found in answers.items()
        ]
        keep(report)
    return report


def is_multi_label(loaded: LoadedModel) -> bool:
    """Say whether images have several classes."""
    return loaded.job_config.classification.multi_label


@torch.no_grad()
def answer(
    loaded: LoadedModel,
    split: str,
    capacities: Sequence[float],
    max_batches: int = -1,
    draw: int = 0,
) -> dict[float, Answers]:
    """Classify the images of a split at each capacity, as validation does.

    Args:
        loaded: The model and the configuration of its run.
        split: Name of the split.
        capacities: Effective ones.
        max_batches: See `evaluate_classification`.
        draw: Number of the draw where routing is random; validation has the first, 0.
    """
    config, args = loaded.job_config, loaded.model_args
    validation = dataclasses.replace(config.validation, steps=max_batches)
    config = dataclasses.replace(config, validation=validation)
    device = next(loaded.model.parameters()).device
    schedule = CapacitySchedule(config.nested, 1, 0, own_capacity(args))
    loss_fn = ClassificationLoss(args, config.classification, schedule, seed=0)
    loss_fn.validation_seed = VALIDATION_SEED + draw
    dims = ParallelDims(**ONE_PROCESS, world_size=1)
    rows: dict[float, list[tuple[Tensor, ...]]] = {capacity: [] for capacity in capacities}
    spent: dict[float, list[float]] = {capacity: [] for capacity in capacities}
    for input_dict, labels in build_image_validation_dataloader(1, 0, config, split):
        tensors = {key: value.to(device) for key, value in input_dict.items()}
        for capacity in capacities:
            images, targets, extra, kwargs = loss_fn.prepare(
                None, None, tensors, labels.to(device), dims, config, capacity
            )
            output = loaded.model(images, **extra, **kwargs)
            scores = loss_fn.score(output, targets)
            top_k = scores.top_1 if scores.top_k is None else scores.top_k
            columns = (scores.losses.double(), scores.top_1, top_k, targets.classes)
            rows[capacity].append(tuple(column[scores.is_image].cpu() for column in columns))
            if output.router is not None:
                loss_fn.details.reset()
                loss_fn.details.add_routing(output.router)
                spent[capacity].append(loss_fn.details.scalars()["nested/capacity"])
    found = {}
    for capacity, batches in rows.items():
        losses, top_1, top_k, classes = (torch.cat(parts) for parts in zip(*batches, strict=True))
        mean = sum(spent[capacity]) / len(spent[capacity]) if spent[capacity] else 1.0
        found[capacity] = Answers(
            losses, top_1, top_k if loss_fn.has_top_k else None, classes, mean
        )
    return found


def summarise(answers: Answers, is_multi_label: bool = False) -> dict[str, Any]:
    """Count right answers; chance is what the commonest classes would give.

    Args:
        answers: Those of a split.
        is_multi_label: Whether images have several classes.

    Returns:
        Number of `images`, `effective_capacity`, mean `loss`, and `accuracy` (or `precision_at_1`)
        and `top_5_accuracy` as `Rate.as_json` says.
    """
    images = len(answers.losses)
    picked = answers.classes[answers.classes != NO_LABEL]
    shares = torch.bincount(picked).sort(descending=True).values / max(images, 1)
    rates = {"precision_at_1" if is_multi_label else "accuracy": (answers.top_1, 1)}
    if answers.top_k is not None:
        rates[f"top_{TOP_K}_accuracy"] = (answers.top_k, TOP_K)
    return {
        "images": images,
        "effective_capacity": answers.capacity,
        "loss": answers.losses.mean().item(),
    } | {
        name: Rate(int(hits.sum()), images, shares[:guesses].sum().item()).as_json()
        for name, (hits, guesses) in rates.items()
    }


def format_classification(report: dict[str, Any]) -> str:
    """Write a report as a Markdown table."""
    averaged = ", averaged" if report["averaged"] else ""
    routing = f", routing {report['routing']}" if report["routing"] else ""
    splits = report["splits"]
    rates = [name for name, value in next(iter(splits.values()))[0].items() if _is_rate(value)]
    columns = ["split", "images", "capacity", "M multiply-adds", "of dense", "loss"]
    columns += [f"{name.replace('_', ' ')} (95 % interval)" for name in rates] + ["chance"]
    lines = [
        f"{report['family']}/{report['flavor']}, step {report['step']}{averaged}{routing} "
        f"({report['checkpoint']})",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for split, rows in splits.items():
        for row in rows:
            macs = row["macs_per_image"]
            cells = [split, f"{row['images']:,}", f"{row['effective_capacity']:.3f}"]
            cells += [f"{macs / 1e6:,.1f}", f"{100 * macs / report['dense_macs_per_image']:.0f} %"]
            cells += [f"{row['loss']:.4f}", *(_cell(row[name]) for name in rates)]
            cells.append(f"{100 * row[rates[0]]['chance']:.1f} %")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _is_rate(value: Any) -> bool:
    return isinstance(value, dict)


def _cell(rate: dict[str, Any]) -> str:
    return (
        f"{100 * rate['share']:.1f} % ({100 * rate['low_95']:.1f} to {100 * rate['high_95']:.1f})"
    )
