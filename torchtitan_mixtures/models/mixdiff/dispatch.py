"""Which samples go to which experts, and the sum of what experts make of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Choice(NamedTuple):
    """The experts of each sample.

    Attributes:
        experts: Their numbers, `(batch, choices)` int64, no expert twice for a sample.
        gates: What their predictions are multiplied with, `(batch, choices)`.
    """

    experts: Tensor
    gates: Tensor

    def dense(self, num_experts: int) -> Tensor:
        """The gate of every expert, `(batch, experts)`; zero where it is not chosen."""
        empty = self.gates.new_zeros(len(self.gates), num_experts)
        return empty.scatter(1, self.experts, self.gates)

    def repeat(self, copies: int) -> Choice:
        """The same for so many copies of the batch, one after the other."""
        return Choice(self.experts.repeat(copies, 1), self.gates.repeat(copies, 1))


class Plan(NamedTuple):
    """What each expert is to do, and where a sample finds what its experts have done.

    Attributes:
        rows: For each expert the samples of the batch it gets, `(rows,)` int64 each.
        places: Rows of all experts' outputs, one expert's after the other's, that belong to the
            choices of each sample, `(batch * choices,)` int64.
    """

    rows: list[Tensor]
    places: Tensor


def choose_top_k(logits: Tensor, noise: Tensor | None, top_k: int, renormalize: bool) -> Choice:
    """Choose the likeliest experts of each sample.

    With `P` the probabilities of all experts and `S` the chosen ones, the gate of an expert of `S`
    is `P_k`, or `P_k / sum of P over S` if renormalised.

    Args:
        logits: `(batch, experts)`.
        noise: Is added to the logits to choose by; None: none.
        top_k: How many.
        renormalize: Whether gates sum to 1.
    """
    noised = logits if noise is None else logits + noise
    experts = noised.detach().topk(top_k, 1).indices
    chosen = logits.gather(1, experts)
    # Of logits, not of probabilities: their sum may be too small to divide by.
    return Choice(
        experts, chosen.softmax(1) if renormalize else logits.softmax(1).gather(1, experts)
    )


def choose_by_gates(gates: Tensor) -> Choice:
    """Take gates that are there already, `(batch, experts)`.

    As many experts of each sample are run as the sample with the most has gates that are not zero.
    """
    # One read by the host, of one number.
    most = max(1, int((gates != 0).sum(1).max()))
    values, experts = gates.topk(most, 1)
    return Choice(experts, values)


def deal_out(choice: Choice, num_experts: int, at_least: int) -> Plan:
    """Deal the samples out to the experts; the host reads once how many each gets.

    Args:
        choice: See there.
        num_experts: How many experts there are.
        at_least: Samples that every expert gets; what is missing is made up by the first sample.
    """
    choices, device = choice.experts.shape[1], choice.experts.device
    flat = choice.experts.flatten()
    order = flat.argsort(stable=True)
    places = torch.empty_like(order)
    places.scatter_(0, order, torch.arange(len(order), device=device))
    numbers = torch.arange(num_experts, device=device)
    counts = _read_counts((flat[:, None] == numbers).sum(0), len(flat))
    rows = list((order // choices).split(counts))
    missing = [max(0, at_least - count) for count in counts]
    if any(missing):
        for expert, number in enumerate(missing):
            rows[expert] = torch.cat([rows[expert], order.new_zeros(number)])
        before = [sum(missing[:expert]) for expert in range(num_experts)]
        places = places + torch.tensor(before, device=device)[flat]
    return Plan(rows, places)


def _read_counts(counts: Tensor, total: int) -> list[int]:
    if isinstance(counts, FakeTensor):
        # No values to read while a model is only being estimated: assume an even mix.
        share, rest = divmod(total, len(counts))
        return [share + (number < rest) for number in range(len(counts))]
    return counts.tolist()


def combine(outputs: Tensor, plan: Plan, gates: Tensor) -> Tensor:
    """Sum the outputs of each sample's experts.

    Args:
        outputs: Of all experts after each other, as `Plan.rows` has them, `(rows, ...)`.
        plan: See there.
        gates: `(batch, choices)`.

    Returns:
        `(batch, ...)`, in the precision of the gates if that is higher.
    """
    # What was added to make up rows is not looked at: its gradient is zero, but there is one.
    chosen = outputs.index_select(0, plan.places).unflatten(0, gates.shape)
    weights = gates.reshape(*gates.shape, *[1] * (outputs.ndim - 1))
    return (weights * chosen).sum(1)


def select_rows(values: Any, rows: Tensor) -> Any:
    """Samples of a tensor, or of each tensor in nested mappings; None stays."""
    if isinstance(values, Mapping):
        return {name: select_rows(value, rows) for name, value in values.items()}
    return None if values is None else values.index_select(0, rows)
