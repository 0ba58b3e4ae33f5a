import pytest
import torch

from tests.unit.models.mom.helpers import build_mixture, naive_choice, naive_mixture, random_tokens
from torchtitan_mixtures.models.mom.routing import Picks, assign, count_picks
from torchtitan_mixtures.objectives.balance import balance_loss


@pytest.mark.parametrize(
    ("pool", "least", "expected"),
    [
        ((2, 4, 4), (1, 1), (1, 1, 0)),
        ((2, 4, 4), (0, 0), (0, 0, 2)),
        ((3, 4, 4), (1, 1), (1, 1, 1)),
        ((2, 4, 4), (1, 0), (1, 0, 1)),
        ((2, 4, 0), (0, 0), (2, 0, 0)),  # one kind only: nothing is open
        ((2, 0, 4), (0, 0), (0, 2, 0)),
        ((3, 4, 1), (0, 1), (2, 1, 0)),  # all of one kind are taken
        ((3, 1, 4), (1, 0), (1, 2, 0)),
    ],
)
def test_picks_are_free_only_where_their_kind_is_open(pool, least, expected):
    assert count_picks(*pool, *least) == Picks(*expected)


@pytest.mark.parametrize("least", [(1, 1), (0, 0), (2, 0), (0, 1)])
@pytest.mark.parametrize("top_k", [2, 3])
def test_choices_are_those_of_a_loop(top_k, least):
    fields = {"min_token_experts": least[0], "min_channel_experts": least[1]}
    router = build_mixture(32, 16, 4, 3, top_k, **fields).router
    logits = torch.randn(64, 7, generator=torch.Generator().manual_seed(0))
    for row, chosen in zip(logits.tolist(), router.choose(logits).tolist(), strict=True):
        assert sorted(chosen) == sorted(naive_choice(row, 4, top_k, least))
        assert sum(e < 4 for e in chosen) >= least[0]
        assert sum(e >= 4 for e in chosen) >= least[1]


def test_a_free_choice_leaves_samples_without_a_token_mixer_and_a_typed_one_does_not():
    logits = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    share = {}
    for least in ((0, 0), (1, 1)):
        fields = {"min_token_experts": least[0], "min_channel_experts": least[1]}
        chosen = build_mixture(32, 16, **fields).router.choose(logits)
        share[least] = (chosen >= 4).all(1).float().mean().item()
    assert share[0, 0] == pytest.approx(6 / 28, abs=0.02)  # two of the eight
    assert share[1, 1] == 0


def test_pairs_are_sorted_by_expert():
    experts = torch.tensor([[2, 0], [0, 2], [2, 1], [0, 1]])
    weights = torch.rand(4, 2)
    assignment = assign(experts, weights, 4, is_partial=False)
    assert assignment.order.tolist() == [1, 2, 6, 5, 7, 0, 3, 4]
    assert assignment.experts.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert assignment.ends.tolist() == [3, 5, 8, 8]
    assert assignment.ends.dtype == torch.int32
    assert assignment.order[assignment.places].tolist() == list(range(8))
    assert torch.equal(assignment.weights, weights)


def test_pairs_of_the_other_kind_come_last_and_weigh_nothing():
    experts = torch.tensor([[-3, 0], [1, 4], [-1, 2]])
    assignment = assign(experts, torch.ones(3, 2), 2, is_partial=True)
    assert assignment.order[:2].tolist() == [1, 2]
    assert assignment.ends.tolist() == [1, 2]
    assert assignment.experts.max() < 2
    assert assignment.weights.tolist() == [[0, 1], [1, 0], [0, 0]]


@pytest.mark.parametrize("least", [(1, 1), (0, 0)])
def test_statistics_are_means_over_samples(least):
    fields = {"min_token_experts": least[0], "min_channel_experts": least[1]}
    mixture, x = build_mixture(32, 16, **fields), random_tokens(9)
    _, statistics = mixture(x)
    weights = dict(mixture.named_parameters())
    _, probabilities, choices, logs = naive_mixture(weights, x, 2, least)
    torch.testing.assert_close(statistics.probabilities, probabilities.mean(0))
    torch.testing.assert_close(statistics.z, logs.square().mean())
    counts = [sum(e in chosen for chosen in choices) / 18 for e in range(8)]
    assert statistics.load.tolist() == pytest.approx(counts)
    assert statistics.load.sum() == pytest.approx(1)
    assert statistics.probabilities.requires_grad and not statistics.load.requires_grad


def test_balance_loss_is_one_if_even_and_the_number_of_experts_if_collapsed():
    mixture = build_mixture(32, 16, 4, 4, 1, min_token_experts=0, min_channel_experts=0)
    x = torch.ones(8, 16, 32, dtype=torch.float64)
    mixture.router.weight.data.zero_()
    _, statistics = mixture(x)
    assert statistics.probabilities.tolist() == pytest.approx([1 / 8] * 8)
    loss = balance_loss(statistics.probabilities[None], statistics.load[None])
    assert loss.item() == pytest.approx(1)
    mixture.router.weight.data[3] = 10
    _, statistics = mixture(x)
    loss = balance_loss(statistics.probabilities[None], statistics.load[None])
    assert loss.item() == pytest.approx(8)


def test_load_of_first_choices_is_balanced_as_in_the_original():
    # Its worked example: probabilities 3/4 and 1/4, all first choices on the first expert.
    loss = balance_loss(torch.tensor([[0.75, 0.25]]), torch.tensor([[1.0, 0.0]]))
    assert loss.item() == pytest.approx(1.5)


@pytest.mark.parametrize("is_renormalized", [False, True])
def test_one_choice_trains_the_router_only_without_renormalisation(is_renormalized):
    mixture = build_mixture(32, 16, 4, 4, 1, min_token_experts=0, min_channel_experts=0)
    assert not mixture.router.is_renormalized
    mixture.router.is_renormalized = is_renormalized
    mixture(random_tokens())[0].square().sum().backward()
    gradient = mixture.router.weight.grad.abs().max()
    assert (gradient < 1e-10) if is_renormalized else (gradient > 1e-3)


def test_weights_of_several_choices_sum_to_one():
    for least in ((1, 1), (0, 0)):
        fields = {"min_token_experts": least[0], "min_channel_experts": least[1]}
        routing = build_mixture(32, 16, **fields).router(random_tokens())
        total = routing.token.weights.sum(1) + routing.channel.weights.sum(1)
        torch.testing.assert_close(total, torch.ones_like(total))


def test_noise_is_relative_to_what_the_router_sees():
    mixture, x = build_mixture(32, 16, router_noise=0.3), random_tokens()
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    weights = dict(mixture.named_parameters())
    expected, probabilities, _, _ = naive_mixture(weights, x, noise=noise, sigma=0.3)
    out, statistics = mixture(x, noise)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(statistics.probabilities, probabilities.mean(0))
    assert not torch.allclose(mixture(x)[0], out)
    silent = build_mixture(32, 16)
    assert torch.equal(silent(x, noise)[0], silent(x)[0])


def test_router_computes_in_float32_under_autocast():
    mixture, x = build_mixture(32, 16, dtype=torch.float32), random_tokens().float()
    expected = mixture(x)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, statistics = mixture(x)
    assert statistics.probabilities.dtype == torch.float32
    torch.testing.assert_close(statistics.probabilities, expected.probabilities)
    assert torch.isfinite(out).all()
