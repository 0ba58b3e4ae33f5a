"""Rows of `scripts/benchmark.py mixdiff`: mixtures of diffusers beside single experts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

# First: it points TorchTitan at the CPU if need be.
import torchtitan_mixtures  # noqa: F401  # isort: skip

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from torchtitan_mixtures import benchmark as measure
from torchtitan_mixtures.benchmark import Spread, Table
from torchtitan_mixtures.models.mixdiff.args import MixDiffModelArgs
from torchtitan_mixtures.models.mixdiff.model import MixtureOfDiffusers
from torchtitan_mixtures.objectives.outputs import DenoiserOutput

CONFIG = Path(__file__).parent.parent / "train_configs" / "mixdiff" / "debugmodel.toml"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXPERTS = ("mom/DiT-S/4", "mom/DiT-S/2", "mom/DiT-B/4", "mom/debugmodel_dit")
NUM_EXPERTS = (4, 8)
TOP_K = (1, 2)
BATCH = 32
COPIES = 2
"""Halves of a batch in guidance: with the condition and without."""

MUST, AIM = 1.10, 1.03
"""Targets of (time of top-k of K) / (k times the time of one expert on the whole batch)."""

FORCED = 100.0
"""Is added to the logits of experts that shall be chosen; random routers would starve some."""

DRAW_SEED = 5
"""The first seed by which, at the default sizes, no expert is without samples."""

ONE, AGAIN = "one expert", "one expert again"
COLUMNS = ["variant", "ms", "time to k experts [quartiles]", "MACs to k experts", "must", "aim", ""]


@dataclass(frozen=True)
class Case:
    """What a table is measured with."""

    num_experts: int = NUM_EXPERTS[0]
    dtype: str = "fp32"
    expert: str = EXPERTS[0]
    batch: int = BATCH

    def __str__(self) -> str:
        return f"{self.num_experts} x {self.expert}, {self.batch} samples, {self.dtype}, eager"

    @property
    def args(self) -> MixDiffModelArgs:
        """Arguments of the mixture."""
        return MixDiffModelArgs(experts=(self.expert,) * self.num_experts, router_noise=1.0)


@dataclass(frozen=True)
class Draw:
    """Experts of each sample, drawn evenly at random.

    Attributes:
        chosen: Their numbers, `(samples, top_k)` int64.
        num_experts: How many experts there are.
    """

    chosen: Tensor
    num_experts: int

    @property
    def gates(self) -> Tensor:
        """The same weight for all chosen ones, `(samples, experts)` float32."""
        empty = torch.zeros(len(self.chosen), self.num_experts, device=self.chosen.device)
        return empty.scatter(1, self.chosen, 1 / self.chosen.shape[1])

    @property
    def noise(self) -> Tensor:
        """What added to any logits makes the router choose them, `(samples, experts)`."""
        return FORCED * (self.gates > 0)

    def __str__(self) -> str:
        counts = self.chosen.flatten().bincount(minlength=self.num_experts).tolist()
        return f"top-{self.chosen.shape[1]} {' '.join(map(str, counts))}"


def draw_experts(case: Case, top_k: int, samples: int, device: torch.device) -> Draw:
    """Draw the experts of so many samples."""
    generator = torch.Generator().manual_seed(DRAW_SEED)
    scores = torch.rand(samples, case.num_experts, generator=generator)
    return Draw(scores.topk(top_k, 1).indices.to(device), case.num_experts)


def build(case: Case, device: torch.device) -> MixtureOfDiffusers:
    """A mixture whose weights make its branches count; its router computes in float32."""
    torch.manual_seed(0)
    model = MixtureOfDiffusers(case.args)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.to(device)
    measure.set_dtype(model.experts, DTYPES[case.dtype], device)
    return model


def draw_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Noised images, times and classes."""
    args, generator = case.args, torch.Generator().manual_seed(0)
    shape = (case.batch, args.in_channels, args.image_size, args.image_size)
    inputs = {
        "latents": torch.randn(shape, generator=generator),
        "times": 1000 * torch.rand(case.batch, generator=generator),
        "class_labels": torch.randint(args.num_classes, (case.batch,), generator=generator),
    }
    return {name: value.to(device) for name, value in inputs.items()}


def training_step(model: nn.Module, inputs: Mapping[str, Any], top_k: int = 1) -> None:
    """Forward and backward, of a router too. Frees the gradients, each its own and in its time."""
    set_top_k(model, top_k)
    output = model(**inputs)
    roots = [output.prediction, output.router_logits]
    roots = [root for root in roots if root is not None]
    torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    model.zero_grad(set_to_none=True)


def sampling_step(model: nn.Module, inputs: Mapping[str, Any], top_k: int = 1) -> None:
    """Forward without gradients."""
    set_top_k(model, top_k)
    with torch.no_grad():
        model(**inputs)


