import pytest
import torch

from tests.unit.models.mone.helpers import (
    gelu,
    gradients,
    naive_block,
    norm,
    randn,
    shake,
    width,
)
from torchtitan_mixtures.models.mone.block import NestedBlock, NestedFeedForward
from torchtitan_mixtures.models.mone.capacity import Budget, compute_capacity_distribution
from torchtitan_mixtures.models.mone.routing import expert_mask

DIM, HEADS = 16, 2
BUDGETS = [
    Budget((2, 1, 3, 2)),
    Budget((8, 0, 0, 0)),
    Budget((0, 0, 0, 8)),
    Budget((0, 3, 0, 5)),
    Budget((4, 0, 4, 0)),
    Budget((0, 0, 0, 3), 5),
    Budget((1, 0, 2, 2), 3),
]


def block_of(num_experts=4, dim=DIM, **fields):
    block = NestedBlock(dim, HEADS, num_experts, mlp_ratio=2.0, **fields).double()
    shake(block)
    return block


def experts_of(budget):
    """Expert of each sorted token."""
    largest_first = reversed(range(len(budget.tokens)))
    return [e for e in largest_first for _ in range(budget.tokens[e])] + [-1] * budget.skipped


def naive(block, x, experts, num_experts=4, offset=None):
    """One sample after the other; `experts` are the same of all."""
    w = dict(block.named_parameters())
    rows = [None] * len(x) if offset is None else offset[:, :, 0]
    samples = [
        naive_block(w, sample, experts, num_experts, HEADS, row)
        for sample, row in zip(x, rows, strict=True)
    ]
    return torch.stack(samples)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("has_offset", [False, True])
