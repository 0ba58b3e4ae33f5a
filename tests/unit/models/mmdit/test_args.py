"""Every argument of the trainable MMDiT does something, and what blocks must know reaches them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torchtitan.protocols.model import BaseModelArgs

from tests.jobs import debug_job
from tests.unit.models.mmdit.test_model import (
    IDS,
    SOUND,
    VECTORS,
    build,
    make_inputs,
    predict,
    tiny_args,
)
from torchtitan_mixtures.models.mmdit.args import MMDiTModelArgs
from torchtitan_mixtures.models.mmdit.block import BlockConfig
from torchtitan_mixtures.models.mmdit.feed_forward import FeedForwardOptions
from torchtitan_mixtures.models.mmdit.model import MMDiTDenoiser

BASE = tiny_args()
RENAMED = dataclasses.replace(IDS, name="speech")
SEVERAL = {"num_residual_streams": 2}
HEARING = {"prompt_names": ("text", "speech"), "prompts": (IDS, SOUND)}

# What changes shapes of weights: the field, its other value, and what the others are meanwhile.
SHAPES = {
    "dim": (24, {}),
    "n_layers": (3, {}),
    "patch_size": (4, {}),
    "in_channels": (4, {}),
    "learned_variance": (True, {}),
    "mlp_ratio": (2.0, {}),
    "num_timestep_features": (128, {}),
    "prompts": ((VECTORS,), {}),
    "prompt_dims": ((8,), {}),
    "encoder_layers": (2, {}),
    "encoder_dim": (12, {}),
    "num_registers": ((0, 1), {}),
    "num_residual_streams": (3, {}),
    "dynamic_streams": (False, SEVERAL),
    "num_adaptive_weights": (2, {}),
    "single_stream": (True, {}),
}
# What changes what the same weights compute.
OUTPUTS = {
    "n_heads": (4, {"qk_norm": "none"}),
    "image_size": (16, {}),
    "position_grid": (2, {}),
    "encoder_heads": (4, {}),
    "softclamp": (0.01, {}),
    "modulation": ("film_identity", {}),
    "init_seed": (1, {}),
}
# What decides lengths of prompts when the data's are taken over.
PROMPTS = {
    "prompt_length": (9, HEARING),
    "speech_length": (7, HEARING),
}
# Norms have one scale for all heads, or one for each; names are those of the prompts.
OTHERS = {"qk_norm": "per_head", "prompt_names": ("speech",)}


def shapes_of(args):
    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in MMDiTDenoiser(args).state_dict().items()}


def test_no_argument_is_forgotten_here():
    tested = [*SHAPES, *OUTPUTS, *PROMPTS, *OTHERS]
    of_torchtitan = {field.name for field in dataclasses.fields(BaseModelArgs)}
    fields = {field.name for field in dataclasses.fields(MMDiTModelArgs)} - of_torchtitan
    assert sorted(tested) == sorted(fields)


@pytest.mark.parametrize("name", [*SHAPES, *OUTPUTS, *PROMPTS, *OTHERS])
def test_every_argument_does_something(name):
    value, others = {**SHAPES, **OUTPUTS, **PROMPTS}.get(name, (OTHERS.get(name), {}))
    before = dataclasses.replace(BASE, **others)
    if name == "prompt_names":  # checked against the prompts, which must have these
        with pytest.raises(ValueError, match="prompts"):
            dataclasses.replace(before, prompt_names=value)
        others = {"prompts": (RENAMED,)}
    assert getattr(before, name) != value
    after = dataclasses.replace(before, **others, **{name: value})
    if name in PROMPTS:
        for args in (before, after):
            args.update_from_config(debug_job("mmdit"))
        lengths = [{spec.name: spec.length for spec in args.prompts} for args in (before, after)]
        changed = {"prompt_length": "text", "speech_length": "speech"}[name]
        assert lengths[1] == {**lengths[0], changed: value} != lengths[0]
    if name not in OUTPUTS:
        assert shapes_of(before) != shapes_of(after)
        return
    assert shapes_of(before) == shapes_of(after)
    inputs = make_inputs(before)
    first, second = predict(build(before), inputs), predict(build(after), inputs)
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(predict(build(before), inputs), first, rtol=0, atol=0)


CONFIG = BlockConfig(
    n_heads=2,
    head_dim=8,
    condition_dim=16,
    modulation="zero",
    qk_norm="shared",
    qkv_bias=True,
    out_bias=True,
    softclamp=None,
    num_adaptive_weights=1,
    feed_forward=FeedForwardOptions(mult=4.0, tanh_gelu=True),
    num_residual_streams=1,
    dynamic_streams=True,
    norm_eps=1e-6,
)
CONFIG_CASES = {
    "as they are": ({}, {}),
    "dim": ({"dim": 24}, {"head_dim": 12, "condition_dim": 24}),
    "n_heads": ({"n_heads": 4}, {"n_heads": 4, "head_dim": 4}),
    "softclamp": ({"softclamp": 5.0},) * 2,
    "modulation": ({"modulation": "film_identity"},) * 2,
    "no norms": ({"qk_norm": "none"},) * 2,
    "norms of heads": ({"qk_norm": "per_head"},) * 2,
    "num_adaptive_weights": ({"num_adaptive_weights": 3},) * 2,
    "num_residual_streams": ({"num_residual_streams": 4},) * 2,
    "dynamic_streams": ({"dynamic_streams": False},) * 2,
    "mlp_ratio": (
        {"mlp_ratio": 2.0},
        {"feed_forward": FeedForwardOptions(mult=2.0, tanh_gelu=True)},
    ),
}


@pytest.mark.parametrize(("given", "changes"), CONFIG_CASES.values(), ids=CONFIG_CASES)
def test_blocks_are_told_what_concerns_them_and_nothing_else_changes(given, changes):
    with torch.device("meta"):
        model = MMDiTDenoiser(dataclasses.replace(BASE, **given))
    expected = dataclasses.replace(CONFIG, **changes)
    assert [block.config for block in model.layers.values()] == [expected] * 2


def test_norms_of_queries_and_keys_have_one_scale_or_one_for_each_head():
    name = "layers.0.attention.q_norm.image"
    sizes = {}
    for kind in ("none", "shared", "per_head"):
        shapes = shapes_of(dataclasses.replace(BASE, qk_norm=kind))
        sizes[kind] = [shape for key, shape in shapes.items() if key.startswith(name)]
    assert sizes == {"none": [], "shared": [(8,)], "per_head": [(2, 8)]}


def test_registers_are_small_at_first():
    args = dataclasses.replace(BASE, num_registers=(900, 1200))
    model = build(args, perturb=False)
    for number, name in zip((900, 1200), ("text", "image"), strict=True):
        weight = model.registers[name].weight
        assert weight.shape == (number, 16)
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert abs(weight.mean().item()) < 4 * 0.02 / (number * 16) ** 0.5
    drawn = model.registers["text"].weight, model.registers["image"].weight[:900]
    assert not torch.equal(*drawn)
