"""What a parallel layout computes against one process, in float64.

Every rank builds the same whole batch and the same model twice: parallelised by the layout, and
not at all. Both take it through the functions of the trainer (`Pipeline`, the loss, its
`prepare` and its meter), the parallel one with this rank's share.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import clip_grad_norm_, get_train_context
from torchtitan.protocols.train_spec import get_train_spec

from tests.jobs import debug_job
from torchtitan_mixtures.checks import CHECKED
from torchtitan_mixtures.layout_checks import check_layout
from torchtitan_mixtures.metrics import reduce_meter
from torchtitan_mixtures.objectives.next_token import NextTokenLoss

KEYS = {
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "tp": "tensor_parallel_degree",
    "cp": "context_parallel_degree",
    "pp": "pipeline_parallel_degree",
}


@dataclass(frozen=True)
class Layout:
    """Degrees (1 where not named), and further keys of `[parallelism]`."""

    degrees: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        """Number of processes."""
        world = 1
        for degree in self.degrees.values():
            world *= degree
        return world

    def dims(self) -> ParallelDims:
        """The host's form of it, meshes built."""
        ones = dict(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1)
        dims = ParallelDims(**(ones | self.degrees), world_size=self.world)
        dims.build_mesh()
        return dims


def pp(schedule: str, **degrees: int) -> Layout:
    """Two pipeline ranks under a schedule, and other degrees."""
    return Layout({"pp": 2} | degrees, {"pipeline_parallel_schedule": schedule})


LAYOUTS = {
    "FSDP2": Layout({"dp_shard": 2}),
    "FSDP4": Layout({"dp_shard": 4}),
    "HSDP2x2": Layout({"dp_replicate": 2, "dp_shard": 2}),
    "DDP2": Layout({"dp_replicate": 2}),
    "TP2": Layout({"tp": 2}),
    "TP4": Layout({"tp": 4}),
    "CP2": Layout({"cp": 2}),
    "CP4": Layout({"cp": 4}),
    "PP2": pp("1F1B"),
    "PP4": Layout({"pp": 4}),
    "PP2 Interleaved1F1B": pp("Interleaved1F1B"),
    "PP2 InterleavedZeroBubble": pp("InterleavedZeroBubble"),
    "PP2 ZBVZeroBubble": pp("ZBVZeroBubble"),
    "PP2 DualPipeV": pp("DualPipeV"),
    "PP2 GPipe": pp("GPipe"),
    "FSDP2xTP2": Layout({"dp_shard": 2, "tp": 2}),
    "FSDP2xCP2": Layout({"dp_shard": 2, "cp": 2}),
    "DDP2xCP2": Layout({"dp_replicate": 2, "cp": 2}),
    "TP2xCP2": Layout({"tp": 2, "cp": 2}),
    "FSDP2xPP2": Layout({"dp_shard": 2, "pp": 2}),
    "FSDP2xPP2 InterleavedZeroBubble": pp("InterleavedZeroBubble", dp_shard=2),
    "TP2xPP2": Layout({"tp": 2, "pp": 2}),
    "TP2xPP2 InterleavedZeroBubble": pp("InterleavedZeroBubble", tp=2),
    "CP2xPP2": Layout({"cp": 2, "pp": 2}),
    "FSDP2xTP2xCP2": Layout({"dp_shard": 2, "tp": 2, "cp": 2}),
    "FSDP2xTP2xPP2": Layout({"dp_shard": 2, "tp": 2, "pp": 2}),
    "TP2xCP2xPP2": Layout({"tp": 2, "cp": 2, "pp": 2}),
}

# Flavour, and what is changed in its arguments.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "2 modalities": ("debugmodel", {}),
    "3 modalities": ("debugmodel_3modality", {}),
    "dense": ("debugmodel_dense", {}),
    "post norm": ("debugmodel_post_norm", {}),
    "QK-norm, grouped queries": ("debugmodel", dict(qk_normalization=True, n_kv_heads=4)),
    "documents masked": ("debugmodel_flex_attn", {}),
    "documents masked, varlen": ("debugmodel_varlen_attn", {}),
    "grouped": ("debugmodel_3modality", dict(dispatch="grouped")),
    "attention tied": (
        "debugmodel",
        dict(untie_attention=False, qk_normalization=True, untie_final_norm=True),
    ),
    "norms and FFN tied": ("debugmodel", dict(untie_norm=False, untie_ffn=False)),
    "dense, QK-norm": ("debugmodel_dense", dict(qk_normalization=True)),
    "towers shared": ("debugmodel_3modality", dict(tower_of_modality=[0, 1, 0])),
    "two key heads": ("debugmodel", dict(n_kv_heads=2)),
}

