"""Models, layouts and steps of `scripts/benchmark.py parallel`, and what each rank measures.

A step is forward, loss and backward with all communication, without an optimiser: that of this
package's trainer for a Mixture-of-Transformers, that of TorchTitan's for its own llama3.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

# First: it points TorchTitan at the CPU if need be.
import torchtitan_mixtures  # noqa: F401  # isort: skip

import torch
import torch.distributed as dist
from benchmark_ranks import (  # pyrefly: ignore [missing-import]  # beside this script
    Traffic,
    first_line,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.context_parallel import prepare_context_parallel_input
from torchtitan.distributed.utils import get_train_context
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures import benchmark as measure
from torchtitan_mixtures.objectives.next_token import prepare_batch
from torchtitan_mixtures.planning.collectives import UnknownCollectiveError
from torchtitan_mixtures.train import parse_job

CONFIG = Path(__file__).resolve().parent.parent / "train_configs" / "mot" / "debugmodel.toml"
CPU = torch.device("cpu")
FAMILIES = ("mot", "llama3")


@dataclass(frozen=True)
class Layout:
    """What gets a degree of two, by its key in `[parallelism]`; None: one process."""

    key: str | None
    schedule: str = "1F1B"

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return 2 if self.key else 1

    @property
    def is_data_parallel(self) -> bool:
        """Whether each rank has its own rows of the batch."""
        return (self.key or "").startswith("data_parallel")

    def flags(self) -> list[str]:
        """What to add to the command line of a job."""
        degrees = {"data_parallel_shard_degree": 1} | ({self.key: 2} if self.key else {})
        flags = [f"--parallelism.{key}={degree}" for key, degree in degrees.items()]
        return [*flags, f"--parallelism.pipeline_parallel_schedule={self.schedule}"]


ALONE = Layout(None)
LAYOUTS = {
    "1 process": ALONE,
    "FSDP2": Layout("data_parallel_shard_degree"),
    "DDP2": Layout("data_parallel_replicate_degree"),
    "TP2": Layout("tensor_parallel_degree"),
    "CP2": Layout("context_parallel_degree"),
    "PP2 1F1B": Layout("pipeline_parallel_degree"),
    "PP2 InterleavedZeroBubble": Layout("pipeline_parallel_degree", "InterleavedZeroBubble"),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of both models, and of the batch of all ranks together."""

    dim: int
    heads: int
    layers: int
    batch: int
    seq: int

    def __str__(self) -> str:
        model = f"width {self.dim}, {self.heads} heads, {self.layers} layers"
        return f"{model}, {self.batch} x {self.seq} tokens"


FULL = Sizes(dim=256, heads=16, layers=6, batch=4, seq=512)
QUICK = Sizes(dim=64, heads=4, layers=4, batch=4, seq=128)


@cache
def make_job(batch: int, seq: int, layout: Layout) -> Any:
    """The debug job in a layout, checked as before training; `batch` is that of all ranks."""
    os.environ["WORLD_SIZE"] = str(layout.ranks)  # read by the checks
    rows = batch // (layout.ranks if layout.is_data_parallel else 1)
    shape = [f"--training.seq_len={seq}", f"--training.local_batch_size={rows}"]
    flags = [*shape, "--validation.no-enable", "--sampling.interval=0", *layout.flags()]
    return parse_job(["--config", str(CONFIG), *flags])


def make_dims(job: Any, layout: Layout) -> ParallelDims:
    """The host's form of a layout, meshes built where there are any."""
    config = job.parallelism
    dims = ParallelDims(
        dp_replicate=config.data_parallel_replicate_degree,
        dp_shard=config.data_parallel_shard_degree,
        cp=config.context_parallel_degree,
        tp=config.tensor_parallel_degree,
        pp=config.pipeline_parallel_degree,
        ep=1,
        etp=1,
        world_size=layout.ranks,
    )
    if layout.key:
        dims.build_mesh()
    return dims


