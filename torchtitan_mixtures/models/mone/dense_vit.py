"""Weights of dense ViTs, in and out, as transformers and timm name and lay them out.

All functions are pure and work on state dicts: parameter name -> plain tensor.

    here                      transformers (names as in files)     timm
    embedder.class_token      vit.embeddings.cls_token             cls_token
    embedder.positions        .. position_embeddings               pos_embed
    embedder.proj             .. patch_embeddings.projection       patch_embed.proj
    layers.{i}.attention_norm vit.encoder.layer.{i}.layernorm_before  blocks.{i}.norm1
               attention.wqkv .. attention.attention.{query,key,value}  attn.qkv
               attention.wo   .. attention.output.dense            attn.proj
               ffn_norm       .. layernorm_after                   norm2
               feed_forward   .. intermediate.dense, output.dense  mlp.fc1, mlp.fc2
    norm                      vit.layernorm                        norm
    head                      classifier                           head

Both embed patches with a convolution, weight `(dim, channels, patch_row, patch_col)`; rows of
timm's qkv are ordered (query | key | value, head, head_dim). Positions and class token have leading
axes of length 1. Left out of what transformers has: the pooler and the mask token of `ViTModel`,
which classification does not use.

A dense checkpoint has no router: what is made of one has neither `routers.*` nor `router_scale.*`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torchtitan.tools.logging import logger

from torchtitan_mixtures.models.mone.args import MoNEModelArgs
from torchtitan_mixtures.models.mone.capacity import expert_widths
from torchtitan_mixtures.models.mone.dense_vit_checks import check_head, check_names, check_sizes
from torchtitan_mixtures.models.mone.model import MoNE
from torchtitan_mixtures.models.mone.resize import resize_positions

State = dict[str, Tensor]

_HUGGINGFACE = {
    "embedder.class_token": "vit.embeddings.cls_token",
    "embedder.positions": "vit.embeddings.position_embeddings",
    "embedder.proj": "vit.embeddings.patch_embeddings.projection",
    "layers.{i}.attention_norm": "vit.encoder.layer.{i}.layernorm_before",
    "layers.{i}.attention.query": "vit.encoder.layer.{i}.attention.attention.query",
    "layers.{i}.attention.key": "vit.encoder.layer.{i}.attention.attention.key",
    "layers.{i}.attention.value": "vit.encoder.layer.{i}.attention.attention.value",
    "layers.{i}.attention.wo": "vit.encoder.layer.{i}.attention.output.dense",
    "layers.{i}.ffn_norm": "vit.encoder.layer.{i}.layernorm_after",
    "layers.{i}.feed_forward.w1": "vit.encoder.layer.{i}.intermediate.dense",
    "layers.{i}.feed_forward.w2": "vit.encoder.layer.{i}.output.dense",
    "norm": "vit.layernorm",
    "head": "classifier",
}
_TIMM = {
    "embedder.class_token": "cls_token",
    "embedder.positions": "pos_embed",
    "embedder.proj": "patch_embed.proj",
    "layers.{i}.attention_norm": "blocks.{i}.norm1",
    "layers.{i}.attention.wqkv": "blocks.{i}.attn.qkv",
    "layers.{i}.attention.wo": "blocks.{i}.attn.proj",
    "layers.{i}.ffn_norm": "blocks.{i}.norm2",
    "layers.{i}.feed_forward.w1": "blocks.{i}.mlp.fc1",
    "layers.{i}.feed_forward.w2": "blocks.{i}.mlp.fc2",
    "norm": "norm",
    "head": "head",
}
_UNUSED = ("vit.pooler.dense.weight", "vit.pooler.dense.bias", "vit.embeddings.mask_token")
_QKV = ("query", "key", "value")


def dense_twin(args: MoNEModelArgs) -> MoNEModelArgs:
    """Arguments of the ViT of the same sizes."""
    return dataclasses.replace(args, num_experts=1)


def dense_state(state: Mapping[str, Tensor], args: MoNEModelArgs, expert: int) -> State:
    """Weights of the ViT that does what a nested model does with all tokens at one expert.

    It has the width of the nested model, with zeros for the channels that the expert does not have:
    a ViT as narrow as the expert would not do the same, since norms are over the whole width, whose
    other channels the embedding fills. Blocks before the first router stay whole.

    What the router says is left out: the result is exact if alpha is 0.

    Args:
        state: Of the nested model, or of a ViT, whose only expert is 0.
        args: Its arguments.
        expert: From 0, the smallest.

    Returns:
        Of the ViT of `dense_twin(args)`.

    Raises:
        ValueError: There is no such expert, or no ViT does the same.
    """
    largest = args.num_experts - 1
    if not 0 <= expert <= largest:
        raise ValueError(
            f"--expert {expert}: the model has {args.num_experts}, numbered from 0 (the smallest) "
            f"to {largest}."
        )
    if args.pool == "class_token" and expert != largest:
        raise ValueError(
            f"--expert {expert}: the class token always has the largest expert, and a ViT computes "
            f"all tokens alike; only expert {largest} of a model with a class token is a ViT."
        )
    alpha = state.get("router_scale.alpha")
    if alpha is not None and alpha.count_nonzero() > 0:
        logger.warning(
            "alpha = " + ", ".join(f"{value:.3g}" for value in alpha.tolist()) + ": the factor "
            "1 + alpha r of feed-forward networks, by which the router takes part in the nested "
            "model, is not in the dense one, whose output differs by that."
        )
    width = expert_widths(args.dim, args.num_experts)[expert]
    first = args.router_layer if args.is_nested else args.n_layers
    dense = {}
    for name, tensor in state.items():
        if name.startswith(("routers.", "router_scale.")):
            continue
        layer = re.match(r"layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= first:
            tensor = _keep_channels(name, tensor, width)
        dense[name] = tensor
    return dense


def _keep_channels(name: str, tensor: Tensor, width: int) -> Tensor:
    """Zero the weights of a block for channels that an expert does not have."""
    if name.endswith((".wqkv.weight", ".w1.weight")):
        axis = 1  # what is read
    elif re.search(r"\.(wo|w2)\.(weight|bias)$", name):
        axis = 0  # what is written
    else:
        return tensor
    kept = torch.zeros_like(tensor)
    kept.narrow(axis, 0, width).copy_(tensor.narrow(axis, 0, width))
    return kept


def to_huggingface(state: Mapping[str, Tensor], args: MoNEModelArgs) -> State:
    """Turn the weights of a ViT into those of transformers' `ViTForImageClassification`.

    Args:
        state: As of `dense_state`.
        args: Of the model; with a class token, which that class reads.

    Raises:
        ValueError: The model has no class token.
    """
    _require_class_token(args)
    theirs = {}
    for name, tensor in _with_common_layout(state, args).items():
        module, _, leaf = name.rpartition(".")
        if module.endswith(".wqkv"):
            parts = zip(_QKV, tensor.chunk(3), strict=True)
            theirs |= {f"{module.removesuffix('wqkv')}{q}.{leaf}": part for q, part in parts}
        else:
            theirs[name] = tensor
    return _rename(theirs, _HUGGINGFACE)


def from_huggingface(
    state: Mapping[str, Tensor],
    args: MoNEModelArgs,
    *,
    new_head: bool = False,
    new_size: bool = False,
) -> State:
    """Turn the weights of transformers' ViT into those of a nested or dense model.

    Args:
        state: Names as in the files that transformers writes; with the prefix `vit.`, or without
            it as those of `ViTModel`, which has no head.
        args: Of the model to be.
        new_head: Leave the head out.
        new_size: Interpolate positions if those of the model are of images of another size.

    Returns:
        All parameters but those of routers, and the head if it is left out.

    Raises:
        ValueError: The weights are not those of such a model; lists what differs.
    """
    _require_class_token(args)
    if not any(name.startswith("vit.") for name in state):
        state = {n if n.startswith("classifier.") else f"vit.{n}": t for n, t in state.items()}
    unused = [name for name in _UNUSED if name in state]
    if unused:
        logger.info(f"Not used: {', '.join(unused)}.")
    state = {name: tensor for name, tensor in state.items() if name not in unused}
    ours = _checked(state, args, _HUGGINGFACE, to_huggingface, new_head)
    for i in range(args.n_layers):
        for leaf in ("weight", "bias"):
            prefix = f"layers.{i}.attention."
            parts = [ours.pop(f"{prefix}{q}.{leaf}") for q in _QKV]
            ours[f"{prefix}wqkv.{leaf}"] = torch.cat(parts)
    return _with_our_layout(ours, args, new_size)


def to_timm(state: Mapping[str, Tensor], args: MoNEModelArgs) -> State:
    """Turn the weights of a ViT into those of timm's `VisionTransformer`.

    Args:
        state: As of `dense_state`.
        args: Of the model. Without a class token it is timm's with `class_token=False,
            global_pool="avg", fc_norm=False`.
    """
    return _rename(_with_common_layout(state, args), _TIMM)


def from_timm(
    state: Mapping[str, Tensor],
    args: MoNEModelArgs,
    *,
    new_head: bool = False,
    new_size: bool = False,
) -> State:
    """Turn the weights of timm's ViT into those of a nested or dense model.

    Arguments, result and errors as of `from_huggingface`.
    """
    if "fc_norm.weight" in state:
        raise ValueError(
            "fc_norm.weight: the checkpoint norms the mean of the tokens; here the mean is of "
            "normed tokens (timm's fc_norm=False). It cannot be imported."
        )
    ours = _checked(state, args, _TIMM, to_timm, new_head)
    return _with_our_layout(ours, args, new_size)


def _require_class_token(args: MoNEModelArgs) -> None:
    if args.pool != "class_token":
        raise ValueError(
            f"pool = {args.pool!r}: transformers' ViTForImageClassification reads a class token; "
            'choose a model.flavor with one (its name ends in "cls"), or timm\'s format.'
        )


def _with_common_layout(state: Mapping[str, Tensor], args: MoNEModelArgs) -> State:
    """Our names, the layout that both libraries have."""
    patch, channels = args.patch_size, args.in_channels
    common = {}
    for name, tensor in state.items():
        if name == "embedder.class_token":
            tensor = tensor[None, None]
        elif name == "embedder.positions":
            tensor = tensor[None]
        elif name == "embedder.proj.weight":
            tensor = tensor.unflatten(1, (patch, patch, channels)).permute(0, 3, 1, 2)
        elif ".wqkv." in name:
            tensor = tensor.unflatten(0, (args.n_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        common[name] = tensor
    return common


def _with_our_layout(common: Mapping[str, Tensor], args: MoNEModelArgs, new_size: bool) -> State:
    """The inverse of `_with_common_layout`."""
    state = {}
    for name, tensor in common.items():
        if name == "embedder.class_token":
            tensor = tensor[0, 0]
        elif name == "embedder.positions":
            tensor = _fit_positions(tensor[0], args, new_size)
        elif name == "embedder.proj.weight":
            tensor = tensor.permute(0, 2, 3, 1).flatten(1)
        elif ".wqkv." in name:
            tensor = tensor.unflatten(0, (3, args.n_heads, -1)).transpose(0, 1).flatten(0, 2)
        state[name] = tensor
    return state


def _fit_positions(positions: Tensor, args: MoNEModelArgs, new_size: bool) -> Tensor:
    count = len(positions) - args.num_full_tokens
    side = math.isqrt(max(count, 0))
    if side == 0 or side**2 != count:
        raise ValueError(f"positions of {count} patches: not of square images, as they are here.")
    if count != args.num_tokens and not new_size:
        theirs = side * args.patch_size
        raise ValueError(
            f"multimodal.image_size = {args.image_size}: the checkpoint has positions of images of "
            f"{theirs} pixels. Set it to {theirs}, or interpolate with --image-size "
            f"{args.image_size}."
        )
    return resize_positions(positions, args.num_full_tokens, args.num_tokens)


def _rename(state: Mapping[str, Tensor], table: Mapping[str, str]) -> State:
    """Rename by a table of modules, or of parameters that are no module's weight or bias.

    Raises:
        ValueError: A name is not in the table.
    """
    renamed = {}
    for name, tensor in state.items():
        number = re.search(r"\.(\d+)\.", name)
        general = re.sub(r"\.\d+\.", ".{i}.", name, count=1)
        module, _, leaf = general.rpartition(".")
        if general not in table and (module not in table or leaf not in ("weight", "bias")):
            raise ValueError(f"{name}: no parameter of a ViT.")
        other = table[general] if general in table else f"{table[module]}.{leaf}"
        renamed[other.replace("{i}", number[1] if number else "")] = tensor
    return renamed


def _checked(
    state: Mapping[str, Tensor],
    args: MoNEModelArgs,
    table: Mapping[str, str],
    to_theirs: Callable[[State, MoNEModelArgs], State],
    new_head: bool,
) -> State:
    """Check that weights are those of a model, and give them our names.

    Args:
        state: In the common layout, under their names.
        args: The model's.
        table: Our names -> theirs.
        to_theirs: What makes such a state dict of ours.
        new_head: Leave the head out.
    """
    with torch.device("meta"):
        ours = {name: p.detach() for name, p in MoNE(dense_twin(args)).named_parameters()}
    expected = {name: tuple(tensor.shape) for name, tensor in to_theirs(ours, args).items()}
    check_sizes(state, args, table)
    head = {f"{table['head']}.{leaf}" for leaf in ("weight", "bias")}
    if new_head:
        if classes := [len(state[name]) for name in sorted(head & state.keys())][:1]:
            logger.info(f"The head of {classes[0]} classes is left out; a new one is initialised.")
        state = {name: tensor for name, tensor in state.items() if name not in head}
        expected = {name: shape for name, shape in expected.items() if name not in head}
    else:
        check_head(state, args, table)
    positions = table["embedder.positions"]
    if positions in state and state[positions].dim() == 3:
        expected[positions] = (1, state[positions].shape[1], args.dim)  # see `_fit_positions`
    check_names(state, expected)
    return _rename(state, {theirs: ours for ours, theirs in table.items()})
