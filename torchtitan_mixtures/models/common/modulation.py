"""Adaptive layer norm: a condition decides scale and shift of activations, and gates of branches.

Source: Peebles and Xie 2022, arXiv 2212.09748, 3.2 ("adaLN-Zero").
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_mixtures.models.common.building import assign

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


def modulated_norm(dim: int, eps: float = NORM_EPS) -> nn.LayerNorm:
    """Make the norm in front of a modulation, which has no scale and shift of its own."""
    return nn.LayerNorm(dim, eps=eps, elementwise_affine=False)


class Modulation(nn.Module):
    """What a condition says about shifts, scales and gates; constant at first.

    State dict:

        linear.weight  (vectors * dim, condition_dim)
        linear.bias    (vectors * dim,)

    Args:
        dim: Channels of what is modulated.
        num_vectors: How many shifts, scales and gates there are.
        condition_dim: Channels of the condition; None: `dim`.
        ones: Numbers of the vectors that are one at first; the others are zero.
    """

    def __init__(
        self,
        dim: int,
        num_vectors: int,
        condition_dim: int | None = None,
        ones: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        self.ones = sorted(ones)
        self.linear = nn.Linear(dim if condition_dim is None else condition_dim, num_vectors * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Compute the vectors.

        Args:
            condition: `(batch, condition_dim)`, or one for each token, `(batch, seq,
                condition_dim)`.

        Returns:
            `num_vectors` tensors `(batch, 1 or seq, dim)`.
        """
        vectors = self.linear(F.silu(condition))
        if vectors.ndim == 2:
            vectors = vectors.unsqueeze(1)  # (batch, 1, vectors * dim)
        return vectors.chunk(self.num_vectors, dim=2)

    def init_weights(self) -> None:
        """Set all weights to zero, and the biases of `ones` to one."""
        nn.init.zeros_(self.linear.weight)
        if not self.ones:
            nn.init.zeros_(self.linear.bias)
            return
        values = torch.zeros(self.num_vectors, self.linear.out_features // self.num_vectors)
        values[self.ones] = 1
        assign(self.linear.bias, values.flatten())
