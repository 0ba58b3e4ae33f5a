"""Rows of `scripts/benchmark.py mom`: MoM blocks and models beside DiT's."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

# First: it points TorchTitan at the CPU if need be.
import torchtitan_mixtures  # noqa: F401  # isort: skip

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures import benchmark as measure
from torchtitan_mixtures.benchmark import Table
from torchtitan_mixtures.models.common.dit import DiTBlock
from torchtitan_mixtures.models.mom.args import MoMModelArgs
from torchtitan_mixtures.models.mom.model import MoM, MoMBlock
from torchtitan_mixtures.train import parse_job

CONFIG = Path(__file__).parent.parent / "train_configs" / "mom" / "debugmodel.toml"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH = 32
MUST, AIM = 1.15, 1.05
"""Targets of (time ratio to DiT) / (ratio of multiply-adds) of the typed MoM-S/4 block."""

SIZES = ("S/4", "B/4")


def variants(size: str) -> dict[str, MoMModelArgs]:
    """The models that are compared, by name."""
    table = get_train_spec("mom").model_args
    dit, typed = (
        cast(MoMModelArgs, table[f"{family}-{size}"])  # a copy each time
        for family in ("DiT", "MoM")
    )
    free = cast(MoMModelArgs, table[f"MoM-{size}"])
    free.min_token_experts = free.min_channel_experts = 0
    found: dict[str, Any] = {"DiT": dit, "DiT again": dit, "typed": typed, "free": free}
    if f"MoM-{size}-matched" in table:
        found["typed, matched"] = table[f"MoM-{size}-matched"]
    return found


def build_block(args: MoMModelArgs) -> nn.Module:
    """One block of a model, with weights that make its branches count."""
    torch.manual_seed(0)
    block: nn.Module
    if args.mixer == "pool":
        block = MoMBlock(args)
    else:
        block = DiTBlock(args.dim, args.n_heads, args.ffn_hidden_dim)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def draw_inputs(args: MoMModelArgs, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Activations and conditions; samples have levels of their own, so that routers tell them."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, args.num_tokens, args.dim, generator=rng)
    x = x + torch.randn(batch, 1, args.dim, generator=rng)
    return x, torch.randn(batch, args.dim, generator=rng)


def block_forward(
    args: MoMModelArgs, dtype: torch.dtype, mode: str, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], Tensor, nn.Module]:
    """A block as a function of its activations alone, these, and the block."""
    block = build_block(args)
    measure.set_dtype(block, dtype, device)
    x, condition = (t.to(device, dtype) for t in draw_inputs(args, BATCH))
    called = torch.compile(block, fullgraph=True) if mode == "compiled" else block

    def forward(x: Tensor) -> Tensor:
        output = called(x, condition)
        return output[0] if isinstance(output, tuple) else output

    return forward, x.requires_grad_(), block


def attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *unused: Any, **named: Any) -> int:
    """FLOPs of attention, given the shapes of its inputs."""
    return sdpa_flop_count(q, k, v)


def multiply_adds(args: MoMModelArgs, device: torch.device) -> float:
    """Multiply-adds of a block's forward pass for each sample, counted while it runs."""
    forward, x, _ = block_forward(args, torch.float32, "eager", device)
    # The counter does not know the fused attention of a CPU by itself.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={fused: attention_flops})
    with torch.no_grad(), counter:
        forward(x)
    return counter.get_total_flops() / 2 / len(x)


def measure_block(
    size: str, dtype: str, mode: str, options: argparse.Namespace, device: torch.device
) -> Table:
    """Time the blocks of one size."""
    title = f"mom block {size}, {BATCH} samples, forward and backward, {dtype}, {mode}"
    columns = ["variant", "ms", "time to DiT [quartiles]", "MACs to DiT", "time / MACs"]
    table = Table(title, [*columns, "must", "aim", ""])
    if mode == "compiled" and device.type == "cpu" and not measure.has_cpp_compiler():
        table.notes.append("skipped: inductor finds no C++ compiler (CXX, g++ or clang++)")
        return table
    torch._dynamo.reset()
    macs = {name: multiply_adds(args, device) for name, args in variants(size).items()}
    runs = {
        name: partial(measure.differentiate, *block_forward(args, DTYPES[dtype], mode, device))
        for name, args in variants(size).items()
    }
    rounds = options.rounds or (10 if options.quick else 40)
    limit = math.inf if options.rounds else 10 if options.quick else 30
    seconds = measure.time_interleaved(runs, rounds, limit=limit, timer=measure.timer_for(device))
    floor = measure.ratio(seconds, "DiT again", "DiT")
    for name, values in seconds.items():
        spread = measure.ratio(seconds, name, "DiT")
        mac_ratio = macs[name] / macs["DiT"]
        cost = spread.median / mac_ratio
        is_target = (size, name, dtype, mode) == ("S/4", "typed", "fp32", "eager")
        targets = (f"{MUST:.2f}", f"{AIM:.2f}") if is_target else ("", "")
        ms = measure.Spread.of(values).median * 1000
        table.add(
            *(name, f"{ms:.1f}", spread, f"{mac_ratio:.3f}", f"{cost:.3f}", *targets),
            measure.judge(cost, MUST, AIM, floor) if is_target else "",
            variant=name,
            milliseconds=ms,
            ratio=[spread.low, spread.median, spread.high],
            macs_per_sample=macs[name],
            mac_ratio=mac_ratio,
        )
    table.notes.append(
        f"{len(seconds['DiT'])} rounds; MACs counted while running, of this batch's choices"
    )
    return table


