"""Context parallelism: each rank holds a part of every sequence.

Nearly everything works on single positions, so a rank runs it on its own part. Attention, and what
else mixes positions, needs whole sequences. Two ways to give it that:

- `all_to_all` (the default; "Ulysses", Jacobs et al. 2023, arXiv 2309.14509): ranks swap parts of
  the sequence for parts of the heads in front of attention, and back behind it. Each rank then
  attends over whole sequences with its share of the heads, so any kernel and any mask work as they
  are. Two all-to-alls a block, in the backward pass the same. The degree must divide the heads.
  Networks over the positions of each channel share channels in the same way.
- `ring`: TorchTitan's, which passes keys and values around; on accelerators only.

Parts are contiguous with `all_to_all`: causality goes by place in the whole sequence, rotary
positions come with the batch. `ring` deals the sequence out as
`parallelism.context_parallel_load_balancer` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial
from torch.distributed.tensor.experimental._attention import set_rotate_method
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle
from torchtitan.distributed.context_parallel import apply_cp_to_attention_module, cp_shard
from torchtitan.protocols.model import AttentionMasksType
from torchtitan.tools.logging import logger

from torchtitan_mixtures.tensor_parallel import gather

SEQUENCE_DIMS = {"modality_masks": 2}
"""Axis of the sequence in tensors of a batch whose axis is not 1."""

WHOLE = ("document_ids", "image_ids")
"""What attention masks are made of; masks are of whole sequences, so these are not cut."""


def shard_batch(tensors: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    """Keep this rank's contiguous part of every sequence.

    Args:
        tensors: What a batch holds, `(batch, seq)` or as `SEQUENCE_DIMS` says; those in `WHOLE`
            stay as they are.
        mesh: The ranks that share a sequence.

    Returns:
        The same keys; views.
    """
    return {
        name: tensor
        if name in WHOLE
        else tensor.chunk(mesh.size(), SEQUENCE_DIMS.get(name, 1))[mesh.get_local_rank()]
        for name, tensor in tensors.items()
    }


def shard_batch_for_ring(
    tensors: dict[str, Tensor],
    mask: AttentionMasksType | None,
    mesh: DeviceMesh,
    load_balancer: str | None,
) -> tuple[dict[str, Tensor], AttentionMasksType | None]:
    """Deal out every sequence, and the mask along its queries, as TorchTitan's ring expects it.

    Args:
        tensors: As in `shard_batch`.
        mask: The mask of whole sequences, if there is one.
        mesh: The ranks that share a sequence.
        load_balancer: `parallelism.context_parallel_load_balancer`.

    Returns:
        This rank's part of the tensors and of the mask.
    """
    parts = {name: tensor for name, tensor in tensors.items() if name in WHOLE}
    part_of_mask = None
    for dim in (1, 2):
        names = [n for n in tensors if n not in parts and SEQUENCE_DIMS.get(n, 1) == dim]
        if names:
            cut, part_of_mask = cp_shard(
                mesh, tuple(tensors[n] for n in names), mask, load_balancer, dim
            )
            parts |= dict(zip(names, cut, strict=True))
    return parts, part_of_mask


def exchange(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Send chunk `i` along axis 0 to rank `i`; get one chunk of every rank, in their order."""
    return all_to_all_single_autograd(x.contiguous(), None, None, mesh.get_group())


def heads_for_sequence(q: Tensor, k: Tensor, v: Tensor, mesh: DeviceMesh) -> tuple[Tensor, ...]:
    """Swap parts of the sequence for parts of the heads, in one all-to-all.

    Args:
        q: `(batch, heads, seq / ranks, head_dim)`.
        k: `(batch, kv_heads, seq / ranks, head_dim)`.
        v: `(batch, kv_heads, seq / ranks, head_dim)`.
        mesh: The ranks that share a sequence; their number divides `heads`.

    Returns:
        The same with `(batch, heads / ranks, seq, head_dim)`. Where there are too few key and value
        heads to share, each is repeated so often that there are enough.
    """
    ranks = mesh.size()
    repeats = ranks // math.gcd(k.shape[1], ranks)
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    shares = [x.unflatten(1, (ranks, -1)) for x in (q, k, v)]
    packed = torch.cat(shares, dim=2).transpose(0, 1)  # (ranks, batch, heads of all, seq / ranks, )
    received = exchange(packed, mesh).permute(1, 2, 0, 3, 4).flatten(2, 3)
    return received.split([share.shape[2] for share in shares], dim=1)


