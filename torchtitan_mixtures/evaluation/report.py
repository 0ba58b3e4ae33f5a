"""All that `scripts/evaluate.py` reports about a checkpoint, as plain JSON and as tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import torch

from torchtitan_mixtures.checkpoint_loading import LoadedCheckpoint
from torchtitan_mixtures.data.emoji import SPLITS
from torchtitan_mixtures.data.loader import build_multimodal_validation_dataloader
from torchtitan_mixtures.data.spoken import UNSEEN_VOICE
from torchtitan_mixtures.evaluation.items import Things, draw_things
from torchtitan_mixtures.evaluation.likelihood import Progress
from torchtitan_mixtures.evaluation.retrieval import (
    classify_groups,
    no_progress,
    retrieve,
    score_direction,
)
from torchtitan_mixtures.objectives.next_token import NextTokenLoss, split_batch

POOLS = (20, 100)


def splits_of(checkpoint: LoadedCheckpoint, wanted: Sequence[str]) -> list[str]:
    """The splits to evaluate.

    Args:
        checkpoint: Its data are those of the run.
        wanted: Their names; none for all: of other data than the embedded corpus, those that the
            run trained and validated on, and of a mixture what there is to validate on.

    Raises:
        ValueError: The embedded corpus has no such split for this model, or a mixture has nothing
            to validate on.
    """
    data = checkpoint.job_config.multimodal
    if data.source == "mixture":
        named = list(wanted or [table["name"] for table in data.validation_sources])
        if not named:
            raise ValueError(
                f"{checkpoint.path} was trained on a mixture without "
                "[[multimodal.validation_sources]]: there is nothing to evaluate it on."
            )
        return named
    if data.source != "emoji":
        return list(wanted or dict.fromkeys([data.train_split, *data.validation_splits]))
    has_speech = "speech" in checkpoint.codecs.modalities.names
    known = (*SPLITS, UNSEEN_VOICE) if has_speech else SPLITS
    unknown = [split for split in wanted if split not in known]
    if unknown:
        raise ValueError(
            f"split {unknown[0]!r} is unknown; the splits of the embedded corpus for a model of "
            f"{', '.join(checkpoint.codecs.modalities.names)} are {', '.join(known)}."
        )
    return list(wanted or known)


def evaluate(
    checkpoint: LoadedCheckpoint,
    splits: Sequence[str],
    *,
    num_items: int = 100,
    max_batches: int = 32,
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
    make_steps: Callable[[], Progress] = lambda: no_progress,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Evaluate a checkpoint on several splits.

    Args:
        checkpoint: The model and its data.
        splits: See `splits_of`.
        num_items: Things among which is retrieved, at most.
        max_batches: See `bits_per_token`.
        seed: Of the things and names that are drawn.
        progress: Told what is about to be done.
        make_steps: Makes what is told how far each comparison of things is.
        keep: Given the report after each split, as far as it goes.

    Returns:
        Plain JSON: what was evaluated, and for each of `splits` its `modalities` (see
        `bits_per_token`), the number of `items`, `retrieval` ("text>image", pool size,
        "information" or "likelihood"; see `retrieve` and `Rate.as_json`) and `groups`.
    """
    saved = checkpoint.job_config.model
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint.path),
        "family": saved.name,
        "flavor": saved.flavor,
        "step": checkpoint.step,
        "seed": seed,
        "num_items": num_items,
        "max_batches": max_batches,
        "splits": {},
    }
    for split in splits_of(checkpoint, splits):
        progress(f"{split}: bits per token")
        found: dict[str, Any] = {"modalities": bits_per_token(checkpoint, split, max_batches)}
        report["splits"][split] = found
        things = draw_things(checkpoint, split, num_items, seed)
        found |= {"items": len(things.items), "retrieval": {}}
        for source, target in _directions(checkpoint, things):
            progress(f"{split}: retrieval from {source} to {target}")
            scores = score_direction(checkpoint.model, things, source, target, make_steps())
            found["retrieval"][f"{source}>{target}"] = {
                str(pool): {kind: rate.as_json() for kind, rate in rates.items()}
                for pool, rates in retrieve(scores, _pools(len(things.items))).items()
            }
        if things.names:
            progress(f"{split}: groups")
            found["groups"] = classify_groups(checkpoint.model, things, make_steps()).as_json()
        keep(report)
    return report


