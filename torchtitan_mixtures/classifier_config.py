"""The TOML sections of classifiers of images: `[classification]` and, of nested ones, `[nested]`.

`job_config.py` says what sections are in general.
"""

# No `from __future__ import annotations` here: TorchTitan merges the real types of the fields.

import math
from dataclasses import dataclass, field
from typing import Literal

from torchtitan_mixtures.config_values import check_rules, check_section


@dataclass
class Classification:
    """What a classifier of images learns from: its loss, and how training images are changed."""

    label_smoothing: float = 0.1
    """Share of a target that is spread evenly over all classes."""

    multi_label: bool = False
    """Score each class by itself, with a sigmoid, as where an image has several. Else one softmax
    over all classes."""

    mixup: float = 0.0
    """Blend pairs of images and their targets (arXiv 1710.09412): parameter of the beta
    distribution that the share is drawn from. 0 = never."""

    cutmix: float = 0.0
    """Paste a rectangle of an image into its partner (arXiv 1905.04899): parameter of the beta
    distribution that its area is drawn from. 0 = never. With `mixup` too, each pair does one of
    them, by a fair coin."""

    random_crop: float = 1.0
    """Least share of the area of a picture that a random crop, scaled to full size, keeps. 1 = no
    crops."""

    rand_augment_ops: int = 0
    """Random operations on each training image (RandAugment, arXiv 1909.13719). 0 = none."""

    rand_augment_magnitude: float = 9.0
    """How strong they are, from 0 to 10."""

    rand_augment_share: float = 1.0
    """Share of the training images that they are applied to."""

    random_erasing: float = 0.0
    """Share of the training images of which a rectangle is replaced by noise (arXiv
    1708.04896)."""

    def __post_init__(self) -> None:
        check_section("classification", self)
        rules = {
            "label_smoothing": (0 <= self.label_smoothing < 1, "at least 0 and below 1"),
            "mixup": (0 <= self.mixup < math.inf, "a finite number >= 0"),
            "cutmix": (0 <= self.cutmix < math.inf, "a finite number >= 0"),
            "random_crop": (0 < self.random_crop <= 1, "above 0 and at most 1"),
            "rand_augment_ops": (self.rand_augment_ops >= 0, "0 or more"),
            "rand_augment_magnitude": (0 <= self.rand_augment_magnitude <= 10, "from 0 to 10"),
            "rand_augment_share": (0 <= self.rand_augment_share <= 1, "from 0 to 1"),
            "random_erasing": (0 <= self.random_erasing <= 1, "from 0 to 1"),
        }
        check_rules("classification", self, rules)


@dataclass
class Nested:
    """How much of a nested model each token gets (`mone`). What is empty is as the flavour says.

    A capacity is the effective one of the paper: the mean share of the width that tokens get.
    """

    capacity: float = -1.0
    """Effective capacity, from 1 / 2^(experts - 1) to 1. -1 = what the flavour says."""

    schedule: Literal["constant", "linear", "cosine", "exponential", "adaptive"] = "constant"
    """How the capacity of training steps changes. `constant`: not. `linear`, `cosine` and
    `exponential`: from `start_capacity` down to `capacity`, in `schedule_levels` equal parts of the
    run. `adaptive`: drawn for each step from `capacities`, all alike."""

    start_capacity: float = 1.0
    """For schedules that go down: capacity of the first steps."""

    schedule_levels: int = 10
    """For schedules that go down: number of different capacities, each of which is compiled
    anew."""

    capacities: list[float] = field(
        default_factory=lambda: [0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]
    )
    """For `adaptive`: what is drawn from."""

    validation_capacities: list[float] = field(default_factory=list)
    """Capacities to validate at, each reported under its own name. Empty = `capacity` alone."""

    same_flops: bool = False
    """Train for longer than training.steps, by the factor that makes all steps together cost as
    many multiply-adds as training.steps of the dense model do ("isoFLOPs")."""

    allocation: Literal["", "entropy", "proportionate", "uniform", "greedy", "skip"] = ""
    """How a capacity is shared out to experts. `entropy`: as the paper does. `proportionate` and
    `uniform` to experts in inverse proportion to their width, and evenly: they have one capacity.
    `greedy`: to the largest and the smallest. `skip`: to the largest; other tokens skip the
    block."""

    delta: float = -1.0
    """For `entropy`: how much experts differ in what they earn, above 1. -1 = as the flavour."""

    beta: float = -1.0
    """For `entropy`: weight of the entropy, above 0. -1 = as the flavour."""

    incentive: Literal["", "multiplicative", "divisive"] = ""
    """For `entropy`: whether larger experts earn `delta` times as much or as little as the next."""

    routing: Literal["", "expert_preferred", "argmax", "random"] = ""
    """Who decides. `expert_preferred`: experts choose tokens, the largest first. `argmax`: tokens
    choose their likeliest expert; for analysis, whatever the capacity, and as dear as a dense
    model. `random`: no one, as a control."""

    router_layer: int = -1
    """First block with routed tokens; blocks before it are dense. -1 = as the flavour."""

    num_routers: int = -1
    """Routers, evenly spaced over the blocks from `router_layer` on. -1 = as the flavour."""

    shared_router: bool = False
    """Let all routers have the same weights."""

    alpha_init: float = -1.0
    """Initial value of alpha, which scales what the router says in the output of the feed-forward
    network; with 0 the router learns nothing until alpha has moved. -1 = as the flavour."""

    alpha_per_layer: bool = False
    """Let each block have an alpha of its own."""

    tokens_multiple: int = 1
    """Round the numbers of tokens that larger experts get down to a multiple of this."""

    context_routing: Literal["global", "local"] = "global"
    """Under context parallelism. `global`: experts choose among all tokens of an image, as on one
    process. `local`: among those of each rank, which is another model."""

    kernels: Literal["plain", "triton"] = "plain"
    """What computes nested layers: matrix products of PyTorch, or own kernels (GPUs only; not yet
    measured there)."""

    def __post_init__(self) -> None:
        check_section("nested", self)
        rules = {
            "capacity": (
                self.capacity == -1 or 0 < self.capacity <= 1,
                "above 0 and at most 1 (-1: as the flavour)",
            ),
            "start_capacity": (0 < self.start_capacity <= 1, "above 0 and at most 1"),
            "schedule_levels": (self.schedule_levels >= 2, "2 or more"),
            "capacities": (
                bool(self.capacities) and all(0 < c <= 1 for c in self.capacities),
                "numbers above 0 and at most 1",
            ),
            "validation_capacities": (
                all(0 < c <= 1 for c in self.validation_capacities),
                "numbers above 0 and at most 1",
            ),
            "delta": (
                self.delta == -1 or 1 < self.delta < math.inf,
                "above 1 (-1: as the flavour)",
            ),
            "beta": (self.beta == -1 or 0 < self.beta < math.inf, "above 0 (-1: as the flavour)"),
            "router_layer": (self.router_layer >= -1, "0 or more (-1: as the flavour)"),
            "num_routers": (
                self.num_routers == -1 or self.num_routers >= 1,
                "1 or more (-1: as the flavour)",
            ),
            "alpha_init": (
                self.alpha_init == -1 or 0 <= self.alpha_init < 1,
                "at least 0 and below 1 (-1: as the flavour)",
            ),
            "tokens_multiple": (self.tokens_multiple >= 1, "1 or more"),
        }
        check_rules("nested", self, rules)
