"""Tensor and sequence parallelism for sub-layers made of several towers.

Around the sub-layers the residual stream is cut along its rows (or its sequence), one share per
rank; inside, every rank sees all rows and computes its part of the heads or hidden units. What a
rank returns is a partial sum over all towers at once. So a sub-layer costs one all-gather in front
and one reduce-scatter behind, in the backward pass the same in reverse, whatever the number of
towers. PyTorch's own `ColwiseParallel` and `RowwiseParallel` cut the weights.

Every parameter becomes a DTensor on the mesh, those of norms and of other layers that each rank
applies to its own share a replicated one whose gradient is a pending sum (`Partial`): FSDP, the
optimiser and gradient clipping then agree about all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from torchtitan_mixtures.models.common.dispatch import Plan, RowNorm, SortedPlan
from torchtitan_mixtures.models.common.embeddings import LabelEmbedder


def gather(x: Tensor, mesh: DeviceMesh, dim: int, grad: Placement) -> Tensor:
    """Join the shares of all ranks.

    Args:
        x: This rank's share, cut along `dim`.
        mesh: The ranks, one-dimensional.
        dim: The dimension to join.
        grad: What a rank's gradient of the result is: `Partial()`, one term of a sum (the backward
            pass is a reduce-scatter), or `Replicate()`, already whole (no communication).
    """
    share = DTensor.from_local(x, mesh, [Shard(dim)], run_check=False)
    return share.redistribute(placements=[Replicate()]).to_local(grad_placements=[grad])


def scatter(x: Tensor, mesh: DeviceMesh, dim: int, layout: Placement) -> Tensor:
    """Keep this rank's share along `dim`; the backward pass is an all-gather.

    Args:
        x: All rows: one term of a sum (`layout` is `Partial()`: a reduce-scatter), or the same
            on all ranks (`Replicate()`: no communication).
        mesh: The ranks, one-dimensional.
        dim: The dimension to cut.
        layout: See `x`.
    """
    whole = DTensor.from_local(x, mesh, [layout], run_check=False)
    return whole.redistribute(placements=[Shard(dim)]).to_local()


def own_term(parameter: Tensor) -> Tensor:
    """All of a replicated parameter, to whose gradient this rank adds one term of a sum."""
    return cast(DTensor, parameter).to_local(grad_placements=[Partial()])


class SubLayer(ParallelStyle):
    """A module that needs all rows and returns a partial sum, between shares of the stream.

    It may return more than that; then the sum is the first.
    """

    def __init__(self, dim: int) -> None:
        """Take the dimension of the residual stream that is cut."""
        self.dim = dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def after(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if not isinstance(output, tuple):
                return scatter(output, device_mesh, self.dim, Partial())
            return (scatter(output[0], device_mesh, self.dim, Partial()), *output[1:])

        module.register_forward_pre_hook(
            lambda _, inputs: (gather(inputs[0], device_mesh, self.dim, Partial()), *inputs[1:])
        )
        module.register_forward_hook(after)
        return module


class GatheredOutput(ParallelStyle):
    """A module between whose output and the next module the stream is joined."""

    def __init__(self, dim: int, grad: Placement, style: ParallelStyle | None = None) -> None:
        """Build the style.

        Args:
            dim: The dimension of the output that is cut.
            grad: As in `gather`.
            style: How the module itself is parallelised.
        """
        self.dim, self.grad, self.style = dim, grad, style

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if self.style is not None:
            module = self.style._apply(module, device_mesh)
        module.register_forward_hook(
            lambda _, inputs, output: gather(output, device_mesh, self.dim, self.grad)
        )
        return module


class VocabParallel(RowwiseParallel):
    """An embedding cut along the vocabulary whose output is this rank's share of the stream.

    PyTorch's style returns a tensor that is still being reduced; the gradient of one that enters a
    compiled block arrives in the wrong class and stops the backward pass (2.13).
    """

    @staticmethod
    def _prepare_output_fn(output_layouts, use_local_output, mod, outputs, device_mesh):
        return outputs.redistribute(placements=output_layouts).to_local()


class ScatteredInput(ParallelStyle):
    """A module that works on shares of a stream that reaches every rank whole."""

    def __init__(self, dim: int, style: ParallelStyle | None = None) -> None:
        """Take the dimension to cut, and how the module itself is parallelised."""
        self.dim, self.style = dim, style

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # Registered before the style's own hook, which takes a share.
        module.register_forward_pre_hook(
            lambda _, inputs: (scatter(inputs[0], device_mesh, self.dim, Replicate()), *inputs[1:])
        )
        return module if self.style is None else self.style._apply(module, device_mesh)


class PartOfInput(ParallelStyle):
    """A module that works on this rank's part of a stream that reaches every rank whole.

    Unlike that of `ScatteredInput` the backward pass does not communicate: modules before this one
    get one term of a sum. Of two kinds of parallelism the one that is applied later cuts first.
    """

    def __init__(self, dim: int) -> None:
        """Take the dimension to cut."""
        self.dim = dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks, rank = device_mesh.size(), device_mesh.get_local_rank()

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            # In the memory layout that later blocks get, too, so that one compiled graph does.
            return inputs[0].chunk(ranks, self.dim)[rank].contiguous(), *inputs[1:]

        module.register_forward_pre_hook(before, prepend=True)
        return module


class GatheredInput(ParallelStyle):
    """A column-parallel layer whose input was joined before, by `gather`.

    On its own a column-parallel layer sums the gradient of its input over all ranks. Here that sum
    is left to `gather`, which reduces the gradients of all towers and projections at once.
    """

    def __init__(self, style: ParallelStyle) -> None:
        """Take the layer's own style, `ColwiseParallel` or a variant of it."""
        self.style = style

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # Registered before the style's own hook, which takes a DTensor as it is.
        module.register_forward_pre_hook(partial(_as_replicated, device_mesh))
        return self.style._apply(module, device_mesh)


