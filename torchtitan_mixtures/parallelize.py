"""The one place where parallelism is applied to a model, in TorchTitan's order.

A family declares where to cut (`Cuts`); the order and mechanics are here and the same for all:
tensor parallelism, context parallelism, freezing of towers, activation checkpointing, compilation
of each block, then FSDP2, HSDP or DDP. Pipeline stages come here one by one.

Gradients are **sums** over data-parallel ranks everywhere, because the trainer divides the loss by
the global number of supervised positions: FSDP's own division is switched off, and DDP's average
is undone.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.utils._pytree import tree_leaves
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.tensor_parallel import maybe_enable_async_tp
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.tools.logging import logger

from torchtitan_mixtures import device
from torchtitan_mixtures.activation_checkpoint import SAVED_OPS, checkpoint_blocks
from torchtitan_mixtures.checks import require_checked
from torchtitan_mixtures.context_parallel import apply_context_parallel, apply_ring
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.layout_checks import check_tensor_parallel
from torchtitan_mixtures.tensor_parallel import apply_tensor_parallel
from torchtitan_mixtures.towers import apply_tower_keys, has_tower_keys


@dataclass(frozen=True)
class TensorCuts:
    """Where tensor parallelism cuts a family's layers.

    Attributes:
        styles: Given the model and whether the loss takes logits cut along the vocabulary:
            module path -> style.
        sizes: Given the model's arguments, what the degree must divide: description -> number.
        cuts_positions: Whether a model without towers shares positions between its layers, which
            the degree must divide too.
    """

    styles: Callable[[nn.Module, bool], Mapping[str, ParallelStyle]]
    sizes: Callable[[BaseModelArgs], Mapping[str, int]]
    cuts_positions: bool = True


@dataclass(frozen=True)
class ContextCuts:
    """Where context parallelism changes a family's layers.

    Attributes:
        styles: Given the model and the job's configuration: module path -> style, of those that
            mix positions or that cut a stream which reaches every rank whole.
        sizes: Given the model's arguments, what ranks share instead of positions and what tensor
            parallelism shares before: description -> number.
        ring: Path of the attention modules that `mixture.context_parallel = "ring"` changes, `*`
            for any layer; None: the family has no such choice.
        check: Given the job's configuration and the model's arguments, raises ValueError for what
            the degree cannot do beside that. None: nothing.
    """

    styles: Callable[[nn.Module, MixtureJobConfig], Mapping[str, ParallelStyle]]
    sizes: Callable[[BaseModelArgs], Mapping[str, int]]
    ring: str | None = None
    check: Callable[[MixtureJobConfig, Any], None] | None = None


@dataclass(frozen=True)
class Cuts:
    """Where a family's model may be cut.

    Attributes:
        units_before: Groups of module paths that FSDP gathers together, in forward order, before
            the blocks in `layers`, each of which is a group of its own. Paths that a pipeline
            stage does not have are skipped.
        units_after: The groups after the blocks.
        saved_ops: Further operators that selective activation checkpointing saves.
        products: Given the model's arguments, the projections of a block in the order of their
            calls: path in the block -> number of matrix products it makes. Every second one is
            saved by selective activation checkpointing of kind "op". None: TorchTitan's policy,
            which saves every second product.
        product_ops: Further operators that compute them.
        tensor_parallel: None: the family does not support it. `checks` finds this by the name
            `CUTS` in the family's `parallelize` module.
        context_parallel: The same about context parallelism.
    """

    units_before: Sequence[Sequence[str]] = ()
    units_after: Sequence[Sequence[str]] = ()
    saved_ops: Sequence[Callable[..., Any]] = field(default=())
    products: Callable[[BaseModelArgs], Mapping[str, int]] | None = None
    product_ops: Sequence[Callable[..., Any]] = field(default=())
    tensor_parallel: TensorCuts | None = None
    context_parallel: ContextCuts | None = None


def parallelize(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig, cuts: Cuts
) -> nn.Module:
    """Apply what the job asks for to a model whose blocks are in `model.layers`.

    Args:
        model: The model, preferably on the meta device; changed in place.
        parallel_dims: The job's parallel layout.
        job_config: The job's configuration.
        cuts: What the family declares.

    Returns:
        The same model.
    """
    _check_trainer(parallel_dims, job_config)
    if parallel_dims.tp_enabled:
        apply_tp(model, parallel_dims, job_config, cuts)
    if parallel_dims.cp_enabled:
        apply_cp(model, parallel_dims, job_config, cuts)
    apply_tower_keys(model, job_config)
    compiled = job_config.compile.enable and "model" in job_config.compile.components
    if job_config.activation_checkpoint.mode != "none":
        apply_checkpointing(model, parallel_dims, job_config, cuts, compiled)
    if compiled:
        apply_compile(model, job_config.compile.backend)
    if parallel_dims.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        apply_fsdp(model, parallel_dims.get_mesh(names), parallel_dims, job_config, cuts)
    elif parallel_dims.dp_replicate_enabled:
        apply_ddp(model, parallel_dims.get_mesh("dp_replicate"), compiled)
    return model


def _check_trainer(parallel_dims: ParallelDims, job_config: JobConfig) -> None:
    """Refuse what TorchTitan's own trainer would silently do wrong or not at all."""
    if parallel_dims.pp_enabled:
        require_checked(job_config, "pipeline parallelism")
    if parallel_dims.cp_enabled:
        require_checked(job_config, "context parallelism")
    data = getattr(job_config, "multimodal", None)
    weights = () if data is None else (data.text_weight, data.image_weight, data.speech_weight)
    if any(weight not in (0, 1) for weight in weights):
        require_checked(job_config, "a loss weight of a modality")
    mixture = getattr(job_config, "mixture", None)
    if mixture is not None and has_tower_keys(mixture):
        require_checked(job_config, "a key per tower")


