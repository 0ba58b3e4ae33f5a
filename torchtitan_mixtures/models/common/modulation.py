"""Adaptive layer norm: a condition decides scale and shift of activations, and gates of branches.

Source: Peebles and Xie 2022, arXiv 2212.09748, 3.2 ("adaLN-Zero").
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
"""Epsilon of the norms in front of a modulation."""


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift channels.

    Args:
        x: Normed activations, `(batch, seq, dim)`.
        shift: `(batch, 1, dim)`.
        scale: `(batch, 1, dim)`; 0 leaves `x` as it is.
    """
    return x * (1 + scale) + shift


def modulated_norm(dim: int) -> nn.LayerNorm:
    """Make the norm in front of a modulation, which has no scale and shift of its own."""
    return nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)


class Modulation(nn.Module):
    """What a condition says about shifts, scales and gates; zero at first.

    State dict:

        linear.weight  (vectors * dim, dim)
        linear.bias    (vectors * dim,)
    """

    def __init__(self, dim: int, num_vectors: int) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        self.linear = nn.Linear(dim, num_vectors * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Compute the vectors.

        Args:
            condition: `(batch, dim)`.

        Returns:
            `num_vectors` tensors `(batch, 1, dim)`.
        """
        vectors = self.linear(F.silu(condition)).unsqueeze(1)  # (batch, 1, vectors * dim)
        return vectors.chunk(self.num_vectors, dim=2)

    def init_weights(self) -> None:
        """Set all weights to zero."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