def test_a_block_is_a_loop_over_tokens(budget, has_offset):
    block, x = block_of(), randn(3, 8, DIM).requires_grad_()
    offset = randn(3, 8, 1, seed=2).requires_grad_() if has_offset else None
    expected = naive(block, x, experts_of(budget), offset=offset)
    found = block(x, budget, offset)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    tensors = [x, *block.parameters(), *([offset] if has_offset else [])]
    torch.testing.assert_close(
        gradients(found, tensors), gradients(expected, tensors), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("num_experts", [1, 2, 3])
def test_a_block_of_any_number_of_experts_is_a_loop_over_tokens(num_experts):
    block, x = block_of(num_experts), randn(2, 6, DIM)
    budget = Budget((6,)) if num_experts == 1 else Budget((3, *[0] * (num_experts - 2), 3))
    expected = naive(block, x, experts_of(budget), num_experts)
    torch.testing.assert_close(block(x, budget), expected, rtol=1e-11, atol=1e-11)


def test_a_block_is_experts_one_by_one():
    # Each expert's tokens as a batch of their own, but for the attention among all of them.
    block, x, budget = block_of(), randn(3, 8, DIM), Budget((2, 1, 3, 2))
    w = dict(block.named_parameters())
    counts, widths = budget.tokens[::-1], [16, 8, 4, 2]

    def expand(name, x):
        parts = zip(x.split(counts, dim=1), widths, strict=True)
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        return torch.cat([part[..., :d] @ weight[:, :d].t() + bias for part, d in parts], dim=1)

    def contract(name, x):
        parts = zip(x.split(counts, dim=1), widths, strict=True)
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        narrow = [(part @ weight[:d].t() + bias[:d], d) for part, d in parts]
        return torch.cat([torch.nn.functional.pad(part, (0, DIM - d)) for part, d in narrow], dim=1)

    normed = norm(x, w["attention_norm.weight"], w["attention_norm.bias"])
    heads = expand("attention.wqkv", normed).view(3, 8, HEADS, 3, DIM // HEADS)
    q, k, v = heads.permute(3, 0, 2, 1, 4)
    scores = (q @ k.transpose(2, 3) / (DIM // HEADS) ** 0.5).softmax(3)
    z = x + contract("attention.wo", (scores @ v).transpose(1, 2).flatten(2))
    normed = norm(z, w["ffn_norm.weight"], w["ffn_norm.bias"])
    expected = z + contract("feed_forward.w2", gelu(expand("feed_forward.w1", normed)))
    torch.testing.assert_close(block(x, budget), expected, rtol=1e-11, atol=1e-11)


def toy():
    """The nested network of the specification."""
    layer = NestedFeedForward(2, 2, 2).double()
    values = {
        "w1.weight": [[1, 0.5], [-1, 1]],
        "w1.bias": [0.1, 0],
        "w2.weight": [[1, 2], [3, -1]],
        "w2.bias": [0.01, 0.02],
    }
    layer.load_state_dict({k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()})
    # Sorted: the token of the larger expert first.
    return layer, torch.tensor([[[2.0, -3.0], [1.0, 10.0]]], dtype=torch.float64)


def test_the_toy_of_the_specification_comes_out():
    layer, x = toy()
    budget = Budget((1, 1))
    hidden = torch.nn.functional.gelu(layer.w1(x, budget))
    assert hidden[0, 1].tolist() == pytest.approx([0.950767, -0.158655], abs=1e-6)
    out = layer(x, budget)
    assert out[0, 1].tolist() == pytest.approx([0.643457, 0], abs=1e-6)
    assert out[0, 0].tolist() == pytest.approx([0.445445, 1.326346], abs=1e-6)
    assert out[0, 1, 1] == 0


def test_alpha_scales_the_toy_as_the_specification_says():
    class Zero(torch.nn.Module):
        def forward(self, x, budget, mask):
            return torch.zeros_like(x)

    block = NestedBlock(2, 1, 2, mlp_ratio=1).double()
    block.feed_forward, x = toy()
    # z = 0 and what the network sees is x: neither attention nor norms.
    block.attention = Zero()
    block.ffn_norm = torch.nn.Identity()
    block.feed_forward.register_forward_pre_hook(lambda _, inputs: (x, *inputs[1:]))
    r, alpha = torch.tensor([[[0.7], [0.6]]], dtype=torch.float64), 0.5
    out = block(torch.zeros_like(x), Budget((1, 1)), alpha * r)
    assert out[0, 1].tolist() == pytest.approx([0.836494, 0], abs=1e-6)
    assert out[0, 0].tolist() == pytest.approx([0.601351, 1.790567], abs=1e-6)


def test_residual_features_beyond_a_tokens_width_stay_untouched():
    block, x, budget = block_of(), randn(3, 8, DIM), Budget((2, 1, 3, 2))
    y = block(x, budget, randn(3, 8, 1))
    for token, expert in enumerate(experts_of(budget)):
        d = width(expert, DIM, 4)
        assert torch.equal(y[:, token, d:], x[:, token, d:])
        assert (y[:, token, :d] != x[:, token, :d]).all()


@pytest.mark.parametrize("expert", [0, 1, 2])
def test_weights_beyond_the_width_of_all_tokens_get_no_gradient(expert):
    block = block_of()
    tokens = [0] * 4
    tokens[expert], tokens[0] = 5, 8 if expert == 0 else 3
    block(randn(3, 8, DIM), Budget(tuple(tokens))).square().sum().backward()
    d = width(expert, DIM, 4)
    for layer in (block.attention.wqkv, block.feed_forward.w1):
        assert layer.weight.grad[:, :d].all() and not layer.weight.grad[:, d:].any()
        assert layer.bias.grad.any()
    for layer in (block.attention.wo, block.feed_forward.w2):
        assert layer.weight.grad[:d].all() and not layer.weight.grad[d:].any()
        assert layer.bias.grad[:d].all() and not layer.bias.grad[d:].any()


def test_a_token_gives_no_gradient_beyond_its_width():
    # Of one token's output alone, through the layers that write it.
    block, budget = block_of(), Budget((2, 1, 3, 2))
    for token, expert in enumerate(experts_of(budget)):
        y = block(randn(1, 8, DIM), budget)
        weights = [
            block.attention.wo.weight,
            block.feed_forward.w2.weight,
            block.feed_forward.w1.weight,
        ]
        grads = torch.autograd.grad(y[0, token].square().sum(), weights)
        d = width(expert, DIM, 4)
        for grad in grads[:2]:
            assert grad[:d].any() and not grad[d:].any()
        # Only this token goes through its feed-forward network.
        assert grads[2][:, :d].any() and not grads[2][:, d:].any()


def test_tokens_that_skip_stay_as_they_are_and_are_no_keys():
    block, x, budget = block_of(), randn(3, 8, DIM), Budget((0, 0, 0, 3), 5)
    y = block(x, budget, randn(3, 8, 1))
    assert torch.equal(y[:, 3:], x[:, 3:])
    other = torch.cat([x[:, :3], randn(3, 5, DIM, seed=7)], dim=1)
    assert torch.equal(block(other, budget, randn(3, 8, 1))[:, :3], y[:, :3])
    alone = block(x[:, :3], Budget((0, 0, 0, 3)), randn(3, 8, 1)[:, :3])
    torch.testing.assert_close(y[:, :3], alone, rtol=1e-13, atol=1e-13)


def test_attention_is_among_all_tokens_in_both_directions():
    block, budget = block_of(), Budget((2, 1, 3, 2))
    for changed in (0, 7):
        x = randn(1, 8, DIM)
        before = block(x, budget)
        x[0, changed, 0] += 1  # a channel that all experts have
        assert ((block(x, budget) - before).abs().amax(2) > 1e-9).all()


def test_masks_do_what_budgets_do_in_any_order():
    block, budget = block_of(), Budget((2, 1, 3, 2))
    x, offset = randn(3, 8, DIM).requires_grad_(), randn(3, 8, 1, seed=2)
    expected = block(x, budget, offset)
    mask = expert_mask(torch.tensor([experts_of(budget)] * 3), DIM, 4)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    found = block(x[:, order], Budget((0, 0, 0, 8)), offset[:, order], mask[:, order])
    found = found[:, order.argsort()]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    tensors = [x, *block.parameters()]
    torch.testing.assert_close(gradients(found, tensors), gradients(expected, tensors))


def test_samples_do_not_see_one_another():
    block, x, budget = block_of(), randn(3, 8, DIM), Budget((2, 1, 3, 2))
    y = block(x, budget)
    for sample in range(3):
        alone = block(x[sample : sample + 1], budget)
        torch.testing.assert_close(alone[0], y[sample], rtol=1e-13, atol=1e-13)


def test_an_offset_of_zero_is_none():
    block, x, budget = block_of(), randn(3, 8, DIM), Budget((2, 1, 3, 2))
    assert torch.equal(block(x, budget, torch.zeros(3, 8, 1).double()), block(x, budget))


def test_a_small_offset_is_not_lost_under_autocast():
    block = block_of().float()
    x, budget = randn(2, 8, DIM).float(), Budget((2, 1, 3, 2))
    offset = torch.full((2, 8, 1), 0.003)  # 1.003 is 1 in bfloat16
    expected = block(x, budget, offset) - block(x, budget)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = block(x, budget, offset) - block(x, budget)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_the_example_of_the_seed_runs():
    from torchtitan_mixtures.models.mone.block import NestedBlock
    from torchtitan_mixtures.models.mone.routing import compute_capacity_distribution

    # Define capacity distribution parameters
    e_c = 0.6  # Effective capacity (between 0 and 1)
    E = 3  # Number of experts
    delta = 2  # Incentive parameter (>1)
    beta = 10  # Entropy regularization parameter (>0)

    # Compute capacity distribution
    capacity_distribution = compute_capacity_distribution(e_c, E, delta, beta)

    # Define router and layers as per model architecture
    block = NestedBlock(
        dim=128,
        num_heads=8,
        num_experts=E,
        capacity_distribution=capacity_distribution,
    )
    x = torch.randn(2, 49, 128)
    y = block(x)
    # 17, 16 and 16 tokens: floor of 0.357271 and 0.328186 of 49, and the rest.
    assert torch.equal(y, block(x, Budget((16, 16, 17))))
    assert torch.equal(y[:, 33:, 32:], x[:, 33:, 32:])


def test_a_block_without_capacities_asks_for_a_budget():
    with pytest.raises(ValueError, match="budget = None"):
        block_of()(randn(1, 8, DIM))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 3, 4), "num_heads = 3.*16"),
        ((16, 0, 4), "num_heads = 0"),
        ((12, 2, 4), "in_features = 12"),
        ((16, 2, 4, compute_capacity_distribution(0.6, 3)), "4 experts"),
        ((16, 2, 2, (0.5, 0.6)), "sum to 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NestedBlock(*arguments)


@pytest.mark.parametrize("budget", [Budget((2, 1, 3, 3)), Budget((2, 1, 3)), Budget((1, 1, 1, 1))])
def test_budgets_of_other_tokens_are_refused(budget):
    with pytest.raises(ValueError, match="budget = Budget"):
        block_of()(randn(1, 8, DIM), budget)
