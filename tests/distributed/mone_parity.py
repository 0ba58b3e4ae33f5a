"""What a parallel layout computes of a MoNE or ViT against one process, in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torchtitan.distributed import ParallelDims

from tests.distributed.mom_parity import MICROBATCHES, Run, errors_of_a_step, lay_out
from tests.distributed.parity import LAYOUTS, Layout, use_float64
from tests.jobs import debug_job
from torchtitan_mixtures.layout_checks import check_layout
from torchtitan_mixtures.models.mone.args import MoNEModelArgs
from torchtitan_mixtures.objectives.capacity import CapacitySchedule, own_capacity
from torchtitan_mixtures.objectives.classification import ClassificationLoss

# What is changed in a model's arguments.
VARIANTS: dict[str, dict[str, Any]] = {
    "nested": {},
    "dense": dict(num_experts=1),
    "all full": dict(capacity=1.0),
    "all small": dict(capacity=0.25),
    "alpha per layer": dict(alpha_per_layer=True),
    "two routers, later": dict(num_routers=2, router_layer=1, n_layers=3),
    "shared router": dict(num_routers=2, shared_router=True),
    "random": dict(routing="random"),
    "random, two routers": dict(routing="random", num_routers=2),
    "argmax": dict(routing="argmax"),
    "greedy": dict(allocation="greedy"),
    "skip": dict(allocation="skip"),
    "class token": dict(pool="class_token"),
}

MICROBATCH = 8  # neighbours are mixed: two for each of four ranks


@cache
def _base_job() -> Any:
    """Parsed once for each process: it takes longer than a step."""
    return debug_job(
        "mone", "--classification.mixup=0.4", "--classification.cutmix=1.0",
        "--classification.label_smoothing=0.1", "--nested.validation_capacities=0.5",
    )  # fmt: skip


def make_job(layout: Layout) -> Any:
    """The configuration of a job that runs a layout."""
    return lay_out(_base_job(), layout, MICROBATCH)


def make_args(variant: str) -> MoNEModelArgs:
    """The arguments of a variant of two narrow layers and 16 tokens."""
    sizes: dict[str, Any] = dict(dim=32, n_layers=2, n_heads=4, patch_size=2, image_size=8)
    sizes |= dict(in_channels=2, num_classes=5, num_experts=3, init_seed=3, tokens_multiple=4)
    return MoNEModelArgs(**(sizes | VARIANTS[variant]))


def make_batches(args: MoNEModelArgs) -> list[dict[str, torch.Tensor]]:
    """Random images, as the loader yields them."""
    rng = torch.Generator().manual_seed(1)
    batches = []
    for index in range(MICROBATCHES):
        shape = (MICROBATCH, args.in_channels, args.image_size, args.image_size)
        batches.append({
            "input": torch.rand(shape, generator=rng, dtype=torch.float32) * 2 - 1,
            "class_labels": torch.randint(args.num_classes, (MICROBATCH,), generator=rng),
            "sample_index": torch.arange(MICROBATCH) + index * MICROBATCH,
        })  # fmt: skip
    return batches


class NestedRun(Run):
    """A MoNE or ViT, under a layout or untouched, and a step of the trainer with it."""

    family = "mone"
    microbatch = MICROBATCH
    positions = 1

    def make_loss(self) -> ClassificationLoss:
        """The objective, at the capacity of the arguments."""
        schedule = CapacitySchedule(self.job.nested, 10, 7, own_capacity(self.args))
        return ClassificationLoss(self.args, self.job.classification, schedule, 7, self.dims)

    def start_step(self) -> None:
        """Let the objective forget what it noted before."""
        self.loss_fn.start_step(1)

    def loss(self, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        """The sum of the losses of a microbatch of this rank."""
        labels = torch.zeros(len(rows["input"]), 1, dtype=torch.int64)
        inputs, targets, extra, kwargs = self.loss_fn.prepare(
            self.model, None, rows, labels, self.dims, self.job
        )
        if targets.share is not None:  # drawn in float32 whatever the default is
            targets = targets._replace(share=targets.share.double())
        return self.loss_fn(self.model(inputs.double(), **extra, **kwargs), targets)


def make_runs(
    layout_name: str, variant: str, dims: ParallelDims, options: dict[str, Any]
) -> list[NestedRun]:
    """The parallel run, with further keys of the job, and one process's."""
    job, args = make_job(LAYOUTS[layout_name]), make_args(variant)
    for path, value in options.items():
        section, _, key = path.partition(".")
        setattr(getattr(job, section), key, value)
    check_layout(job, args)
    ones = dict(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1)
    single = NestedRun(False, make_job(Layout({})), args, ParallelDims(**ones, world_size=1))
    return [NestedRun(True, job, args, dims), single]


def route_segments(router: Any, parts: int) -> None:
    """Let a router of one process route each of several segments of an image by itself."""
    whole = router.forward

    def forward(x: torch.Tensor, budget: Any, scores: Any, num_full_tokens: int) -> Any:
        length = x.shape[1] // parts
        routings = [
            whole(
                x[:, start : start + length],
                budget.part_of_rank(parts),
                None if scores is None else scores[:, start : start + length],
                num_full_tokens,
            )
            for start in range(0, x.shape[1], length)
        ]
        # Tokens of an expert in all segments, then those of the next: as one budget has them.
        orders = [r.order + i * length for i, r in enumerate(routings)]
        counts = [*reversed(budget.part_of_rank(parts).tokens), budget.part_of_rank(parts).skipped]
        groups = zip(*(order.split(counts, 1) for order in orders), strict=True)
        order = torch.cat([torch.cat(group, 1) for group in groups], 1)
        experts, chosen = (
            torch.cat([getattr(r, name) for r in routings], 1)
            for name in ("experts", "probabilities")
        )
        rows = zip(*(r.statistics for r in routings), strict=True)
        statistics = type(routings[0].statistics)(*(torch.stack(r).mean(0) for r in rows))
        return routings[0]._replace(
            order=order, experts=experts, probabilities=chosen, statistics=statistics
        )

    router.forward = forward


def compare(
    layout: str, variants: list[str], options: dict[str, Any]
) -> dict[str, tuple[float, str]]:
    """For each variant: the largest relative error and where it is."""
    use_float64()
    dims, worst = LAYOUTS[layout].dims(), {}
    for variant in variants:
        run, single = make_runs(layout, variant, dims, options)
        if options.get("nested.context_routing") == "local":
            route_segments(single.model.routers["0"], dims.cp)
            # Its layers have the budget of all segments.
            part = make_args(variant).budget().part_of_rank(dims.cp)
            whole = type(part)(tuple(n * dims.cp for n in part.tokens), part.skipped * dims.cp)
            single.loss_fn._args.budget = lambda capacity=None, whole=whole: whole
        errors = errors_of_a_step(run, single, make_batches(run.args))
        worst[variant] = max((error, name) for name, error in errors.items())
    return worst
