"""Where an MMDiT may be cut."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatch
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model import BaseModelArgs

from torchtitan_mixtures.checks import require_checked
from torchtitan_mixtures.context_parallel import AllToAllAttention
from torchtitan_mixtures.data.aspect_ratios import make_buckets
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.models.mmdit.args import IMAGE, MMDiTModelArgs
from torchtitan_mixtures.models.mmdit.hyper_connections import HyperConnection, StreamReader
from torchtitan_mixtures.models.mmdit.joint_attention import PerHeadNorm
from torchtitan_mixtures.models.mmdit.model import MMDiTDenoiser, Registers
from torchtitan_mixtures.models.mmdit.stream_shares import (
    STREAM,
    CutParts,
    GatheredImage,
    JointSubLayer,
    Shares,
    check_lengths,
)
from torchtitan_mixtures.parallelize import ContextCuts, Cuts, TensorCuts, parallelize
from torchtitan_mixtures.tensor_parallel import (
    Distributed,
    GatheredInput,
    GatheredOutput,
    ReplicatedEmbedding,
    ReplicatedLayerNorm,
    ReplicatedLinear,
    ReplicatedRMSNorm,
    SubLayer,
    own_term,
)

# --- tensor parallelism ---------------------------------------------------------------------------


class ReplicatedRegisters(Registers):
    """Registers of which each rank uses some."""

    def forward(self, batch: int) -> Tensor:
        """See `Registers`."""
        return own_term(self.weight).expand(batch, -1, -1)


class ShardedPerHeadNorm(PerHeadNorm):
    """A norm of this rank's heads."""

    def scales(self) -> Tensor:
        """See `PerHeadNorm`."""
        return cast(DTensor, self.weight).to_local()


class ReplicatedReader(StreamReader):
    """A `StreamReader` of this rank's tokens."""

    def parameter(self, name: str) -> Tensor:
        """See `Connection`."""
        return own_term(getattr(self, name))


class ReplicatedConnection(HyperConnection):
    """A `HyperConnection` of this rank's tokens."""

    def parameter(self, name: str) -> Tensor:
        """See `Connection`."""
        return own_term(getattr(self, name))


REPLICATED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: ReplicatedLinear,  # outside of blocks
    nn.Embedding: ReplicatedEmbedding,
    nn.LayerNorm: ReplicatedLayerNorm,
    nn.RMSNorm: ReplicatedRMSNorm,
    Registers: ReplicatedRegisters,
    StreamReader: ReplicatedReader,
    HyperConnection: ReplicatedConnection,
}
"""Modules that ranks apply to tokens or heads of their own, and what they become."""


def tensor_parallel_styles(model: nn.Module, loss_parallel: bool) -> dict[str, ParallelStyle]:
    """Say how each layer is cut over the ranks of tensor parallelism.

    Embedders and encoders of prompts are small and computed by every rank; streams are cut in front
    of the first block.

    Args:
        model: An MMDiT, or its baseline of a single stream.
        loss_parallel: Not used: there are no logits.

    Returns:
        Module path -> style; `*` stands for any layer or stream.
    """
    args = cast(MMDiTDenoiser, model).model_args
    shares = Shares(args)
    expand = GatheredInput(ColwiseParallel())
    contract = RowwiseParallel(output_layouts=Partial())
    modulation = GatheredOutput(1, Partial(), expand)
    styles: dict[str, ParallelStyle] = {
        "streams": CutParts(shares),
        "layers.*.modulation.*.linear": modulation,
        "layers.*.attention": JointSubLayer(shares),
        "layers.*.attention.wqkv.*": expand,
        "layers.*.attention.wo.*": contract,
        "layers.*.feed_forward.*": SubLayer(STREAM),
        "layers.*.feed_forward.*.w1": expand,
        "layers.*.feed_forward.*.w2": contract,
        "final_layer": GatheredImage(shares),
        "final_layer.modulation.linear": modulation,
    }
    if args.num_adaptive_weights > 1:
        styles["layers.*.attention.gates.*"] = expand
    if args.qk_norm == "per_head":
        of_heads = Distributed(ShardedPerHeadNorm, {"weight": Shard(0)})
        styles |= {"layers.*.attention.q_norm.*": of_heads, "layers.*.attention.k_norm.*": of_heads}
    return styles | {
        path: Distributed(REPLICATED[type(module)])
        for path, module in model.named_modules()
        if type(module) in REPLICATED
        and next(module.parameters(), None) is not None
        and not any(fnmatch(path, pattern) for pattern in styles)
    }


