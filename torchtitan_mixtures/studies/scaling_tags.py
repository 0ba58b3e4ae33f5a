"""Whether a run will log what a scaling study compares, as far as that is known before it runs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.loss_report import bucket_scalars
from torchtitan_mixtures.objectives.classification import TOP_K, ClassificationLoss
from torchtitan_mixtures.objectives.denoising import DenoisingLoss
from torchtitan_mixtures.objectives.meter import LossMeter
from torchtitan_mixtures.studies.scaling_file import Metric

TRAINING_LOSSES = ("loss_metrics/global_avg_loss", "loss_metrics/global_max_loss")

FURTHER = (
    "grad_norm", "update_ratio", "lr", "data", "router", "domain", "nested", "train",
    "n_tokens_seen", "throughput(tps)", "tflops", "mfu(%)", "time_metrics", "memory",
)  # fmt: skip
"""First parts of tags of which it shows in training what they go on with."""

_OF_ROUTING = ("domain", "router")


def check_tag(metric: Metric, job: MixtureJobConfig) -> None:
    """Check that a run may log a metric, in its last step too, and as often as it is averaged.

    Losses and accuracies are known from what computes them; of other tags only the first part is.
    A bucket of the loss that has no targets, say, is not logged after all.

    Args:
        metric: What runs are compared by.
        job: The run's configuration, checked.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    # No parallel layout: it matters to sums over ranks alone.
    loss: Any = get_train_spec(job.model.name).build_loss_fn(job, parallel_dims=None)
    if metric.tag.split("/")[0] == "validation":
        _check_validation(metric, job, loss)
        logged = _times_logged(job.training.steps, job.validation.freq)
    else:
        known = [*TRAINING_LOSSES, *_of_buckets(loss.meter.group, loss.meter)]
        firsts = {tag.split("/")[0] for tag in known}
        first = metric.tag.split("/")[0]
        if metric.tag not in known and (first in firsts or first not in FURTHER):
            raise _unknown(metric.tag, known)
        logged = _times_logged(job.training.steps, job.metrics.log_freq)
    if metric.last > logged:
        raise ValueError(
            f"metric.last = {metric.last}: must be at most {logged}, as often as {metric.tag!r} is "
            f"logged in training.steps = {job.training.steps}."
        )


def _times_logged(steps: int, frequency: int) -> int:
    """Count the steps that are logged, the first one always."""
    return len({1, *range(frequency, steps + 1, frequency)})


def _check_validation(metric: Metric, job: MixtureJobConfig, loss: Any) -> None:
    steps, freq, splits = job.training.steps, job.validation.freq, job.multimodal.validation_splits
    prefixes = {split: f"validation/{split}" if split else "validation" for split in splits}
    own = [split for split, prefix in prefixes.items() if metric.tag.startswith(f"{prefix}/")]
    rules = [
        (job.validation.enable, "validation.enable = false", f"true, for {metric.tag!r}"),
        (
            steps % freq == 0,
            f"validation.freq = {freq}",
            f"a divisor of training.steps = {steps}, so that the last step is validated",
        ),
        (
            bool(own),
            f"metric.tag = {metric.tag!r}",
            f"of a split in multimodal.validation_splits = {splits}",
        ),
    ]
    for holds, found, allowed in rules:
        if not holds:
            raise ValueError(f"{found}: must be {allowed}.")
    known = [tag for split in own for tag in _of_split(prefixes[split], job, loss)]
    routed = getattr(loss, "routing", None) is not None
    open_ended = [f"{prefixes[split]}/{part}/" for split in own for part in _OF_ROUTING if routed]
    if metric.tag not in known and not metric.tag.startswith(tuple(open_ended)):
        raise _unknown(metric.tag, known)


def _of_split(prefix: str, job: MixtureJobConfig, loss: Any) -> list[str]:
    """Tags of what a split is scored by."""
    if isinstance(loss, ClassificationLoss):
        capacities = job.nested.validation_capacities
        prefixes = [prefix]
        if len(capacities) > 1:
            prefixes = [f"{prefix}/capacity_{capacity:.4g}" for capacity in capacities]
        names = ["loss", "precision_at_1" if job.classification.multi_label else "accuracy"]
        names += [f"top_{TOP_K}_accuracy"] if loss.has_top_k else []
        return [f"{one}/{name}" for one in prefixes for name in names]
    meter = loss.validation_meter() if isinstance(loss, DenoisingLoss) else loss.meter
    return [f"{prefix}/loss", *_of_buckets(prefix, meter)]


def _of_buckets(prefix: str, meter: LossMeter) -> list[str]:
    """Tags of the buckets of a loss."""
    return list(bucket_scalars(prefix, dict.fromkeys(meter.names, (0.0, 1)), meter.in_bits))


def _unknown(tag: str, known: Sequence[str]) -> ValueError:
    near = difflib.get_close_matches(tag, known, n=3, cutoff=0.5) or known
    return ValueError(
        f"metric.tag = {tag!r}: is not logged; set it to one that is: {', '.join(near)}."
    )
