"""Weights of a vision transformer for images of another size: its positions, interpolated."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_mixtures.models.mone.args import MoNEModelArgs


def resize_state_dict(
    state_dict: Mapping[str, Tensor], old_args: MoNEModelArgs, new_args: MoNEModelArgs
) -> dict[str, Tensor]:
    """Turn the weights of a model into those of the same model for images of another size.

    Args:
        state_dict: Parameter name -> plain tensor; not changed.
        old_args: Arguments of the model it is of.
        new_args: Arguments of the model to be, with another `image_size`.

    Returns:
        Parameter name -> plain tensor; all but the positions are the same tensors.
    """
    positions = state_dict["embedder.positions"]
    resized = resize_positions(positions, old_args.num_full_tokens, new_args.num_tokens)
    return {**state_dict, "embedder.positions": resized}


def resize_positions(positions: Tensor, num_full_tokens: int, num_tokens: int) -> Tensor:
    """Interpolate positions for another number of patches, bicubic as transformers does.

    Args:
        positions: `(full tokens + patches, dim)`; patches are a square.
        num_full_tokens: Tokens at the front that are no patches.
        num_tokens: New number of patches, a square.

    Returns:
        `(full tokens + num_tokens, dim)`.
    """
    front, patches = positions[:num_full_tokens], positions[num_full_tokens:]
    if len(patches) == num_tokens:
        return positions
    old, new = math.isqrt(len(patches)), math.isqrt(num_tokens)
    grid = patches.t().unflatten(1, (old, old))[None]  # (1, dim, rows, columns)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([front, grid[0].flatten(1).t()])