def apply_tp(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig, cuts: Cuts
) -> None:
    """Cut the layers of a model along what its family declares."""
    args = cast(BaseModelArgs, model.model_args)
    check_tensor_parallel(job_config, args, cuts.tensor_parallel)
    assert cuts.tensor_parallel is not None
    mesh = parallel_dims.get_mesh("tp")
    loss_parallel = not job_config.parallelism.disable_loss_parallel
    apply_tensor_parallel(model, mesh, cuts.tensor_parallel.styles(model, loss_parallel))
    maybe_enable_async_tp(job_config, mesh)
    logger.info(f"Applied tensor parallelism over {mesh.size()} ranks to the model")


def apply_cp(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig, cuts: Cuts
) -> None:
    """Let each rank hold a part of every sequence."""
    context, mesh = cuts.context_parallel, parallel_dims.get_mesh("cp")
    assert context is not None
    if cast(MixtureJobConfig, job_config).mixture.context_parallel == "ring":
        assert context.ring is not None
        method = job_config.parallelism.context_parallel_rotate_method
        apply_ring(model, mesh, context.ring, method)
    else:
        config = cast(MixtureJobConfig, job_config)
        apply_context_parallel(model, mesh, context.styles(model, config))


def apply_checkpointing(
    model: nn.Module,
    parallel_dims: ParallelDims,
    job_config: JobConfig,
    cuts: Cuts,
    compiled: bool,
) -> None:
    """Keep only a part of each block's activations and recompute the rest in the backward pass."""
    config, saved = job_config.activation_checkpoint, {*SAVED_OPS, *cuts.saved_ops}
    full = config.mode == "full"
    if full and compiled and parallel_dims.tp_enabled and not device.has_accelerator():
        # On a CPU, PyTorch 2.13 saves the random state of a recomputed attention kernel where the
        # backward graph expects a mesh. Attention is saved there, all else recomputed as asked for.
        config = dataclasses.replace(config, mode="selective", selective_ac_option="op")
        saved = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}
    args = cast(BaseModelArgs, model.model_args)
    checkpoint_blocks(
        model,
        config,
        saved,
        cuts.products(args) if cuts.products is not None else None,
        product_ops=cuts.product_ops,
        compiled=compiled,
        base_folder=job_config.job.dump_folder,
    )


def apply_compile(model: nn.Module, backend: str) -> None:
    """Compile each block on its own: they are alike, so the first one's graph serves all."""
    layers = model.get_submodule("layers")
    for name, block in layers.named_children():
        # PyTorch's state-dict functions strip the wrapper's prefix from parameter names.
        compiled = torch.compile(block, backend=backend, fullgraph=True)
        layers.register_module(name, cast(nn.Module, compiled))
    logger.info(f"Compiling each block with torch.compile, backend {backend}")