def set_top_k(model: nn.Module, top_k: int) -> None:
    """Set how many experts the router chooses; a single expert has none."""
    if isinstance(model, MixtureOfDiffusers):
        model.model_args.top_k = top_k


def routing_of_training(draw: Draw) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What makes a mixture train the drawn experts: with its router, and without.

    One expert is that of a sample's domain (decentralised); several the router weighs (joint).
    """
    if draw.chosen.shape[1] == 1:
        own = {"domain_labels": draw.chosen[:, 0]}
        return own, {**own, "gates": draw.gates}
    return {"router_noise": draw.noise}, {"gates": draw.gates}


def routing_of_sampling(draw: Draw) -> tuple[dict[str, Any], dict[str, Any]]:
    """What makes a mixture sample with the drawn experts: with its router, and without."""
    return (
        {"router_noise": draw.noise, "copies": COPIES},
        {"gates": draw.gates, "copies": COPIES},
    )


@dataclass(frozen=True)
class Kind:
    """What is done with a mixture.

    Attributes:
        title: In words.
        step: What is timed.
        routing: Inputs by which it uses the drawn experts.
        copies: The batch is so many copies of its samples.
        seconds: Limit of a table.
    """

    title: str
    step: Callable[..., None]
    routing: Callable[[Draw], tuple[dict[str, Any], dict[str, Any]]]
    copies: int
    seconds: float


KINDS = {
    "training": Kind("forward and backward", training_step, routing_of_training, 1, 60),
    "sampling": Kind("forward", sampling_step, routing_of_sampling, COPIES, 30),
}


def expected_cost(args: MixDiffModelArgs, copies: int, *, with_router: bool) -> float:
    """Multiply-adds of a mixture for each row of a batch, to those of `top_k` experts alone."""
    router = args.router_macs_per_image()
    experts = args.macs_per_image() - router
    return 1 + with_router * router / copies / experts


def time_runs(
    runs: dict[str, Callable[[], None]], options: argparse.Namespace, limit: float, device: Any
) -> dict[str, list[float]]:
    """Time variants, among them the first one again."""
    runs[AGAIN] = runs[ONE]
    rounds = options.rounds or (5 if options.quick else 15)
    seconds = math.inf if options.rounds else limit / 2 if options.quick else limit
    return measure.time_interleaved(runs, rounds, limit=seconds, timer=measure.timer_for(device))


def add_row(
    table: Table,
    seconds: Mapping[str, list[float]],
    name: str,
    count: int = 1,
    macs: float = 1.0,
    *,
    is_judged: bool = False,
) -> None:
    """Add a variant that does the work of so many single experts."""
    of_one = measure.ratio(seconds, name, ONE)
    spread = Spread(*(value / count for value in (of_one.median, of_one.low, of_one.high)))
    ms = Spread.of(seconds[name]).median * 1000
    floor = measure.ratio(seconds, AGAIN, ONE)
    table.add(
        *(name, f"{ms:.0f}", spread, f"{macs:.3f}"),
        *((f"{MUST:.2f}", f"{AIM:.2f}") if is_judged else ("", "")),
        measure.judge(spread.median, MUST, AIM, floor) if is_judged else "",
        variant=name,
        milliseconds=ms,
        single_experts=count,
        ratio=[spread.low, spread.median, spread.high],
        mac_ratio=macs,
    )


def measure_mixture(
    kind: Kind, case: Case, options: argparse.Namespace, device: torch.device
) -> Table:
    """Time mixtures, with the router and without, beside one expert on the whole batch."""
    guidance = ", guided" if kind.copies > 1 else ""
    table = Table(f"mixdiff top-k, {kind.title}{guidance}, {case}", COLUMNS)
    model, inputs = build(case, device), draw_inputs(case, device)
    single = next(iter(model.experts.values()))
    runs: dict[str, Callable[[], None]] = {ONE: partial(kind.step, single, inputs)}
    draws: dict[int, Draw] = {}
    for top_k in options.top_k:
        draws[top_k] = draw_experts(case, top_k, case.batch // kind.copies, device)
        routed, given = kind.routing(draws[top_k])
        runs[f"top-{top_k}"] = partial(kind.step, model, {**inputs, **routed}, top_k)
        runs[f"top-{top_k}, no router"] = partial(kind.step, model, {**inputs, **given}, top_k)
    seconds = time_runs(runs, options, kind.seconds, device)
    for name in (ONE, AGAIN):
        add_row(table, seconds, name)
    for top_k in options.top_k:
        model.model_args.top_k = top_k
        for suffix in ("", ", no router"):
            macs = expected_cost(model.model_args, kind.copies, with_router=not suffix)
            is_judged = case.dtype == "fp32" and not suffix
            add_row(table, seconds, f"top-{top_k}{suffix}", top_k, macs, is_judged=is_judged)
    counts, rows = "; ".join(map(str, draws.values())), kind.copies
    table.notes.append(f"{len(seconds[ONE])} rounds; MACs by formula")
    table.notes.append(f"samples of each expert, {rows} row(s) a sample: {counts}")
    return table


class Loop(nn.Module):
    """Equal experts on equally many rows each, one after the other."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, **inputs: Tensor) -> DenoiserOutput:
        """Run; inputs `(experts * rows, ...)`, those of an expert next to each other."""
        parts = {name: value.chunk(len(self.experts)) for name, value in inputs.items()}
        outputs = [
            expert(**{name: part[number] for name, part in parts.items()}).prediction
            for number, expert in enumerate(self.experts)
        ]
        return DenoiserOutput(torch.cat(outputs))


