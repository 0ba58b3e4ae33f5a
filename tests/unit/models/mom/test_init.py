import math

import pytest
import torch

from tests.unit.models.mom.helpers import tiny_args
from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.mom.mixers import MixtureOfMixers
from torchtitan_mixtures.models.mom.model import MoM


def meta_built(args):
    with torch.device("meta"):
        model = MoM(args)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
    model.init_weights(torch.device("cpu"))
    return model


@pytest.mark.parametrize("fields", [{}, {"mixer": "attention"}])
def test_no_value_is_left_uninitialised(fields):
    model = meta_built(tiny_args(**fields))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.isfinite(tensor).all(), name
    assert "pos_embed" in dict(model.named_buffers())
    assert "pos_embed" not in model.state_dict()


def test_weights_do_not_depend_on_how_the_model_came_about():
    meta, direct = meta_built(tiny_args()), MoM(tiny_args())
    direct.init_weights()
    for name, parameter in direct.named_parameters():
        assert torch.equal(parameter, meta.get_parameter(name)), name
    assert torch.equal(meta.pos_embed, direct.pos_embed)


def test_experts_and_layers_are_drawn_apart():
    model = meta_built(tiny_args())
    first, second = (block.mixer.channel_mixers.w1 for block in model.layers.values())
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_parameters_are_drawn_by_the_rule_of_dit():
    model = meta_built(tiny_args(dim=64, image_size=32))
    zeros = {"final_layer.linear.weight", "final_layer.modulation.linear.weight"}
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "b1", "b2")) or "modulation" in name or name in zeros:
            assert not parameter.any(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            bound = math.sqrt(6 / (parameter.shape[-1] + parameter.shape[-2]))
            assert parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_experts_start_at_the_scale_of_the_original():
    mixture = MixtureOfMixers(384, 64)
    with init.parameter_names(mixture, 0):
        mixture.init_weights()
    x = torch.randn(8, 64, 384, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        routing = mixture.router(x)
        for mixers, assignment in (
            (mixture.token_mixers, routing.token),
            (mixture.channel_mixers, routing.channel),
        ):
            out = mixers(x, routing) / assignment.weights[:, :, None]
            assert out.std().item() == pytest.approx(0.48, abs=0.03)
