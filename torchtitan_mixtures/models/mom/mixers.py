"""Token mixers and channel mixers, of which a sample passes those it chose.

Both are pools of two-layer networks. The rows of a channel mixer are tokens: it mixes the channels
of each. The rows of a token mixer are channels: it mixes the tokens of each. Samples are sorted by
the expert they chose, so that all experts of a kind are computed by two grouped matrix products,
of chosen samples only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.common.grouped_mm import grouped_mm
from torchtitan_mixtures.models.mom.routing import Assignment, LayerStatistics, Router, Routing


class _Spread(torch.autograd.Function):
    """Give every pair its sample. The backward pass gathers and sums, always in one order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.choices = choices
        return x.index_select(0, order // choices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        grad = grads[0].index_select(0, places)
        return grad.unflatten(0, (-1, ctx.choices)).sum(1), None, None, None


class _Unsort(torch.autograd.Function):
    """Undo the order of pairs; the backward pass gathers too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, order), None, None


class _BiasOfPairs(torch.autograd.Function):
    """Give every pair the bias of its expert; the backward pass sums in one order."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, experts: Tensor) -> Tensor:
        ctx.save_for_backward(experts)
        ctx.num_experts = bias.shape[0]
        return bias.index_select(0, experts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (experts,) = ctx.saved_tensors
        numbers = torch.arange(ctx.num_experts, device=experts.device)
        is_own = experts[:, None] == numbers  # (pairs, experts)
        return torch.where(is_own[:, :, None], grads[0][:, None], 0).sum(0), None


class Mixers(nn.Module):
    """Two-layer networks with a GELU (tanh form) between the layers, one per expert.

    State dict:

        w1  (experts, hidden, width)    b1  (experts, hidden)
        w2  (experts, width, hidden)    b2  (experts, width)
    """

    def __init__(self, num_experts: int, width: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_dim, width))
        self.b1 = nn.Parameter(torch.empty(num_experts, hidden_dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, width, hidden_dim))
        self.b2 = nn.Parameter(torch.empty(num_experts, width))

    def parameters_of_experts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What to compute with, w1, b1, w2 and b2; parallelism may hand out a part of each."""
        return self.w1, self.b1, self.w2, self.b2

    def mix(self, x: Tensor, assignment: Assignment) -> Tensor:
        """Apply to each sample the experts it chose.

        Args:
            x: `(batch, rows, width)`.
            assignment: The choices.

        Returns:
            Their weighted sum, `(batch, rows, width)`; zero for a sample without a choice.
        """
        w1, b1, w2, b2 = self.parameters_of_experts()
        order, places, experts, ends, weights, is_partial = assignment
        pairs = _Spread.apply(x, order, places, weights.shape[1])  # (pairs, rows, width)
        ends = ends * x.shape[1]

        def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            bias = _BiasOfPairs.apply(bias, experts)  # (pairs, out)
            weight = weight.transpose(1, 2)
            product = grouped_mm(x.flatten(0, 1), weight, ends, is_partial, bias)
            return product.unflatten(0, (len(order), -1))

        out = layer(F.gelu(layer(pairs, w1, b1), approximate="tanh"), w2, b2)
        out = _Unsort.apply(out, order, places).unflatten(0, weights.shape)
        return (out * weights[:, :, None, None].to(out.dtype)).sum(1)

    def init_weights(self) -> None:
        """Initialise all weights, those of each expert as of a layer of its own."""
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            init.xavier_uniform_(weight)
            nn.init.zeros_(bias)


class TokenMixers(Mixers):
    """Mixers over the tokens of each channel; see `Mixers`, `width` being the number of tokens."""

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Mix tokens.

        Args:
            x: `(batch, seq, channels)`, any number of channels: each is on its own.
            routing: The router's choices.

        Returns:
            `(batch, seq, channels)`.
        """
        assert routing.token is not None
        return self.mix(x.transpose(1, 2), routing.token).transpose(1, 2)


class ChannelMixers(Mixers):
    """Mixers over the channels of each token; see `Mixers`, `width` being the model's width."""

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """`(batch, seq, dim)`, any number of tokens -> the same shape."""
        assert routing.channel is not None
        return self.mix(x, routing.channel)


class MixtureOfMixers(nn.Module):
    """A pool of token mixers and channel mixers, of which each sample passes the `top_k`.

    Args:
        hidden_size: Width of the model.
        num_tokens: Tokens of a sample.
        num_token_experts: Token mixers in the pool; 0 for none.
        num_channel_experts: Channel mixers in the pool; 0 for none.
        top_k: Experts that a sample passes.
        min_token_experts: Token mixers among them, at least.
        min_channel_experts: Channel mixers among them, at least.
        token_hidden_dim: Hidden units of a token mixer; None: 4 per token.
        channel_hidden_dim: Hidden units of a channel mixer; None: 4 per channel.
        router_noise: Relative noise of what the router sees in training.

    State dict:

        router.weight     (token and channel experts, dim)
        token_mixers.*    see `Mixers`, width = tokens
        channel_mixers.*  see `Mixers`, width = dim
    """

    def __init__(
        self,
        hidden_size: int,
        num_tokens: int,
        num_token_experts: int = 4,
        num_channel_experts: int = 4,
        top_k: int = 2,
        *,
        min_token_experts: int = 1,
        min_channel_experts: int = 1,
        token_hidden_dim: int | None = None,
        channel_hidden_dim: int | None = None,
        router_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.router = Router(
            hidden_size,
            num_token_experts,
            num_channel_experts,
            top_k,
            min_token_experts,
            min_channel_experts,
            router_noise,
        )
        self.token_mixers, self.channel_mixers = None, None
        if num_token_experts:
            hidden = token_hidden_dim or 4 * num_tokens
            self.token_mixers = TokenMixers(num_token_experts, num_tokens, hidden)
        if num_channel_experts:
            hidden = channel_hidden_dim or 4 * hidden_size
            self.channel_mixers = ChannelMixers(num_channel_experts, hidden_size, hidden)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, LayerStatistics]:
        """Route and mix.

        Args:
            x: `(batch, seq, dim)`.
            noise: Of the router, see `Router`.

        Returns:
            `(batch, seq, dim)`, and how the router decided.
        """
        routing = self.router(x, noise)
        # Channel mixers first: a sum has the memory layout of its first term.
        pools = (self.channel_mixers, self.token_mixers)
        first, *others = (mixers(x, routing) for mixers in pools if mixers is not None)
        for other in others:
            first = first + other
        return first, routing.statistics

    def init_weights(self) -> None:
        """Initialise all weights."""
        self.router.init_weights()
        for mixers in (self.token_mixers, self.channel_mixers):
            if mixers is not None:
                mixers.init_weights()
