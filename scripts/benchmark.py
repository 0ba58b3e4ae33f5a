"""Measures a family against what it should cost: `python scripts/benchmark.py mot [--quick]`.

One process, variants alternately and in random order, forward and backward. Design targets are
printed beside the ratios; the baseline's ratio to itself says how much of a difference is noise.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

# First: it points TorchTitan at the CPU if need be.
import torchtitan_mixtures  # noqa: F401  # isort: skip

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args
from torchtitan.models.llama3.model.model import Transformer
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures import benchmark as measure
from torchtitan_mixtures.device import has_accelerator
from torchtitan_mixtures.models.common.attention import dense_mask
from torchtitan_mixtures.models.common.rope import rotation_at
from torchtitan_mixtures.models.mot.args import Dispatch, MoTModelArgs
from torchtitan_mixtures.models.mot.model import MoTTransformer
from torchtitan_mixtures.objectives.next_token import split_batch
from torchtitan_mixtures.train import parse_job

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("text", "image", "speech")
DISPATCHES: tuple[Dispatch, ...] = ("split", "grouped", "reference")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BlockRow:
    """One row of the design's table of targets."""

    dim: int
    heads: int
    batch: int
    seq: int
    must: float
    aim: float
    rounds: int
    mixes: Mapping[str, tuple[float, ...]]

    @property
    def modalities(self) -> int:
        """Number of modalities."""
        return len(next(iter(self.mixes.values())))


MOT_BLOCKS = {
    "width1024": BlockRow(
        dim=1024,
        heads=16,
        batch=2,
        seq=1024,
        must=1.06,
        aim=1.03,
        rounds=5,
        mixes={"50/50": (0.5, 0.5), "90/10": (0.9, 0.1), "100/0": (1.0, 0.0)},
    ),
    "width512": BlockRow(
        dim=512,
        heads=8,
        batch=2,
        seq=512,
        must=1.12,
        aim=1.05,
        rounds=21,
        mixes={
            "even": (1 / 3, 1 / 3, 1 / 3),
            "80/10/10": (0.8, 0.1, 0.1),
            "100/0/0": (1.0, 0.0, 0.0),
        },
    ),
}


@dataclass(frozen=True)
class BlockCase:
    """Under which circumstances a block is measured."""

    dtype: str = "fp32"
    mode: str = "eager"
    mask: str = "causal"
    mix: int = 0


def block_cases(options: argparse.Namespace) -> list[BlockCase]:
    """The product of what the flags ask for, or a selection that takes minutes."""
    asked = [options.dtypes, options.modes, options.masks, options.mixes]
    if any(asked):
        defaults = (["fp32"], ["eager"], ["causal"], [0])
        choices = [given or default for given, default in zip(asked, defaults, strict=True)]
        return [BlockCase(*choice) for choice in product(*choices)]
    if options.quick:
        return [BlockCase()]
    return [
        BlockCase(),
        BlockCase(mix=1),
        BlockCase(mix=2),
        BlockCase(mask="document"),
        BlockCase(dtype="bf16"),
        BlockCase(mode="compiled"),
    ]


def random_modalities(row: BlockRow, mix: Sequence[float], seed: int) -> Tensor:
    """Modality of each token, interleaved at random, `(batch, seq)`, int64.

    The shares are exact, and so what the mix says is what is measured.
    """
    tokens = row.batch * row.seq
    ends = torch.tensor(mix, dtype=torch.float64).cumsum(0).mul(tokens).round()
    in_order = torch.searchsorted(ends, torch.arange(tokens).double(), right=True)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    return in_order.clamp(max=len(mix) - 1)[order].view(row.batch, row.seq)


class MaskedAttention(nn.Module):
    """What llama3 lacks: fused attention under a dense mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **unused: Any) -> Tensor:
        """Attend where the mask is True."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