def _as_replicated(mesh: DeviceMesh, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    x = DTensor.from_local(
        inputs[0], mesh, [Replicate()], run_check=False, grad_placements=[Partial()]
    )
    return (x, *inputs[1:])


class Distributed(ParallelStyle):
    """A module whose class is exchanged for one that computes with what a rank has of its weights.

    As FSDP does: another class and not another module, so names and references stay.
    """

    def __init__(
        self, module_class: type[nn.Module], placements: Mapping[str, Placement] | None = None
    ) -> None:
        """Build the style.

        Args:
            module_class: The class; of replicated parameters it takes the `own_term`.
            placements: Name of a parameter of the module itself -> how it is cut; those that are
                not named are replicated.
        """
        self.module_class, self.placements = module_class, placements or {}

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            placement = self.placements.get(name, Replicate())
            part = distribute_tensor(parameter, device_mesh, [placement], src_data_rank=0)
            module.register_parameter(name, nn.Parameter(part))
        module.__class__ = self.module_class
        return module


class ReplicatedLinear(nn.Linear):
    """A linear layer that each rank applies to rows of its own."""

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in)` -> `(..., out)`."""
        return F.linear(input, own_term(self.weight), own_term(self.bias))


class ReplicatedEmbedding(nn.Embedding):
    """An embedding of which each rank uses the result for rows of its own."""

    def forward(self, input: Tensor) -> Tensor:
        """Ids of any shape -> `(..., dim)`."""
        return F.embedding(input, own_term(self.weight))


class ReplicatedLayerNorm(nn.LayerNorm):
    """A norm that each rank applies to rows of its own."""

    def forward(self, input: Tensor) -> Tensor:
        """`(..., dim)` -> the same shape."""
        weight, bias = own_term(self.weight), own_term(self.bias)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class ReplicatedRMSNorm(nn.RMSNorm):
    """A norm that each rank applies to rows or heads of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` -> the same shape."""
        return F.rms_norm(x, self.normalized_shape, own_term(self.weight), self.eps)


class ReplicatedLabelEmbedder(LabelEmbedder):
    """An embedding of which each rank uses the result for rows of its own."""

    def forward(self, input: Tensor) -> Tensor:
        """`(batch,)` -> `(batch, dim)`."""
        return F.embedding(input, own_term(self.weight))


def alike(parameter: Tensor) -> Tensor:
    """All of a replicated parameter that every rank uses alike, and so finds the same gradient."""
    return cast(DTensor, parameter).to_local()


class AlikeLinear(nn.Linear):
    """A linear layer that every rank computes alike."""

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in)` -> `(..., out)`."""
        return F.linear(input, alike(self.weight), alike(self.bias))


