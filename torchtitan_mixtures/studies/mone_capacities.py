"""MoNE at several capacities: which models are trained, and what is measured of each.

The protocol is that of `scripts/study_mone.py`. Everything is in the study's folder: trainings in
`runs/`, what was measured of each in `results/` (numbers as JSON, those of each image in a file of
NumPy beside it), and `times.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures import benchmark
from torchtitan_mixtures.checkpoint_loading import LoadedModel, load_model
from torchtitan_mixtures.classifier_config import Nested
from torchtitan_mixtures.data.image_loader import build_image_validation_dataloader
from torchtitan_mixtures.data.image_sets import emoji_classes
from torchtitan_mixtures.evaluation.classification import answer, with_routing
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

SPLITS = ("unseen_concept", "unseen_style")
"""Drawings that no model has seen; that of the primary metric first."""

METRICS = tuple(f"{split}{what}" for split in SPLITS for what in (" loss", ""))
"""What is compared: of each split the loss, and the share of right answers in percent. The first is
the primary one."""

OWN, UNTRAINED, RANDOMLY = "own", "untrained", "random"
"""Who routes: the model's router, the same with its initial weights, or chance."""

DRAWS = 5
"""How often random routing is drawn; everything is averaged over draws."""

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
        alpha_init: As `nested.alpha_init`; None: what the flavour has, 0.
    """

    name: str
    flavor: str = "debugmodel"
    capacity: float | None = None
    schedule: str = "constant"
    routing: str = "expert_preferred"
    same_flops: bool = False
    alpha_init: float | None = None

    @property
    def is_nested(self) -> bool:
        """Whether it can be asked at several capacities."""
        return self.flavor == "debugmodel"

    @property
    def is_adaptive(self) -> bool:
        """Whether it was trained at several capacities."""
        return self.schedule == "adaptive"

    @property
    def own(self) -> tuple[float, ...]:
        """Capacities that it was made for."""
        if self.is_adaptive:
            return CAPACITIES
        return (1.0,) if self.capacity is None else (self.capacity,)

    @property
    def controlled(self) -> tuple[float, ...]:
        """Capacities that it is asked at with other routing than its own, too."""
        if not self.is_nested or self.routing == "random":
            return ()
        return (0.2, 0.6) if self.is_adaptive else self.own

    def overrides(self) -> list[str]:
        """What differs from the TOML."""
        overrides = [f"--model.flavor={self.flavor}"]
        if self.is_nested:
            overrides += [f"--nested.schedule={self.schedule}", f"--nested.routing={self.routing}"]
        if self.capacity is not None:
            overrides.append(f"--nested.capacity={self.capacity}")
        if self.alpha_init is not None:
            overrides.append(f"--nested.alpha_init={self.alpha_init}")
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
NARROW = tuple(Variant(f"dense {w}", flavor=f"debugmodel_dense_{w}") for w in (64, 96))
FIXED = tuple(Variant(f"fixed {c:g}", capacity=c) for c in (0.2, 0.4, 0.6, 0.8))
ADAPTIVE = Variant("adaptive", schedule="adaptive")
RANDOM = tuple(Variant(f"random {c:g}", capacity=c, routing="random") for c in (0.2, 0.6))
SAME_FLOPS = Variant("same FLOPs 0.4", capacity=0.4, same_flops=True)
ALPHA = (
    Variant("fixed 0.2, alpha 0.1", capacity=0.2, alpha_init=0.1),
    Variant("adaptive, alpha 0.1", schedule="adaptive", alpha_init=0.1),
)


VARIANTS = (DENSE, *NARROW, *FIXED, SAME_FLOPS, ADAPTIVE, *ALPHA, *RANDOM)
"""In the order of tables."""


# --- measuring ------------------------------------------------------------------------------------


def measure_run(
    out: Path, name: str, variant: Variant, capacities: Sequence[float], max_batches: int
) -> None:
    """Measure a trained model.

    Args:
        out: The study's folder.
        name: Of the training.
        variant: The model.
        capacities: Effective ones to ask a nested model at with its own routing.
        max_batches: Batches of each split to score; -1 for all of it.
    """
    loaded = load_model(out / "runs" / name)
    args = loaded.model_args
    asked = {OWN: _ask(loaded, capacities if args.is_nested else (1.0,), max_batches)}
    if variant.controlled:
        untrained = with_untrained_router(loaded)
        by_chance = with_routing(loaded, "random")
        asked[UNTRAINED] = _ask(untrained, variant.controlled, max_batches)
        asked[RANDOMLY] = _ask(by_chance, variant.controlled, max_batches)
    own = own_capacity(args)
    trained = answer(loaded, "train", [own], max_batches)[own]
    content: dict[str, Any] = {
        "variant": variant.name,
        "seed": loaded.job_config.debug.seed,
        "step": loaded.step,
        "averaged": loaded.is_averaged,
        "parameters": args.num_total_parameters,
        "dense_macs_per_image": args.dense_macs_per_image,
        "asked": {routing: found.rows for routing, found in asked.items()},
        "train_accuracy": trained.top_1.double().mean().item(),
        "router": _describe_router(loaded) if args.is_nested else None,
    }
    images: dict[str, Any] = {
        f"{who}/{key}": v for who, found in asked.items() for key, v in found.images.items()
    }
    for split in SPLITS:
        numbers = [numbers for _, numbers in _read(loaded, split, max_batches)]
        images[numbers_of(split)] = torch.cat(numbers).numpy()
    path = out / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path.with_suffix(".npz"), **images)
    write_json(path, content)  # last: where it is, all is done


def numbers_of(split: str) -> str:
    """What the file of single images calls the images' numbers in a split."""
    return f"numbers/{split}"


