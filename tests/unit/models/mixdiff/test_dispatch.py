"""Choosing experts, dealing samples out and summing up, against loops over samples."""

from __future__ import annotations

import pytest
import torch

from torchtitan_mixtures.models.mixdiff.dispatch import (
    Choice,
    choose_by_gates,
    choose_top_k,
    combine,
    deal_out,
    select_rows,
)


def mix(choice, outputs):
    """Sum by the loop that the package avoids; `outputs` `(experts, batch, values)`."""
    rows = []
    for sample, (experts, gates) in enumerate(zip(choice.experts, choice.gates, strict=True)):
        rows.append(sum(g * outputs[e, sample] for e, g in zip(experts, gates, strict=True)))
    return torch.stack(rows)


def test_the_seeds_example_with_weights_and_experts_paired_rightly():
    logits = torch.tensor([[-1.0, 0.5, 2.0, 1.0], [2.0, 1.0, 0.5, -1.0]], dtype=torch.float64)
    outputs = torch.tensor([1.0, 3.0, -2.0, 10.0], dtype=torch.float64)
    choice = choose_top_k(logits, None, 2, renormalize=True)
    assert choice.experts.tolist() == [[2, 3], [0, 1]]
    expected = torch.tensor([0.030343, 0.135989, 0.609460, 0.224208], dtype=torch.float64)
    torch.testing.assert_close(logits[0].softmax(0), expected, atol=5e-7, rtol=0)
    expected = torch.tensor([0.731059, 0.268941], dtype=torch.float64)
    torch.testing.assert_close(choice.gates[1], expected, atol=5e-7, rtol=0)
    found = (choice.gates * outputs[choice.experts]).sum(1)
    assert found.tolist() == pytest.approx([1.227297, 1.537883], abs=5e-7)


def test_without_renormalisation_gates_are_probabilities():
    logits = torch.randn(5, 4, dtype=torch.float64)
    choice = choose_top_k(logits, None, 2, renormalize=False)
    values, experts = logits.softmax(1).topk(2)
    torch.testing.assert_close(choice.gates, values)
    assert torch.equal(choice.experts, experts)


def test_noise_changes_who_is_chosen_and_not_the_weights():
    logits = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
    noise = torch.tensor([[-5.0, 0.0, 0.0]], dtype=torch.float64)
    choice = choose_top_k(logits, noise, 2, renormalize=True)
    assert choice.experts.tolist() == [[1, 2]]
    torch.testing.assert_close(choice.gates, logits[:, 1:].softmax(1))


def test_weights_are_right_where_probabilities_are_too_small_to_divide_by():
    logits = torch.tensor([[0.0, -400.0, -401.0]])
    choice = choose_top_k(logits[:, 1:], None, 2, renormalize=True)
    assert choice.gates.sum() == pytest.approx(1)
    assert choice.gates[0, 0] == pytest.approx(0.731059, abs=1e-5)


@pytest.mark.parametrize("at_least", [0, 1, 3])
@pytest.mark.parametrize("choices", [1, 2, 4])
def test_samples_get_what_their_experts_made(at_least, choices):
    rng = torch.Generator().manual_seed(choices)
    batch, count = 7, 5
    logits = torch.randn(batch, count, generator=rng, dtype=torch.float64)
    logits[:, 3] = -100.0  # nobody's choice
    choice = choose_top_k(logits, None, choices, renormalize=True)
    outputs = torch.randn(count, batch, 3, generator=rng, dtype=torch.float64)
    plan = deal_out(choice, count, at_least)
    assert all(len(rows) >= at_least for rows in plan.rows)
    assert len(plan.rows[3]) == at_least
    joined = torch.cat([outputs[expert, rows] for expert, rows in enumerate(plan.rows)])
    found = combine(joined, plan, choice.gates)
    torch.testing.assert_close(found, mix(choice, outputs))


def test_what_makes_up_rows_has_a_gradient_that_is_zero():
    choice = Choice(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    plan = deal_out(choice, 2, 1)
    outputs = torch.randn(4, 2, requires_grad=True)
    combine(outputs, plan, choice.gates).sum().backward()
    assert outputs.grad is not None
    assert outputs.grad.tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]


def test_gates_that_are_given_are_taken_as_they_are():
    gates = torch.tensor([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]])
    choice = choose_by_gates(gates)
    assert choice.experts.shape == (2, 2)
    assert torch.equal(choice.dense(3), gates)
    assert torch.equal(choice.repeat(2).dense(3), gates.repeat(2, 1))


def test_rows_are_selected_in_nested_tables():
    rows = torch.tensor([2, 0])
    table = {"a": torch.arange(3), "b": {"c": torch.arange(6).reshape(3, 2)}, "d": None}
    found = select_rows(table, rows)
    assert found["a"].tolist() == [2, 0] and found["d"] is None
    assert found["b"]["c"].tolist() == [[4, 5], [0, 1]]
