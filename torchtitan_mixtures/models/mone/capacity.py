"""How much of a nested model is spent, and on how many tokens.

Source: Jain et al. 2024, "Mixture of Nested Experts", arXiv 2407.19985, 3.3 (capacities) and
table 2 (other allocations). Expert j of E has the first `dim / 2^(E - j)` channels; the share of
the tokens that it gets is its capacity `c_j`, and `e_c = sum_j c_j 2^-(E - j)` is the effective
capacity: what a token costs on average, relative to the whole width.

Deviations:
    - The paper solves for the capacities numerically. Their optimum has a closed form but for one
      number, which is found by bisection; see `compute_capacity_distribution`.
    - Experts are numbered from 0, the smallest, in code.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.utils._pytree as pytree

Incentive = Literal["multiplicative", "divisive"]
Allocation = Literal["entropy", "proportionate", "uniform", "greedy", "skip"]

_ROUNDING = 1e-6
"""Capacities are solved for; one that should be 0.25 may be a little less."""


def expert_shares(num_experts: int) -> list[float]:
    """Width of each expert relative to the largest, smallest first."""
    return [0.5 ** (num_experts - 1 - expert) for expert in range(num_experts)]


def expert_widths(dim: int, num_experts: int) -> list[int]:
    """Channels of each expert, smallest first."""
    return [dim >> (num_experts - 1 - expert) for expert in range(num_experts)]


def compute_capacity_distribution(
    e_c: float,
    E: int,
    delta: float = 2.0,
    beta: float = 10.0,
    incentive: Incentive = "multiplicative",
) -> tuple[float, ...]:
    """Share tokens out to experts such that they cost `e_c`.

    Maximises `sum_j c_j a_j - beta sum_j c_j ln c_j` over capacities that sum to 1 and cost `e_c`.
    The optimum is `c_j = softmax_j((a_j + lambda 2^-(E - j)) / beta)`, with the one `lambda` that
    meets the cost. With the multiplicative form and `delta = 2` the incentive is the same for all
    capacities that cost `e_c`, and neither it nor `beta` changes the result.

    Args:
        e_c: Effective capacity, from `2^-(E - 1)` to 1.
        E: Number of experts.
        delta: How much more or less than the next smaller expert one earns, above 1.
        beta: Weight of the entropy, above 0.
        incentive: `a_j = delta^(j - 1)`, or as the paper prints it `delta^-(j - 1)`.

    Returns:
        Share of the tokens of each expert, smallest first; they sum to 1.

    Raises:
        ValueError: An argument is out of its range.
    """
    if not isinstance(E, numbers.Integral) or E < 1:
        raise ValueError(f"E = {E!r}: must be 1 or more experts.")
    if isinstance(e_c, str):
        raise ValueError(f"e_c = {e_c!r}: must be a number.")
    shares = expert_shares(E)
    if not shares[0] <= e_c <= 1:
        raise ValueError(f"e_c = {e_c}: must be from {shares[0]:g} to 1 with {E} experts.")
    if not 1 < delta < math.inf:
        raise ValueError(f"delta = {delta}: must be a finite number above 1.")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta = {beta}: must be a finite number above 0.")
    if incentive not in ("multiplicative", "divisive"):
        raise ValueError(f"incentive = {incentive!r}: must be 'multiplicative' or 'divisive'.")
    if e_c in (shares[0], 1):  # reached with an infinite lambda only
        expert = E - 1 if e_c == 1 else 0
        return tuple(float(index == expert) for index in range(E))
    sign = 1 if incentive == "multiplicative" else -1
    try:
        earned = [delta ** (sign * expert) for expert in range(E)]
    except OverflowError:
        raise ValueError(f"delta = {delta}: too large for {E} experts.") from None
    # Less the line through the first and the last, which is the same for all capacities that cost
    # e_c: what is left needs no lambda that is too large to be exact.
    slope = (earned[-1] - earned[0]) / (1 - shares[0])
    excess = [
        (a - earned[0] - slope * (share - shares[0])) / beta
        for a, share in zip(earned, shares, strict=True)
    ]
    excess[-1] = 0.0

    def capacities(multiplier: float) -> list[float]:
        logits = [a + multiplier * share for a, share in zip(excess, shares, strict=True)]
        largest = max(logits)
        weights = [math.exp(logit - largest) for logit in logits]
        return [weight / sum(weights) for weight in weights]

    def cost(multiplier: float) -> float:
        return sum(c * share for c, share in zip(capacities(multiplier), shares, strict=True))

    low, high = -1.0, 1.0
    while cost(low) > e_c:
        low *= 2
    while cost(high) < e_c:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < e_c else (low, middle)
    return tuple(capacities((low + high) / 2))


def fixed_capacity(allocation: Allocation, num_experts: int) -> float | None:
    """The only effective capacity that an allocation has; None if it can have any."""
    shares = expert_shares(num_experts)
    if allocation == "proportionate":
        return num_experts / sum(1 / share for share in shares)
    return sum(shares) / num_experts if allocation == "uniform" else None


def allocate(
    allocation: Allocation,
    capacity: float,
    num_experts: int,
    delta: float = 2.0,
    beta: float = 10.0,
    incentive: Incentive = "multiplicative",
) -> tuple[float, ...]:
    """Share tokens out to experts by a rule of the paper's table 2.

    Args:
        allocation: The rule; see `Nested.allocation` in `classifier_config.py`.
        capacity: Effective capacity.
        num_experts: Number of experts.
        delta: See `compute_capacity_distribution`, as the next two.
        beta: See there.
        incentive: See there.

    Returns:
        Share of the tokens of each expert, smallest first. With `skip` they sum to `capacity`:
        other tokens skip the block.

    Raises:
        ValueError: An argument is out of its range.
    """
    shares = expert_shares(num_experts)
    only = fixed_capacity(allocation, num_experts)
    if only is not None:
        if not math.isclose(capacity, only, abs_tol=1e-6):
            raise ValueError(
                f"capacity = {capacity}: allocation = {allocation!r} has an effective capacity of "
                f"{only:.6g} with {num_experts} experts and no other."
            )
        if allocation == "uniform":
            return (1 / num_experts,) * num_experts
        return tuple(1 / share / sum(1 / s for s in shares) for share in shares)
    if allocation == "entropy":
        return compute_capacity_distribution(capacity, num_experts, delta, beta, incentive)
    least = 0.0 if allocation == "skip" else shares[0]
    is_possible = least < capacity <= 1 if allocation == "skip" else least <= capacity <= 1
    if not is_possible:
        raise ValueError(
            f"capacity = {capacity}: must be {'above' if allocation == 'skip' else 'from'} "
            f"{least:g} to 1 with {num_experts} experts and allocation = {allocation!r}."
        )
    if num_experts == 1:
        return (capacity,)
    largest = capacity if allocation == "skip" else (capacity - least) / (1 - least)
    smallest = 0.0 if allocation == "skip" else 1 - largest
    return (smallest, *[0.0] * (num_experts - 2), largest)


def check_distribution(capacity_distribution: Sequence[float], num_experts: int) -> None:
    """Check capacities that a user gave.

    Raises:
        ValueError: There are not as many as experts, one is negative, or they do not sum to 1.
    """
    capacities = list(capacity_distribution)
    if len(capacities) != num_experts:
        raise ValueError(
            f"capacity_distribution = {capacities}: must have one number for each of the "
            f"{num_experts} experts (num_experts)."
        )
    total = sum(capacities)
    if not all(c >= 0 for c in capacities) or not math.isclose(total, 1, abs_tol=1e-4):
        raise ValueError(
            f"capacity_distribution = {capacities}: must be numbers >= 0 that sum to 1, not "
            f"{total:g}; compute_capacity_distribution(e_c, E) makes some."
        )


@dataclass(frozen=True)
class Budget:
    """How many tokens of an image each expert gets: numbers, known before any token is seen.

    For torch.compile it is a constant: each budget is a graph of its own.

    Attributes:
        tokens: Of each expert, smallest first.
        skipped: Tokens that pass a block as they are.
    """

    tokens: tuple[int, ...]
    skipped: int = 0

    @property
    def rows(self) -> tuple[int, ...]:
        """Tokens of each expert or a larger one: where tokens are sorted, the first so many."""
        return tuple(sum(self.tokens[expert:]) for expert in range(len(self.tokens)))

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return sum(self.tokens) + self.skipped

    @property
    def effective_capacity(self) -> float:
        """Mean share of the width that tokens get; by rounding a little less than was asked for."""
        shares = expert_shares(len(self.tokens))
        spent = sum(count * share for count, share in zip(self.tokens, shares, strict=True))
        return spent / self.num_tokens

    def with_full_tokens(self, count: int) -> Budget:
        """Add tokens that the largest expert gets in any case, such as a class token."""
        return Budget((*self.tokens[:-1], self.tokens[-1] + count), self.skipped)

    def share_of_rank(self, ranks: int) -> Budget:
        """The budget of each of several ranks that deal the tokens of every expert out.

        Raises:
            ValueError: An expert's tokens cannot be dealt out evenly.
        """
        counts = (*self.tokens, self.skipped)
        if any(count % ranks for count in counts):
            raise ValueError(
                f"tokens of the experts = {self.tokens}: {ranks} ranks cannot share them evenly; "
                f"set nested.tokens_multiple = {ranks} (or a multiple of it), or "
                'nested.context_routing = "local".'
            )
        return Budget(tuple(count // ranks for count in self.tokens), self.skipped // ranks)

    def part_of_rank(self, ranks: int) -> Budget:
        """The budget of as many tokens as each of several ranks has, with the same capacities.

        Raises:
            ValueError: The ranks do not divide the tokens.
        """
        if self.num_tokens % ranks:
            raise ValueError(f"{self.num_tokens} tokens: {ranks} ranks cannot share them evenly.")
        larger = tuple(count // ranks for count in self.tokens[1:])
        left = self.num_tokens // ranks - sum(larger)
        return Budget((0, *larger), left) if self.skipped else Budget((left, *larger))


# Without leaves: torch.compile guards on its value instead of making its numbers symbols.
pytree.register_constant(Budget)


def count_tokens(
    capacity_distribution: Sequence[float], num_tokens: int, multiple: int = 1, skips: bool = False
) -> Budget:
    """Turn capacities into numbers of tokens.

    Args:
        capacity_distribution: Share of the tokens of each expert, smallest first.
        num_tokens: Tokens of an image.
        multiple: Numbers are rounded down to multiples of this.
        skips: Whether tokens that are left over skip blocks. Else the smallest expert gets them.

    Raises:
        ValueError: There are fewer tokens than experts, or shares are none.
    """
    shares = capacity_distribution
    if min(shares, default=-1.0) < 0 or sum(shares) > 1 + _ROUNDING:
        found = tuple(shares)
        raise ValueError(f"capacities = {found}: must be 0 or more, and 1 together at most.")
    if num_tokens < len(capacity_distribution):
        raise ValueError(
            f"{num_tokens} tokens: fewer than the {len(capacity_distribution)} experts that share "
            "them; use larger images, smaller patches or fewer experts."
        )
    if skips and max(capacity_distribution) * num_tokens + _ROUNDING < multiple:
        raise ValueError(
            f"capacity = {max(capacity_distribution)}: not one of {num_tokens} tokens would be "
            "left; use a larger one."
        )
    larger = [
        math.floor(c * num_tokens + _ROUNDING) // multiple * multiple
        for c in capacity_distribution[1:]
    ]
    left = num_tokens - sum(larger)
    if len(capacity_distribution) == 1 and skips:
        chosen = math.floor(capacity_distribution[0] * num_tokens + _ROUNDING)
        return Budget((chosen // multiple * multiple,), num_tokens - chosen // multiple * multiple)
    return Budget((0, *larger), left) if skips else Budget((left, *larger))