def set_dtype(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Cast parameters only, as FSDP's mixed precision does: rotary tables stay in float32."""
    model.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def differentiate(run: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> None:
    """One forward and backward pass from fresh gradients, as every training step has them."""
    x.grad = None
    model.zero_grad(set_to_none=True)
    output = run(x)
    output.backward(torch.ones_like(output))


def mot_block_run(
    row: BlockRow,
    case: BlockCase,
    dispatch: Dispatch,
    device: torch.device,
    mask: Tensor | None,
    *,
    is_dense: bool = False,
) -> measure.Run:
    """A MoT block with the making of its plan; the dense twin has one tower and no plan."""
    args = MoTModelArgs(
        dim=row.dim,
        n_layers=1,
        n_heads=row.heads,
        vocab_size=64,
        max_seq_len=row.seq,
        n_modalities=row.modalities,
        modality_names=list(NAMES[: row.modalities]),
        tower_of_modality=[0] * row.modalities if is_dense else None,
        dispatch=dispatch,
        init_seed=0,
    )
    model = MoTTransformer(args)
    model.init_weights()
    set_dtype(model, DTYPES[case.dtype], device)
    block = model.layers["0"]
    if case.mode == "compiled":
        block.compile(fullgraph=True)
    rotation = rotation_at(model.rope_table, row.seq)
    tokens = torch.zeros(row.batch, row.seq, dtype=torch.int64, device=device)

    def run_on(modalities: Tensor) -> None:
        masks = torch.stack([modalities == index for index in range(row.modalities)], dim=1)
        x = torch.randn(row.batch, row.seq, row.dim, dtype=DTYPES[case.dtype], device=device)
        plan = model._plan(tokens, masks)
        x = (x if plan is None else plan.sort(x)).requires_grad_()

        def run() -> None:
            differentiate(lambda x: block(x, rotation, mask, model._plan(tokens, masks)), x, block)

        runs.append(run)
        run()

    runs: list[measure.Run] = []
    mixes = list(row.mixes.values())
    # Training sees ever new mixes: a compiled block must not be specialised on the one measured.
    others = [mix for mix in mixes if mix != mixes[case.mix]] if case.mode == "compiled" else []
    for seed, mix in enumerate([*others, mixes[case.mix]]):
        run_on(random_modalities(row, mix, seed).to(device))
    return runs[-1]


def llama_block_run(
    row: BlockRow, case: BlockCase, device: torch.device, mask: Tensor | None
) -> measure.Run:
    """TorchTitan's own block of the same size."""
    args = TransformerModelArgs(
        dim=row.dim,
        n_layers=1,
        n_heads=row.heads,
        vocab_size=64,
        max_seq_len=row.seq,
        rope_theta=500000,
    )
    model = Transformer(args)
    model.init_weights()
    set_dtype(model, DTYPES[case.dtype], device)
    block: Any = model.layers["0"]
    if mask is not None:
        block.attention.inner_attention = MaskedAttention(mask)
    if case.mode == "compiled":
        block.compile(fullgraph=True)
    dtype = DTYPES[case.dtype]
    x = torch.randn(row.batch, row.seq, row.dim, dtype=dtype, device=device, requires_grad=True)
    return lambda: differentiate(lambda x: block(x, model.freqs_cis, None), x, block)


def document_mask(row: BlockRow, device: torch.device) -> Tensor:
    """Causal attention inside documents of an eighth of the sequence."""
    documents = torch.arange(row.seq, device=device).expand(row.batch, -1) // (row.seq // 8)
    return dense_mask(row.seq, device, document_ids=documents)


def measure_block(
    name: str, case: BlockCase, options: argparse.Namespace, device: torch.device
) -> measure.Table:
    """Time all variants of one block under one case."""
    row = MOT_BLOCKS[name]
    mix = list(row.mixes)[case.mix]
    mask = document_mask(row, device) if case.mask == "document" else None
    title = f"mot {name}: {row.modalities} modalities {mix}, {row.batch} x {row.seq} tokens"
    columns = ["variant", "ms", "ratio to dense [quartiles]", "fastest", "must", "aim", ""]
    table = measure.Table(f"{title}, {case.dtype}, {case.mode}, {case.mask} mask", columns)
    if case.mode == "compiled" and device.type == "cpu" and not measure.has_cpp_compiler():
        table.notes.append("skipped: inductor finds no C++ compiler (CXX, g++ or clang++)")
        return table
    torch._dynamo.reset()
    dense = mot_block_run(row, case, "split", device, mask, is_dense=True)
    runs = {
        "dense": dense,
        "dense again": dense,
        "llama3": llama_block_run(row, case, device, mask),
    }
    for dispatch in options.dispatches:
        if dispatch == "reference" and case.mode == "compiled":
            table.notes.append("reference: not compiled, its shapes depend on content")
            continue
        runs[dispatch] = mot_block_run(row, case, dispatch, device, mask)
    rounds = options.rounds or (row.rounds // 3 + 1 if options.quick else row.rounds)
    seconds = measure.time_interleaved(runs, rounds, timer=measure.timer_for(device))
    for variant, values in seconds.items():
        spread = measure.ratio(seconds, variant, "dense")
        fastest = min(values) / min(seconds["dense"])
        is_target = variant == "split" and case.mode == "eager" and case.dtype == "fp32"
        verdict = judge(spread.median, row.must, row.aim) if is_target else ""
        targets = (f"{row.must:.2f}", f"{row.aim:.2f}") if is_target else ("", "")
        milliseconds = measure.Spread.of(values).median * 1000
        table.add(
            *(variant, f"{milliseconds:.1f}", spread, f"{fastest:.3f}", *targets, verdict),
            variant=variant,
            milliseconds=milliseconds,
            ratio=[spread.low, spread.median, spread.high],
            fastest=fastest,
            rounds=rounds,
        )
    table.notes.append(f"{rounds} rounds; fastest: ratio of the fastest rounds of each")
    return table


def judge(value: float, must: float, aim: float) -> str:
    """Compare a cost with its targets."""
    return "aim met" if value <= aim else "met" if value <= must else "MISSED"


def measure_blocks(
    name: str, options: argparse.Namespace, device: torch.device
) -> list[measure.Table]:
    """Time one block under all cases."""
    return [measure_block(name, case, options, device) for case in block_cases(options)]


def debug_job(*overrides: str) -> Any:
    """The debug configuration."""
    config = ROOT / "train_configs" / "mot" / "debugmodel.toml"
    return parse_job(["--config", str(config), *overrides])


def debug_loader(job: Any) -> Any:
    """Its loader, as on a single rank."""
    spec = get_train_spec("mot")
    assert spec.build_tokenizer_fn is not None
    tokenizer = spec.build_tokenizer_fn(job)
    return spec.build_dataloader_fn(dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=job)


def debug_model(job: Any, **fields: Any) -> MoTTransformer:
    """Its model, with some arguments changed."""
    args = get_train_spec("mot").model_args["debugmodel"]
    args.update_from_config(job)
    for name, value in fields.items():
        setattr(args, name, value)
    model = MoTTransformer(args)
    model.init_weights()
    return model


def training_run(
    model: nn.Module, batches: Sequence[Any], loss_of: Callable[[Any], Tensor], device: torch.device
) -> measure.Run:
    """Training steps of a model, each on the next of the batches."""
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    remaining = cycle(batches)

    def run() -> None:
        optimizer.zero_grad()
        loss_of(next(remaining)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()

    return run


def measure_training(options: argparse.Namespace, device: torch.device) -> list[measure.Table]:
    """Time whole training steps of the debug model, and its loader."""
    job = debug_job("--training.seq_len", "512") if options.tiny else debug_job()
    batches = [
        ({key: value.to(device) for key, value in inputs.items()}, labels.to(device))
        for inputs, labels in islice(iter(debug_loader(job)), 4)
    ]
    tokens = job.training.seq_len * job.training.local_batch_size
    spec = get_train_spec("mot")

    def mot_run(**fields: Any) -> measure.Run:
        model, loss_fn = debug_model(job, **fields), spec.build_loss_fn(job)

        def loss_of(batch: Any) -> Tensor:
            inputs, targets, extra = split_batch(*batch)
            return loss_fn(model(inputs, **extra), targets) / (targets.labels != -100).sum()

        return training_run(model, batches, loss_of, device)

    args = llama3_args["debugmodel"]
    args.update_from_config(job)
    args.vocab_size = debug_model(job).model_args.total_vocab_size
    llama = Transformer(args)
    llama.init_weights()

    def llama_loss(batch: Any) -> Tensor:
        return cross_entropy_loss(llama(batch[0]["input"]), batch[1])

    llama_run = training_run(llama, batches, llama_loss, device)
    runs = {"llama3": llama_run, "llama3 again": llama_run}
    runs["mot dense"] = mot_run(tower_of_modality=[0, 0])
    for dispatch in [name for name in options.dispatches if name != "reference"]:
        runs[f"mot {dispatch}"] = mot_run(dispatch=dispatch)
    rounds = options.rounds or (2 if options.quick else 5)
    seconds = measure.time_interleaved(runs, rounds, timer=measure.timer_for(device))
    sizes = f"{job.training.local_batch_size} x {job.training.seq_len} tokens"
    title = f"mot training: steps of debugmodel on real batches, {sizes}, fp32, eager"
    table = measure.Table(title, ["variant", "ms/step", "tokens/s", "time to llama3 [quartiles]"])
    for variant, values in seconds.items():
        step = measure.Spread.of(values).median
        spread = measure.ratio(seconds, variant, "llama3")
        table.add(
            *(variant, f"{step * 1000:.0f}", f"{tokens / step:,.0f}", spread),
            variant=variant,
            milliseconds=step * 1000,
            tokens_per_second=tokens / step,
            ratio=[spread.low, spread.median, spread.high],
        )
    table.notes.append(
        f"{rounds} rounds; forward, loss, backward, clip, AdamW; same vocabulary of "
        f"{args.vocab_size}. llama3 has half of mot's parameters to update, as mot dense has."
    )
    step = measure.Spread.of(seconds[next(reversed(seconds))]).median
    return [table, measure_loader(job, tokens, step, options.quick)]


def measure_loader(job: Any, tokens: int, step: float, is_quick: bool) -> measure.Table:
    """Time the loader alone."""
    batches = iter(debug_loader(job))
    seconds = measure.time_interleaved({"loader": lambda: next(batches)}, 20 if is_quick else 100)
    spread = measure.Spread.of(seconds["loader"])
    rate, share = tokens / spread.median, spread.median / step
    columns = ["variant", "ms/batch", "tokens/s", "must", "aim", "share of a step", "must", ""]
    table = measure.Table("mot loader: no workers, embedded corpus", columns)
    verdict = judge(-rate, -500e3, -2e6) + ("" if share < 0.01 else ", share MISSED")
    table.add(
        *("loader", f"{spread.median * 1000:.2f}", f"{rate:,.0f}", "500,000", "2,000,000"),
        *(f"{share:.2%}", "1.00%", verdict),
        variant="loader",
        milliseconds=spread.median * 1000,
        tokens_per_second=rate,
        share_of_step=share,
    )
    return table


def measure_counts(options: argparse.Namespace, device: torch.device) -> list[measure.Table]:
    """Count what a GPU pays for: host reads of a step, graphs and graph breaks of compiled ones."""
    job = debug_job("--training.seq_len", "256")
    batches = list(islice(iter(debug_loader(job)), 3 if options.tiny else 6))
    table = measure.Table(
        "mot counts: forward and backward of the whole debugmodel",
        ["variant", "host reads", "which", "graphs", "mixes", "graph breaks"],
    )
    variants: dict[str, dict[str, Any]] = {"dense": {"tower_of_modality": [0, 0]}}
    variants |= {name: {"dispatch": name} for name in options.dispatches}
    for variant, fields in variants.items():
        model = debug_model(job, **fields).to(device)

        def step(inputs: Tensor, extra: dict[str, Tensor], model: nn.Module = model) -> None:
            model(inputs, **extra).square().mean().backward()

        samples = [split_batch(*batch) for batch in batches]
        feeds = [
            (inputs.to(device), {key: value.to(device) for key, value in extra.items()})
            for inputs, _, extra in samples
        ]
        reads = measure.host_reads(partial(step, *feeds[0]))
        graphs, breaks = count_graphs(model, step, feeds)
        kinds = ", ".join(f"{reads.count(kind)} {kind}" for kind in sorted(set(reads)))
        num_mixes = 2 * len(feeds)
        table.add(
            *(variant, len(reads), kinds or "-", graphs, num_mixes, breaks),
            variant=variant,
            host_reads=len(reads),
            graphs=graphs,
            mixes=num_mixes,
            graph_breaks=breaks,
        )
    table.notes.append("graphs: blocks compiled one by one, as compile.enable does; forward only")
    return [table]


def count_graphs(
    model: MoTTransformer, step: Callable[..., None], feeds: Sequence[tuple[Tensor, Any]]
) -> tuple[int, int]:
    """Graphs and graph breaks over the mixes of real batches and as many extreme ones."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = measure.GraphCounter()
    for block in model.layers.values():
        block.compile(backend=counter)
    for index, (inputs, extra) in enumerate(feeds):
        step(inputs, extra)
        share = torch.rand(inputs.shape) < index / max(1, len(feeds) - 1)
        step(inputs, {**extra, "modality_masks": torch.stack((share, ~share), 1).to(inputs.device)})
    breaks = measure.graph_breaks()
    torch._dynamo.reset()
    return len(counter.graphs), breaks


def measure_startup(options: argparse.Namespace, device: torch.device) -> list[measure.Table]:
    """Time fresh processes until the first training step is logged."""
    marks = {"imports": "Starting job", "build": "Training starts", "first step": "step:  1 "}
    columns = ["variant", *marks, "total s", "must", "aim", ""]
    table = measure.Table("mot start-up: debugmodel to its first step, seconds", columns)
    module = ["-m", "torchtitan_mixtures.train"]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "--tee=3"]
    launches = {"python": (module, {**rank, **rendezvous}), "torchrun": ([*torchrun, *module], {})}
    for variant, (launch, environment) in launches.items():
        with measure.scratch_folder() as folder:
            arguments = [
                *("--config", str(ROOT / "train_configs" / "mot" / "debugmodel.toml")),
                *("--training.steps", "1", "--lr_scheduler.warmup_steps", "1"),
                *("--metrics.log_freq", "1", "--job.dump_folder", str(folder)),
                *("--validation.no-enable", "--checkpoint.no-enable"),
            ]
            command = [sys.executable, *launch, *arguments]
            seen = measure.time_lines(command, marks, environment, limit=180)
        times = [seen[name] for name in marks]
        parts = [later - before for before, later in zip([0, *times], times, strict=False)]
        total = times[-1]
        table.add(
            *(variant, *(f"{part:.1f}" for part in parts), f"{total:.1f}", "20", "10"),
            judge(total, 20, 10),
            variant=variant,
            seconds=dict(zip(marks, parts, strict=True)),
            total=total,
        )
    table.notes.append("imports: from the launch to the first line of the job, torchrun's included")
    return [table]


MOT_ROWS: dict[str, Callable[[argparse.Namespace, torch.device], list[measure.Table]]] = {
    **{name: partial(measure_blocks, name) for name in MOT_BLOCKS},
    "training": measure_training,
    "counts": measure_counts,
    "startup": measure_startup,
}