class AlikeLayerNorm(nn.LayerNorm):
    """A norm that every rank computes alike."""

    def forward(self, input: Tensor) -> Tensor:
        """`(..., dim)` -> the same shape."""
        weight, bias = alike(self.weight), alike(self.bias)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class _ScaledGradient(torch.autograd.Function):
    """Multiply the gradient alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class CountedOnce(ParallelStyle):
    """A module that every rank computes alike, where else each has one term of a gradient.

    Each gets its share of the gradient, so that the terms sum up to it.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        share = 1 / device_mesh.size()
        module.register_forward_pre_hook(
            lambda _, inputs: tuple(
                _ScaledGradient.apply(x, share) if x.is_floating_point() else x for x in inputs
            )
        )
        return module


class RowNormParallel(ParallelStyle):
    """A `RowNorm` on this rank's share of the rows."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for norm in cast(RowNorm, module).values():
            weight = distribute_tensor(
                cast(Tensor, norm.weight), device_mesh, [Replicate()], src_data_rank=0
            )
            norm.register_parameter("weight", nn.Parameter(weight))
        module.__class__ = ShardedRowNorm
        cast(ShardedRowNorm, module).share = device_mesh.get_local_rank()
        return module


class ShardedRowNorm(RowNorm):
    """A norm of one rank's share of the sorted rows.

    The statistics of a row do not depend on its tower, the scale does, and it is picked per row.
    The share could be cut into slices of towers like the whole, but a slice may then be empty, and
    each pattern of empty slices would be a graph of its own under torch.compile. Norming in front
    of the reduce-scatter or behind the all-gather would be done on every rank, and keep activations
    of all rows for the backward pass. Against `nn.RMSNorm`, in bfloat16, the normed row is rounded
    before it is scaled, as in Llama's own code.

    State dict: as `RowNorm`.
    """

    share: int
    """Which of the equal shares of all rows this rank holds."""

    def forward(self, x: Tensor, plan: Plan | None) -> Tensor:
        """Norm each row by its tower.

        Args:
            x: This rank's share of the residual stream, `(rows / ranks, dim)`;
                `(batch, seq / ranks, dim)` without a plan.
            plan: The plan of all rows.

        Returns:
            Same shape as `x`.
        """
        norms = [cast(nn.RMSNorm, norm) for norm in self.values()]
        shape, eps = norms[0].normalized_shape, norms[0].eps
        weights = [own_term(norm.weight) for norm in norms]
        if not isinstance(plan, SortedPlan) or len(weights) == 1:
            return F.rms_norm(x, shape, weights[0], eps)
        first = self.share * x.shape[0]
        rows = torch.arange(first, first + x.shape[0], device=x.device)[:, None]
        scale = weights[0]
        for weight, start in zip(weights[1:], plan.ends, strict=False):
            # Rows are sorted by tower: the last condition that holds decides.
            scale = torch.where(rows >= start, weight, scale)  # (rows / ranks, dim)
        return F.rms_norm(x, shape, None, eps) * scale


def apply_tensor_parallel(
    model: nn.Module, mesh: DeviceMesh, styles: Mapping[str, ParallelStyle]
) -> None:
    """Cut a model along `styles` (module path -> style); changes it in place.

    Raises:
        RuntimeError: A parameter is in no style: it would be missing from the mesh, and its
            gradient wrong without a word.
    """
    parallelize_module(model, mesh, dict(styles))
    left = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    if left:
        raise RuntimeError(f"tensor parallelism leaves out {', '.join(left)}")
