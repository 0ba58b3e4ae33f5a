"""Where a Mixture of Mixers may be cut."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model import BaseModelArgs

from torchtitan_mixtures.checks import require_checked
from torchtitan_mixtures.context_parallel import (
    AllToAllAttention,
    AllToAllChannels,
    MeanOverParts,
)
from torchtitan_mixtures.models.mom.args import MoMModelArgs
from torchtitan_mixtures.models.mom.mixers import ChannelMixers, TokenMixers
from torchtitan_mixtures.models.mom.model import MoM
from torchtitan_mixtures.models.mom.routing import Router
from torchtitan_mixtures.parallelize import ContextCuts, Cuts, TensorCuts, parallelize
from torchtitan_mixtures.tensor_parallel import (
    CountedOnce,
    Distributed,
    GatheredInput,
    GatheredOutput,
    PartOfInput,
    ReplicatedLabelEmbedder,
    ReplicatedLinear,
    SubLayer,
    own_term,
)

STREAM = 1
"""The dimension of the residual stream, `(batch, seq, dim)`, that ranks share."""


class ReplicatedRouter(Router):
    """A router that chooses alike on every rank, and weighs what each computes of the mixers."""

    def parameters_of_gate(self) -> Tensor:
        """See `Router`."""
        return own_term(self.weight)


class ReplicatedTokenMixers(TokenMixers):
    """Token mixers of this rank's channels."""

    def parameters_of_experts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Mixers`."""
        return own_term(self.w1), own_term(self.b1), own_term(self.w2), own_term(self.b2)


class ShardedChannelMixers(ChannelMixers):
    """Channel mixers with this rank's part of the hidden units; the output is a term of a sum."""

    def parameters_of_experts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Mixers`."""
        w1, b1, w2 = (cast(DTensor, p).to_local() for p in (self.w1, self.b1, self.w2))
        # The bias of the output is added once: a share of it in each term.
        return w1, b1, w2, own_term(self.b2) / cast(DTensor, self.b2).device_mesh.size()


HIDDEN_UNITS = {"w1": Shard(1), "b1": Shard(1), "w2": Shard(2)}
"""Where the weights of `Mixers` are cut for `ShardedChannelMixers`."""


class ChannelsOfRank(ParallelStyle):
    """A module that works on each channel, `(batch, seq, channels)`, alone.

    Each rank computes a slice of the channels; with zeros for the others it is a term of a sum.
    """

    def __init__(self, style: ParallelStyle) -> None:
        """Take how the module itself is parallelised."""
        self.style = style

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks, rank = device_mesh.size(), device_mesh.get_local_rank()

        def put_back(part: Tensor) -> Tensor:
            width = part.shape[2]
            return F.pad(part, (rank * width, (ranks - 1 - rank) * width))

        module.register_forward_pre_hook(
            lambda _, inputs: (inputs[0].chunk(ranks, 2)[rank], *inputs[1:])
        )
        module.register_forward_hook(lambda _, inputs, output: put_back(output))
        return self.style._apply(module, device_mesh)


def tensor_parallel_styles(model: nn.Module, loss_parallel: bool) -> dict[str, ParallelStyle]:
    """Say how each layer is cut over the ranks of tensor parallelism.

    Embedders are small and computed by every rank; the stream is cut in front of the first block.
    Mixers over tokens need no sum: each rank mixes some of the channels.

    Args:
        model: A MoM or DiT.
        loss_parallel: Not used: there are no logits.

    Returns:
        Module path -> style; `*` stands for any layer.
    """
    args = cast(MoM, model).model_args
    whole = Distributed(ReplicatedLinear)
    modulation = GatheredOutput(1, Partial(), GatheredInput(ColwiseParallel()))
    styles: dict[str, ParallelStyle] = {
        "x_embedder": whole,
        "t_embedder.w1": whole,
        "t_embedder.w2": whole,
        "y_embedder": Distributed(ReplicatedLabelEmbedder),
        "stream": PartOfInput(STREAM),
        "layers.*.modulation.linear": modulation,
        "layers.*.feed_forward": SubLayer(STREAM),
        "layers.*.feed_forward.w1": GatheredInput(ColwiseParallel()),
        "layers.*.feed_forward.w2": RowwiseParallel(output_layouts=Partial()),
        "final_layer": GatheredOutput(STREAM, Replicate()),
        "final_layer.modulation.linear": modulation,
        "final_layer.linear": whole,
    }
    if args.mixer == "attention":
        styles["layers.*.attention"] = SubLayer(STREAM)
        for name in ("wq", "wk", "wv"):
            styles[f"layers.*.attention.{name}"] = GatheredInput(ColwiseParallel())
        styles["layers.*.attention.wo"] = RowwiseParallel(output_layouts=Partial())
        return styles
    styles["layers.*.mixer"] = SubLayer(STREAM)
    styles["layers.*.mixer.router"] = Distributed(ReplicatedRouter)
    styles["layers.*.mixer.router.statistics"] = CountedOnce()
    if args.num_token_experts:
        token_mixers = ChannelsOfRank(Distributed(ReplicatedTokenMixers))
        styles["layers.*.mixer.token_mixers"] = token_mixers
    if args.num_channel_experts:
        channel_mixers = Distributed(ShardedChannelMixers, HIDDEN_UNITS)
        styles["layers.*.mixer.channel_mixers"] = channel_mixers
    return styles


def tensor_parallel_sizes(model_args: BaseModelArgs) -> dict[str, int]:
    """What the degree of tensor parallelism must divide: description -> number."""
    args = cast(MoMModelArgs, model_args)
    sizes = {
        "channels": args.dim,
        "hidden units of the feed-forward network": args.ffn_hidden_dim,
    }
    if args.mixer == "attention":
        sizes["heads"] = args.n_heads
    elif args.num_channel_experts:
        sizes["hidden units of a channel mixer"] = args.channel_hidden_dim
    return sizes


def context_parallel_styles(model: nn.Module, job_config: JobConfig) -> dict[str, ParallelStyle]:
    """Say where ranks that share images' tokens communicate; module path -> style."""
    args = cast(MoM, model).model_args
    styles: dict[str, ParallelStyle] = {"stream": PartOfInput(STREAM)}
    if args.mixer == "attention":
        styles["layers.*.attention.inner_attention"] = AllToAllAttention()
        return styles
    styles["layers.*.mixer.router.pool"] = MeanOverParts()
    if args.num_token_experts:
        styles["layers.*.mixer.token_mixers"] = AllToAllChannels()
    return styles