@torch.no_grad()
def bits_per_token(
    checkpoint: LoadedCheckpoint, split: str, max_batches: int
) -> dict[str, dict[str, float]]:
    """Score packed sequences of a split as validation does.

    Args:
        checkpoint: The model and its data.
        split: Name of the split.
        max_batches: Batches to score at most; -1 for the whole split.

    Returns:
        For each modality with targets: `bits_per_token` and the number of `targets`.
    """
    model, modalities = checkpoint.model, checkpoint.codecs.modalities
    device = next(model.parameters()).device
    settings = checkpoint.job_config.validation
    settings.steps = max_batches
    # A run without validation did not care for the length of its sequences.
    settings.seq_len = min(settings.seq_len, checkpoint.model_args.max_seq_len)
    loader = build_multimodal_validation_dataloader(
        1, 0, checkpoint.codecs.text, checkpoint.job_config, split
    )
    loss = NextTokenLoss(modalities.vocab_ranges, modalities.names)
    for input_dict, labels in loader:
        tensors = {key: value.to(device) for key, value in input_dict.items()}
        tokens, targets, extra_inputs = split_batch(tensors, labels.to(device))
        loss(model(tokens, **extra_inputs), targets)
    sums, counts = loss.meter.totals(device).tolist()
    return {
        name: {"bits_per_token": nll / count / math.log(2), "targets": int(count)}
        for name, nll, count in zip(modalities.names, sums, counts, strict=True)
        if count
    }


def _pools(num_items: int) -> list[int]:
    """Sizes of pools: all of few items are one pool."""
    return [pool for pool in POOLS if pool <= num_items] or [num_items]


def _directions(checkpoint: LoadedCheckpoint, things: Things) -> list[tuple[str, str]]:
    """All ordered pairs of modalities between which there is something to ask."""
    if len(things.items) < 2:
        return []
    pairs = list(permutations(things.modalities, 2))
    if getattr(checkpoint.model_args, "bidirectional_images", False):
        # Such a model reads images but does not predict them.
        return [(source, target) for source, target in pairs if target != "image"]
    return pairs


def format_report(report: dict[str, Any]) -> str:
    """Write a report as Markdown tables."""
    lines = [
        f"{report['family']}/{report['flavor']}, step {report['step']} ({report['checkpoint']})",
        "",
        "| split | modality | bits per token | targets |",
        "|---|---|---|---|",
    ]
    for split, found in report["splits"].items():
        for name, row in found["modalities"].items():
            lines.append(f"| {split} | {name} | {row['bits_per_token']:.3f} | {row['targets']:,} |")
    lines += [
        "",
        "| split | question | among | right (95 % interval) | chance | by likelihood alone |",
        "|---|---|---|---|---|---|",
    ]
    for split, found in report["splits"].items():
        for direction, pools in found["retrieval"].items():
            for pool, rates in pools.items():
                best, plain = rates["information"], rates["likelihood"]
                question = f"{split} | {direction.replace('>', ' to ')} | {pool}"
                lines.append(
                    f"| {question} | {format_rate(best)} | {best['chance']:.1%} | "
                    f"{format_rate(plain)} |"
                )
        if "groups" in found:
            groups = found["groups"]
            lines.append(
                f"| {split} | group of an image | | {format_rate(groups)} | "
                f"{groups['chance']:.1%} (commonest) | |"
            )
    return "\n".join(lines)


def format_rate(rate: dict[str, float]) -> str:
    """Write a share with its interval, of `Rate.as_json`."""
    above = ", above chance" if rate["excludes_chance"] else ""
    return f"{rate['share']:.1%} ({rate['low_95']:.1%} to {rate['high_95']:.1%}{above})"
