import math
from collections import Counter

import pytest
import torch

from tests.unit.models.mone.helpers import naive_choice, randn, shake
from torchtitan_mixtures.models.mone.capacity import Budget
from torchtitan_mixtures.models.mone.routing import (
    ExpertPreferredRouter,
    choose_tokens,
    expert_mask,
    sort_by_experts,
    sort_tokens,
)

# The worked example of the specification: of 7 tokens the probabilities of three experts.
EXAMPLE = [
    (0.70, 0.20, 0.10),
    (0.10, 0.30, 0.60),
    (0.25, 0.50, 0.25),
    (0.05, 0.15, 0.80),
    (0.34, 0.33, 0.33),
    (0.20, 0.60, 0.20),
    (0.15, 0.45, 0.40),
]
EXAMPLE_EXPERTS = [0, 2, 1, 2, 0, 1, 0]
EXAMPLE_CHOSEN = [0.70, 0.60, 0.50, 0.80, 0.34, 0.60, 0.15]


def router_of_logits(num_experts, capacities=None, **fields):
    """A router that takes what it is given for logits."""
    router = ExpertPreferredRouter(num_experts, num_experts, capacities, **fields)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
        router.bias.zero_()
    return router


def random_router(dim=8, num_experts=4, **fields):
    router = ExpertPreferredRouter(dim, num_experts, **fields).double()
    shake(router, 1.0)
    return router


def counts_of(experts, num_experts):
    """Tokens of each expert, of each sample."""
    return [[Counter(row)[e] for e in range(num_experts)] for row in experts.tolist()]


def test_the_worked_example_comes_out():
    router = router_of_logits(3, (0.3, 0.3, 0.4))
    routing = router(torch.tensor([EXAMPLE]).log())
    assert routing.experts.tolist() == [EXAMPLE_EXPERTS]
    torch.testing.assert_close(routing.probabilities, torch.tensor([EXAMPLE_CHOSEN]))
    assert routing.order.tolist() == [[3, 1, 5, 2, 0, 4, 6]]
    assert routing.is_sorted


def test_the_worked_example_reversed_and_in_one_batch_with_itself():
    router = router_of_logits(3, (0.3, 0.3, 0.4))
    example = torch.tensor(EXAMPLE).log()
    reverse = router(example.flip(0)[None])
    assert reverse.experts.tolist() == [EXAMPLE_EXPERTS[::-1]]
    torch.testing.assert_close(reverse.probabilities, torch.tensor([EXAMPLE_CHOSEN[::-1]]))
    both = router(torch.stack([example, example.flip(0)]))
    assert both.experts.tolist() == [EXAMPLE_EXPERTS, EXAMPLE_EXPERTS[::-1]]
    torch.testing.assert_close(
        both.probabilities, torch.tensor([EXAMPLE_CHOSEN, EXAMPLE_CHOSEN[::-1]])
    )


@pytest.mark.parametrize(
    "budget",
    [
        Budget((3, 2, 4, 3)),
        Budget((12, 0, 0, 0)),
        Budget((0, 0, 0, 12)),
        Budget((0, 5, 0, 7)),
        Budget((0, 0, 0, 5), 7),
        Budget((0, 0, 3, 0), 9),
    ],
    ids=str,
)
def test_choices_are_those_of_a_loop_over_tokens(budget):
    router, x = random_router(), randn(5, 12, 8)
    routing = router(x, budget)
    powers = (x @ router.weight.t() + router.bias).exp()
    probabilities = powers / powers.sum(2, keepdim=True)
    for sample, table in enumerate(probabilities):
        experts = naive_choice(table.tolist(), budget.tokens)
        assert routing.experts[sample].tolist() == experts
        for token, expert in enumerate(experts):
            # A token that skips takes no part: its probability is used nowhere.
            if expert >= 0:
                expected = table[token, expert]
                torch.testing.assert_close(routing.probabilities[sample, token], expected)


