import pytest
import torch

from tests.unit.models.mone.helpers import gradients, naive_contract, naive_expand, randn, shake
from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.mone.capacity import Budget
from torchtitan_mixtures.models.mone.layers import NestedLinearContract, NestedLinearExpand

BUDGET = Budget((2, 0, 3, 1))
WIDTHS = [16, 8, 8, 8, 2, 2]  # of sorted tokens of four experts, 16 channels in all


def layer_of(kind):
    layer = kind(*((16, 6) if kind is NestedLinearExpand else (6, 16)), 4).double()
    shake(layer)
    return layer


@pytest.mark.parametrize(
    ("kind", "naive"),
    [(NestedLinearExpand, naive_expand), (NestedLinearContract, naive_contract)],
)
def test_layers_are_loops_over_tokens(kind, naive):
    layer = layer_of(kind)
    x = randn(3, 6, layer.in_features).requires_grad_()
    expected = torch.stack([naive(sample, layer.weight, layer.bias, WIDTHS) for sample in x])
    found = layer(x, BUDGET)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    tensors = [x, layer.weight, layer.bias]
    torch.testing.assert_close(gradients(found, tensors), gradients(expected, tensors))


@pytest.mark.parametrize("kind", [NestedLinearExpand, NestedLinearContract])
def test_one_expert_is_a_linear_layer(kind):
    layer = kind(6, 4, 1).double()
    shake(layer)
    x = randn(2, 3, 6)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x, Budget((3,))), expected, rtol=1e-13, atol=1e-13)


def test_layers_without_tokens_of_an_expert_still_have_gradients_for_all_columns():
    layer = layer_of(NestedLinearExpand)
    layer(randn(2, 4, 16), Budget((4, 0, 0, 0))).sum().backward()
    assert layer.weight.grad.shape == (6, 16)
    assert layer.weight.grad[:, :2].all() and not layer.weight.grad[:, 2:].any()
    layer = layer_of(NestedLinearContract)
    layer(randn(2, 4, 6), Budget((0, 4, 0, 0))).sum().backward()
    assert layer.weight.grad[:4].all() and not layer.weight.grad[4:].any()
    assert layer.bias.grad.tolist() == [8.0] * 4 + [0.0] * 12


@pytest.mark.parametrize("kind", [NestedLinearExpand, NestedLinearContract])
@pytest.mark.parametrize(
    "budget",
    [
        Budget((2, 0, 3)),
        Budget((2, 1, 3)),
        Budget((2, 0, 3, 2)),
        Budget((6, 0, 0, 1)),
        Budget((0, 0, 0, 2), 4),
    ],
    ids=str,
)
def test_budgets_of_other_tokens_or_experts_are_refused(kind, budget):
    layer = layer_of(kind)
    with pytest.raises(ValueError, match=r"budget = Budget.*4 experts.*6 tokens"):
        layer(randn(1, 6, layer.in_features), budget)


@pytest.mark.parametrize(
    ("kind", "sizes", "side"),
    [
        (NestedLinearExpand, (12, 16, 4), "in_features = 12"),
        (NestedLinearContract, (16, 12, 4), "out_features = 12"),
        (NestedLinearExpand, (16, 16, 0), "num_experts = 0"),
    ],
)
def test_sides_that_cannot_be_halved_are_refused(kind, sizes, side):
    with pytest.raises(ValueError, match=side):
        kind(*sizes)


def test_the_other_side_may_have_any_size():
    assert NestedLinearExpand(16, 3, 4).weight.shape == (3, 16)
    assert NestedLinearContract(3, 16, 4).weight.shape == (16, 3)


@pytest.mark.parametrize("kind", [NestedLinearExpand, NestedLinearContract])
def test_a_layer_alone_is_initialised_as_one_in_a_model(kind):
    alone, inside = kind(128, 256, 4), kind(128, 256, 4)
    with init.parameter_names(inside, 0):
        inside.init_weights()
    for layer in (alone, inside):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()
        assert set(layer.state_dict()) == {"weight", "bias"}