BATCHES = ("mixed", "no first half", "none", "one", "all")
"""How the tokens of the last modality lie: anywhere; not in the first half of the rows nor of any
sequence, so the first rank of most layouts has none; nowhere; in one place; everywhere."""

ROWS, SEQ = 4, 64


@cache
def _base_job() -> Any:
    """Parsed once for each process: it takes longer than a step."""
    return debug_job("mot", f"--training.seq_len={SEQ}")


def make_job(layout: Layout, flavor: str) -> Any:
    """The configuration of a job that runs a layout."""
    job = deepcopy(_base_job())
    job.model.flavor = flavor
    job.training.local_batch_size = ROWS // _data_ranks(layout)
    job.training.mixed_precision_param = job.training.mixed_precision_reduce = "float64"
    for name, degree in layout.degrees.items():
        setattr(job.parallelism, KEYS[name], degree)
    for key, value in layout.options.items():
        setattr(job.parallelism, key, value)
    setattr(job, CHECKED, True)
    return job


def _data_ranks(layout: Layout) -> int:
    return layout.degrees.get("dp_replicate", 1) * layout.degrees.get("dp_shard", 1)


def make_args(job: Any, variant: str) -> Any:
    """The arguments of a variant, cut down to two narrow layers and a small vocabulary."""
    flavor, changes = VARIANTS[variant]
    args = get_train_spec("mot").model_args[flavor]
    args.update_from_config(job)
    sizes = dict(n_layers=2, dim=64, multiple_of=32, vocab_size=192)
    sizes["code_vocab_sizes"] = [64] * (args.n_modalities - 1)
    for key, value in (sizes | changes).items():
        setattr(args, key, value)
    args.check()
    return args


