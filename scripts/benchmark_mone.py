"""Rows of `scripts/benchmark.py mone`: nested models and blocks beside their dense twins."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

# First: it points TorchTitan at the CPU if need be.
import torchtitan_mixtures  # noqa: F401  # isort: skip

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures import benchmark as measure
from torchtitan_mixtures.benchmark import Table
from torchtitan_mixtures.models.mone.args import MoNEModelArgs
from torchtitan_mixtures.models.mone.block import NestedBlock
from torchtitan_mixtures.models.mone.capacity import Budget
from torchtitan_mixtures.models.mone.model import MoNE

CONFIG = Path(__file__).parent.parent / "train_configs" / "mone" / "debugmodel.toml"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = ("S/16", "B/16")
CAPACITIES = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
BATCH = 16
LAYERS = 2
"""Of models, unless said otherwise: a step of all twelve takes a CPU many seconds."""

MUST, AIM = 1.9, 2.2
"""Targets of the throughput of a training step of B/16 at capacity 0.3, dense = 1."""

DENSE = "dense"
COLUMNS = [
    *("variant", "e_c", "ms", "time to dense [quartiles]", "throughput", "dense MACs / MACs"),
    *("time / MACs", "must", "aim", ""),
]


def twins(size: str, layers: int | None) -> tuple[MoNEModelArgs, MoNEModelArgs]:
    """Arguments of a dense model and of the nested one of its size.

    Args:
        size: Flavour of the nested one.
        layers: Blocks of both; None: as many as the flavours have.
    """
    table = get_train_spec("mone").model_args
    dense, nested = (
        cast(MoNEModelArgs, table[flavor])  # a copy each time
        for flavor in (f"ViT-{size}", size)
    )
    if layers is not None:
        dense, nested = (replace(args, n_layers=layers) for args in (dense, nested))
    return dense, nested


def capacities(options: argparse.Namespace) -> list[float]:
    """Effective capacities to measure."""
    return options.capacities or ([0.3, 0.6] if options.quick else list(CAPACITIES))


def budgets(args: MoNEModelArgs, options: argparse.Namespace) -> dict[str, Budget]:
    """What each nested variant spends, by its name."""
    return {f"nested {e_c:g}": args.budget(e_c) for e_c in capacities(options)}


def shake(module: nn.Module) -> None:
    """Give all parameters values that make their branches count; those of a head begin as zero."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)


