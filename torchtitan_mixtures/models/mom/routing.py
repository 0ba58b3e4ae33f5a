"""Which samples go to which mixers.

A router looks at the mean of a sample's tokens and chooses `top_k` experts of a pool of token
mixers and channel mixers: once per sample and layer. The choice can be free, or *typed*: at least
so many of either kind, so that no sample passes a layer without mixing its tokens.

Everything stays on the device: nothing here waits for it, and shapes depend on the shape of the
batch only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchtitan_mixtures.models.common import init


class Picks(NamedTuple):
    """How many of the chosen experts are token mixers, channel mixers, and of either kind."""

    token: int
    channel: int
    free: int


def count_picks(
    top_k: int,
    num_token_experts: int,
    num_channel_experts: int,
    min_token_experts: int,
    min_channel_experts: int,
) -> Picks:
    """Say of which kind the chosen experts are; `free` is 0 wherever the kinds are known before."""
    if min_channel_experts == num_channel_experts:
        return Picks(top_k - min_channel_experts, min_channel_experts, 0)
    if min_token_experts == num_token_experts:
        return Picks(min_token_experts, top_k - min_token_experts, 0)
    free = top_k - min_token_experts - min_channel_experts
    return Picks(min_token_experts, min_channel_experts, free)


class Assignment(NamedTuple):
    """The experts of one kind, and the samples that chose them.

    A *pair* is a sample and one of its choices. Pairs are sorted by expert, so that each expert's
    are neighbours.

    Attributes:
        order: The pair at each place, `(pairs,)` int64: sample * choices + choice.
        places: The place of each pair, `(pairs,)` int64.
        experts: The expert of the pair at each place, `(pairs,)` int64.
        ends: First place after each expert's, `(experts,)` int32.
        weights: What the expert's output is multiplied by, `(batch, choices)`.
        is_partial: Whether some choices may be of the other kind. Their pairs come last, after the
            last end, and have a weight of zero.
    """

    order: Tensor
    places: Tensor
    experts: Tensor
    ends: Tensor
    weights: Tensor
    is_partial: bool


class LayerStatistics(NamedTuple):
    """One layer's row of `RouterStatistics`.

    Attributes:
        probabilities: `(experts,)` float32.
        load: `(experts,)` float32.
        z: A scalar, float32.
    """

    probabilities: Tensor
    load: Tensor
    z: Tensor


class Routing(NamedTuple):
    """What a router decided; None where the pool has no experts of a kind."""

    token: Assignment | None
    channel: Assignment | None
    statistics: LayerStatistics


def assign(experts: Tensor, weights: Tensor, num_experts: int, is_partial: bool) -> Assignment:
    """Sort pairs by expert.

    Args:
        experts: Number of each chosen expert, `(batch, choices)` int64; if `is_partial`, what is
            not from 0 to `num_experts - 1` is of the other kind.
        weights: `(batch, choices)`.
        num_experts: Experts of this kind.
        is_partial: Whether there may be experts of the other kind.
    """
    if is_partial:
        is_own = (experts >= 0) & (experts < num_experts)
        experts = torch.where(is_own, experts, num_experts)
        weights = torch.where(is_own, weights, 0)
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    places = torch.empty_like(order)
    places.scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = (flat[:, None] == torch.arange(num_experts, device=flat.device)).sum(0)
    return Assignment(
        order=order,
        places=places,
        # Pairs after the last end need some number, whose bias goes nowhere.
        experts=flat.index_select(0, order).clamp(max=num_experts - 1),
        ends=counts.cumsum(0).int(),
        weights=weights,
        is_partial=is_partial,
    )


class TokenMean(nn.Module):
    """Mean over tokens; a module of its own for context parallelism, which has parts of them."""

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, dim)` -> `(batch, dim)`, float32 or the precision of `x` if higher."""
        return x.mean(1, dtype=torch.promote_types(x.dtype, torch.float32))


