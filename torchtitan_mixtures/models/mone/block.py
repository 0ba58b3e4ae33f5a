"""A transformer block whose tokens get nested slices of it.

Source: Jain et al. 2024, "Mixture of Nested Experts", arXiv 2407.19985, 3.1, equations 2 and 3:

    z  = x + SA_j(LN(x))
    x' = z + (alpha r + 1) FFN_j(LN(z))

for a token of expert j. Queries, keys and values are made of the token's first channels but have
full width, attention is among all tokens, and so are hidden units; what a branch adds to the
residual stream has the token's first channels alone.

Deviations:
    - The paper's appendix norms what a branch puts out; its figure and text norm the whole width in
      front of it, as here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_mixtures.models.common.attention import InnerAttention
from torchtitan_mixtures.models.mone.capacity import Budget, check_distribution, count_tokens
from torchtitan_mixtures.models.mone.layers import (
    NestedLinear,
    NestedLinearContract,
    NestedLinearExpand,
)


class NestedAttention(nn.Module):
    """Softmax attention in which every token sees every other.

    State dict:

        wqkv.weight  (3 * dim, dim), rows ordered (head, query | key | value, head_dim), so that
                     tensor parallelism can share heads
        wqkv.bias    (3 * dim,)
        wo.weight    (dim, dim)
        wo.bias      (dim,)
    """

    def __init__(self, dim: int, num_heads: int, num_experts: int) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.wqkv = NestedLinearExpand(dim, 3 * dim, num_experts)
        self.wo = NestedLinearContract(dim, dim, num_experts)
        self.inner_attention = InnerAttention()

    def forward(self, x: Tensor, budget: Budget, mask: Tensor | None = None) -> Tensor:
        """`(batch, seq, dim)` -> the same shape; arguments as of `NestedBlock`."""
        x = x if mask is None else x * mask
        # -1 and not the number of heads: tensor parallelism leaves each rank a part of them.
        qkv = self.wqkv(x, budget).unflatten(2, (-1, 3, self.head_dim))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))  # (batch, heads, seq, head_dim)
        attended = self.inner_attention(q, k, v, is_causal=False)
        rows = attended.permute(2, 0, 1, 3).flatten(2)  # (seq, batch, dim)
        y = self.wo(rows.transpose(0, 1), budget)
        return y if mask is None else y * mask


class NestedFeedForward(nn.Module):
    """Two layers with a GELU (exact form) between them; all tokens have all hidden units.

    State dict:

        w1.weight  (hidden, dim)    w1.bias  (hidden,)
        w2.weight  (dim, hidden)    w2.bias  (dim,)
    """

    def __init__(self, dim: int, hidden_dim: int, num_experts: int) -> None:
        super().__init__()
        self.w1 = NestedLinearExpand(dim, hidden_dim, num_experts)
        self.w2 = NestedLinearContract(hidden_dim, dim, num_experts)

    def forward(self, x: Tensor, budget: Budget, mask: Tensor | None = None) -> Tensor:
        """`(batch, seq, dim)` -> the same shape; arguments as of `NestedBlock`."""
        y = self.w2(F.gelu(self.w1(x if mask is None else x * mask, budget)), budget)
        return y if mask is None else y * mask


class NestedBlock(nn.Module):
    """Attention and feed-forward network of which tokens get nested slices.

    Its input is sorted by expert: the first tokens get the most. `ExpertPreferredRouter` says who
    that is, `Routing.sort` puts them in front, and `Routing.offset` is how the router learns.

    State dict:

        attention_norm.weight, attention_norm.bias, ffn_norm.weight, ffn_norm.bias  (dim,)
        attention.*     see `NestedAttention`
        feed_forward.*  see `NestedFeedForward`

    Args:
        dim: Width of the residual stream.
        num_heads: Attention heads.
        num_experts: Nested experts; with 1 the block is that of a ViT.
        capacity_distribution: Share of the tokens of each expert, smallest first, as
            `compute_capacity_distribution` returns it; None: `forward` is given a budget.
        mlp_ratio: Hidden units of the feed-forward network / dim.
        norm_eps: Epsilon of the norms.

    Raises:
        ValueError: Capacities do not sum to 1, or sizes do not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_experts: int,
        capacity_distribution: Sequence[float] | None = None,
        *,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if capacity_distribution is not None:
            check_distribution(capacity_distribution, num_experts)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads = {num_heads}: must be a divisor of dim = {dim}.")
        if not round(mlp_ratio * dim) > 0:
            raise ValueError(f"mlp_ratio = {mlp_ratio}: must be a number > 1 / dim.")
        self.capacity_distribution = capacity_distribution
        self.attention_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.attention = NestedAttention(dim, num_heads, num_experts)
        self.ffn_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.feed_forward = NestedFeedForward(dim, round(mlp_ratio * dim), num_experts)

    def forward(
        self,
        x: Tensor,
        budget: Budget | None = None,
        offset: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            x: Residual stream, `(batch, seq, dim)`; tokens sorted by expert, the largest first, as
                `Routing.sort` puts them. Those that skip the block are the last.
            budget: How many tokens each expert has; None: by the capacities of the block.
            offset: `alpha r`, `(batch, seq, 1)`; None: zero.
            mask: Channels that tokens have, `(batch, seq, dim)` bool, where that is not by budget
                (which then gives all tokens to the largest expert); None: by budget.

        Returns:
            `(batch, seq, dim)`.
        """
        if budget is None:
            if self.capacity_distribution is None:
                raise ValueError("budget = None: the block has no capacity_distribution.")
            budget = count_tokens(self.capacity_distribution, x.shape[1])
        active = x.narrow(1, 0, x.shape[1] - budget.skipped) if budget.skipped else x
        z = active + self.attention(_norm(self.attention_norm, active), budget, mask)
        branch = self.feed_forward(_norm(self.ffn_norm, z), budget, mask)
        if offset is not None:
            # 1 + alpha r would lose most of alpha r in bfloat16.
            branch = torch.addcmul(branch, branch, offset.narrow(1, 0, branch.shape[1]))
        z = z + branch.to(z.dtype)  # the offset is in float32
        if not budget.skipped:
            return z
        skipping = x.narrow(1, z.shape[1], budget.skipped)
        return torch.cat([z.transpose(0, 1), skipping.transpose(0, 1)]).transpose(0, 1)

    def init_weights(self) -> None:
        """Initialise all weights."""
        self.attention_norm.reset_parameters()
        self.ffn_norm.reset_parameters()
        attention, feed_forward = self.attention, self.feed_forward
        layers: tuple[NestedLinear, ...] = (attention.wqkv, attention.wo)
        for layer in (*layers, feed_forward.w1, feed_forward.w2):
            layer.init_weights()


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Norm tokens in the order of memory; the kernel would copy them into another."""
    return norm(x.transpose(0, 1)).transpose(0, 1)
