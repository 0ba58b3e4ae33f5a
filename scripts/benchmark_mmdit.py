"""Rows of `scripts/benchmark.py mmdit`: joint blocks beside one plain block for all tokens."""

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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from torchtitan_mixtures import benchmark as measure
from torchtitan_mixtures.benchmark import Table
from torchtitan_mixtures.models.common.dit import DiTBlock
from torchtitan_mixtures.models.mmdit.block import BlockConfig, JointBlock, MMDiTBlock
from torchtitan_mixtures.models.mmdit.feed_forward import FeedForwardOptions

CONFIG = Path(__file__).parent.parent / "train_configs" / "mmdit" / "debugmodel.toml"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDTHS = (512, 1024)
LENGTHS = {2: {"text": 154, "image": 256}, 3: {"text": 154, "speech": 128, "image": 256}}
"""Tokens of each modality, by their number; text as in Stable Diffusion 3, an image of 256 px."""
MASKS = ("none", "keys")
BATCH = 4
HEAD_DIM = 64
STREAMS = 4

COLUMNS = [
    *("variant", "ms", "GFLOPs", "MB kept", "time to base [quartiles]", "FLOPs to base"),
    *("MB to base", "must", "aim", ""),
]


@dataclass(frozen=True)
class Case:
    """What a table is measured with."""

    width: int = 512
    modalities: int = 2
    masks: str = "none"  # "keys": a sample sees a part of its prompts
    dtype: str = "fp32"
    mode: str = "eager"
    batch: int = BATCH

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens of each modality."""
        return LENGTHS[self.modalities]

    def __str__(self) -> str:
        tokens = " + ".join(map(str, self.lengths.values()))
        masks = "no masks" if self.masks == "none" else "key masks"
        size = f"width {self.width}, {self.batch} x ({tokens}) tokens, {masks}"
        return f"{size}, forward and backward, {self.dtype}, {self.mode}"


class Passes:
    """Forward and backward pass of a block, from fresh gradients as each training step has them.

    Args:
        block: The block.
        forward: From the inputs to all outputs.
        inputs: What gradients are needed of: residual streams, and the condition.
    """

    def __init__(
        self,
        block: nn.Module,
        forward: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
    ) -> None:
        self.block, self.run_forward = block, forward
        self.inputs = [x.detach().requires_grad_() for x in inputs]
        self.gradients = [torch.ones_like(x) for x in inputs[:-1]]

    def forward(self) -> Sequence[Tensor]:
        """Run forward."""
        return self.run_forward(*self.inputs)

    def __call__(self) -> None:
        """Run both."""
        self.block.zero_grad(set_to_none=True)
        for x in self.inputs:
            x.grad = None
        torch.autograd.backward(self.forward(), self.gradients)


class KeyMaskedAttention(nn.Module):
    """Attention of a plain block to a part of the tokens, which the block itself knows nothing of.

    Args:
        mask: Which tokens are seen, `(batch, 1, 1, seq)` bool.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
        """`(batch, heads, seq, head_dim)` -> the same shape."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=is_causal)


def draw_masks(case: Case, device: torch.device) -> dict[str, Tensor | None]:
    """Which tokens are seen: of each prompt the first ones; None: all of a modality."""
    generator = torch.Generator().manual_seed(0)
    masks: dict[str, Tensor | None] = dict.fromkeys(case.lengths)
    for name, length in list(case.lengths.items())[: -1 if case.masks == "keys" else 0]:
        ends = torch.randint(length // 4, length, (case.batch, 1), generator=generator)
        masks[name] = (torch.arange(length) < ends).to(device)
    return masks


def finish(block: nn.Module, case: Case, device: torch.device) -> Callable[..., Any]:
    """Cast a block and make its branches count, many of which begin as zero; how it is called."""
    torch.manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    measure.set_dtype(block, DTYPES[case.dtype], device)
    return torch.compile(block, fullgraph=True) if case.mode == "compiled" else block


def draw(case: Case, device: torch.device, *shape: int) -> Tensor:
    """Activations of each sample, `(batch, *shape, width)`."""
    return torch.randn(case.batch, *shape, case.width, device=device, dtype=DTYPES[case.dtype])


def plain(case: Case, device: torch.device) -> Passes:
    """One DiT block for all tokens, which are one sequence."""
    with device:
        block = DiTBlock(case.width, case.width // HEAD_DIM, 4 * case.width)
    if case.masks == "keys":
        parts = [
            torch.ones(case.batch, case.lengths[name], dtype=torch.bool, device=device)
            if mask is None
            else mask
            for name, mask in draw_masks(case, device).items()
        ]
        masked = KeyMaskedAttention(torch.cat(parts, 1)[:, None, None])
        block.attention.inner_attention = masked  # pyrefly: ignore [bad-assignment]
    called = finish(block, case, device)
    inputs = [draw(case, device, sum(case.lengths.values())), draw(case, device)]
    return Passes(block, lambda x, condition: [called(x, condition)], inputs)


def joint(case: Case, device: torch.device, **changes: Any) -> Passes:
    """The joint block of the same width, in the form of Stable Diffusion 3.

    Args:
        case: What is measured.
        device: Where.
        **changes: Of the block's form.
    """
    config = BlockConfig(
        n_heads=case.width // HEAD_DIM,
        head_dim=HEAD_DIM,
        condition_dim=case.width,
        qkv_bias=True,
        out_bias=True,
        feed_forward=FeedForwardOptions(tanh_gelu=True),
        **changes,
    )
    with device:
        block = JointBlock(dict.fromkeys(case.lengths, case.width), config)
    called = finish(block, case, device)
    masks = draw_masks(case, device)
    several = () if config.num_residual_streams == 1 else (config.num_residual_streams,)
    inputs = [draw(case, device, length, *several) for length in case.lengths.values()]

    def forward(*inputs: Tensor) -> list[Tensor]:
        *streams, condition = inputs
        named = dict(zip(case.lengths, streams, strict=True))
        return list(called(named, condition, masks).values())

    return Passes(block, forward, [*inputs, draw(case, device)])


def seed(case: Case, device: torch.device) -> Passes:
    """The seed's block, of which text has a feed-forward network too."""
    with device:
        block = MMDiTBlock(
            dim_text=case.width,
            dim_image=case.width,
            dim_joint_attn=case.width,
            dim_cond=case.width,
            dim_head=HEAD_DIM,
        )
    called = finish(block, case, device)
    masks = {f"{name}_mask": mask for name, mask in draw_masks(case, device).items()}

    def forward(text: Tensor, image: Tensor, condition: Tensor) -> Sequence[Tensor]:
        return called(
            text_tokens=text,
            image_tokens=image,
            time_cond=condition,
            skip_feedforward_text_tokens=False,
            **masks,
        )

    inputs = [draw(case, device, length) for length in case.lengths.values()]
    return Passes(block, forward, [*inputs, draw(case, device)])