def measure_blocks(options: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Time blocks under all cases."""
    sizes = options.sizes or (["S/4"] if options.quick else list(SIZES))
    for size in sizes:
        for dtype in options.dtypes or ["fp32", "bf16"]:
            for mode in options.modes or ["eager"]:
                yield measure_block(size, dtype, mode, options, device)


def training_run(flavor: str, device: torch.device) -> tuple[measure.Run, float]:
    """Training steps of a debug flavour, and its multiply-adds an image by the formula."""
    job = parse_job(["--config", str(CONFIG), f"--model.flavor={flavor}"])
    spec: Any = get_train_spec("mom")
    args = spec.model_args[flavor]
    args.update_from_config(job)
    torch.manual_seed(0)
    model = MoM(args)
    with torch.no_grad():
        model.init_weights()
    model.to(device)
    loader = spec.build_dataloader_fn(dp_world_size=1, dp_rank=0, tokenizer=None, job_config=job)
    loss_fn = spec.build_loss_fn(job)
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    remaining = cycle(list(islice(loader, 4)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def run() -> None:
        input_dict, labels = next(remaining)
        input_dict = {key: value.to(device) for key, value in input_dict.items()}
        optimizer.zero_grad()
        prepared = loss_fn.prepare(model, None, input_dict, labels.to(device), dims, job)
        inputs, targets, extra, _ = prepared
        (loss_fn(model(inputs, **extra), targets) / labels.numel()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()

    return run, args.total_macs_per_image()


def measure_training(options: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Time whole training steps of the debug flavours: data, noise, loss and optimizer included."""
    flavors = ["debugmodel_dit", "debugmodel", "debugmodel_matched"]
    built = {flavor: training_run(flavor, device) for flavor in flavors}
    runs = {flavor: run for flavor, (run, _) in built.items()}
    runs["debugmodel_dit again"] = runs["debugmodel_dit"]
    rounds = options.rounds or (5 if options.quick else 15)
    seconds = measure.time_interleaved(runs, rounds, limit=60, timer=measure.timer_for(device))
    columns = ["flavour", "ms", "time to DiT [quartiles]", "MACs to DiT", "images/s"]
    table = Table("mom training step, debug flavours, batch 64, fp32, eager", columns)
    base = built["debugmodel_dit"][1]
    for name, values in seconds.items():
        spread = measure.ratio(seconds, name, "debugmodel_dit")
        ms = measure.Spread.of(values).median * 1000
        mac_ratio = built[name.removesuffix(" again")][1] / base
        table.add(
            *(name, f"{ms:.0f}", spread, f"{mac_ratio:.3f}", f"{64 / ms * 1000:.0f}"),
            variant=name,
            milliseconds=ms,
            ratio=[spread.low, spread.median, spread.high],
            mac_ratio=mac_ratio,
        )
    yield table


def measure_counts(options: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Count reads by the host, and graphs over batches that choose differently."""
    columns = ["variant", "host reads", "which", "graphs", "graph breaks"]
    table = Table("mom counts: forward and backward of an S/4 block, 6 batches", columns)
    for name, args in variants("S/4").items():
        if name.endswith("again"):
            continue
        block = build_block(args).to(device)

        def step(x: Tensor, condition: Tensor, block: nn.Module = block) -> None:
            output = block(x, condition)
            stream = output[0] if isinstance(output, tuple) else output
            stream.square().mean().backward()

        batches = [[t.to(device) for t in draw_inputs(args, 8, seed)] for seed in range(6)]
        steps = [partial(step, x, condition) for x, condition in batches]
        reads = measure.host_reads(steps[0])
        graphs, breaks = measure.count_graphs([block], steps)
        kinds = ", ".join(f"{reads.count(kind)} {kind}" for kind in sorted(set(reads)))
        table.add(
            *(name, len(reads), kinds or "-", graphs, breaks),
            variant=name,
            host_reads=len(reads),
            graphs=graphs,
            graph_breaks=breaks,
        )
    yield table


def measure_startup(options: argparse.Namespace, device: torch.device) -> list[Table]:
    """Time fresh processes until their first step."""
    return [measure.startup_table("mom", CONFIG, must=20, aim=10)]


ROWS: dict[str, Callable[[argparse.Namespace, torch.device], Iterable[Table]]] = {
    "block": measure_blocks,
    "training": measure_training,
    "counts": measure_counts,
    "startup": measure_startup,
}