def draw_batch(
    args: MoNEModelArgs, batch: int, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Images and classes."""
    rng = torch.Generator().manual_seed(seed)
    shape = (batch, args.in_channels, args.image_size, args.image_size)
    images = 2 * torch.rand(shape, generator=rng) - 1
    labels = torch.randint(args.num_classes, (batch,), generator=rng)
    return images.to(device), labels.to(device)


def build_block(args: MoNEModelArgs) -> NestedBlock:
    """One block of a model."""
    block = NestedBlock(
        args.dim,
        args.n_heads,
        args.num_experts,
        mlp_ratio=args.mlp_ratio,
        norm_eps=args.norm_eps,
    )
    shake(block)
    return block


def pytorch_block(args: MoNEModelArgs) -> nn.Module:
    """PyTorch's own layer of the dense block's size: says whether the dense twin is a fair one."""
    layer = nn.TransformerEncoderLayer(
        args.dim,
        args.n_heads,
        args.hidden_dim,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    shake(layer)
    return layer


def draw_tokens(args: MoNEModelArgs, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sorted tokens `(batch, seq, dim)`, neighbours in memory as in the model; offsets."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(args.seq_len, batch, args.dim, generator=rng).transpose(0, 1)
    return x, 0.1 * torch.rand(batch, args.seq_len, 1, generator=rng)


def block_runs(
    size: str, dtype: torch.dtype, mode: str, options: argparse.Namespace, device: torch.device
) -> dict[str, measure.Run]:
    """Forward and backward passes of one block of each variant."""
    dense, nested = twins(size, None)
    tokens, offset = (t.to(device, dtype) for t in draw_tokens(dense, options.batch))

    def run(block: nn.Module, x: Tensor, *arguments: Any) -> measure.Run:
        measure.set_dtype(block, dtype, device)
        called = torch.compile(block, fullgraph=True) if mode == "compiled" else block
        x = x.detach().requires_grad_()
        return lambda: measure.differentiate(lambda x: called(x, *arguments), x, block)

    base = run(build_block(dense), tokens, dense.budget())
    runs = {DENSE: base, f"{DENSE} again": base}
    runs["PyTorch's layer"] = run(pytorch_block(dense), tokens.contiguous())
    for name, budget in budgets(nested, options).items():
        # A block each: a compiled one takes every budget to be the only one.
        runs[name] = run(build_block(nested), tokens, budget, offset)
    return runs


def add_rows(
    table: Table,
    seconds: Mapping[str, list[float]],
    macs: Mapping[str, int],
    spent: Mapping[str, Budget],
    target: str | None = None,
) -> None:
    """Add a row of each variant.

    Args:
        table: Table with `COLUMNS`.
        seconds: Times of each variant.
        macs: Multiply-adds of an image, by variant; of others, the dense ones.
        spent: Budgets of nested variants.
        target: The variant that has targets.
    """
    floor = measure.ratio(seconds, f"{DENSE} again", DENSE)
    for name, values in seconds.items():
        spread = measure.ratio(seconds, name, DENSE)
        ms = measure.Spread.of(values).median * 1000
        saved = macs[DENSE] / macs.get(name, macs[DENSE])
        e_c = spent[name].effective_capacity if name in spent else 1.0
        table.add(
            *(name, f"{e_c:.3f}", f"{ms:.1f}", spread, f"{1 / spread.median:.2f}"),
            *(f"{saved:.2f}", f"{spread.median * saved:.3f}"),
            *((f"{MUST:g}", f"{AIM:g}") if name == target else ("", "")),
            measure.judge(spread.median, 1 / MUST, 1 / AIM, floor) if name == target else "",
            variant=name,
            effective_capacity=e_c,
            milliseconds=ms,
            ratio=[spread.low, spread.median, spread.high],
            throughput=1 / spread.median,
            macs_per_image=macs.get(name, macs[DENSE]),
            mac_ratio=saved,
        )
    table.notes.append(f"{len(seconds[DENSE])} rounds; e_c as rounding to whole tokens leaves it")


def measure_block(
    size: str, dtype: str, mode: str, options: argparse.Namespace, device: torch.device
) -> Table:
    """Time the blocks of one size."""
    title = f"mone block {size}, {options.batch} images, forward and backward, {dtype}, {mode}"
    table = Table(title, COLUMNS)
    if mode == "compiled" and device.type == "cpu" and not measure.has_cpp_compiler():
        table.notes.append("skipped: inductor finds no C++ compiler (CXX, g++ or clang++)")
        return table
    torch._dynamo.reset()
    dense, nested = twins(size, None)
    spent = budgets(nested, options)
    macs = {name: nested.macs_per_block(budget) for name, budget in spent.items()}
    macs[DENSE] = dense.macs_per_block()
    runs = block_runs(size, DTYPES[dtype], mode, options, device)
    rounds = options.rounds or (7 if options.quick else 20)
    limit = math.inf if options.rounds else 15 if options.quick else 60
    seconds = measure.time_interleaved(runs, rounds, limit=limit, timer=measure.timer_for(device))
    add_rows(table, seconds, macs, spent)
    return table


def cases(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Sizes and precisions to measure."""
    sizes = options.sizes or (["B/16"] if options.quick else list(SIZES))
    dtypes = options.dtypes or list(DTYPES)
    return [(size, dtype) for size in sizes for dtype in dtypes]


def measure_blocks(options: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Time blocks under all cases."""
    for size, dtype in cases(options):
        for mode in options.modes or ["eager"]:
            yield measure_block(size, dtype, mode, options, device)


def cast_inputs(dtype: torch.dtype, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast what goes into a layer, as FSDP does: what the router says is float32."""
    return tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in inputs)


class Training:
    """Training steps of a model on one batch, in mixed precision as FSDP's, without communication.

    Args:
        args: Arguments of the model.
        dtype: Of all computation; the optimizer's weights are float32 in any case.
        batch: Images of a step.
        device: Where.
    """

    def __init__(
        self, args: MoNEModelArgs, dtype: torch.dtype, batch: int, device: torch.device
    ) -> None:
        self.model = MoNE(args)
        shake(self.model)
        measure.set_dtype(self.model, dtype, device)
        for layer in self.model.layers.values():
            layer.register_forward_pre_hook(partial(cast_inputs, dtype))
        self.images, self.labels = draw_batch(args, batch, device)
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.masters: list[Tensor] = self.parameters
        if dtype != torch.float32:
            self.masters = [nn.Parameter(p.detach().float()) for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=True)

    def forward(self, budget: Budget | None = None) -> Tensor:
        """Logits of the batch, without a graph for gradients."""
        with torch.no_grad():
            return self.model(self.images, budget).logits

    def step(self, budget: Budget | None = None) -> None:
        """One training step: forward, backward, clipping, AdamW."""
        self.model.zero_grad(set_to_none=True)
        logits = self.model(self.images, budget).logits
        F.cross_entropy(logits.float(), self.labels).backward()
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
        nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.optimizer.step()
        if self.masters is not self.parameters:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)