Build = Callable[[Case, torch.device], Passes]


@dataclass(frozen=True)
class Row:
    """What is compared with what."""

    title: str
    base: str  # the variant that ratios are formed with
    variants: Mapping[str, Build]
    must: float = math.inf  # targets of the design
    aim: float = math.inf
    judged: tuple[str, ...] = ()  # variants that have them


BLOCK_ROWS = {
    "block": Row(
        "mmdit block to one of DiT",
        "plain",
        {"plain": plain, "joint": joint, "seed's": seed},
        must=1.06,
        aim=1.02,
        judged=("joint",),
    ),
    "streams": Row(
        "mmdit block, residual streams",
        "1 stream",
        {
            "1 stream": joint,
            f"{STREAMS} static": partial(
                joint, num_residual_streams=STREAMS, dynamic_streams=False
            ),
            f"{STREAMS} dynamic": partial(joint, num_residual_streams=STREAMS),
        },
        must=1.4,
        aim=1.25,
        judged=(f"{STREAMS} static", f"{STREAMS} dynamic"),
    ),
    "options": Row(
        "mmdit block, options of attention",
        "joint",
        {
            "joint": joint,
            "qk norm, shared": partial(joint, qk_norm="shared"),
            "qk norm, per head": partial(joint, qk_norm="per_head"),
            "soft clamp": partial(joint, softclamp=50.0),
        },
    ),
}


def count_flops(build: Build, case: Case) -> tuple[int, int]:
    """FLOPs of a block's matrix products, forward and in both passes."""
    # Shapes alone: there attention is made of matrix products, which the counter knows.
    eager = Case(case.width, case.modalities, case.masks, batch=case.batch)
    passes, totals = build(eager, torch.device("meta")), []
    for run in (passes.forward, passes):
        counter = FlopCounterMode(display=False)
        with counter:
            run()
        totals.append(counter.get_total_flops())
    return totals[0], totals[1]