def make_args(family: str, sizes: Sizes, job: Any) -> Any:
    """Model arguments of a family; llama3's are the active size of the MoT."""
    mot: Any = get_train_spec("mot").model_args["debugmodel"]
    mot.update_from_config(job)
    shape = {"dim": sizes.dim, "n_heads": sizes.heads, "n_layers": sizes.layers}
    vars(mot).update(shape)
    mot.check()
    if family == "mot":
        return mot
    same = ("multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta", "max_seq_len")
    shared: dict[str, Any] = {name: getattr(mot, name) for name in same}
    return TransformerModelArgs(vocab_size=mot.total_vocab_size, **shape, **shared)


def make_batch(vocab_size: int, sizes: Sizes) -> tuple[dict[str, Tensor], Tensor]:
    """Random tokens, half of them of either modality at random, and labels; of all ranks."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (sizes.batch, sizes.seq), generator=generator)
    order = torch.randperm(tokens.numel(), generator=generator).view_as(tokens)
    is_text = order < tokens.numel() // 2
    masks = torch.stack((is_text, ~is_text), dim=1)  # (batch, modalities, seq)
    return {"input": tokens, "modality_masks": masks}, tokens.roll(-1, dims=1)


class Step:
    """A model in a layout, built by its family's TrainSpec, and the trainer's step with it."""

    def __init__(self, family: str, sizes: Sizes, layout: Layout) -> None:
        self.family, self.layout = family, layout
        self.job = make_job(sizes.batch, sizes.seq, layout)
        self.dims = make_dims(self.job, layout)
        spec, args = get_train_spec(family), make_args(family, sizes, self.job)
        vocab_size = args.total_vocab_size if family == "mot" else args.vocab_size
        self.inputs, self.labels = make_batch(vocab_size, sizes)
        if layout.is_data_parallel:
            self.inputs = {name: self._share(tensor) for name, tensor in self.inputs.items()}
            self.labels = self._share(self.labels)
        self.count = torch.tensor(float(sizes.batch * sizes.seq))
        self.loss_fn: Any = spec.build_loss_fn(self.job)
        self.schedule: Any = None
        with torch.device("meta"):
            model = spec.model_cls(args)
        if self.dims.pp_enabled:
            assert spec.pipelining_fn is not None
            self.schedule, self.parts, self.has_first, self.has_last = spec.pipelining_fn(
                *(model, self.dims, self.job, CPU, args, spec.parallelize_fn, self.loss_fn)
            )
        else:
            self.parts = [spec.parallelize_fn(model, self.dims, self.job)]
        for part in self.parts:
            part.to_empty(device="cpu")
            with torch.no_grad():
                part.init_weights(buffer_device=CPU)  # pyrefly: ignore [not-callable]
            if family == "llama3":
                adapt_llama3(part, args)
        loss_parallel = self.dims.tp_enabled and not self.job.parallelism.disable_loss_parallel
        self.context = get_train_context(loss_parallel)

    def _share(self, tensor: Tensor) -> Tensor:
        """The rows of this rank."""
        return tensor.chunk(self.layout.ranks)[dist.get_rank()]

    def __call__(self) -> None:
        """Run forward, loss and backward from fresh gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)
        with self.context():
            if self.family == "mot":
                self._run_mot()
            else:
                self._run_llama3()

    def _run_mot(self) -> None:
        """As the trainer of this package does."""
        self.loss_fn.meter.reset()
        tokenizer: Any = None  # only read for the masks of a ring
        model: Any = self.parts[0]
        inputs, targets, extra, kwargs = prepare_batch(
            model, tokenizer, self.inputs, self.labels, self.dims, self.job
        )
        if self.schedule is not None:
            self.schedule.step(inputs, kwargs, targets, self.count)
        else:
            loss = self.loss_fn(model(inputs, **extra, **kwargs), targets)
            (loss / self.count).backward()

    def _run_llama3(self) -> None:
        """As TorchTitan's trainer does."""
        inputs, labels, kwargs = self.inputs["input"], self.labels, {}
        if self.dims.cp_enabled:
            balancer = self.job.parallelism.context_parallel_load_balancer
            inputs, labels, kwargs = prepare_context_parallel_input(
                inputs, labels, kwargs, self.dims.get_mesh("cp"), CPU, balancer
            )
        if self.schedule is not None:
            first = (inputs,) if self.has_first else ()
            last = {"target": labels, "losses": []} if self.has_last else {}
            self.schedule.step(*first, **kwargs, **last, return_outputs=False)
        else:
            loss = self.loss_fn(self.parts[0](inputs, **kwargs), labels)
            (loss / self.count).backward()

    def squared_gradient(self) -> float:
        """Squared norm of the gradients of all parameters of this rank's stages."""
        gradients = [p.grad for part in self.parts for p in part.parameters() if p.grad is not None]
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
        return sum(float(gradient.double().square().sum()) for gradient in whole)


