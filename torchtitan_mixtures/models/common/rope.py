"""Rotary position embeddings with Llama-3.1 frequency scaling and explicit positions.

Source: Su et al. 2021, arXiv 2104.09864; the frequency scaling is that of Llama 3.1.
Channels are paired as neighbours (0, 1), (2, 3), ..., the convention of TorchTitan's llama3, so
its weights can be loaded as they are.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoPEScaling:
    """Llama-3.1 scaling of low frequencies; `factor = 1` switches it off."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, eq=False)
class Rotation:
    """Cosines and sines of the positions of one batch, each `(batch or 1, seq, 1, head_dim / 2)`.

    A class of its own and not a pair of tensors: FSDP's mixed precision casts every floating
    tensor it finds among a block's arguments, and angles in bfloat16 are useless.
    """

    cos: Tensor
    sin: Tensor


def rope_frequencies(head_dim: int, theta: float, scaling: RoPEScaling) -> Tensor:
    """Angle per position step of each channel pair, `(head_dim / 2,)`, float32."""
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    frequencies = 1.0 / theta**exponents
    wavelengths = 2 * math.pi / frequencies
    # 1 where the wavelength is short enough to keep, 0 where it is divided by the factor.
    keep = scaling.original_max_positions / wavelengths - scaling.low_freq_factor
    keep = (keep / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def rope_table(head_dim: int, max_seq_len: int, theta: float, scaling: RoPEScaling) -> Tensor:
    """Cosine and sine of each position and channel pair, `(max_seq_len, head_dim / 2, 2)`."""
    angles = torch.outer(
        torch.arange(max_seq_len).float(), rope_frequencies(head_dim, theta, scaling)
    )
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotation_at(table: Tensor, seq: int, positions: Tensor | None = None) -> Rotation:
    """Look up the rotation of each position.

    Args:
        table: As returned by `rope_table`, `(max_seq_len, head_dim / 2, 2)`.
        seq: Length of the sequences.
        positions: Position of each token, `(batch, seq)` or `(1, seq)`, int64, below
            `max_seq_len` (the loader's business); None counts from 0.
    """
    rows = table[:seq].unsqueeze(0) if positions is None else table[positions]
    cos, sin = rows.unsqueeze(2).unbind(-1)  # (batch or 1, seq, 1, head_dim / 2)
    return Rotation(cos.contiguous(), sin.contiguous())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the channel pairs of queries or keys, in float32 or better.

    Args:
        x: `(batch, seq, heads, head_dim)`.
        rotation: The rotation of each position.

    Returns:
        `(batch, seq, heads, head_dim)`, dtype of `x`.
    """
    wide = x.to(torch.promote_types(x.dtype, rotation.cos.dtype))
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)  # (batch, seq, heads, head_dim / 2)
    rotated = (
        even * rotation.cos - odd * rotation.sin,
        even * rotation.sin + odd * rotation.cos,
    )
    return torch.stack(rotated, dim=-1).flatten(-2).to(x.dtype)