def test_every_sample_spends_exactly_its_budget():
    budget = Budget((5, 1, 0, 6))
    for seed in range(5):
        routing = random_router()(randn(7, 12, 8, seed=seed), budget)
        assert counts_of(routing.experts, 4) == [[5, 1, 0, 6]] * 7
        for order in routing.order.tolist():
            assert sorted(order) == list(range(12))


def test_tokens_go_by_expert_and_an_experts_favourites_come_first():
    budget = Budget((3, 2, 4, 3))
    scores = randn(4, 12, 4)
    order = choose_tokens(scores, budget)
    for sample in range(4):
        start = 0
        for expert in (3, 2, 1, 0):
            places = order[sample, start : start + budget.tokens[expert]]
            liked = scores[sample, places, expert].tolist()
            assert liked == sorted(liked, reverse=True)
            start += budget.tokens[expert]


def test_each_sample_is_routed_by_itself():
    router, x = random_router(), randn(4, 12, 8)
    budget = Budget((3, 2, 4, 3))
    together = router(x, budget)
    for sample in range(4):
        alone = router(x[sample : sample + 1], budget)
        assert torch.equal(alone.order[0], together.order[sample])
        assert torch.equal(alone.experts[0], together.experts[sample])


def test_equal_probabilities_share_out_all_tokens_still():
    x = torch.zeros(2, 9, 4)
    for scores in (None, torch.zeros(2, 9, 4), torch.ones(2, 9, 4)):
        routing = router_of_logits(4)(x, Budget((2, 3, 1, 3)), scores)
        assert counts_of(routing.experts, 4) == [[2, 3, 1, 3]] * 2
        assert [sorted(order) for order in routing.order.tolist()] == [list(range(9))] * 2


def test_probabilities_of_zero_are_chosen_if_no_others_are_left():
    # All prefer expert 0, as much as float32 can tell: the others' probabilities are zeros.
    x = torch.tensor([1000.0, 0.0, 0.0]).expand(2, 6, 3).clone().requires_grad_()
    routing = router_of_logits(3)(x, Budget((2, 2, 2)))
    assert counts_of(routing.experts, 3) == [[2, 2, 2]] * 2
    assert [sorted(order) for order in routing.order.tolist()] == [list(range(6))] * 2
    assert all(torch.isfinite(value).all() for value in routing.statistics)
    routing.probabilities.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_broken_activations_leave_an_order():
    x = torch.full((1, 6, 3), torch.nan)
    routing = router_of_logits(3)(x, Budget((2, 2, 2)))
    assert sorted(routing.order[0].tolist()) == list(range(6))
    assert counts_of(routing.experts, 3) == [[2, 2, 2]]


def test_random_routing_keeps_the_counts_and_heeds_no_token():
    router = random_router(kind="random")
    x, budget = randn(1, 12, 8).expand(300, 12, 8), Budget((3, 2, 4, 3))
    torch.manual_seed(0)
    routing = router(x, budget)
    assert counts_of(routing.experts, 4) == [[3, 2, 4, 3]] * 300
    # All samples are alike, yet each token is everywhere in turn.
    for expert, count in enumerate(budget.tokens):
        shares = (routing.experts == expert).double().mean(0)
        assert (shares - count / 12).abs().max() < 5 * math.sqrt(0.25 / 300)
    # What it says of a token is the router's own probability all the same.
    probabilities = (x @ router.weight.t() + router.bias).softmax(2)
    expected = probabilities.gather(2, routing.experts[:, :, None]).squeeze(2)
    torch.testing.assert_close(routing.probabilities, expected)


@pytest.mark.parametrize("kind", ["random", "expert_preferred"])
def test_scores_decide_if_there_are_any(kind):
    router, x, budget = random_router(kind=kind), randn(3, 12, 8), Budget((3, 2, 4, 3))
    scores = randn(3, 12, 4, seed=5)
    routing = router(x, budget, scores)
    expected = [naive_choice(table.tolist(), budget.tokens) for table in scores]
    assert routing.experts.tolist() == expected