def adapt_llama3(part: nn.Module, args: Any) -> None:
    """Let gloo reduce FSDP's gradients, and start every layout from the same weights.

    FSDP would scale while it reduces, which gloo cannot. Weights that TorchTitan draws depend on
    the layout; those of a MoT do not.
    """
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    torch.manual_seed(0)
    whole = get_train_spec("llama3").model_cls(args)
    with torch.no_grad():
        whole.init_weights()
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(part, whole.state_dict(), options=options)


def count_rank(sizes: Sizes, layout: Layout) -> dict[str, dict[str, Any]]:
    """Count what this rank communicates in a step of each family, or say why it does not run."""
    counts = {"mot": _count_family("mot", sizes, layout)}
    try:
        counts["llama3"] = _count_family("llama3", sizes, layout)
    except UnknownCollectiveError:
        raise
    # The baseline is not ours: under some layouts TorchTitan's llama3 does not run on a CPU, each
    # time with an error of another class. That it does not is a result, which the table shows.
    except Exception as error:
        counts["llama3"] = {"error": first_line(error)}
    return counts


def _count_family(family: str, sizes: Sizes, layout: Layout) -> dict[str, Any]:
    """Count collectives and bytes of a step, and how much of that one block more adds."""
    step = Step(family, sizes, layout)
    deep = _traffic_of(step)
    layers = sizes.layers // 2
    shallow = _traffic_of(Step(family, replace(sizes, layers=layers), layout))
    added = sizes.layers - layers
    return {
        "step": {"calls": dict(deep.calls), "bytes": dict(deep.bytes)},
        "block": {
            "calls": _per_block(deep.calls, shallow.calls, added),
            "bytes": _per_block(deep.bytes, shallow.bytes, added),
        },
        "squared_gradient": step.squared_gradient(),
    }


def _traffic_of(step: Step) -> Traffic:
    # DDP groups gradients anew after its first step; pipelines learn shapes in theirs.
    for _ in range(2):
        step()
    with Traffic() as traffic:
        step()
    return traffic


def _per_block(deep: Counter[str], shallow: Counter[str], blocks: int) -> dict[str, float]:
    more = {kind: (deep[kind] - shallow[kind]) / blocks for kind in deep}
    return {kind: value for kind, value in more.items() if value}


def time_on_all_ranks(run: measure.Run) -> float:
    """Seconds from a common start until the last rank is done; the same number on all ranks."""
    dist.barrier()
    seconds = torch.tensor(measure.time_on_cpu(run))
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def time_rank(
    families: Sequence[str], sizes: Sizes, layout: Layout, rounds: int, limit: float
) -> dict[str, list[float]]:
    """Time steps in a layout and, while the other rank waits, in one process."""
    runs: dict[str, measure.Run] = {}
    for family in families:
        runs[family] = Step(family, sizes, layout)
        if layout.key:
            is_first = dist.get_rank() == 0
            runs[f"{family} alone"] = Step(family, sizes, ALONE) if is_first else lambda: None
    runs["mot again"] = runs["mot"]
    return measure.time_interleaved(runs, rounds, warmup=2, limit=limit, timer=time_on_all_ranks)