def measure_model(
    kind: str, size: str, dtype: str, options: argparse.Namespace, device: torch.device
) -> Table:
    """Time whole models of one size: passes forward, or training steps."""
    full = twins(size, None)[0].n_layers
    dense, nested = twins(size, options.layers)
    title = f"mone {kind} {size}, {options.layers} of {full} layers, {options.batch} images"
    table = Table(f"{title}, {dtype}, eager", COLUMNS)
    spent = budgets(nested, options)
    macs = {name: nested.macs_per_image(budget) for name, budget in spent.items()}
    macs[DENSE] = dense.macs_per_image()
    models = [Training(args, DTYPES[dtype], options.batch, device) for args in (dense, nested)]
    of_dense, of_nested = ((m.forward if kind == "forward" else m.step) for m in models)
    runs: dict[str, measure.Run] = {DENSE: of_dense, f"{DENSE} again": of_dense}
    runs.update({name: partial(of_nested, budget) for name, budget in spent.items()})
    rounds = options.rounds or (5 if options.quick else 10)
    limit = math.inf if options.rounds else 20 if options.quick else 120
    seconds = measure.time_interleaved(runs, rounds, limit=limit, timer=measure.timer_for(device))
    has_target = (kind, size, dtype, options.layers) == ("training step", "B/16", "fp32", full)
    add_rows(table, seconds, macs, spent, "nested 0.3" if has_target else None)
    if options.layers != full:
        table.notes.append(f"a model cut short; all of it: --layers {full}")
    return table


def measure_forward(options: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Time models without gradients, as they are used."""
    for size, dtype in cases(options):
        yield measure_model("forward", size, dtype, options, device)


def measure_training(options: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Time whole training steps."""
    for size, dtype in cases(options):
        yield measure_model("training step", size, dtype, options, device)


def attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *unused: Any, **named: Any) -> int:
    """FLOPs of attention, given the shapes of its inputs."""
    return sdpa_flop_count(q, k, v)


def count_flops(args: MoNEModelArgs, budget: Budget, device: torch.device) -> int:
    """FLOPs of one image, forward, counted while a model runs."""
    # The counter does not know the fused attention of a CPU by itself.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={fused: attention_flops})
    model, images = MoNE(args).to(device), draw_batch(args, 1, device)[0]
    with torch.no_grad(), counter:
        model(images, budget)
    return counter.get_total_flops()


def measure_flops(options: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Compare counted FLOPs with the formulas, at full depth."""
    columns = ["variant", "e_c", "GMACs counted", "formula", "dense / this"]
    for size in options.sizes or SIZES:
        dense, nested = twins(size, None)
        table = Table(f"mone FLOPs {size}, one image, {dense.n_layers} layers", columns)
        variants = {DENSE: (dense, dense.budget())}
        variants.update({name: (nested, b) for name, b in budgets(nested, options).items()})
        for name, (args, budget) in variants.items():
            counted, formula = count_flops(args, budget, device) / 2, args.macs_per_image(budget)
            table.add(
                *(name, f"{budget.effective_capacity:.3f}", f"{counted / 1e9:.4f}"),
                f"{formula / 1e9:.4f}" + ("" if formula == counted else " DIFFERS"),
                f"{dense.macs_per_image() / formula:.2f}",
                variant=name,
                effective_capacity=budget.effective_capacity,
                macs_counted=counted,
                macs_formula=formula,
            )
        yield table


def measure_counts(options: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Count reads by the host, and graphs: one of each capacity, whatever tokens are chosen."""
    columns = ["variant", "host reads", "which", "graphs", "graph breaks"]
    table = Table("mone counts: forward and backward of S/16, 2 layers, 4 batches", columns)
    dense, nested = twins("S/16", 2)
    spent = budgets(nested, options)
    variants: dict[str, tuple[MoNEModelArgs, list[Budget]]] = {DENSE: (dense, [dense.budget()])}
    variants.update({name: (nested, [budget]) for name, budget in spent.items()})
    variants[f"these {len(spent)} in turn"] = (nested, list(spent.values()))
    for name, (args, in_turn) in variants.items():
        model = MoNE(args).to(device)
        shake(model)

        def step(images: Tensor, budget: Budget, model: MoNE = model) -> None:
            model(images, budget).logits.square().mean().backward()

        batches = [draw_batch(args, 2, device, seed)[0] for seed in range(4)]
        steps = [partial(step, images, budget) for images in batches for budget in in_turn]
        reads = measure.host_reads(steps[0])
        graphs, breaks = measure.count_graphs(model.layers.values(), steps)
        kinds = ", ".join(f"{reads.count(kind)} {kind}" for kind in sorted(set(reads)))
        table.add(
            *(name, len(reads), kinds or "-", graphs, breaks),
            variant=name,
            host_reads=len(reads),
            graphs=graphs,
            graph_breaks=breaks,
        )
    table.notes.append("graphs of the blocks of the model, each compiled by itself as in training")
    yield table


def measure_startup(options: argparse.Namespace, device: torch.device) -> list[Table]:
    """Time fresh processes until their first step."""
    return [measure.startup_table("mone", CONFIG, must=20, aim=10)]


ROWS: dict[str, Callable[[argparse.Namespace, torch.device], Iterable[Table]]] = {
    "block": measure_blocks,
    "forward": measure_forward,
    "training": measure_training,
    "flops": measure_flops,
    "counts": measure_counts,
    "startup": measure_startup,
}