def sequence_for_heads(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Undo `heads_for_sequence`: `(batch, heads / ranks, seq, head_dim)` to the part of the rank.

    Returns:
        `(batch, heads, seq / ranks, head_dim)`.
    """
    packed = x.unflatten(2, (mesh.size(), -1)).permute(2, 0, 1, 3, 4)
    return exchange(packed, mesh).transpose(0, 1).flatten(1, 2)


def channels_for_sequence(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Swap a part of the sequence for a part of the channels.

    Args:
        x: `(batch, seq / ranks, channels)`.
        mesh: The ranks that share a sequence; their number divides `channels`.

    Returns:
        `(batch, seq, channels / ranks)`.
    """
    packed = x.unflatten(2, (mesh.size(), -1)).permute(2, 0, 1, 3)
    return exchange(packed, mesh).transpose(0, 1).flatten(1, 2)


def sequence_for_channels(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Undo `channels_for_sequence`."""
    packed = x.unflatten(1, (mesh.size(), -1)).transpose(0, 1)
    return exchange(packed, mesh).permute(1, 2, 0, 3).flatten(2)


class AllToAllAttention(ParallelStyle):
    """An attention module whose first inputs are q, k and v, `(batch, heads, seq, head_dim)`."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            q, k, v, *rest = inputs
            return (*heads_for_sequence(q, k, v, device_mesh), *rest)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(
            lambda _, inputs, output: sequence_for_heads(output, device_mesh)
        )
        return module


class AllToAllChannels(ParallelStyle):
    """A module that works on each channel of whole sequences, `(batch, seq, channels)`, alone."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # Inside what tensor parallelism does before and behind, which was applied before.
        module.register_forward_pre_hook(
            lambda _, inputs: (channels_for_sequence(inputs[0], device_mesh), *inputs[1:])
        )
        module.register_forward_hook(
            lambda _, inputs, output: sequence_for_channels(output, device_mesh), prepend=True
        )
        return module


class MeanOverParts(ParallelStyle):
    """A module that returns the mean over a rank's part of each sequence, `(batch, dim)`.

    The means are gathered and averaged by every rank, in one order: what is decided by them is
    decided alike. The gradient is one term of a sum, as what a rank makes of it is for its part.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_hook(
            lambda _, inputs, output: gather(output[:, None], device_mesh, 1, Partial()).mean(1)
        )
        return module


def apply_context_parallel(
    model: nn.Module, mesh: DeviceMesh, styles: Mapping[str, ParallelStyle]
) -> None:
    """Cut sequences, and let what mixes their positions see whole ones; changes the model in place.

    Args:
        model: The model, or one pipeline stage of it.
        mesh: The ranks that share a sequence.
        styles: Module path -> style, `*` for any layer.
    """
    if len(model.get_submodule("layers")._modules):  # a pipeline stage may have none
        parallelize_module(model, mesh, dict(styles))
    logger.info(f"Applied context parallelism over {mesh.size()} ranks to the model")


def apply_ring(model: nn.Module, mesh: DeviceMesh, attention: str, rotate_method: str) -> None:
    """Let attention pass keys and values around, as TorchTitan does; changes the model in place.

    Args:
        model: The model, or one pipeline stage of it.
        mesh: The ranks that share a sequence.
        attention: Path of the attention modules, `*` for any layer.
        rotate_method: `parallelism.context_parallel_rotate_method`.
    """
    set_rotate_method(rotate_method)
    suffix = attention.rpartition("*")[2]
    modules = [m for name, m in model.named_modules() if name.endswith(suffix)]
    apply_cp_to_attention_module(modules, mesh, cast(Any, model).model_args.attn_type)
    logger.info(f"Applied context parallelism (ring) over {mesh.size()} ranks to the model")
