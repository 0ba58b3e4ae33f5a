"""Where a Mixture of Nested Experts may be cut.

Tensor parallelism shares heads and hidden units, nesting is along the other side of each matrix,
and the two never meet. The residual stream is whole on every rank. What ranks add up are branches,
of which a token has the channels of its expert and zeros beyond: only those are sent, in forward
and backward pass, which takes the share of the traffic that the capacity is of the compute.

Context parallelism deals sorted tokens out: each rank gets as many of every expert as any other.
That is `nested.context_routing = "global"`. With `"local"` each rank routes its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel.style import ParallelStyle
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model import BaseModelArgs

from torchtitan_mixtures.checks import require_checked
from torchtitan_mixtures.context_parallel import AllToAllAttention, MeanOverParts
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.models.mone.args import MoNEModelArgs
from torchtitan_mixtures.models.mone.capacity import Budget
from torchtitan_mixtures.models.mone.layers import NestedLinearContract, NestedLinearExpand
from torchtitan_mixtures.models.mone.model import Embedder, MoNE, RouterScale
from torchtitan_mixtures.models.mone.nested_mm import merge_blocks
from torchtitan_mixtures.models.mone.routing import ExpertPreferredRouter
from torchtitan_mixtures.objectives.capacity import CapacitySchedule, own_capacity
from torchtitan_mixtures.parallelize import ContextCuts, Cuts, TensorCuts, parallelize
from torchtitan_mixtures.tensor_parallel import (
    AlikeLayerNorm,
    AlikeLinear,
    Distributed,
    alike,
    gather,
    own_term,
)

TOKENS = 1
"""The dimension of tokens in `(batch, seq, dim)`."""


# --- tensor parallelism ---------------------------------------------------------------------------


def sum_used(x: Tensor, rows: Sequence[int], widths: Sequence[int], mesh: DeviceMesh) -> Tensor:
    """Sum over ranks what tokens have, leaving out the channels that are zero on all of them.

    Args:
        x: `(seq, batch, dim)`, tokens sorted by expert.
        rows: Tokens of each expert or a larger one.
        widths: Channels of each expert.
        mesh: The ranks, one-dimensional.

    Returns:
        The same shape.
    """
    blocks = merge_blocks(rows, widths)
    parts = [x[:count, :, columns] for count, columns in blocks]
    packed = torch.cat([part.reshape(-1) for part in parts])
    summed = collectives.all_reduce(packed, "sum", mesh)
    total = torch.zeros_like(x)
    pieces = summed.split([part.numel() for part in parts])
    for (count, columns), part, piece in zip(blocks, parts, pieces, strict=True):
        total[:count, :, columns] = piece.view(part.shape)
    return total


class _SumOfOutputs(torch.autograd.Function):
    """Sum over ranks; a rank's gradient is that of the sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Sequence[int], widths: Sequence[int], mesh: DeviceMesh
    ) -> Tensor:
        return sum_used(x, rows, widths, mesh)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None


class _SumOfGradients(torch.autograd.Function):
    """Nothing; the gradient is the sum over ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Sequence[int], widths: Sequence[int], mesh: DeviceMesh
    ) -> Tensor:
        ctx.rows, ctx.widths, ctx.mesh = rows, widths, mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return sum_used(grads[0], ctx.rows, ctx.widths, ctx.mesh), None, None, None


class ShardedExpand(NestedLinearExpand):
    """This rank's outputs, of the whole input."""

    def parameters_of_layer(self) -> tuple[Tensor, Tensor]:
        """See `NestedLinear`."""
        return cast(DTensor, self.weight).to_local(), cast(DTensor, self.bias).to_local()

    def forward(self, x: Tensor, budget: Budget) -> Tensor:
        """See `NestedLinearExpand`."""
        mesh = cast(DTensor, self.weight).device_mesh
        rows = _SumOfGradients.apply(x.transpose(0, 1), budget.rows, self.widths, mesh)
        return super().forward(rows.transpose(0, 1), budget)


class ShardedContract(NestedLinearContract):
    """The whole output, of what each rank has of the input."""

    def parameters_of_layer(self) -> tuple[Tensor, Tensor]:
        """See `NestedLinear`."""
        weight = cast(DTensor, self.weight)
        # The bias is added once: a share of it in each term.
        return weight.to_local(), own_term(self.bias) / weight.device_mesh.size()

    def forward(self, x: Tensor, budget: Budget) -> Tensor:
        """See `NestedLinearContract`."""
        mesh, term = cast(DTensor, self.weight).device_mesh, super().forward(x, budget)
        total = _SumOfOutputs.apply(term.transpose(0, 1), budget.rows, self.widths, mesh)
        return total.transpose(0, 1)