def test_with_argmax_each_token_takes_its_likeliest_expert_whatever_the_budget():
    router = router_of_logits(3, kind="argmax")
    x = torch.tensor([EXAMPLE]).log()
    for budget in (None, Budget((0, 0, 7)), Budget((5, 1, 1))):
        routing = router(x, budget)
        assert routing.experts.tolist() == [[0, 2, 1, 2, 0, 1, 1]]
        assert routing.order.tolist() == [list(range(7))]
        assert not routing.is_sorted
        torch.testing.assert_close(
            routing.probabilities, torch.tensor([[0.70, 0.60, 0.50, 0.80, 0.34, 0.60, 0.45]])
        )


@pytest.mark.parametrize("kind", ["expert_preferred", "random", "argmax"])
def test_a_class_token_gets_the_largest_expert_and_the_first_place(kind):
    router, x = random_router(kind=kind), randn(6, 13, 8)
    x[:, 0] = -10 * router.weight[3].detach()  # what it is least likely to get
    routing = router(x, Budget((3, 2, 4, 3)), num_full_tokens=1)
    assert (routing.experts[:, 0] == 3).all()
    assert (routing.order[:, 0] == 0).all()
    assert (routing.probabilities[:, 0] < 0.1).all()
    probabilities = (x @ router.weight.t() + router.bias).softmax(2)
    torch.testing.assert_close(routing.probabilities[:, 0], probabilities[:, 0, 3])
    if kind != "argmax":
        assert counts_of(routing.experts, 4) == [[3, 2, 4, 4]] * 6
        for order in routing.order.tolist():
            assert sorted(order) == list(range(13))
    if kind == "expert_preferred":
        others = router(x[:, 1:], Budget((3, 2, 4, 3)))
        assert torch.equal(routing.experts[:, 1:], others.experts)
        assert torch.equal(routing.order[:, 1:], others.order + 1)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_sorting_and_restoring_is_a_round_trip(shape):
    x = randn(3, 12, *shape)
    routing = random_router()(randn(3, 12, 8), Budget((0, 2, 4, 1), 5))
    placed = routing.sort(x)
    assert placed.shape == x.shape
    for sample, order in enumerate(routing.order.tolist()):
        for place, token in enumerate(order):
            assert torch.equal(placed[sample, place], x[sample, token])
    assert torch.equal(routing.restore(placed), x)
    assert placed.transpose(0, 1).is_contiguous()


def test_gradients_pass_through_sorting():
    x = randn(3, 12, 5).requires_grad_()
    order = torch.stack([torch.randperm(12) for _ in range(3)])
    weights = randn(3, 12, 5, seed=1)
    (sort_tokens(x, order) * weights).sum().backward()
    assert torch.equal(x.grad, sort_tokens(weights, order.argsort(1)))


def test_sorted_tokens_are_those_of_the_largest_expert_first():
    budget = Budget((2, 3, 1, 4), 2)
    routing = random_router()(randn(3, 12, 8), budget)
    placed = routing.experts.gather(1, routing.order)
    expected = [3] * 4 + [2] + [1] * 3 + [0] * 2 + [-1] * 2
    assert placed.tolist() == [expected] * 3


def test_masks_are_the_channels_of_experts():
    mask = expert_mask(torch.tensor([[0, 2, 1]]), 8, 3)
    assert mask.tolist() == [
        [[c < 2 for c in range(8)], [True] * 8, [c < 4 for c in range(8)]],
    ]


def test_statistics_are_means_over_all_tokens_and_carry_no_gradient():
    router, x, budget = random_router(), randn(3, 12, 8).requires_grad_(), Budget((5, 1, 2, 4))
    load, probabilities, entropy = statistics = router(x, budget).statistics
    table = (x @ router.weight.t() + router.bias).softmax(2).detach().flatten(0, 1)
    assert load.tolist() == pytest.approx([5 / 12, 1 / 12, 2 / 12, 4 / 12])
    torch.testing.assert_close(probabilities, table.mean(0))
    expected = sum(-(row * row.log()).sum() for row in table) / len(table)
    torch.testing.assert_close(entropy, expected)
    assert not any(value.requires_grad for value in statistics)
    skipping = router(x, Budget((0, 0, 0, 3), 9)).statistics
    assert skipping.load.tolist() == [0, 0, 0, 0.25]