def count_kept_bytes(passes: Passes) -> int:
    """Bytes that a forward pass leaves for the backward pass, weights not counted."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = passes.forward()  # holds all of it, so that no address is used twice
    weights = {p.untyped_storage().data_ptr() for p in passes.block.parameters()}
    del outputs
    return sum(size for address, size in sizes.items() if address not in weights)


def measure_case(row: Row, case: Case, options: argparse.Namespace, device: torch.device) -> Table:
    """Time the variants of a row under one case."""
    table = Table(f"{row.title}, {case}", COLUMNS)
    if case.mode == "compiled" and device.type == "cpu" and not measure.has_cpp_compiler():
        table.notes.append("skipped: inductor finds no C++ compiler (CXX, g++ or clang++)")
        return table
    torch._dynamo.reset()
    builders = {
        name: build
        for name, build in row.variants.items()
        if build is not seed or case.modalities == 2
    }
    runs = {name: build(case, device) for name, build in builders.items()}
    kept = {name: count_kept_bytes(passes) for name, passes in runs.items()}
    flops = {name: count_flops(build, case) for name, build in builders.items()}
    again = f"{row.base} again"
    runs[again] = runs[row.base]
    rounds = options.rounds or (7 if options.quick else 20)
    limit = math.inf if options.rounds else 8 if options.quick else 20
    seconds = measure.time_interleaved(runs, rounds, limit=limit, timer=measure.timer_for(device))
    floor = measure.ratio(seconds, again, row.base)
    for name, values in seconds.items():
        spread = measure.ratio(seconds, name, row.base)
        ms = measure.Spread.of(values).median * 1000
        measured = row.base if name == again else name
        (forward, total), base = flops[measured], flops[row.base][1]
        is_judged = name in row.judged and (case.dtype, case.mode) == ("fp32", "eager")
        table.add(
            *(name, f"{ms:.1f}", f"{total / 1e9:.2f}", f"{kept[measured] / 2**20:.0f}", spread),
            *(f"{total / base:.4f}", f"{kept[measured] / kept[row.base]:.2f}"),
            *((f"{row.must:g}", f"{row.aim:g}") if is_judged else ("", "")),
            measure.judge(spread.median, row.must, row.aim, floor) if is_judged else "",
            variant=name,
            milliseconds=ms,
            ratio=[spread.low, spread.median, spread.high],
            flops_forward=forward,
            flops=total,
            flop_ratio=total / base,
            bytes_kept=kept[measured],
        )
    table.notes.append(f"{len(seconds[again])} rounds; FLOPs of matrix products, counted")
    return table


def cases(options: argparse.Namespace, *, is_brief: bool) -> list[Case]:
    """What to measure; unless flags say so, brief rows leave out masks and a third modality."""
    one, one_form = options.quick, options.quick or is_brief
    return [
        Case(*values, batch=options.batch)
        for values in product(
            options.widths or WIDTHS[: 1 if one else None],
            options.modalities or list(LENGTHS)[: 1 if one_form else None],
            options.masks or MASKS[: 1 if one_form else None],
            options.dtypes or list(DTYPES)[: 1 if one else None],
            options.modes or ["eager"],
        )
    ]


def measure_row(name: str, options: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Time a row under all its cases."""
    for case in cases(options, is_brief=name != "block"):
        yield measure_case(BLOCK_ROWS[name], case, options, device)


def measure_counts(options: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Count reads by the host, and graphs over batches with masks of their own."""
    columns = ["variant", "host reads", "which", "graphs", "graph breaks"]
    table = Table("mmdit counts: forward and backward of a block, width 512, 4 batches", columns)
    streams = partial(joint, num_residual_streams=STREAMS)
    built: dict[str, tuple[Build, int]] = {
        "plain": (plain, 2),
        "joint, 2 modalities": (joint, 2),
        "joint, 3 modalities": (joint, 3),
        f"{STREAMS} streams": (streams, 2),
        "soft clamp": (partial(joint, softclamp=50.0), 2),
    }
    for (name, (build, modalities)), masks in product(built.items(), MASKS):
        passes = build(Case(modalities=modalities, masks=masks, batch=2), device)
        reads = measure.host_reads(passes)
        graphs, breaks = measure.count_graphs([passes.block], [passes] * 4)
        kinds = ", ".join(f"{reads.count(kind)} {kind}" for kind in sorted(set(reads)))
        variant = f"{name}, masks" if masks == "keys" else name
        table.add(
            *(variant, len(reads), kinds or "-", graphs, breaks),
            variant=variant,
            host_reads=len(reads),
            graphs=graphs,
            graph_breaks=breaks,
        )
    yield table


def measure_startup(options: argparse.Namespace, device: torch.device) -> list[Table]:
    """Time fresh processes until their first step."""
    return [measure.startup_table("mmdit", CONFIG, must=20, aim=10)]


ROWS: dict[str, Callable[[argparse.Namespace, torch.device], Iterable[Table]]] = {
    **{name: partial(measure_row, name) for name in BLOCK_ROWS},
    "counts": measure_counts,
    "startup": measure_startup,
}
