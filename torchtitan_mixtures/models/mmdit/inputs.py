"""Checks of what layers with the seed's interface are built with and called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DEFAULT_HEADS = 8
"""Attention heads where neither their number nor their width together is given."""


def count_heads(dim_joint_attn: int | None, heads: int | None, dim_head: int) -> int:
    """Say how many attention heads there are.

    Raises:
        ValueError: `dim_joint_attn` is not `heads * dim_head`.
    """
    given = {"dim_joint_attn": dim_joint_attn, "heads": heads}
    check_counts(dim_head=dim_head, **{k: v for k, v in given.items() if v is not None})
    if heads is None and dim_joint_attn is None:
        return DEFAULT_HEADS
    if heads is None and dim_joint_attn is not None:
        if dim_joint_attn % dim_head:
            raise ValueError(
                f"dim_joint_attn = {dim_joint_attn}: must be a multiple of dim_head = {dim_head}, "
                "as many times as there are heads."
            )
        return dim_joint_attn // dim_head
    assert heads is not None
    if dim_joint_attn is not None and dim_joint_attn != heads * dim_head:
        raise ValueError(
            f"dim_joint_attn = {dim_joint_attn}: must be heads * dim_head, with heads = {heads} "
            f"and dim_head = {dim_head}."
        )
    return heads


def check_widths(dims: Mapping[str, int]) -> None:
    """Raise ValueError for modalities of no width, or no modalities."""
    if not dims or any(not isinstance(dim, int) or dim < 1 for dim in dims.values()):
        raise ValueError(
            f"widths of modalities are {list(dims.values())}: there must be one or more, each a "
            "whole number from 1."
        )


def check_tokens(what: str, tokens: Tensor, dim: int) -> None:
    """Raise ValueError for tokens that are not `(batch, seq, dim)` floating-point numbers."""
    _check_tensor(what, tokens)
    if not tokens.is_floating_point():
        raise ValueError(f"{what} is {tokens.dtype}: must be embedded tokens, floating-point.")
    if tokens.ndim != 3 or tokens.shape[2] != dim:
        raise ValueError(
            f"{what} is {tuple(tokens.shape)}: must be (batch, seq, dim) with dim = {dim}."
        )


def _check_tensor(what: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} is {type(value).__name__}: must be a tensor.")


def check_counts(**numbers: object) -> None:
    """Raise ValueError for what is no whole number from 1."""
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} = {value!r}: must be a whole number from 1.")


def check_mask(what: str, mask: Tensor | None, shape: Sequence[int]) -> None:
    """Raise ValueError for a mask that is not bool of `shape`, `(batch, seq)`."""
    if mask is None:
        return
    _check_tensor(what, mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"{what} is {mask.dtype}: must be torch.bool, True where tokens are seen.")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"{what} is {tuple(mask.shape)}: must be (batch, seq) = {tuple(shape)} as its tokens."
        )


def check_batches(batches: Mapping[str, int]) -> None:
    """Raise ValueError if modalities have different numbers of samples."""
    if len(set(batches.values())) > 1:
        listed = ", ".join(f"{size} of {name}" for name, size in batches.items())
        raise ValueError(f"there are {listed}: all modalities must have as many samples.")


def read_condition(
    time_cond: Tensor | Sequence[Tensor] | None,
    shapes: Mapping[str, tuple[int, int]],
    dim_cond: int | None,
) -> Tensor | dict[str, Tensor] | None:
    """Give each modality its condition.

    Args:
        time_cond: One for all, `(batch, dim_cond)`, or of each modality that or `(batch, seq,
            dim_cond)`.
        shapes: `(batch, seq)` of each modality.
        dim_cond: Width of a condition; None: there must be none.

    Raises:
        ValueError: Missing, superfluous, or of a wrong shape.
    """
    if time_cond is None or dim_cond is None:
        if time_cond is not None:
            raise ValueError("time_cond is given, but dim_cond = None: set dim_cond or remove it.")
        if dim_cond is not None:
            raise ValueError(f"time_cond = None, but dim_cond = {dim_cond}: a condition is needed.")
        return None
    if isinstance(time_cond, Tensor):
        expected = (next(iter(shapes.values()))[0], dim_cond)
        if tuple(time_cond.shape) != expected:
            raise ValueError(
                f"time_cond is {tuple(time_cond.shape)}: must be (batch, dim_cond) = {expected}, "
                f"or one for each of the {len(shapes)} modalities."
            )
        return time_cond
    if len(time_cond) != len(shapes):
        raise ValueError(f"time_cond has {len(time_cond)} conditions for {len(shapes)} modalities.")
    for condition, (name, shape) in zip(time_cond, shapes.items(), strict=True):
        _check_tensor(f"time_cond of {name}", condition)
        allowed = ((shape[0], dim_cond), (*shape, dim_cond))
        if tuple(condition.shape) not in allowed:
            raise ValueError(
                f"time_cond of {name} is {tuple(condition.shape)}: must be (batch, dim_cond) = "
                f"{allowed[0]} or (batch, seq, dim_cond) = {allowed[1]}."
            )
    return dict(zip(shapes, time_cond, strict=True))