def apply_fsdp(
    model: nn.Module,
    mesh: DeviceMesh,
    parallel_dims: ParallelDims,
    job_config: JobConfig,
    cuts: Cuts,
) -> None:
    """Shard parameters, gradients and optimiser state with FSDP2 (HSDP on a 2-D mesh).

    A block is one unit with the weights of all its towers: every rank gathers and reduces the
    same buffers whatever modalities its tokens have, so ranks cannot wait for each other.
    """
    arguments = fsdp_arguments(mesh, job_config)
    policy = job_config.parallelism.fsdp_reshard_after_forward
    # Under pipeline parallelism every microbatch would gather again.
    reshard = policy == "always" or (policy == "default" and not parallel_dims.pp_enabled)
    blocks = [[f"layers.{name}"] for name, _ in model.get_submodule("layers").named_children()]
    for paths in (*cuts.units_before, *blocks):
        _shard_unit(model, paths, reshard, arguments)
    for paths in cuts.units_after:
        # Needed again at once in the backward pass, so they stay gathered by default.
        _shard_unit(model, paths, policy == "always", arguments)
    finish_fsdp(model, arguments)


def fsdp_arguments(mesh: DeviceMesh, job_config: JobConfig) -> dict[str, Any]:
    """Make what `fully_shard` is told of every unit of a model."""
    training = job_config.training
    arguments: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        ),
        "shard_placement_fn": partial(_placement, mesh.size(mesh.ndim - 1)),
    }
    if training.enable_cpu_offload:
        # Only memory of an accelerator's host can be pinned.
        arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=device.has_accelerator())
    return arguments


def finish_fsdp(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Shard what is in no unit yet, and let ranks sum their gradients.

    Args:
        model: The model, whose units are sharded.
        arguments: See `fsdp_arguments`.
    """
    # The root would round times and positions to the parameters' precision with all other inputs;
    # units cast what their own layers take.
    policy = dataclasses.replace(arguments["mp_policy"], cast_forward_inputs=False)
    fully_shard(model, **{**arguments, "mp_policy": policy})
    # A layer with a bias returns a view. The warning is of writing into it, which nothing does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh: DeviceMesh = arguments["mesh"]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            if mesh.device_type == "cpu":
                # gloo cannot scale while it reduces.
                module.set_force_sum_reduction_for_comms(True)
    logger.info(f"Applied {'HSDP' if mesh.ndim == 2 else 'FSDP'} to the model")


def _placement(ranks: int, parameter: Tensor) -> Shard | None:
    """Say where a parameter is sharded; None: along its first dimension.

    Of a stack of matrices, fewer than there are ranks or not as many for each, that would leave
    some ranks more than others, or nothing.
    """
    if parameter.ndim < 3 or parameter.shape[0] % ranks == 0:
        return None
    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    taken = {placement.dim for placement in placements if isinstance(placement, Shard)}
    for dim in range(1, parameter.ndim):
        if dim not in taken and parameter.shape[dim] % ranks == 0:
            return Shard(dim)
    return None


def _shard_unit(
    model: nn.Module, paths: Sequence[str], reshard: bool, arguments: dict[str, Any]
) -> None:
    modules = [module for path in paths if (module := _submodule_or_none(model, path)) is not None]
    if modules:
        fully_shard(modules, **arguments, reshard_after_forward=reshard)


def _submodule_or_none(model: nn.Module, path: str) -> nn.Module | None:
    """Find a module that a pipeline stage may lack (the attribute is None there)."""
    module: Any = model
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


def apply_ddp(model: nn.Module, mesh: DeviceMesh, compiled: bool) -> None:
    """Replicate the model with DDP, gradients summed over ranks.

    DDP averages. A communication hook that sums would be wrong under gradient accumulation, where
    DDP reduces the accumulated gradient again with every microbatch (the average of equal parts
    is that part, their sum is not). So the gradient is scaled by the number of ranks where it
    enters the model.
    """
    if compiled:
        torch._dynamo.config.optimize_ddp = "ddp_optimizer"
    replicate(model, device_mesh=mesh, bucket_cap_mb=100)
    ranks = mesh.size()

    def scale_gradient(module: nn.Module, arguments: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda gradient: gradient * ranks)

    model.register_forward_hook(scale_gradient)
    logger.info("Applied DDP to the model")