def test_the_router_learns_from_the_probability_of_the_chosen_expert():
    router, x = random_router(), randn(2, 12, 8)
    budget = Budget((3, 2, 4, 3))
    routing = router(x, budget)
    weights = randn(2, 12, seed=3)
    found = torch.autograd.grad((routing.probabilities * weights).sum(), [*router.parameters()])
    logits = (x @ router.weight.t() + router.bias).detach()
    # d p_e / d l_f = p_e (delta_ef - p_f)
    p = logits.softmax(2)
    chosen = torch.nn.functional.one_hot(routing.experts, 4)
    of_chosen = (p * chosen).sum(2, keepdim=True)
    of_logits = weights[:, :, None] * of_chosen * (chosen - p)
    torch.testing.assert_close(found[0], of_logits.flatten(0, 1).t() @ x.flatten(0, 1))
    torch.testing.assert_close(found[1], of_logits.sum((0, 1)))


def test_probabilities_are_in_float32_of_half_precision_activations():
    router = ExpertPreferredRouter(8, 4).bfloat16()
    x = randn(2, 12, 8).bfloat16()
    routing = router(x, Budget((3, 2, 4, 3)))
    expected = (x.float() @ router.weight.float().t() + router.bias.float()).softmax(2)
    found = expected.gather(2, routing.experts[:, :, None]).squeeze(2)
    assert routing.probabilities.dtype == torch.float32
    torch.testing.assert_close(routing.probabilities, found)


def test_what_a_router_cannot_go_by_is_refused():
    x = torch.zeros(1, 6, 3)
    router = ExpertPreferredRouter(3, 3)
    with pytest.raises(ValueError, match="budget = None"):
        router(x)
    with pytest.raises(ValueError, match="3 experts and 6 tokens"):
        router(x, Budget((1, 2, 2)))
    with pytest.raises(ValueError, match="3 experts and 6 tokens"):
        router(x, Budget((3, 3)))
    with pytest.raises(ValueError, match="3 experts and 5 tokens"):
        router(x, Budget((2, 2, 2)), num_full_tokens=1)
    with pytest.raises(ValueError, match="capacity_distribution"):
        ExpertPreferredRouter(3, 3, (0.5, 0.5))
    with pytest.raises(ValueError, match="fewer than the 3 experts"):
        ExpertPreferredRouter(3, 3, (0.3, 0.3, 0.4))(torch.zeros(1, 2, 3))


def test_tokens_are_sorted_by_experts_that_someone_else_chose():
    router, x = router_of_logits(4), randn(3, 12, 4)
    budget = Budget((2, 4, 1, 5))
    routing = router(x, budget)
    order, found = sort_by_experts(routing.experts, 4)
    assert found == budget
    placed = routing.experts.gather(1, order)
    assert (placed.diff(dim=1) <= 0).all()
    assert torch.equal(order.sort(1).values, torch.arange(12).expand(3, 12))
    for wrong, message in (
        (torch.tensor([[0, 1], [1, 1]]), "samples have"),
        (torch.tensor([[0, 4]]), "from 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            sort_by_experts(wrong, 4)


def test_a_router_learns_by_its_offset():
    router, x = ExpertPreferredRouter(4, 2, (0.5, 0.5)), randn(2, 6, 4).float()
    alpha = torch.tensor([0.5], requires_grad=True)
    routing = router(x)
    offset = routing.offset(alpha)
    assert torch.equal(offset, 0.5 * routing.sort(routing.probabilities)[:, :, None])
    offset.square().sum().backward()
    assert router.weight.grad.abs().sum() > 0 and alpha.grad.abs() > 0


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"kind = 'best': must be one of"):
        ExpertPreferredRouter(4, 2, kind="best")
