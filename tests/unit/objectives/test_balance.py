"""Losses of routers against loops, and what is reported of them."""

import math

import pytest
import torch

from torchtitan_mixtures.objectives.balance import RouterMeter, balance_loss, router_losses
from torchtitan_mixtures.objectives.outputs import RouterStatistics


def test_the_balance_loss_is_one_if_even_and_the_number_of_experts_if_collapsed():
    even = torch.full((3, 8), 1 / 8)
    assert float(balance_loss(even, even)) == pytest.approx(1.0)
    collapsed = torch.zeros(3, 8)
    collapsed[:, 2] = 1.0
    assert float(balance_loss(collapsed, collapsed)) == pytest.approx(8.0)


def test_the_balance_loss_is_the_sum_of_a_loop():
    torch.manual_seed(0)
    probabilities, load = torch.rand(2, 4), torch.rand(2, 4)
    expected = sum(
        4 * sum(float(probabilities[layer, e] * load[layer, e]) for e in range(4))
        for layer in range(2)
    )
    assert float(balance_loss(probabilities, load)) == pytest.approx(expected / 2)


def test_weights_scale_both_losses_and_only_probabilities_have_a_gradient():
    torch.manual_seed(0)
    probabilities = torch.rand(2, 4, requires_grad=True)
    load = torch.rand(2, 4, requires_grad=True)
    z = torch.rand(2, requires_grad=True)
    statistics = RouterStatistics(probabilities, load, z)
    loss, _, balance = router_losses(statistics, None, 0.5, 0.25)
    expected = 0.5 * balance + 0.25 * z.mean()
    assert float(loss) == pytest.approx(float(expected))
    loss.backward()
    assert load.grad is None
    torch.testing.assert_close(probabilities.grad, 0.5 * 4 * load.detach() / 2)
    torch.testing.assert_close(z.grad, torch.full((2,), 0.125))


def test_the_meter_reports_loads_relative_to_even_ones():
    meter = RouterMeter(num_token_experts=1)
    assert meter.scalars() == {}
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    for load, balance in (([0.5, 0.5], 2.0), ([0.25, 0.75], 1.0)):
        means = torch.stack([torch.tensor([[1.0, 0.0], load]), probabilities])
        meter.add(means, torch.tensor(balance))
    scalars = meter.scalars()
    assert scalars["router/balance_loss"] == pytest.approx(1.5)
    assert scalars["router/layer_0/largest_load"] == pytest.approx(2.0)
    assert scalars["router/layer_0/load_entropy"] == pytest.approx(0.0)
    assert scalars["router/layer_1/largest_load"] == pytest.approx(1.25)
    assert scalars["router/layer_0/token_probability"] == pytest.approx(0.9)
    assert scalars["router/layer_1/token_probability"] == pytest.approx(0.2)
    entropy = -(0.375 * math.log(0.375) + 0.625 * math.log(0.625)) / math.log(2)
    assert scalars["router/layer_1/load_entropy"] == pytest.approx(entropy)