class AlikeEmbedder(Embedder):
    """An embedder that every rank computes alike."""

    def parameters_of_tokens(self) -> tuple[Tensor, Tensor | None]:
        """See `Embedder`."""
        token = self.class_token
        return alike(self.positions), None if token is None else alike(token)


class AlikeRouter(ExpertPreferredRouter):
    """A router that every rank computes alike."""

    def gate(self) -> tuple[Tensor, Tensor]:
        """See `ExpertPreferredRouter`."""
        return alike(self.weight), alike(self.bias)


class AlikeRouterScale(RouterScale):
    """A scale that every rank computes alike."""

    def alphas(self) -> Tensor:
        """See `RouterScale`."""
        return alike(self.alpha)


def tensor_parallel_styles(model: nn.Module, loss_parallel: bool) -> dict[str, ParallelStyle]:
    """Say how each layer is cut over the ranks of tensor parallelism.

    Args:
        model: A MoNE or ViT.
        loss_parallel: Not used: an image has one row of logits, which every rank computes.

    Returns:
        Module path -> style; `*` stands for any layer.
    """
    expand = Distributed(ShardedExpand, {"weight": Shard(0), "bias": Shard(0)})
    contract = Distributed(ShardedContract, {"weight": Shard(1)})
    styles: dict[str, ParallelStyle] = {
        "embedder": Distributed(AlikeEmbedder),
        "embedder.proj": Distributed(AlikeLinear),
        "layers.*.attention_norm": Distributed(AlikeLayerNorm),
        "layers.*.attention.wqkv": expand,
        "layers.*.attention.wo": contract,
        "layers.*.ffn_norm": Distributed(AlikeLayerNorm),
        "layers.*.feed_forward.w1": expand,
        "layers.*.feed_forward.w2": contract,
        "norm": Distributed(AlikeLayerNorm),
        "head": Distributed(AlikeLinear),
    }
    if cast(MoNE, model).model_args.is_nested:
        styles["routers.*"] = Distributed(AlikeRouter)
        styles["router_scale"] = Distributed(AlikeRouterScale)
    return styles


def tensor_parallel_sizes(model_args: BaseModelArgs) -> dict[str, int]:
    """What the degree of tensor parallelism must divide: description -> number."""
    args = cast(MoNEModelArgs, model_args)
    return {
        "heads": args.n_heads,
        "hidden units of the feed-forward network": args.hidden_dim,
    }


# --- context parallelism --------------------------------------------------------------------------


class PartOfTokens(ParallelStyle):
    """Where tokens that every rank has whole are cut; neighbours stay as they are in memory."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks, rank = device_mesh.size(), device_mesh.get_local_rank()
        module.register_forward_hook(
            lambda _, inputs, x: x.transpose(0, 1).chunk(ranks)[rank].transpose(0, 1)
        )
        return module


class JoinedTokens(ParallelStyle):
    """Where tokens of all ranks are joined, each rank's gradient being one term of a sum."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_hook(lambda _, inputs, x: gather(x, device_mesh, TOKENS, Partial()))
        return module


class DealtTokens(ParallelStyle):
    """A `SortedTokens` of which each rank keeps every so-manieth token.

    Tokens of an expert are neighbours and can be shared evenly, so each rank has as many of them.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks, rank = device_mesh.size(), device_mesh.get_local_rank()

        def deal(_: nn.Module, inputs: Any, output: Any) -> tuple[Any, ...]:
            *parts, budget = output
            dealt = (part.transpose(0, 1)[rank::ranks].contiguous().transpose(0, 1)
                     for part in parts)  # fmt: skip
            return (*dealt, budget.share_of_rank(ranks))

        module.register_forward_hook(deal)
        return module


class LocalRouter(ParallelStyle):
    """A router that goes by the budget of its rank's part of the tokens."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks = device_mesh.size()

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, budget, *others = inputs
            return x, budget.part_of_rank(ranks), *others

        module.register_forward_pre_hook(before)
        return module