class _Found(NamedTuple):
    """What a model made of the splits.

    Attributes:
        rows: What was measured at each capacity, of each split.
        images: Loss of each image, and whether it was right, by capacity and metric; means over
            draws, `(images,)` float32.
    """

    rows: dict[str, list[dict[str, Any]]]
    images: dict[str, NDArray[np.float32]]


def _ask(loaded: LoadedModel, capacities: Sequence[float], max_batches: int) -> _Found:
    args = loaded.model_args
    draws = DRAWS if args.is_nested and args.routing == "random" else 1
    rows: dict[str, list[dict[str, Any]]] = {}
    images = {}
    for split in SPLITS:
        drawn = [answer(loaded, split, capacities, max_batches, draw) for draw in range(draws)]
        rows[split] = []
        for capacity in capacities:
            losses = torch.stack([found[capacity].losses for found in drawn]).mean(0)
            right = torch.stack([found[capacity].top_1 for found in drawn]).double().mean(0)
            images[f"{capacity:g}/{split} loss"] = losses.float().numpy()
            images[f"{capacity:g}/{split}"] = right.float().numpy()
            row = {
                "capacity": capacity,
                "effective_capacity": drawn[0][capacity].capacity,
                "macs_per_image": args.macs_per_image(args.budget(capacity)),
                "images": len(losses),
                "loss": losses.mean().item(),
                "accuracy": right.mean().item(),
            }
            rows[split].append(row)
    return _Found(rows, images)


def with_untrained_router(loaded: LoadedModel) -> LoadedModel:
    """Put the weights back that the routers of a model had before training; keep all others.

    What routers say is scaled by alpha into the feed-forward networks; that changes, too.
    """
    model = MoNE(loaded.model_args)
    model.load_state_dict(loaded.model.state_dict() | _initial_routers(loaded.model_args))
    return dataclasses.replace(loaded, model=model.eval())


def _initial_routers(args: MoNEModelArgs) -> dict[str, Tensor]:
    """Parameters of the routers before training on the CPU; they depend on the seed alone."""
    model = MoNE(args)
    model.init_weights()
    return {name: v for name, v in model.state_dict().items() if name.startswith("routers.")}


@torch.no_grad()
def _describe_router(loaded: LoadedModel) -> dict[str, float]:
    """What became of a router: alpha, how sure it is, how far it is from where it began.

    Entropy is that of a patch's probabilities in nats, a mean over the patches of the first split.
    """
    model = cast(MoNE, loaded.model)
    initial = _initial_routers(loaded.model_args)
    name = "routers.0.weight"
    weights = model.state_dict()[name].flatten(), initial[name].flatten()
    total, count = 0.0, 0
    for images, _ in _read(loaded, SPLITS[0]):
        statistics = model(images).router
        assert statistics is not None
        total += statistics.entropy.mean().item() * len(images)
        count += len(images)
    return {
        "alpha": model.router_scale.alpha.mean().item(),
        "entropy": total / count,
        "cosine": F.cosine_similarity(*weights, dim=0).item(),
    }


def _read(
    loaded: LoadedModel, split: str, max_batches: int = -1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of a split as they are evaluated, without padding; images and their numbers in it."""
    config = loaded.job_config
    validation = dataclasses.replace(config.validation, steps=max_batches)
    config = dataclasses.replace(config, validation=validation)
    for inputs, labels in build_image_validation_dataloader(1, 0, config, split):
        is_image = labels[:, 0] != IGNORE_INDEX
        yield inputs["input"][is_image], inputs["sample_index"][is_image]


def measure_times(out: Path, rounds: int) -> None:
    """Time nested and dense models, alternately, in this process.

    Time depends on the capacity, not on what was learned: models are as they begin.

    Args:
        out: The study's folder.
        rounds: How often each is timed.
    """
    torch.manual_seed(0)
    args = model_args(ADAPTIVE)
    images = torch.rand(BATCH, args.in_channels, args.image_size, args.image_size) * 2 - 1
    models = {}
    for variant in (ADAPTIVE, DENSE, *NARROW):
        args = model_args(variant)
        args.init_seed = 0
        models[variant.name] = MoNE(args).eval()
        models[variant.name].init_weights()

    def run(variant: Variant, capacity: float | None = None) -> benchmark.Run:
        model = models[variant.name]
        return partial(model, images, model.model_args.budget(capacity))

    runs = {DENSE.name: run(DENSE), f"{DENSE.name} again": run(DENSE)}
    runs |= {variant.name: run(variant) for variant in NARROW}
    runs |= {f"{c:g}": run(ADAPTIVE, c) for c in CAPACITIES}
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
