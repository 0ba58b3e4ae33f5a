"""Linear layers of which tokens use the columns of their expert.

Source: Jain et al. 2024, "Mixture of Nested Experts", arXiv 2407.19985, 3.1. The experts of a layer
are its first columns: expert j of E has `dim / 2^(E - j)` of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.mone.capacity import Budget, expert_widths
from torchtitan_mixtures.models.mone.nested_mm import nested_contract, nested_expand

INIT_STD = 0.02
"""Standard deviation of initial weights."""


class NestedLinear(nn.Module):
    """What the two kinds of nested layers have in common.

    No `nn.Linear`, whose products whatever converts linear layers would make whole again.

    Args:
        in_features: Channels of the input.
        out_features: Channels of the output.
        num_experts: Experts, of which the last has all channels of the side that is nested.

    Raises:
        ValueError: The nested side cannot be halved often enough.
    """

    nested_side: str

    uses_triton = False
    """Whether own kernels compute the layer; `MoNE` sets it."""

    def __init__(self, in_features: int, out_features: int, num_experts: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        nested: int = getattr(self, self.nested_side)
        if num_experts < 1 or nested % 2 ** (num_experts - 1):
            raise ValueError(
                f"{self.nested_side} = {nested}: must be a multiple of 2^(num_experts - 1), with "
                f"num_experts = {num_experts} (1 or more)."
            )
        self.num_experts = num_experts
        self.widths = expert_widths(nested, num_experts)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as `init_weights` does, from PyTorch's global generator."""
        nn.init.trunc_normal_(self.weight, std=INIT_STD)
        nn.init.zeros_(self.bias)

    def init_weights(self) -> None:
        """Initialise all weights."""
        init.trunc_normal_(self.weight, std=INIT_STD)
        nn.init.zeros_(self.bias)

    def parameters_of_layer(self) -> tuple[Tensor, Tensor]:
        """Weight and bias; a method of its own for parallelism to say otherwise."""
        return self.weight, self.bias

    def _rows(self, x: Tensor, budget: Budget) -> tuple[int, ...]:
        if sum(budget.tokens) != x.shape[1] or len(budget.tokens) != self.num_experts:
            raise ValueError(
                f"budget = {budget}: must be of {self.num_experts} experts, and of {x.shape[1]} "
                "tokens without those that skip."
            )
        return budget.rows


class NestedLinearExpand(NestedLinear):
    """Reads the first channels of each token, those of its expert, and writes all.

    State dict:

        weight  (out_features, in_features)
        bias    (out_features,)
    """

    nested_side = "in_features"

    def forward(self, x: Tensor, budget: Budget) -> Tensor:
        """Compute `weight[:, :d] @ x[:d] + bias`, `d` being the width of a token's expert.

        Args:
            x: Tokens sorted by expert, the largest first, `(batch, seq, in_features)`; fastest
                with neighbours in memory as `sort_tokens` leaves them.
            budget: How many tokens each expert has.

        Returns:
            `(batch, seq, out_features)`.
        """
        weight, bias = self.parameters_of_layer()
        rows = self._rows(x, budget)
        y = nested_expand(x.transpose(0, 1), weight, bias, rows, self.widths, self.uses_triton)
        return y.transpose(0, 1)


class NestedLinearContract(NestedLinear):
    """Reads all channels of each token, and writes the first ones, those of its expert.

    State dict:

        weight  (out_features, in_features)
        bias    (out_features,)
    """

    nested_side = "out_features"

    def forward(self, x: Tensor, budget: Budget) -> Tensor:
        """Compute `weight[:d] @ x + bias[:d]`, then zeros, `d` being the width of the expert.

        Args:
            x: Tokens sorted by expert, the largest first, `(batch, seq, in_features)`; fastest
                with neighbours in memory as `sort_tokens` leaves them.
            budget: How many tokens each expert has.

        Returns:
            `(batch, seq, out_features)`.
        """
        weight, bias = self.parameters_of_layer()
        rows = self._rows(x, budget)
        y = nested_contract(x.transpose(0, 1), weight, bias, rows, self.widths, self.uses_triton)
        return y.transpose(0, 1)