class Stacked(nn.Module):
    """The same as one batched model, whose weights are those of all experts, stacked."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        weights, self.tables = stack_module_state(list(experts))
        self.names, self.count = list(weights), len(experts)
        self.weights = nn.ParameterList(weights.values())
        self.forms = (experts[0],)  # hidden from this module: its own weights are not used

    def forward(self, **inputs: Tensor) -> DenoiserOutput:
        """Run; inputs as for `Loop`."""

        def run(weights: Any, tables: Any, inputs: Any) -> Tensor:
            return functional_call(self.forms[0], (weights, tables), kwargs=inputs).prediction

        weights = dict(zip(self.names, self.weights, strict=True))
        rows = {name: value.unflatten(0, (self.count, -1)) for name, value in inputs.items()}
        return DenoiserOutput(vmap(run)(weights, self.tables, rows).flatten(0, 1))


def measure_stack(kind: Kind, case: Case, options: argparse.Namespace, device: Any) -> Table:
    """Time equal experts on equally many rows, stacked and one after the other."""
    table = Table(f"mixdiff equal experts, {kind.title}, {case}", COLUMNS)
    inputs = draw_inputs(case, device)
    experts = list(build(case, device).experts.values())
    models = {ONE: experts[0], "loop": Loop(experts), "stacked": Stacked(experts)}
    runs: dict[str, Callable[[], None]] = {
        name: partial(kind.step, model, inputs) for name, model in models.items()
    }
    seconds = time_runs(runs, options, kind.seconds / 2, device)
    for name in seconds:
        add_row(table, seconds, name)
    rows = case.batch // case.num_experts
    table.notes.append(f"{len(seconds[ONE])} rounds; {rows} rows each, without router and dispatch")
    return table


def cases(options: argparse.Namespace) -> list[Case]:
    """What to measure.

    Raises:
        ValueError: Names `--batch` or `--top-k` if experts cannot have the samples.
    """
    quick = 1 if options.quick else None
    found = [
        Case(num_experts, dtype, options.expert, options.batch)
        for num_experts, dtype in product(
            options.num_experts or NUM_EXPERTS[:quick], options.dtypes or list(DTYPES)[:quick]
        )
    ]
    for case in found:
        if options.batch < 1 or options.batch % math.lcm(COPIES, case.num_experts):
            raise ValueError(
                f"--batch {options.batch}: must be a multiple of {COPIES} (guidance) and of "
                f"--num-experts {case.num_experts} (equal rows)."
            )
        if not all(1 <= top_k <= case.num_experts for top_k in options.top_k):
            raise ValueError(
                f"--top-k {options.top_k}: must be from 1 to --num-experts {case.num_experts}."
            )
    return found


def measure_kind(name: str, options: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Time mixtures under all cases."""
    for case in cases(options):
        yield measure_mixture(KINDS[name], case, options, device)


def measure_stacks(options: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Time stacked experts under all cases."""
    for case, kind in product(cases(options), KINDS.values()):
        yield measure_stack(kind, case, options, device)


def measure_counts(options: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Count reads by the host, of small experts."""
    table = Table("mixdiff counts: host reads of a step", ["variant", "host reads", "which"])
    case = Case(expert="mom/debugmodel_dit", batch=8)
    model, inputs = build(case, device), draw_inputs(case, device)
    for (name, kind), top_k in product(KINDS.items(), TOP_K):
        draw = draw_experts(case, top_k, case.batch // kind.copies, device)
        for suffix, routing in zip(("", ", given weights"), kind.routing(draw), strict=True):
            run = partial(kind.step, model, {**inputs, **routing}, top_k)
            reads = measure.host_reads(run)
            kinds = ", ".join(f"{reads.count(read)} {read}" for read in sorted(set(reads)))
            variant = f"{name}, top-{top_k}{suffix}"
            table.add(variant, len(reads), kinds or "-", variant=variant, host_reads=len(reads))
    yield table


def measure_startup(options: argparse.Namespace, device: torch.device) -> list[Table]:
    """Time fresh processes until their first step."""
    return [measure.startup_table("mixdiff", CONFIG, must=20, aim=10)]


ROWS: dict[str, Callable[[argparse.Namespace, torch.device], Iterable[Table]]] = {
    **{name: partial(measure_kind, name) for name in KINDS},
    "stacked": measure_stacks,
    "counts": measure_counts,
    "startup": measure_startup,
}