class Statistics(nn.Module):
    """How a router decided, in numbers; a module of its own for parallelism to hook."""

    def forward(self, logits: Tensor, probabilities: Tensor, experts: Tensor) -> LayerStatistics:
        """Count.

        Args:
            logits: `(batch, experts)`.
            probabilities: `(batch, experts)`.
            experts: The chosen ones, `(batch, top_k)` int64.
        """
        numbers = torch.arange(logits.shape[1], device=logits.device)
        chosen = (experts.flatten()[:, None] == numbers).to(logits.dtype)  # (pairs, experts)
        return LayerStatistics(
            probabilities.mean(0), chosen.mean(0), logits.logsumexp(1).square().mean()
        )


class Router(nn.Module):
    """Chooses experts for each sample, token mixers being the first in the pool.

    Weights are the probabilities of the chosen experts, divided by their sum, unless `top_k = 1`:
    then this would be 1, and no gradient would reach the router.

    State dict:

        weight  (experts, dim)
    """

    def __init__(
        self,
        hidden_size: int,
        num_token_experts: int,
        num_channel_experts: int,
        top_k: int,
        min_token_experts: int,
        min_channel_experts: int,
        noise: float,
    ) -> None:
        super().__init__()
        self.num_token_experts = num_token_experts
        self.num_channel_experts = num_channel_experts
        self.picks = count_picks(
            top_k, num_token_experts, num_channel_experts, min_token_experts, min_channel_experts
        )
        self.is_renormalized = top_k > 1
        self.noise = noise
        self.weight = nn.Parameter(
            torch.empty(num_token_experts + num_channel_experts, hidden_size)
        )
        self.pool = TokenMean()
        self.statistics = Statistics()

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Routing:
        """Route.

        Args:
            x: Modulated activations, `(batch, seq, dim)`.
            noise: Standard normal, `(batch, dim)`; times `1 + noise of the router * noise` goes
                what the router sees. None: without.
        """
        pooled = self.pool(x)  # (batch, dim)
        if noise is not None:
            pooled = pooled * (1 + self.noise * noise.to(pooled.dtype))
        # No matrix product: autocast would round it.
        weight = self.parameters_of_gate().to(pooled.dtype)
        logits = (pooled[:, None] * weight).sum(2)  # (batch, experts)
        probabilities = logits.softmax(1)
        experts = self.choose(logits)
        weights = probabilities.gather(1, experts)  # (batch, top_k)
        if self.is_renormalized:
            weights = weights / weights.sum(1, keepdim=True)
        return Routing(
            self._assign_token(experts, weights),
            self._assign_channel(experts, weights),
            self.statistics(logits, probabilities, experts),
        )

    def parameters_of_gate(self) -> Tensor:
        """What to compute with; see `Mixers.parameters_of_experts`."""
        return self.weight

    def choose(self, logits: Tensor) -> Tensor:
        """Choose experts: first token mixers, then channel mixers, then those of either kind.

        Args:
            logits: `(batch, experts)`.

        Returns:
            Their numbers in the pool, `(batch, top_k)` int64.
        """
        logits = logits.detach()
        token, channel = logits.split([self.num_token_experts, self.num_channel_experts], 1)
        chosen = [
            token.topk(self.picks.token, 1).indices,
            channel.topk(self.picks.channel, 1).indices + self.num_token_experts,
        ]
        if self.picks.free:
            rest = logits.scatter(1, torch.cat(chosen, 1), float("-inf"))
            chosen.append(rest.topk(self.picks.free, 1).indices)
        return torch.cat(chosen, 1)

    def _assign_token(self, experts: Tensor, weights: Tensor) -> Assignment | None:
        if self.num_token_experts == 0:
            return None
        # Of the choices, those of channel mixers are in the middle.
        kinds = [self.picks.token, self.picks.channel, self.picks.free]
        (experts, _, free), (weights, _, free_weights) = (
            chosen.split(kinds, 1) for chosen in (experts, weights)
        )
        return assign(
            torch.cat((experts, free), 1),
            torch.cat((weights, free_weights), 1),
            self.num_token_experts,
            self.picks.free > 0,
        )

    def _assign_channel(self, experts: Tensor, weights: Tensor) -> Assignment | None:
        if self.num_channel_experts == 0:
            return None
        return assign(
            experts[:, self.picks.token :] - self.num_token_experts,
            weights[:, self.picks.token :],
            self.num_channel_experts,
            self.picks.free > 0,
        )

    def init_weights(self) -> None:
        """Initialise all weights."""
        init.xavier_uniform_(self.weight)
