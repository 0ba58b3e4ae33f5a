"""What `scripts/benchmark.py mot` measures."""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from torchtitan_mixtures.benchmark import Table
from torchtitan_mixtures.models.common.attention import dense_mask
from torchtitan_mixtures.models.common.rope import rotation_at
from torchtitan_mixtures.models.mot.args import Dispatch, MoTModelArgs
from torchtitan_mixtures.models.mot.model import MoTTransformer
from torchtitan_mixtures.objectives.next_token import split_batch
from torchtitan_mixtures.train import parse_job

CONFIG = Path(__file__).resolve().parent.parent / "train_configs" / "mot" / "debugmodel.toml"
DISPATCHES: tuple[Dispatch, ...] = ("split", "grouped", "reference")
Device = torch.device
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
        *(1024, 16, 2, 1024, 1.06, 1.03, 5),
        mixes={"50/50": (0.5, 0.5), "90/10": (0.9, 0.1), "100/0": (1, 0)},
    ),
    "width512": BlockRow(
        *(512, 8, 2, 512, 1.12, 1.05, 21),
        mixes={"even": (1 / 3, 1 / 3, 1 / 3), "80/10/10": (0.8, 0.1, 0.1), "100/0/0": (1, 0, 0)},
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
    if options.dtypes or options.modes or options.masks or options.mixes:
        dtypes, modes = options.dtypes or ["fp32"], options.modes or ["eager"]
        masks, mixes = options.masks or ["causal"], options.mixes or [0]
        return [BlockCase(*choice) for choice in product(dtypes, modes, masks, mixes)]
    cases = [BlockCase()]
    if not options.quick:
        cases += [BlockCase(mix=1), BlockCase(mix=2), BlockCase(mask="document")]
        cases += [BlockCase(dtype="bf16"), BlockCase(mode="compiled")]
    return cases


def random_masks(row: BlockRow, mix: Sequence[float]) -> Tensor:
    """Masks of modalities interleaved at random, in exact shares, `(batch, modalities, seq)`."""
    tokens = row.batch * row.seq
    ends = torch.tensor(mix, dtype=torch.float64).cumsum(0).mul(tokens).round()
    in_order = torch.searchsorted(ends, torch.arange(tokens).double(), right=True)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    modality = in_order[order].view(row.batch, row.seq)
    return torch.stack([modality == index for index in range(len(mix))], dim=1)


class MaskedAttention(nn.Module):
    """What llama3 lacks: fused attention under a dense mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **unused: Any) -> Tensor:
        """Attend where the mask is True."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


def mot_block_run(
    row: BlockRow, case: BlockCase, dispatch: Dispatch | None, mask: Tensor | None, device: Device
) -> measure.Run:
    """A MoT block with the making of its plan; without dispatch its dense twin, one tower."""
    args = MoTModelArgs(
        dim=row.dim,
        n_layers=1,
        n_heads=row.heads,
        vocab_size=64,
        max_seq_len=row.seq,
        n_modalities=row.modalities,
        modality_names=["text", "image", "speech"][: row.modalities],
        tower_of_modality=None if dispatch else [0] * row.modalities,
        dispatch=dispatch or "split",
        init_seed=0,
    )
    model = MoTTransformer(args)
    model.init_weights()
    measure.set_dtype(model, DTYPES[case.dtype], device)
    block = model.layers["0"]
    if case.mode == "compiled":
        block.compile(fullgraph=True)
    rotation = rotation_at(model.rope_table, row.seq)
    tokens = torch.zeros(row.batch, row.seq, dtype=torch.int64, device=device)

    x = torch.randn(row.batch, row.seq, row.dim, dtype=DTYPES[case.dtype], device=device)

    def run_on(masks: Tensor) -> measure.Run:
        plan = model._plan(tokens, masks)
        rows = (x if plan is None else plan.sort(x)).requires_grad_()

        def forward(rows: Tensor) -> Tensor:
            return block(rows, rotation, mask, model._plan(tokens, masks))

        return partial(measure.differentiate, forward, rows, block)

    mixes = list(row.mixes.values())
    measured = mixes.pop(case.mix)
    if case.mode == "compiled":
        # Training sees ever new mixes: the block must not be specialised on the one measured.
        for mix in mixes:
            run_on(random_masks(row, mix).to(device))()
    return run_on(random_masks(row, measured).to(device))


def llama_block_run(
    row: BlockRow, case: BlockCase, mask: Tensor | None, device: Device
) -> measure.Run:
    """TorchTitan's own block of the same size."""
    sizes: dict[str, Any] = {"dim": row.dim, "n_heads": row.heads, "max_seq_len": row.seq}
    model = Transformer(TransformerModelArgs(n_layers=1, vocab_size=64, rope_theta=5e5, **sizes))
    with torch.no_grad():
        model.init_weights()
    measure.set_dtype(model, DTYPES[case.dtype], device)
    block: Any = model.layers["0"]
    if mask is not None:
        block.attention.inner_attention = MaskedAttention(mask)
    if case.mode == "compiled":
        block.compile(fullgraph=True)
    dtype = DTYPES[case.dtype]
    x = torch.randn(row.batch, row.seq, row.dim, dtype=dtype, device=device, requires_grad=True)
    forward = partial(block, freqs_cis=model.freqs_cis, attention_masks=None)
    return partial(measure.differentiate, forward, x, block)


def document_mask(row: BlockRow, device: Device) -> Tensor:
    """Causal attention inside documents of an eighth of the sequence."""
    documents = torch.arange(row.seq, device=device).expand(row.batch, -1) // (row.seq // 8)
    return dense_mask(row.seq, device, document_ids=documents)


def measure_block(name: str, case: BlockCase, options: argparse.Namespace, device: Device) -> Table:
    """Time all variants of one block under one case."""
    row, mix = MOT_BLOCKS[name], list(MOT_BLOCKS[name].mixes)[case.mix]
    mask = document_mask(row, device) if case.mask == "document" else None
    title = f"mot {name}: {row.modalities} modalities {mix}, {row.batch} x {row.seq} tokens"
    columns = ["variant", "ms", "ratio to dense [quartiles]", "fastest", "must", "aim", ""]
    table = Table(f"{title}, {case.dtype}, {case.mode}, {case.mask} mask", columns)
    if case.mode == "compiled" and device.type == "cpu" and not measure.has_cpp_compiler():
        table.notes.append("skipped: inductor finds no C++ compiler (CXX, g++ or clang++)")
        return table
    torch._dynamo.reset()
    dense = mot_block_run(row, case, None, mask, device)
    runs = {
        "dense": dense,
        "dense again": dense,
        "llama3": llama_block_run(row, case, mask, device),
    }
    for dispatch in options.dispatches:
        if dispatch == "reference" and case.mode == "compiled":
            table.notes.append("reference: not compiled, its shapes depend on content")
            continue
        runs[dispatch] = mot_block_run(row, case, dispatch, mask, device)
    rounds = options.rounds or (row.rounds // 3 + 1 if options.quick else row.rounds)
    limit = math.inf if options.rounds else 15 if options.quick else 40
    seconds = measure.time_interleaved(runs, rounds, limit=limit, timer=measure.timer_for(device))
    for variant, values in seconds.items():
        spread = measure.ratio(seconds, variant, "dense")
        floor = measure.ratio(seconds, "dense again", "dense")
        fastest = min(values) / min(seconds["dense"])
        is_target = variant == "split" and case.mode == "eager" and case.dtype == "fp32"
        verdict = measure.judge(spread.median, row.must, row.aim, floor) if is_target else ""
        targets = (f"{row.must:.2f}", f"{row.aim:.2f}") if is_target else ("", "")
        ms = measure.Spread.of(values).median * 1000
        table.add(
            *(variant, f"{ms:.1f}", spread, f"{fastest:.3f}", *targets, verdict),
            variant=variant,
            milliseconds=ms,
            ratio=[spread.low, spread.median, spread.high],
            fastest=fastest,
            rounds=len(values),
        )
    table.notes.append(
        f"{len(seconds['dense'])} rounds; fastest: ratio of each one's fastest round"
    )
    return table


def measure_blocks(name: str, options: argparse.Namespace, device: Device) -> Iterator[Table]:
    """Time one block under all cases."""
    for case in block_cases(options):
        yield measure_block(name, case, options, device)


def debug_job(*overrides: str) -> Any:
    """The debug configuration."""
    return parse_job(["--config", str(CONFIG), *overrides])


def debug_loader(job: Any) -> Any:
    """Its loader, as on a single rank."""
    spec: Any = get_train_spec("mot")
    tokenizer = spec.build_tokenizer_fn(job)
    return spec.build_dataloader_fn(dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=job)


def debug_model(job: Any, **fields: Any) -> MoTTransformer:
    """Its model, with some arguments changed."""
    args: Any = get_train_spec("mot").model_args["debugmodel"]
    args.update_from_config(job)
    vars(args).update(fields)
    model = MoTTransformer(args)
    model.init_weights()
    return model


def training_run(
    model: nn.Module, batches: Sequence[Any], loss_of: Callable[[Any], Tensor], device: Device
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


def measure_training(options: argparse.Namespace, device: Device) -> Iterator[Table]:
    """Time whole training steps of the debug model, and its loader."""
    job = debug_job()
    batches = [
        ({key: value.to(device) for key, value in inputs.items()}, labels.to(device))
        for inputs, labels in islice(iter(debug_loader(job)), 4)
    ]
    tokens = job.training.seq_len * job.training.local_batch_size

    def mot_run(**fields: Any) -> measure.Run:
        model, loss_fn = debug_model(job, **fields), get_train_spec("mot").build_loss_fn(job)

        def loss_of(batch: Any) -> Tensor:
            inputs, targets, extra = split_batch(*batch)
            return loss_fn(model(inputs, **extra), targets) / (targets.labels != -100).sum()

        return training_run(model, batches, loss_of, device)

    args = llama3_args["debugmodel"]
    args.update_from_config(job)
    args.vocab_size = debug_model(job).model_args.total_vocab_size
    llama = Transformer(args)
    with torch.no_grad():
        llama.init_weights()

    llama_run = training_run(
        llama, batches, lambda b: cross_entropy_loss(llama(b[0]["input"]), b[1]), device
    )
    runs = {"llama3": llama_run, "llama3 again": llama_run}
    runs["mot dense"] = mot_run(tower_of_modality=[0, 0])
    for dispatch in [name for name in options.dispatches if name != "reference"]:
        runs[f"mot {dispatch}"] = mot_run(dispatch=dispatch)
    rounds, timer = options.rounds or (2 if options.quick else 5), measure.timer_for(device)
    seconds = measure.time_interleaved(runs, rounds, limit=90, timer=timer)
    title = f"mot training: steps of debugmodel on {tokens} tokens of real batches, fp32, eager"
    table = Table(title, ["variant", "ms/step", "tokens/s", "time to llama3 [quartiles]"])
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
        f"{len(values)} rounds; forward, loss, backward, clip, AdamW; same vocabulary of "
        f"{args.vocab_size}. llama3 has half of mot's parameters to update, as mot dense has."
    )
    step = measure.Spread.of(seconds[next(reversed(seconds))]).median
    yield table
    yield measure_loader(job, tokens, step, options.quick)


def measure_loader(job: Any, tokens: int, step: float, is_quick: bool) -> Table:
    """Time the loader alone."""
    batches = iter(debug_loader(job))
    seconds = measure.time_interleaved({"loader": lambda: next(batches)}, 20 if is_quick else 100)
    spread = measure.Spread.of(seconds["loader"])
    rate, share = tokens / spread.median, spread.median / step
    columns = ["variant", "ms/batch", "tokens/s", "must", "aim", "share of a step", "must", ""]
    table = Table("mot loader: no workers, embedded corpus, tokenised on the fly", columns)
    ms = f"{spread.median * 1000:.2f}"
    verdict = measure.judge(-rate, -500e3, -2e6) + ("" if share < 0.01 else ", share MISSED")
    table.add(
        *("loader", ms, f"{rate:,.0f}", "500,000", "2,000,000", f"{share:.2%}", "1.00%", verdict),
        variant="loader",
        milliseconds=spread.median * 1000,
        tokens_per_second=rate,
        share_of_step=share,
    )
    return table


def measure_counts(options: argparse.Namespace, device: Device) -> list[Table]:
    """Count what a GPU pays for: host reads of a step, graphs and graph breaks of compiled ones."""
    job = debug_job("--training.seq_len", "256")
    samples = [split_batch(*batch) for batch in islice(iter(debug_loader(job)), 6)]
    feeds = [(inputs, extra["modality_masks"]) for inputs, _, extra in samples]
    generator = torch.Generator().manual_seed(0)
    for share in (0, 0.001, 0.1, 0.5, 0.9, 1):
        is_image = torch.rand(feeds[0][0].shape, generator=generator) < share
        feeds.append((feeds[0][0], torch.stack((~is_image, is_image), dim=1)))
    table = Table(
        f"mot counts: forward and backward of debugmodel, {len(feeds)} mixes",
        ["variant", "host reads/step", "which", "graphs", "graph breaks"],
    )
    variants: dict[str, dict[str, Any]] = {"dense": {"tower_of_modality": [0, 0]}}
    variants |= {name: {"dispatch": name} for name in options.dispatches}
    for variant, fields in variants.items():
        model = debug_model(job, **fields).to(device)

        def step(inputs: Tensor, masks: Tensor, model: nn.Module = model) -> None:
            model(inputs, masks).square().mean().backward()

        steps = [partial(step, inputs.to(device), masks.to(device)) for inputs, masks in feeds]
        reads = measure.host_reads(steps[0])
        graphs, breaks = measure.count_graphs(model.layers.values(), steps)
        kinds = ", ".join(f"{reads.count(kind)} {kind}" for kind in sorted(set(reads)))
        table.add(
            *(variant, len(reads), kinds or "-", graphs, breaks),
            variant=variant,
            host_reads=len(reads),
            graphs=graphs,
            mixes=len(feeds),
            graph_breaks=breaks,
        )
    table.notes.append("graphs: blocks compiled one by one, as compile.enable does; forward only")
    return [table]


def measure_startup(options: argparse.Namespace, device: Device) -> list[Table]:
    """Time fresh processes until their first step."""
    return [measure.startup_table("mot", CONFIG, must=20, aim=10)]


ROWS: dict[str, Callable[[argparse.Namespace, Device], Iterable[Table]]] = {
    **{name: partial(measure_blocks, name) for name in MOT_BLOCKS},
    "training": measure_training,
    "counts": measure_counts,
    "startup": measure_startup,
}
