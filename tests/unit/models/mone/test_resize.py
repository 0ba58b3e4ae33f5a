"""Weights for images of another size."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from torchtitan_mixtures.models.mone.args import MoNEModelArgs
from torchtitan_mixtures.models.mone.model import MoNE
from torchtitan_mixtures.models.mone.resize import resize_positions

SMALL = MoNEModelArgs(
    dim=16, n_layers=1, n_heads=2, patch_size=4, image_size=16, num_classes=3, num_experts=2
)


@pytest.mark.parametrize("pool", ["mean", "class_token"])
def test_a_model_takes_the_resized_weights_of_another(pool):
    args = dataclasses.replace(SMALL, pool=pool)
    larger = dataclasses.replace(args, image_size=32)
    state = MoNE.resize_state_dict(_model(args).state_dict(), args, larger)
    model = MoNE(larger)
    model.load_state_dict(state, assign=True)
    assert model(torch.zeros(2, 3, 32, 32)).logits.shape == (2, 3)


def test_the_class_token_keeps_its_position_and_equal_positions_stay_equal():
    positions = torch.cat([torch.full((1, 3), 7.0), torch.full((16, 3), 2.0)])
    resized = resize_positions(positions, 1, 64)
    assert torch.equal(resized[0], positions[0])
    torch.testing.assert_close(resized[1:], torch.full((64, 3), 2.0))


def test_positions_of_the_same_size_are_left_alone():
    positions = torch.randn(16, 3)
    assert resize_positions(positions, 0, 16) is positions


def test_a_ramp_stays_a_ramp_inside():
    ramp = torch.arange(4.0).repeat(4)[:, None]  # the column, of a 4 x 4 grid
    resized = resize_positions(ramp, 0, 64).view(8, 8)
    torch.testing.assert_close(resized[3, 3:5], torch.tensor([1.25, 1.75]), atol=0.05, rtol=0)


def _model(args):
    model = MoNE(args)
    model.init_weights()
    return model
