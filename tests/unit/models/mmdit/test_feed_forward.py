import pytest
import torch
from torch.nn import functional as F

from tests.unit.models.mmdit.naive import count, randn, shake
from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.mmdit.feed_forward import FeedForward, FeedForwardOptions


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def differs(found, expected):
    return (found - expected).abs().max() > 1e-6


@pytest.mark.parametrize("activation", ["gelu", "swish", "relu_squared", "tanh_gelu"])
@pytest.mark.parametrize("glu", [False, True])
def test_feed_forward_options_do_what_they_say(activation, glu):
    flags = {} if activation == "gelu" else {activation: True}
    options = FeedForwardOptions(
        mult=3, glu=glu, glu_mult_bias=glu, post_act_ln=True, no_bias=glu, **flags
    )
    module, x = shake(FeedForward(6, options)), randn(2, 3, 6)
    act = {
        "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
        "swish": lambda x: x / (1 + torch.exp(-x)),
        "relu_squared": lambda x: torch.where(x > 0, x * x, 0.0),
        "tanh_gelu": lambda x: (
            x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
        ),
    }[activation]
    hidden = x @ module.w1.weight.t()
    if not glu:
        hidden = act(hidden + module.w1.bias)
    else:
        hidden = hidden[..., :18] * act(hidden[..., 18:]) * module.mult_bias
    hidden = F.layer_norm(hidden, (18,), module.norm.weight, module.norm.bias)
    expected = hidden @ module.w2.weight.t() + (0 if glu else module.w2.bias)
    close(module(x), expected)
    # Two layers, gates, the factor of each, biases, norm.
    assert count(module) == 2 * 6 * 18 + (6 * 18 + 18 if glu else 18 + 6) + 2 * 18


def test_dropout_is_of_training_alone():
    module = FeedForward(6, FeedForwardOptions(dropout=0.5)).double()
    x = randn(2, 3, 6)
    torch.manual_seed(0)
    assert differs(module(x), module(x))
    module.eval()
    close(module(x), module(x))


def test_a_feed_forward_network_can_start_at_zero():
    module = FeedForward(6, FeedForwardOptions(zero_init_output=True))
    with init.parameter_names(module, 0):
        module.init_weights()
    assert module.w1.weight.any() and not module.w2.weight.any()
