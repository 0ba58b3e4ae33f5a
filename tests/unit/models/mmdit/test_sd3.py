"""Weights of Stable Diffusion 3 in and out, with diffusers as the oracle."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import Timesteps

from tests.unit.models.mmdit.sd3_oracle import (
    config_of,
    make_args,
    make_ours,
    make_theirs,
    run_both,
)
from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.models.common.embeddings import centred_position_table, timestep_features
from torchtitan_mixtures.models.mmdit import sd3
from torchtitan_mixtures.models.mmdit.model import MMDiTDenoiser


@pytest.mark.parametrize("size", [(12, 12), (8, 8), (4, 12), (6, 8), (10, 2)])
@pytest.mark.parametrize(("there", "here"), [(None, "none"), ("rms_norm", "shared")])
def test_the_model_computes_what_diffusers_does(there, here, size):
    theirs, args = make_theirs(qk_norm=there).double(), make_args(qk_norm=here)
    ours = make_ours(theirs, args).double()
    # Small times: those of diffusers are embedded in float32, which shows at large ones.
    times = torch.tensor([0.0, 0.25, 2.0])
    expected, found = run_both(theirs, ours, *size, times, torch.float64)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("there", "here"), [(None, "none"), ("rms_norm", "shared")])
def test_in_single_precision_and_at_all_times_it_does_so_too(there, here):
    theirs = make_theirs(std=0.15, qk_norm=there)
    ours = make_ours(theirs, make_args(qk_norm=here))
    times = torch.tensor([0.0, 313.7, 1000.0])
    expected, found = run_both(theirs, ours, 8, 10, times)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(times)
    torch.testing.assert_close(timestep_features(times, 256), features, atol=1e-4, rtol=0)


def test_gradients_are_those_of_diffusers():
    theirs, args = make_theirs(qk_norm="rms_norm").double(), make_args(qk_norm="shared")
    ours = make_ours(theirs, args).double()
    outputs = run_both(theirs, ours, 6, 8, torch.tensor([0.0, 0.25, 2.0]), torch.float64)
    for output in outputs:
        output.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    expected = {  # nothing is read from text's queries in the last block
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in theirs.named_parameters()
    }
    found = sd3.to_sd3(gradients, args)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_weights_go_out_as_they_came_in(qk_norm):
    theirs = make_theirs(qk_norm=qk_norm)
    args = make_args(qk_norm="shared" if qk_norm else "none")
    before = theirs.state_dict()
    sd3.check_model(args)
    sd3.check_config(config_of(theirs), args)
    state = sd3.from_sd3(before, args)
    after = sd3.to_sd3(state, args)
    assert after.keys() == before.keys() - {sd3.POSITIONS}
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert state.keys() == dict(MMDiTDenoiser(args).named_parameters()).keys()
    # That no layer has a second attention is a tuple there, and a list in JSON.
    sizes = {"dual_attention_layers": [], "sample_size": 12, "pos_embed_max_size": 18}
    assert sd3.sd3_config(args) == config_of(theirs, **sizes)


@pytest.mark.parametrize(
    ("sample_size", "max_size", "grid"), [(8, 6, 4), (12, 6, 6), (16, 24, 8), (128, 96, 64)]
)
def test_places_can_be_those_of_a_new_model_of_diffusers(sample_size, max_size, grid):
    theirs = make_theirs(sample_size=sample_size, pos_embed_max_size=max_size, num_layers=1)
    args = make_args(image_size=2 * max_size, position_grid=grid, n_layers=1)
    config = config_of(theirs)
    sd3.check_config(config, args)
    sd3.check_positions(theirs.pos_embed.pos_embed, config, args)
    sd3.check_positions(None, config, args)
    for rows, columns in ((max_size, max_size), (max_size - 1, 2), (1, max_size - 3), (4, 5)):
        expected = theirs.pos_embed.cropped_pos_embed(2 * rows, 2 * columns)[0]
        found = centred_position_table(16, rows, columns, max_size, grid, torch.device("cpu"))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (12, 12), (5, 4), (2, 9), (3, 7)])
def test_places_can_be_those_of_the_paper(rows, columns):
    theirs, args = make_theirs(pos_embed_max_size=12), make_args(image_size=8, position_grid=16)
    places = (torch.arange(12, dtype=torch.float64) - (12 - 4) / 2) * 16 / 4
    angles = places[:, None] / 10000 ** (torch.arange(4) / 4)
    vectors = torch.cat([angles.sin(), angles.cos()], 1).float()
    table = torch.cat([vectors.repeat(12, 1), vectors.repeat_interleave(12, 0)], 1)[None]
    theirs.pos_embed.pos_embed = table
    sd3.check_config(config_of(theirs), args)
    sd3.check_positions(table, config_of(theirs), args)
    torch.testing.assert_close(sd3.sd3_positions(args), table)
    times = torch.tensor([0.0, 0.25, 2.0])
    expected, found = run_both(theirs, make_ours(theirs, args), 2 * rows, 2 * columns, times)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_other_places_are_refused():
    theirs, args = make_theirs(), make_args()
    table, config = theirs.pos_embed.pos_embed, config_of(theirs)
    sd3.check_positions(table.bfloat16(), config, args)
    with pytest.raises(ValueError, match=r"from 0\.0 to 3\.3, those of the model .* 0\.0 to 5\.0"):
        sd3.check_positions(table, config, make_args(position_grid=6))
    with pytest.raises(ValueError, match=r"from 0\.0 to 6\.7, those of the model .* 0\.0 to 3\.3"):
        sd3.check_positions(None, {**config, "sample_size": 16}, args)
    with pytest.raises(ValueError, match=r"from 0\.0 to 3\.3, those of the model .* -1\.0 to 4\.0"):
        sd3.check_positions(table, config, make_args(image_size=8))
    with pytest.raises(ValueError, match=r"places that are equally far apart cannot be imported"):
        sd3.check_positions(2 * table, config, args)
    with pytest.raises(ValueError, match=r"\(1, 35, 16\), torch.float32: .* \(1, 36, 16\)"):
        sd3.check_positions(table[:, 1:], config, args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name = 'FluxTransformer2DModel'"),
        ({"_class_name": None}, "only 'SD3Transformer2DModel' is imported"),
        ({"dual_attention_layers": [0, 1]}, "dual_attention_layers = [0, 1]: blocks with a second"),
        ({"qk_norm": "rms_norm"}, "qk_norm = 'rms_norm' (here None)"),
        ({"qk_norm": "layer_norm"}, "qk_norm = 'layer_norm' (here None)"),
        ({"num_layers": 4}, "num_layers = 4 (here 3)"),
        ({"num_attention_heads": 4}, "num_attention_heads = 4 (here 2)"),
        ({"out_channels": 8}, "out_channels = 8 (here 4)"),
        ({"joint_attention_dim": 32}, "joint_attention_dim = 32 (here 24)"),
        ({"caption_projection_dim": 32}, "caption_projection_dim = 32 (here 16)"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size = None (here 6 or an even number more)"),
        ({"pos_embed_max_size": 4}, "pos_embed_max_size = 4 (here 6 or an even number more)"),
        ({"pos_embed_max_size": 9}, "pos_embed_max_size = 9 (here 6 or an even number more)"),
        ({"sample_size": "8"}, "sample_size = '8' (here 12)"),
        ({"mlp_ratio": 2}, "mlp_ratio = 2 (not known here)"),
    ],
)
def test_a_config_of_something_else_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        sd3.check_config(config_of(make_theirs(), **changes), make_args())
    assert message in str(error.value)


def test_a_config_may_leave_out_what_diffusers_leaves_out():
    config = config_of(make_theirs(), out_channels=None, sample_size=9, _diffusers_version="0.29")
    del config["qk_norm"], config["dual_attention_layers"]  # as Stable Diffusion 3 was published
    sd3.check_config(config, make_args())
    with pytest.raises(ValueError, match=r"patch_size.*in_channels = 16 \(here 4\)"):
        sd3.check_config({"_class_name": sd3.CLASS}, make_args(patch_size=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": "per_head"}, "qk_norm = 'per_head' (there 'none' or 'shared')"),
        ({"softclamp": 50.0}, "softclamp = 50.0 (there None)"),
        ({"modulation": "film_identity"}, "modulation = 'film_identity' (there 'zero')"),
        ({"num_residual_streams": 2}, "num_residual_streams = 2 (there 1)"),
        ({"num_adaptive_weights": 2}, "num_adaptive_weights = 2 (there 1)"),
        ({"single_stream": True}, "single_stream = True (there False)"),
        ({"learned_variance": True}, "learned_variance = True (there False)"),
        ({"mlp_ratio": 2.0}, "mlp_ratio = 2.0 (there 4)"),
        ({"num_timestep_features": 128}, "num_timestep_features = 128 (there 256)"),
        ({"num_registers": (0, 4)}, "num_registers = (0, 4) (there none)"),
        ({"prompt_dims": (8,)}, "prompt_dims = (8,) (there dim = 16)"),
        ({"prompts": (PromptSpec("text", "tokens", 4, 9),)}, "prompts text (tokens) (there one"),
        ({"prompts": (PromptSpec("text", "embeddings", 4, dim=9),)}, "with pooled ones"),
    ],
)
def test_a_model_that_is_another_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        sd3.check_model(make_args(**changes))
    assert message in str(error.value)


def test_weights_that_do_not_fit_are_named_all_at_once():
    weights = make_theirs().state_dict()
    name = "transformer_blocks.1.attn.to_q.weight"
    weights["proj_out.weight"] = weights["proj_out.weight"][1:]
    weights["context_embedder.bias"] = weights["context_embedder.bias"].int()
    weights["transformer_blocks.0.attn2.to_q.weight"] = weights.pop(name)
    with pytest.raises(ValueError) as error:
        sd3.from_sd3(weights, make_args())
    for part in (f"{name} missing", "attn2.to_q.weight not known here", "bias is torch.int32",
                 "proj_out.weight is (15, 16) (here (16, 16))"):  # fmt: skip
        assert part in str(error.value)
