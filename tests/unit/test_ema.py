"""The average of parameters: its closed form, its exchange with the parameters, its state."""

import pytest
import torch
from torch import nn

from torchtitan_mixtures.ema import EMA


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_the_average_is_the_closed_form():
    model, decay = make_model(), 0.9
    ema = EMA([model], decay)
    ema.start()
    history = [model[0].weight.detach().clone()]
    for step in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * (step + 1))
        ema.update()
        history.append(model[0].weight.detach().clone())
    # decay**n * w_0 + (1 - decay) * sum_i decay**(n - i) * w_i
    n = len(history) - 1
    expected = decay**n * history[0].double()
    for i in range(1, n + 1):
        expected += (1 - decay) * decay ** (n - i) * history[i].double()
    torch.testing.assert_close(ema.state_dict()["0.weight"].double(), expected, rtol=1e-6, atol=0)


def test_the_average_begins_with_the_weights_at_the_start_of_training():
    model = make_model()
    ema = EMA([model], 0.5)
    with torch.no_grad():
        model[0].weight.fill_(3.0)  # as loading a checkpoint does
    ema.start()
    assert torch.equal(ema.state_dict()["0.weight"], torch.full((4, 3), 3.0))


def test_a_loaded_average_is_gone_on_with():
    model = make_model()
    ema = EMA([model], 0.5)
    state = {name: torch.full_like(p, 7.0) for name, p in ema.state_dict().items()}
    ema.load_state_dict(state)
    ema.start()
    assert torch.equal(ema.state_dict()["1.bias"], torch.full((2,), 7.0))


def test_the_model_has_the_average_while_they_are_swapped_and_its_weights_again_after():
    model = make_model()
    ema = EMA([model], 0.5)
    ema.start()
    averages = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), ema.swapped():
        assert all(torch.equal(p, averages[name]) for name, p in model.named_parameters())
        raise RuntimeError("inside")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(t, averages[name]) for name, t in ema.state_dict().items())


def test_names_are_those_of_the_model_without_wrappers():
    model = nn.Module()
    model.layers = nn.ModuleDict({"0": torch.compile(nn.Linear(2, 2), backend="eager")})
    assert set(EMA([model], 0.5).state_dict()) == {"layers.0.weight", "layers.0.bias"}


def test_bfloat16_weights_have_a_float32_average():
    model = make_model().to(torch.bfloat16)
    ema = EMA([model], 0.999)
    ema.start()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    ema.update()
    average = ema.state_dict()["0.weight"]
    assert average.dtype == torch.float32
    with ema.swapped():
        assert model[0].weight.dtype == torch.bfloat16
