"""The block of a diffusion transformer, and its final layer.

Source: Peebles and Xie 2022, arXiv 2212.09748, 3.2 and figure 3 ("DiT block with adaLN-Zero").

Deviations:
    - Queries, keys and values have a linear layer each, so that tensor parallelism can share heads.
      They are drawn as if they were one, as in the published code.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.common.attention import InnerAttention
from torchtitan_mixtures.models.common.modulation import Modulation, modulate, modulated_norm


class Attention(nn.Module):
    """Softmax attention in which every token sees every other.

    State dict:

        wq.weight, wk.weight, wv.weight, wo.weight  (dim, dim)
        wq.bias, wk.bias, wv.bias, wo.bias          (dim,)
    """

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // n_heads
        self.wq = nn.Linear(dim, dim)
        self.wk = nn.Linear(dim, dim)
        self.wv = nn.Linear(dim, dim)
        self.wo = nn.Linear(dim, dim)
        self.inner_attention = InnerAttention()

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, dim)` -> the same shape."""
        # -1 and not the number of heads: tensor parallelism leaves each rank a part of them.
        q, k, v = (
            linear(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.wq, self.wk, self.wv)
        )  # (batch, heads, seq, head_dim)
        attended = self.inner_attention(q, k, v, is_causal=False)
        return self.wo(attended.transpose(1, 2).flatten(2))

    def init_weights(self) -> None:
        """Initialise all weights."""
        dim = self.wo.weight.shape[0]
        for linear in (self.wq, self.wk, self.wv):
            init.xavier_uniform_(linear.weight, fan_out=3 * dim)
        init.xavier_uniform_(self.wo.weight)
        for linear in (self.wq, self.wk, self.wv, self.wo):
            nn.init.zeros_(linear.bias)


class FeedForward(nn.Module):
    """Two layers with a GELU (tanh form) between them, the same for each token.

    State dict:

        w1.weight  (hidden, dim)    w1.bias  (hidden,)
        w2.weight  (dim, hidden)    w2.bias  (dim,)
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim)
        self.w2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, dim)` -> the same shape."""
        return self.w2(F.gelu(self.w1(x), approximate="tanh"))

    def init_weights(self) -> None:
        """Initialise all weights."""
        for linear in (self.w1, self.w2):
            init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)


class DiTBlock(nn.Module):
    """Attention and feed-forward network, each modulated by a condition; an identity at first.

    State dict:

        attention.*     see `Attention`
        feed_forward.*  see `FeedForward`
        modulation.*    see `Modulation`, 6 vectors
    """

    def __init__(self, dim: int, n_heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.modulation = Modulation(dim, 6)
        self.attention_norm = modulated_norm(dim)
        self.attention = Attention(dim, n_heads)
        self.ffn_norm = modulated_norm(dim)
        self.feed_forward = FeedForward(dim, hidden_dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Run the block.

        Args:
            x: Residual stream, `(batch, seq, dim)`.
            condition: `(batch, dim)`.

        Returns:
            `(batch, seq, dim)`.
        """
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.modulation(condition)
        x = x + gate * self.attention(modulate(self.attention_norm(x), shift, scale))
        return x + ffn_gate * self.feed_forward(modulate(self.ffn_norm(x), ffn_shift, ffn_scale))

    def init_weights(self) -> None:
        """Initialise all weights."""
        self.modulation.init_weights()
        self.attention.init_weights()
        self.feed_forward.init_weights()


class FinalLayer(nn.Module):
    """From the residual stream to patches; zero at first.

    State dict:

        linear.weight  (out, dim)
        linear.bias    (out,)
        modulation.*   see `Modulation`, 2 vectors
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.modulation = Modulation(dim, 2)
        self.norm = modulated_norm(dim)
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`(batch, seq, dim)` and the condition `(batch, dim)` -> `(batch, seq, out)`."""
        shift, scale = self.modulation(condition)
        return self.linear(modulate(self.norm(x), shift, scale))

    def init_weights(self) -> None:
        """Set all weights to zero."""
        self.modulation.init_weights()
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