def context_parallel_sizes(model_args: BaseModelArgs) -> dict[str, int]:
    """What ranks share instead of tokens: description -> number."""
    args = cast(MoMModelArgs, model_args)
    if args.mixer == "attention":
        return {"heads": args.n_heads}
    return {"channels": args.dim} if args.num_token_experts else {}


def matrix_products(model_args: BaseModelArgs) -> dict[str, int]:
    """The projections of a block in the order of their calls -> matrix products of each."""
    args = cast(MoMModelArgs, model_args)
    names = ["modulation.linear"]
    if args.mixer == "attention":
        names += [f"attention.{name}" for name in ("wq", "wk", "wv", "wo")]
    else:
        experts = {"channel": args.num_channel_experts, "token": args.num_token_experts}
        names += [f"mixer.{kind}_mixers.{w}" for kind in experts for w in ("w1", "w2")
                  if experts[kind]]  # fmt: skip
    return dict.fromkeys([*names, "feed_forward.w1", "feed_forward.w2"], 1)


CUTS = Cuts(
    units_before=[["x_embedder", "t_embedder", "y_embedder"]],
    units_after=[["final_layer"]],
    products=matrix_products,
    tensor_parallel=TensorCuts(tensor_parallel_styles, tensor_parallel_sizes),
    context_parallel=ContextCuts(context_parallel_styles, context_parallel_sizes),
)


def parallelize_mom(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """Apply the job's parallelism to a MoM or DiT; see `torchtitan_mixtures.parallelize`."""
    # TorchTitan's trainer does not noise batches.
    require_checked(job_config, "a model of images")
    return parallelize(model, parallel_dims, job_config, CUTS)