def make_batch(args: Any, kind: str, seed: int = 1) -> tuple[dict[str, torch.Tensor], Any]:
    """Random tokens, documents and loss weights, as the loader yields them.

    Modalities come from the masks here, so it does not matter which ids they have.
    """
    rng = torch.Generator().manual_seed(seed)
    last = args.n_modalities - 1
    modalities = torch.randint(last + 1, (ROWS, SEQ), generator=rng)
    if kind == "all":
        modalities.fill_(last)
    elif kind in ("none", "one"):
        modalities.clamp_(max=last - 1)
        if kind == "one":
            modalities[0, 17] = last
    elif kind == "no first half":
        modalities[: ROWS // 2].clamp_(max=last - 1)
        modalities[:, : SEQ // 2].clamp_(max=last - 1)
    labels = torch.randint(args.total_vocab_size, (ROWS, SEQ), generator=rng)
    labels[torch.rand(ROWS, SEQ, generator=rng) < 0.2] = -100
    documents = (torch.rand(ROWS, SEQ, generator=rng) < 0.1).cumsum(1)
    return {
        "input": torch.randint(args.total_vocab_size, (ROWS, SEQ), generator=rng),
        "modality_masks": modalities[:, None] == torch.arange(last + 1)[:, None],
        "document_ids": documents,
        "image_ids": torch.full((ROWS, SEQ), -1),
        "positions": torch.randint(SEQ, (ROWS, SEQ), generator=rng),
        "loss_weights": torch.rand(ROWS, SEQ, generator=rng),
    }, labels


class Run:
    """A model under a layout (None: one process, untouched), and a step of the trainer with it."""

    def __init__(self, layout: Layout | None, job: Any, args: Any, dims: ParallelDims) -> None:
        self.job, self.dims = job, dims
        spec = get_train_spec("mot")
        self.loss_fn = NextTokenLoss(args.vocab_ranges, args.modality_names)
        self.pipeline = None
        with torch.device("meta"):
            model = spec.model_cls(args)
        if layout is None:
            parts = [model]
        elif dims.pp_enabled:
            self.pipeline, parts, *_ = spec.pipelining_fn(
                model, dims, job, torch.device("cpu"), args, spec.parallelize_fn, self.loss_fn
            )
        else:
            parts = [spec.parallelize_fn(model, dims, job)]
        for part in parts:
            part.to_empty(device="cpu")
            with torch.no_grad():
                part.init_weights(buffer_device=torch.device("cpu"))
        self.parts = parts

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All parameters of this rank, by name."""
        return {name: p for part in self.parts for name, p in part.named_parameters()}

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of this data-parallel rank."""
        mesh = self.dims.get_optional_mesh("batch") if self.dims.dp_enabled else None
        if mesh is None:
            return tensor
        return tensor.chunk(mesh.size())[mesh.get_local_rank()]

    def backward(self, batch: tuple[dict[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Run forward and backward; return the loss over all ranks."""
        input_dict, labels = batch
        count = (labels != -100).sum().double()
        self.loss_fn.meter.reset()
        for parameter in self.parameters().values():
            parameter.grad = None
        inputs, targets, extra, kwargs = self.loss_fn.prepare(
            self.parts[0],
            None,
            {name: self.share(tensor) for name, tensor in input_dict.items()},
            self.share(labels),
            self.dims,
            self.job,
        )
        disabled = self.job.parallelism.disable_loss_parallel
        with get_train_context(self.dims.tp_enabled and not disabled)():
            if self.pipeline is not None:
                loss = self.pipeline.step(inputs, kwargs, targets, count)
            else:
                loss = self.loss_fn(self.parts[0](inputs, **extra, **kwargs), targets) / count
                loss.backward()
        total = loss.detach().clone()
        for name in ("loss", "pp"):
            mesh = self.dims.get_optional_mesh(name) if self.dims.world_size > 1 else None
            if mesh is not None:
                dist.all_reduce(total, group=mesh.get_group())
        return total

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clip all gradients; return their norm before."""
        return clip_grad_norm_(
            list(self.parameters().values()),
            max_norm,
            foreach=True,
            pp_mesh=self.dims.get_optional_mesh("pp") if self.dims.world_size > 1 else None,
        )


def make_runs(
    layout_name: str, variant: str, dims: ParallelDims, **options: Any
) -> tuple[Any, Run, Run]:
    """Arguments, the parallel run (with further keys of `[parallelism]`) and one process's."""
    layout = LAYOUTS[layout_name]
    job = make_job(layout, VARIANTS[variant][0])
    for key, value in options.items():
        setattr(job.parallelism, key, value)
    args = make_args(job, variant)
    check_layout(job, args)
    alone = Layout({})
    single = Run(None, make_job(alone, VARIANTS[variant][0]), args, ParallelDims(
        dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1
    ))  # fmt: skip
    return args, Run(layout, job, args, dims), single


def use_float64() -> None:
    """Make errors of the arithmetic as small as they get."""
    TORCH_DTYPE_MAP["float64"] = torch.float64  # the host has no such option
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, of which this rank may have a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest value."""
    scale = float(expected.abs().max())
    return float((found - expected).abs().max()) / (scale or 1.0)


def errors_of_a_step(
    run: Run, single: Run, batch: tuple[dict[str, torch.Tensor], torch.Tensor], dims: ParallelDims
) -> dict[str, float]:
    """Compare loss, losses per modality, initial weights, gradients and their norm."""
    expected = single.backward(batch)
    errors = {"loss": relative_error(run.backward(batch), expected)}
    meter = single.loss_fn.meter
    expected_losses = {
        name: (float(nll / count), int(count))
        for name, nll, count in zip(meter.names, *meter.totals(torch.device("cpu")), strict=True)
        if count
    }
    losses = reduce_meter(run.loss_fn.meter, dims)
    assert losses.keys() == expected_losses.keys()
    for name, (loss, count) in losses.items():
        assert count == expected_losses[name][1]
        errors[f"loss of {name}"] = abs(loss / expected_losses[name][0] - 1)
    weights = single.parameters()
    for name, parameter in run.parameters().items():
        assert torch.equal(whole(parameter), weights[name]), f"{name}: initial weights differ"
        assert parameter.grad is not None, name
        errors[name] = relative_error(whole(parameter.grad), weights[name].grad)
    errors["norm"] = relative_error(whole(run.clip(1e9)), single.clip(1e9))
    return errors
