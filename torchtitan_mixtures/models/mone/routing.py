"""Which expert each token gets.

Source: Jain et al. 2024, "Mixture of Nested Experts", arXiv 2407.19985, 3.2 and algorithm 1:
experts choose tokens, the largest first, so that cost is the same for every image and known before.

Routing is done once, at a router, and tokens stay sorted by expert from there on: attention sees
all of them and does not care, positions were added before. Everything has static shapes and stays
on the device.

Deviations:
    - Tokens that were chosen are left out of later choices by -inf; the paper sets their
      probabilities to zero, which others may have too.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.mone.capacity import (
    Budget,
    check_distribution,
    compute_capacity_distribution,
    count_tokens,
    expert_widths,
)
from torchtitan_mixtures.objectives.outputs import NestedStatistics

__all__ = [
    "ExpertPreferredRouter",
    "Routing",
    "RoutingKind",
    "choose_tokens",
    "compute_capacity_distribution",
    "expert_mask",
    "sort_by_experts",
    "sort_tokens",
]

RoutingKind = Literal["expert_preferred", "argmax", "random"]

INIT_STD = 0.02
"""Standard deviation of a router's initial weights."""


class Routing(NamedTuple):
    """What a router decided.

    Attributes:
        order: Number of the token at each place, those of the largest expert first, `(batch, seq)`
            int64.
        experts: Expert of each token, from 0, the smallest, `(batch, seq)` int64. Of a token that
            skips blocks -1.
        probabilities: Of each token's expert, `(batch, seq)` float32.
        statistics: One router's rows of `NestedStatistics`.
        is_sorted: Whether tokens go by a budget. Else (`argmax`) their order is as it was, and
            layers that know no better must be masked, see `expert_mask`.
    """

    order: Tensor
    experts: Tensor
    probabilities: Tensor
    statistics: NestedStatistics
    is_sorted: bool

    def sort(self, x: Tensor) -> Tensor:
        """Put tokens `(batch, seq, ...)` into this order; see `sort_tokens`."""
        return sort_tokens(x, self.order)

    def offset(self, alpha: Tensor | float) -> Tensor:
        """What blocks scale their feed-forward branch by, less one: `alpha r` of sorted tokens.

        It is how a router learns.

        Args:
            alpha: A number, or a parameter `(1,)`.

        Returns:
            `(batch, seq, 1)` float32.
        """
        return alpha * self.sort(self.probabilities[:, :, None])

    def restore(self, x: Tensor) -> Tensor:
        """Undo `sort`."""
        return sort_tokens(x, self.order.argsort(1))


