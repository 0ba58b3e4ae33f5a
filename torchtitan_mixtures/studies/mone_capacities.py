"""MoNE at several capacities: which models are trained, and what is measured of each.

The protocol is that of `scripts/study_mone.py`. Everything is in the study's folder: trainings in
`runs/`, what was measured of each in `results/`, and `times.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures import benchmark
from torchtitan_mixtures.checkpoint_loading import LoadedModel, load_model
from torchtitan_mixtures.classifier_config import Nested
from torchtitan_mixtures.data.image_sets import emoji_classes
from torchtitan_mixtures.evaluation.classification import evaluate_classification
from torchtitan_mixtures.models.mone.args import MoNEModelArgs
from torchtitan_mixtures.models.mone.model import MoNE
from torchtitan_mixtures.objectives.capacity import (
    CapacitySchedule,
    own_capacity,
    same_flops_steps,
)
from torchtitan_mixtures.studies.pieces import write_json

CAPACITIES = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
"""What every nested model is asked at, whatever it was trained with."""

SPLITS = ("unseen_style", "unseen_concept")
"""Drawings that no model has seen."""

TIMES = "times"
"""Name of the file about time."""

BATCH = 64
"""Images that are classified together where time is measured."""


@dataclass(frozen=True)
class Variant:
    """A model of the study.

    Attributes:
        name: Within the study.
        flavor: Of the family `mone`.
        capacity: Effective, trained with; None: the whole model, or several capacities.
        schedule: As `nested.schedule`.
        routing: As `nested.routing`.
        same_flops: As `nested.same_flops`.
    """

    name: str
    flavor: str = "debugmodel"
    capacity: float | None = None
    schedule: str = "constant"
    routing: str = "expert_preferred"
    same_flops: bool = False

    @property
    def is_nested(self) -> bool:
        """Whether it can be asked at several capacities."""
        return self.flavor == "debugmodel"

    @property
    def own(self) -> tuple[float, ...]:
        """Capacities that it was made for."""
        if self.schedule == "adaptive":
            return CAPACITIES
        return (1.0,) if self.capacity is None else (self.capacity,)

    def overrides(self) -> list[str]:
        """What differs from the TOML."""
        overrides = [f"--model.flavor={self.flavor}"]
        if self.is_nested:
            overrides += [f"--nested.schedule={self.schedule}", f"--nested.routing={self.routing}"]
        if self.capacity is not None:
            overrides.append(f"--nested.capacity={self.capacity}")
        return [*overrides, "--nested.same_flops"] if self.same_flops else overrides

    def steps(self, steps: int) -> int:
        """Say how long it is trained where the dense model is for `steps`."""
        if not self.same_flops:
            return steps
        args = model_args(self)
        assert self.capacity is not None
        args.capacity = self.capacity
        return same_flops_steps(steps, args, CapacitySchedule(Nested(), 1, 0, own_capacity(args)))


def model_args(variant: Variant) -> MoNEModelArgs:
    """Look up the arguments of a variant's flavour, for groups of emoji."""
    args = cast(MoNEModelArgs, get_train_spec("mone").model_args[variant.flavor])  # a copy
    args.num_classes = len(emoji_classes("group"))
    return args


DENSE = Variant("dense", flavor="debugmodel_dense")
FIXED = tuple(Variant(f"fixed {c:g}", capacity=c) for c in (0.2, 0.4, 0.6, 0.8))
ADAPTIVE = Variant("adaptive", schedule="adaptive")
RANDOM = tuple(Variant(f"random {c:g}", capacity=c, routing="random") for c in (0.2, 0.6))
SAME_FLOPS = Variant("same FLOPs 0.4", capacity=0.4, same_flops=True)


VARIANTS = (DENSE, *FIXED, SAME_FLOPS, ADAPTIVE, *RANDOM)
"""In the order of tables."""


# --- measuring ------------------------------------------------------------------------------------


def measure_run(
    out: Path, name: str, variant: str, capacities: Sequence[float], max_batches: int
) -> None:
    """Measure a trained model.

    Args:
        out: The study's folder.
        name: Of the training.
        variant: Name of the model.
        capacities: Effective ones to ask a nested model at.
        max_batches: Batches of each split to score; -1 for all of it.
    """
    loaded = load_model(out / "runs" / name)
    args = loaded.model_args
    asked = list(capacities) if args.is_nested else []
    ask = partial(_ask, loaded, max_batches=max_batches)
    content: dict[str, Any] = {
        "variant": variant,
        "seed": loaded.job_config.debug.seed,
        "step": loaded.step,
        "averaged": loaded.is_averaged,
        "parameters": args.num_total_parameters,
        "dense_macs_per_image": args.dense_macs_per_image,
        "splits": ask(SPLITS, asked),
        "train": ask(["train"], [])["train"][0],
        "random": None,
    }
    if args.is_nested and args.routing != "random":
        content["random"] = ask(SPLITS, asked, routing="random")
    write_json(out / "results" / f"{name}.json", content)


def _ask(
    loaded: LoadedModel,
    splits: Sequence[str],
    capacities: Sequence[float],
    routing: str = "",
    max_batches: int = -1,
) -> dict[str, Any]:
    """What the evaluation says of each split: a list, by capacity."""
    return evaluate_classification(
        loaded, splits, capacities=capacities, routing=routing, max_batches=max_batches
    )["splits"]


def measure_times(out: Path, rounds: int) -> None:
    """Time nested and dense models, alternately, in this process.

    Time depends on the capacity, not on what was learned: models are as they begin.

    Args:
        out: The study's folder.
        rounds: How often each is timed.
    """
    nested, dense = model_args(ADAPTIVE), model_args(DENSE)
    torch.manual_seed(0)
    images = torch.rand(BATCH, nested.in_channels, nested.image_size, nested.image_size) * 2 - 1
    models = {}
    for args in (nested, dense):
        args.init_seed = 0
        models[args.num_experts] = MoNE(args).eval()
        models[args.num_experts].init_weights()

    def run(model: MoNE, capacity: float | None = None) -> benchmark.Run:
        return partial(model, images, model.model_args.budget(capacity))

    runs = {name: run(models[1]) for name in ("dense", "dense again")}
    runs |= {f"{c:g}": run(models[nested.num_experts], c) for c in CAPACITIES}
    with torch.no_grad():
        seconds = benchmark.time_interleaved(runs, rounds, warmup=3)
    content = {
        name: {
            "milliseconds_per_image": 1000 * benchmark.Spread.of(values).median / BATCH,
            "ratio": _as_list(benchmark.ratio(seconds, name, "dense")),
        }
        for name, values in seconds.items()
    }
    settings = {"batch": BATCH, "rounds": rounds, "threads": torch.get_num_threads()}
    write_json(out / f"{TIMES}.json", {"settings": settings, "forward": content})


def _as_list(spread: benchmark.Spread) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [spread.low, spread.median, spread.high]