def tensor_parallel_sizes(model_args: BaseModelArgs) -> dict[str, int]:
    """What the degree of tensor parallelism must divide: description -> number."""
    args = cast(MMDiTModelArgs, model_args)
    sizes = {"heads": args.n_heads}
    for name, width in args.stream_dims.items():
        sizes[f"channels of {name}"] = width
        sizes[f"hidden units of {name}"] = int(args.mlp_ratio * width)
    return sizes


# --- context parallelism --------------------------------------------------------------------------


def context_parallel_styles(model: nn.Module, job_config: JobConfig) -> dict[str, ParallelStyle]:
    """Say where ranks that share sequences communicate; module path -> style."""
    return {
        "streams": CutParts(),
        "layers.*.attention.inner_attention": AllToAllAttention(),
    }


def context_parallel_sizes(model_args: BaseModelArgs) -> dict[str, int]:
    """What ranks share instead of tokens: description -> number."""
    return {"heads": cast(MMDiTModelArgs, model_args).n_heads}


def check_context_parallel(job_config: MixtureJobConfig, model_args: MMDiTModelArgs) -> None:
    """Check that ranks can share prompts, registers and images of all shapes of the job.

    Raises:
        ValueError: Names the lengths that they cannot share.
    """
    lengths = {f"the prompt {spec.name!r}": spec.length for spec in model_args.prompts}
    for name, number in model_args.registers.items():
        lengths[f"the registers of {name}"] = number
    patch = model_args.patch_size
    ratios = job_config.multimodal.aspect_ratios
    for bucket in make_buckets(ratios, model_args.image_size, patch):
        tokens = (bucket.height // patch) * (bucket.width // patch)
        lengths[f"images of {bucket.name}"] = tokens
    check_lengths(lengths, job_config.parallelism.context_parallel_degree)


# --- the family -----------------------------------------------------------------------------------


def matrix_products(model_args: BaseModelArgs) -> dict[str, int]:
    """The projections of a block in the order of their calls -> matrix products of each.

    The last block lacks networks of prompts, so these count as one projection.
    """
    args = cast(MMDiTModelArgs, model_args)
    streams = len(args.stream_dims)
    is_dynamic = args.num_residual_streams > 1 and args.dynamic_streams
    products = {"modulation": streams}
    if is_dynamic:
        products["attention_streams"] = streams
    if args.num_adaptive_weights > 1:
        products["attention.gates"] = streams
    products |= {"attention.wqkv": streams, "attention.wo": streams}
    if streams > 1:
        products["feed_forward"] = (streams - 1) * (3 if is_dynamic else 2)
    if is_dynamic:
        products[f"ffn_streams.{IMAGE}"] = 1
    return products | {f"feed_forward.{IMAGE}.{layer}": 1 for layer in ("w1", "w2")}


CUTS = Cuts(
    units_after=[["final_layer"]],
    products=matrix_products,
    tensor_parallel=TensorCuts(tensor_parallel_styles, tensor_parallel_sizes, cuts_positions=False),
    context_parallel=ContextCuts(
        context_parallel_styles, context_parallel_sizes, check=check_context_parallel
    ),
)


def embedders(model_args: MMDiTModelArgs) -> list[str]:
    """What FSDP gathers together in front of the blocks.

    Not registers, which are returned as they are: the root's unit keeps them through a step.
    """
    kinds = ("prompt_encoder", "prompt_embedder", "pooled_embedder")
    of_prompts = [f"{kind}.{name}" for name in model_args.prompt_names for kind in kinds]
    return ["x_embedder", "t_embedder", *of_prompts]


def prepare_compilation() -> None:
    """Let dynamo make all graphs of a job."""
    # Of two kinds of blocks; for the shape that comes first, and for others; behind embedders,
    # whose outputs are views, and behind blocks; in training, and in validation and sampling. By
    # itself dynamo gives up after eight.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 2 * 2 * 2 * 2)


def parallelize_mmdit(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """Apply the job's parallelism to an MMDiT; see `torchtitan_mixtures.parallelize`."""
    # TorchTitan's trainer does not noise batches.
    require_checked(job_config, "a model of images")
    if job_config.compile.enable:
        prepare_compilation()
    # Which embedders there are depends on the prompts.
    units = [embedders(cast(MMDiTDenoiser, model).model_args)]
    cuts = dataclasses.replace(CUTS, units_before=units)
    return parallelize(model, parallel_dims, job_config, cuts)
