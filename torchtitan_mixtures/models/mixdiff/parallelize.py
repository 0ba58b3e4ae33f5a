"""Where a mixture of diffusers may be cut: every expert as its own family does it.

The router is small: all ranks of tensor parallelism compute it alike, and FSDP keeps it in float32.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel.style import ParallelStyle
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures.checks import require_checked
from torchtitan_mixtures.models.common.embeddings import LabelEmbedder
from torchtitan_mixtures.models.mixdiff.model import MixtureOfDiffusers
from torchtitan_mixtures.models.mixdiff.router import Router, TokenEmbedder, Transformer
from torchtitan_mixtures.parallelize import Cuts, apply_ddp, finish_fsdp, fsdp_arguments
from torchtitan_mixtures.tensor_parallel import (
    AlikeLinear,
    Distributed,
    alike,
    apply_tensor_parallel,
)
from torchtitan_mixtures.towers import apply_tower_keys

CUTS = Cuts()
"""Of the mixture itself; experts have those of their families, see `MixDiffModelArgs.parts`."""


class AlikeLabelEmbedder(LabelEmbedder):
    """An embedding of classes that every rank computes alike."""

    def forward(self, input: Tensor) -> Tensor:
        """`(batch,)` -> `(batch, dim)`."""
        return F.embedding(input, alike(self.weight))


class AlikeTokenEmbedder(TokenEmbedder):
    """A `TokenEmbedder` that every rank computes alike."""

    def table(self) -> Tensor:
        """See `TokenEmbedder`."""
        return alike(self.weight)


class AlikeTransformer(Transformer):
    """A `Transformer` that every rank computes alike."""

    def first_token(self) -> Tensor:
        """See `Transformer`."""
        return alike(self.token)


ALIKE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: AlikeLinear,
    LabelEmbedder: AlikeLabelEmbedder,
    TokenEmbedder: AlikeTokenEmbedder,
    Transformer: AlikeTransformer,
}
"""Modules of a router that have weights, and what they become."""


def router_styles(router: Router) -> dict[str, ParallelStyle]:
    """Say how ranks of tensor parallelism compute a router: all of it, alike."""
    return {
        path: Distributed(ALIKE[type(module)])
        for path, module in router.named_modules()
        if type(module) in ALIKE
    }


def parallelize_mixdiff(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """Apply the job's parallelism to a mixture of diffusers.

    Every rank runs every expert in training, on one sample at least, so that all gather and reduce
    the same buffers.

    Args:
        model: The model, preferably on the meta device; changed in place.
        parallel_dims: The job's parallel layout.
        job_config: The job's configuration.

    Returns:
        The same model.
    """
    # TorchTitan's trainer does not noise batches.
    require_checked(job_config, "a model of images")
    mixture = cast(MixtureOfDiffusers, model)
    compiled = job_config.compile.enable and "model" in job_config.compile.components
    if parallel_dims.tp_enabled:
        mesh = parallel_dims.get_mesh("tp")
        apply_tensor_parallel(mixture.router, mesh, router_styles(mixture.router))
    if compiled:
        mixture.least_rows = 2  # dynamo makes graphs of their own for one row
        _prepare_compilation(mixture)
    _parallelize_experts(mixture, parallel_dims, job_config)
    # Experts have their new parameters now; FSDP and DDP look at them when the first batch comes.
    apply_tower_keys(model, job_config)
    if parallel_dims.fsdp_enabled:
        mixture.runs_all = True
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        arguments = fsdp_arguments(parallel_dims.get_mesh(names), job_config)
        of_router: dict[str, Any] = {**arguments, "reshard_after_forward": False}
        of_router["mp_policy"] = MixedPrecisionPolicy(cast_forward_inputs=False)
        fully_shard(mixture.router, **of_router)
        finish_fsdp(model, arguments)
    elif parallel_dims.dp_replicate_enabled:
        apply_ddp(model, parallel_dims.get_mesh("dp_replicate"), compiled)
    return model


def _parallelize_experts(
    mixture: MixtureOfDiffusers, parallel_dims: ParallelDims, job_config: JobConfig
) -> None:
    config: Any = copy.deepcopy(job_config)
    # These are about the mixture's parts, not about parts of an expert.
    config.mixture = type(config.mixture)()
    if parallel_dims.dp_replicate_enabled and not parallel_dims.fsdp_enabled:
        # DDP is around the whole: alone it goes with no other parallelism.
        parallel_dims = dataclasses.replace(parallel_dims, dp_replicate=1, world_size=1)
    specs = [get_train_spec(family) for family, _ in mixture.model_args.parts]
    for expert, spec in zip(mixture.experts.values(), specs, strict=True):
        spec.parallelize_fn(expert, parallel_dims, config)


def _prepare_compilation(mixture: MixtureOfDiffusers) -> None:
    """Let dynamo make all graphs of a job; those of blocks that are alike are shared by experts."""
    # Of each flavour as many as one of its family makes, for a first number of samples and for
    # others, with gradients and without. By itself dynamo gives up after eight.
    config = torch._dynamo.config
    flavors = len(set(mixture.model_args.experts))
    config.recompile_limit = max(config.recompile_limit, 32 * flavors)
