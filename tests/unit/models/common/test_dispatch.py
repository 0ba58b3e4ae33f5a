import pytest
import torch

from torchtitan_mixtures.models.common.dispatch import (
    LinearTowers,
    Towers,
    merge_slices,
    plan_by_masks,
    plan_by_sorting,
)


@pytest.mark.parametrize("row_multiple", [1, 8, 12])
@pytest.mark.parametrize("mix", [[30, 10, 0], [0, 0, 40], [13, 14, 13], [1, 1, 38], [39, 0, 1]])
def test_sorted_rows_are_contiguous_padded_and_of_constant_number(mix, row_multiple):
    towers = torch.repeat_interleave(torch.arange(3), torch.tensor(mix))
    towers = towers[torch.randperm(40)].view(4, 10)
    plan = plan_by_sorting(towers, 3, checks={}, row_multiple=row_multiple)
    rows = -(-40 // row_multiple) * row_multiple + 2 * row_multiple
    assert sum(plan.sizes) == rows == len(plan.source)
    assert all(size % row_multiple == 0 and size >= row_multiple for size in plan.sizes)
    assert plan.ends.tolist() == torch.tensor(plan.sizes).cumsum(0).tolist()
    assert plan.ends.dtype == torch.int32

    is_padding = torch.zeros(rows, dtype=torch.bool)
    is_padding[plan.padding] = True
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(plan.sizes))
    assert torch.equal(towers.flatten()[plan.source][~is_padding], owner[~is_padding])
    for tower in range(3):  # stable: the order inside a tower is the original one
        places = plan.source[(owner == tower) & ~is_padding]
        assert torch.equal(places, (towers.flatten() == tower).nonzero().flatten())
    assert torch.equal(plan.source[plan.target], torch.arange(40))


def test_sorting_and_back_is_the_identity_with_exact_gradients():
    towers = torch.randint(3, (2, 7))
    plan = plan_by_sorting(towers, 3, checks={})
    x = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(plan.unsort(plan.sort(x)), x)
    assert torch.autograd.gradcheck(lambda x: plan.unsort(plan.sort(x).square()), x)
    rows = torch.randn(len(plan.source), 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(plan.unsort, rows)
    plan.unsort(rows).sum().backward()
    assert not rows.grad[plan.padding].any()


def test_padding_gradients_stay_zero_where_an_upstream_gradient_is_not_finite():
    plan = plan_by_sorting(torch.tensor([[0, 1, 1]]), 2, checks={})
    rows = torch.randn(len(plan.source), 2, requires_grad=True)
    plan.unsort(rows).backward(torch.full((1, 3, 2), float("inf")))
    assert not rows.grad[plan.padding].any()


def test_all_checks_are_reported_with_place_and_number():
    towers = torch.zeros(2, 5, dtype=torch.int64)
    bad = torch.zeros(2, 5, dtype=torch.bool)
    checks = {"are fine": bad.clone(), "are bad": bad}
    plan_by_sorting(towers, 2, checks=checks)
    bad[1, 2:4] = True
    for build in (plan_by_sorting, plan_by_masks):
        with pytest.raises(ValueError, match=r"2 of 10 tokens are bad; .* 2 of sequence 1"):
            build(towers, 2, checks=checks)


def test_a_single_entry_serves_all_towers():
    plan = plan_by_sorting(torch.randint(2, (1, 9)), 2, checks={})
    linears = LinearTowers(["text"], 4, 6)
    x = torch.randn(len(plan.source), 4)
    slices = linears(linears.split(x, plan), plan)
    assert torch.equal(merge_slices(slices, plan), linears["text"](x))


def test_towers_take_whole_rows_or_slices():
    plan = plan_by_sorting(torch.randint(2, (1, 9)), 2, checks={})
    towers = Towers({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
    x = torch.randn(len(plan.source), 4)
    in_slices = merge_slices(towers(towers.split(x, plan), plan), plan)
    (whole,) = towers([x], plan)
    assert torch.equal(in_slices, whole)