def sort_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Put tokens into another order.

    Args:
        x: `(batch, seq, ...)`.
        order: Number of the token at each place, `(batch, seq)` int64.

    Returns:
        The same shape. In memory the tokens of all samples at one place are neighbours, as nested
        layers read them: `(seq, batch, ...)`.
    """
    batch = x.shape[0]
    rows = x.transpose(0, 1).flatten(0, 1)
    places = order.t() * batch + torch.arange(batch, device=x.device)  # (seq, batch)
    return rows.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(0, 1)


def sort_by_experts(experts: Tensor, num_experts: int) -> tuple[Tensor, Budget]:
    """Sort tokens whose experts someone else chose; reads their numbers from the device.

    Args:
        experts: Expert of each token, from 0, the smallest, `(batch, seq)` int64.
        num_experts: Number of experts.

    Returns:
        Number of the token at each place, for `sort_tokens`, `(batch, seq)` int64, and the budget
        of blocks.

    Raises:
        ValueError: Experts are out of range, or not as many tokens of each in all samples.
    """
    if experts.min() < 0 or experts.max() >= num_experts:
        raise ValueError(f"experts: must be from 0 to {num_experts - 1} (num_experts - 1).")
    counts = (experts[:, :, None] == torch.arange(num_experts, device=experts.device)).sum(1)
    if (counts != counts[0]).any():
        raise ValueError(
            f"experts: samples have {counts.tolist()} tokens of each expert; all must have as many."
        )
    order = (num_experts - 1 - experts).argsort(dim=1, stable=True)
    return order, Budget(tuple(counts[0].tolist()))


def choose_tokens(scores: Tensor, budget: Budget) -> Tensor:
    """Let experts choose tokens, the largest expert first.

    Args:
        scores: `(batch, seq, experts)`.
        budget: Tokens of each expert; together `seq`.

    Returns:
        Number of the token at each place, `(batch, seq)` int64: the tokens of the largest expert,
        its favourites first, then those of the next, last those that skip.
    """
    taken = torch.zeros(scores.shape[:2], dtype=torch.bool, device=scores.device)
    counts = list(budget.tokens)
    counts[0] += budget.skipped  # what is left over, whoever gets it
    order = []
    scores = scores.clamp(min=torch.finfo(scores.dtype).min)  # -inf is for those that are taken
    for expert in reversed(range(len(counts))):
        if counts[expert] == 0:
            continue
        left = scores[:, :, expert].masked_fill(taken, -torch.inf)
        picked = left.topk(counts[expert], dim=1).indices
        taken = taken.scatter(1, picked, True)
        order.append(picked)
    return torch.cat(order, dim=1)


def expert_mask(experts: Tensor, dim: int, num_experts: int) -> Tensor:
    """Say which channels tokens have: `(batch, seq)` int64 -> `(batch, seq, dim)` bool."""
    widths = torch.tensor(expert_widths(dim, num_experts), device=experts.device)
    return torch.arange(dim, device=experts.device) < widths[experts][:, :, None]


def _experts_of_places(budget: Budget, device: torch.device) -> Tensor:
    """Expert of the tokens at each place, `(seq,)` int64; -1 of those that skip."""
    numbers = torch.arange(len(budget.tokens) - 1, -2, -1, device=device)
    counts = torch.tensor([*reversed(budget.tokens), budget.skipped], device=device)
    return numbers.repeat_interleave(counts, output_size=budget.num_tokens)


class ExpertPreferredRouter(nn.Module):
    """A linear router whose experts choose tokens.

    State dict:

        weight  (experts, dim)
        bias    (experts,)

    Args:
        dim: Width of tokens.
        num_experts: Number of experts.
        capacity_distribution: Share of the tokens of each expert, smallest first; None: `forward`
            is given a budget.
        kind: `expert_preferred`; `random` chooses by scores that are given or drawn; with `argmax`
            each token takes its likeliest expert, whatever the budget.

    Raises:
        ValueError: Capacities do not sum to 1, or are not as many as experts.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity_distribution: Sequence[float] | None = None,
        kind: RoutingKind = "expert_preferred",
    ) -> None:
        super().__init__()
        if capacity_distribution is not None:
            check_distribution(capacity_distribution, num_experts)
        if kind not in get_args(RoutingKind):
            raise ValueError(f"kind = {kind!r}: must be one of {get_args(RoutingKind)}.")
        self.capacity_distribution = capacity_distribution
        self.num_experts = num_experts
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.empty(num_experts))
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        budget: Budget | None = None,
        scores: Tensor | None = None,
        num_full_tokens: int = 0,
    ) -> Routing:
        """Route.

        Args:
            x: `(batch, seq, dim)`.
            budget: Tokens of each expert, without `num_full_tokens`; None: by the capacities of
                the router.
            scores: What experts choose by instead of the probabilities, `(batch, seq -
                num_full_tokens, experts)`.
            num_full_tokens: The first so many tokens get the largest expert in any case.
        """
        weight, bias = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in self.gate())
        with _without_autocast(x.device):  # it would round to bfloat16
            probabilities = F.linear(x.to(weight.dtype), weight, bias).softmax(2)
        if self.kind == "argmax":
            experts = probabilities.argmax(2)
            experts = F.pad(experts[:, num_full_tokens:], (num_full_tokens, 0), value=self.last)
            order = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        else:
            budget = self._budget(x.shape[1] - num_full_tokens) if budget is None else budget
            order, experts = self._assign(probabilities, budget, scores, num_full_tokens)
        chosen = probabilities.gather(2, experts.clamp(min=0)[:, :, None]).squeeze(2)
        statistics = _describe(probabilities, experts)
        return Routing(order, experts, chosen, statistics, is_sorted=self.kind != "argmax")

    def _assign(
        self, probabilities: Tensor, budget: Budget, scores: Tensor | None, num_full_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Order of the tokens, and expert of each, both `(batch, seq)`."""
        choosable = probabilities[:, num_full_tokens:].detach()
        if budget.num_tokens != choosable.shape[1] or len(budget.tokens) != self.num_experts:
            raise ValueError(
                f"budget = {budget}: must be of {self.num_experts} experts and "
                f"{choosable.shape[1]} tokens."
            )
        if scores is None:
            scores = torch.rand_like(choosable) if self.kind == "random" else choosable
        order = choose_tokens(scores, budget) + num_full_tokens
        first = torch.arange(num_full_tokens, device=order.device).expand(len(order), -1)
        order = torch.cat([first, order], dim=1)
        of_places = _experts_of_places(budget.with_full_tokens(num_full_tokens), order.device)
        experts = torch.empty_like(order).scatter(1, order, of_places.expand_as(order))
        return order, experts

    def _budget(self, num_tokens: int) -> Budget:
        if self.capacity_distribution is None:
            raise ValueError("budget = None: the router has no capacity_distribution of its own.")
        return count_tokens(self.capacity_distribution, num_tokens)

    @property
    def last(self) -> int:
        """Number of the largest expert."""
        return self.num_experts - 1

    def gate(self) -> tuple[Tensor, Tensor]:
        """Weight and bias; a method of its own for parallelism to say otherwise."""
        return self.weight, self.bias

    def reset_parameters(self) -> None:
        """Initialise as `init_weights` does, from PyTorch's global generator."""
        nn.init.trunc_normal_(self.weight, std=INIT_STD)
        nn.init.zeros_(self.bias)

    def init_weights(self) -> None:
        """Initialise all weights."""
        init.trunc_normal_(self.weight, std=INIT_STD)
        nn.init.zeros_(self.bias)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Keep precision as it is; the meta device, which has no autocast, does in any case."""
    is_there = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if is_there else nullcontext()


@torch.no_grad()
def _describe(probabilities: Tensor, experts: Tensor) -> NestedStatistics:
    numbers = torch.arange(probabilities.shape[2], device=experts.device)
    is_of = experts.flatten()[:, None] == numbers  # (tokens, experts)
    return NestedStatistics(
        is_of.float().mean(0),
        probabilities.mean((0, 1)),
        torch.special.entr(probabilities).sum(2).mean(),
    )