class LocalTokens(ParallelStyle):
    """A `SortedTokens` that goes by the budget of its rank's part of the tokens."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks = device_mesh.size()
        module.register_forward_pre_hook(
            lambda _, inputs: (*inputs[:3], inputs[3].part_of_rank(ranks))
        )
        return module


def context_parallel_styles(model: nn.Module, job_config: JobConfig) -> dict[str, ParallelStyle]:
    """Say where ranks that share images' tokens communicate; module path -> style."""
    args = cast(MoNE, model).model_args
    styles: dict[str, ParallelStyle] = {
        "layers.*.attention.inner_attention": AllToAllAttention(),
        "pool": MeanOverParts(),
    }
    is_local = cast(MixtureJobConfig, job_config).nested.context_routing == "local"
    if is_local or not args.is_nested or args.router_layer > 0:
        styles["stream"] = PartOfTokens()
    if args.is_nested and is_local:
        styles |= {"routers.*": LocalRouter(), "sorted": LocalTokens()}
    elif args.is_nested:
        styles |= {"whole": JoinedTokens(), "sorted": DealtTokens()}
    return styles


def context_parallel_sizes(model_args: BaseModelArgs) -> dict[str, int]:
    """What ranks share instead of tokens: description -> number."""
    return {"heads": cast(MoNEModelArgs, model_args).n_heads}


def all_capacities(job_config: MixtureJobConfig, model_args: MoNEModelArgs) -> list[float]:
    """The capacities of all steps and validations of a job."""
    config, own = job_config.nested, own_capacity(model_args)
    schedule = CapacitySchedule(config, job_config.training.steps, 0, own)
    return sorted({own, *schedule.levels, *config.validation_capacities})


def check_context_parallel(job_config: MixtureJobConfig, model_args: MoNEModelArgs) -> None:
    """Check that ranks can share the tokens of every expert, at all capacities of the job.

    Raises:
        ValueError: They cannot, or there is a class token, which no one else has.
    """
    degree = job_config.parallelism.context_parallel_degree
    key = f"parallelism.context_parallel_degree = {degree}"
    if model_args.num_full_tokens:
        raise ValueError(f"{key}: not with pool = 'class_token'; use a flavour with a mean.")
    if not model_args.is_nested or job_config.nested.context_routing == "local":
        return
    for capacity in all_capacities(job_config, model_args):
        try:
            model_args.budget(capacity).share_of_rank(degree)
        except ValueError as error:
            raise ValueError(f"{key}, capacity {capacity}: {error}") from None


# --- the family -----------------------------------------------------------------------------------


def matrix_products(model_args: BaseModelArgs) -> dict[str, int]:
    """The projections of a block in the order of their calls -> matrix products of each."""
    names = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2")
    return dict.fromkeys(names, 1)


CUTS = Cuts(
    # Routers and alpha are small, and routers may be called often: they are in the root's unit.
    units_before=[["embedder"]],
    units_after=[["norm", "head"]],
    products=matrix_products,
    product_ops=(
        torch.ops.torchtitan_mixtures.nested_expand.default,
        torch.ops.torchtitan_mixtures.nested_contract.default,
    ),
    tensor_parallel=TensorCuts(tensor_parallel_styles, tensor_parallel_sizes, cuts_positions=False),
    context_parallel=ContextCuts(
        context_parallel_styles, context_parallel_sizes, check=check_context_parallel
    ),
)


def prepare_compilation(job_config: MixtureJobConfig, model_args: MoNEModelArgs) -> None:
    """Let dynamo make a graph for each capacity of a job."""
    capacities = all_capacities(job_config, model_args)
    # Of each, and of dense blocks: in training, in validation and there with another batch; of
    # views (behind a router) and others. By itself dynamo gives up after eight.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 2 * 3 * (len(capacities) + 1))
    # Else the numbers of the second budget are symbols, although its value is guarded on.
    torch._dynamo.config.specialize_int = True


def parallelize_mone(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """Apply the job's parallelism to a MoNE or ViT; see `torchtitan_mixtures.parallelize`."""
    # TorchTitan's trainer does not prepare classes.
    require_checked(job_config, "a model of images")
    if job_config.compile.enable:
        prepare_compilation(cast(MixtureJobConfig, job_config), cast(MoNE, model).model_args)
    return parallelize(model, parallel_dims, job_config, CUTS)
