import math

import pytest
import torch
from torch import nn

from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.common.embeddings import (
    LabelEmbedder,
    TimestepEmbedder,
    position_table,
    timestep_features,
)


def test_timestep_features_are_those_of_dit():
    features = timestep_features(torch.tensor([10.0]), 8)
    expected = [-0.8391, 0.5403, 0.9950, 0.9999, -0.5440, 0.8415, 0.0998, 0.0100]
    torch.testing.assert_close(features, torch.tensor([expected]), atol=6e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_timestep_features_are_float32_whatever_the_times(dtype):
    times = torch.tensor([0, 1, 500, 999]).to(dtype)
    features = timestep_features(times, 256)
    assert features.dtype == torch.float32
    for row, time in zip(features, times.double().tolist(), strict=True):
        angles = [time * math.exp(-math.log(10000) * i / 128) for i in range(128)]
        expected = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)


def test_position_table_is_that_of_dit():
    table = position_table(8, 2)
    place = [0.841471, 0.01, 0.540302, 0.99995]
    expected = [[0, 0, 1, 1, 0, 0, 1, 1], [*place, 0, 0, 1, 1], [0, 0, 1, 1, *place], place * 2]
    torch.testing.assert_close(table, torch.tensor(expected), atol=1e-6, rtol=0)


def test_position_table_of_a_grid_that_is_not_square():
    wide = position_table(16, 2, 5).view(2, 5, 16)
    square = position_table(16, 5).view(5, 5, 16)
    assert torch.equal(wide, square[:2])


def test_timestep_embedder_is_two_layers_with_a_silu():
    embedder = TimestepEmbedder(8, 16).double()
    features = torch.randn(3, 8, dtype=torch.float64)
    weights = dict(embedder.named_parameters())
    for row, expected in zip(embedder(features), features, strict=True):
        hidden = weights["w1.weight"] @ expected + weights["w1.bias"]
        hidden = hidden / (1 + torch.exp(-hidden))
        torch.testing.assert_close(row, weights["w2.weight"] @ hidden + weights["w2.bias"])


def test_label_embedder_has_a_row_for_no_class():
    embedder = LabelEmbedder(10, 4)
    assert embedder(torch.tensor([0, 10])).shape == (2, 4)
    with pytest.raises(IndexError):
        embedder(torch.tensor([11]))


def test_embedders_start_small():
    model = nn.ModuleDict({"t": TimestepEmbedder(256, 256), "y": LabelEmbedder(100, 256)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    with init.parameter_names(model, 0):
        for module in model.values():
            module.init_weights()
    for name, parameter in model.named_parameters():
        std = 0 if name.endswith("bias") else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.03), name
