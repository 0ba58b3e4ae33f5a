import inspect
import random

import pytest
import torch

from tests.unit.models.mmdit.naive import (
    count,
    naive_block,
    randn,
    randn_streams,
    random_mask,
    shake,
)
from torchtitan_mixtures.models.mmdit.block import MMDiTBlock

SEED = {"dim_text": 6, "dim_image": 8, "dim_cond": 5, "dim_head": 4, "heads": 2}


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def differs(found, expected):
    return (found - expected).abs().max() > 1e-6


def seed_block(**fields):
    torch.manual_seed(0)
    return shake(MMDiTBlock(**{**SEED, **fields}))


def call(block, **changes):
    streams = randn_streams({"text": 6, "image": 8}, (3, 4), seed=4)
    num_streams = block.block.config.num_residual_streams
    arguments = {
        "text_tokens": streams["text"].repeat_interleave(num_streams, 0),
        "image_tokens": streams["image"].repeat_interleave(num_streams, 0),
        "time_cond": None if block.block.config.condition_dim is None else randn(2, 5),
        "skip_feedforward_text_tokens": False,
    }
    return block(**{**arguments, **changes})


def test_the_seeds_block_has_as_many_parameters():
    block = MMDiTBlock(dim_joint_attn=512, dim_cond=256, dim_text=768, dim_image=512)
    assert count(block) == 11_417_344
    parts = {name: count(module) for name, module in block.block.named_children()}
    assert parts["modulation"] == 1_973_760
    assert parts["attention"] == 2_621_440
    assert parts["feed_forward"] == 6_822_144
    normed = MMDiTBlock(
        dim_joint_attn=512, dim_cond=256, dim_text=768, dim_image=512, qk_rmsnorm=True
    )
    assert count(normed) == 11_417_344 + 2 * 2 * 512


def test_the_seeds_example_runs():
    time_cond = torch.randn(2, 256)
    text_tokens = torch.randn(2, 512, 768)
    text_mask = torch.ones((2, 512)).bool()
    image_tokens = torch.randn(2, 1024, 512)
    block = MMDiTBlock(
        dim_joint_attn=512, dim_cond=256, dim_text=768, dim_image=512, qk_rmsnorm=True
    )
    with torch.no_grad():
        text_tokens_next, image_tokens_next = block(
            time_cond=time_cond,
            text_tokens=text_tokens,
            text_mask=text_mask,
            image_tokens=image_tokens,
        )
    assert text_tokens_next.shape == text_tokens.shape
    assert image_tokens_next.shape == image_tokens.shape


@pytest.mark.parametrize("num_streams", [1, 3])
def test_the_seeds_block_is_the_joint_block(num_streams):
    block = seed_block(num_residual_streams=num_streams, qk_rmsnorm=True, softclamp=True)
    config = block.block.config
    assert (config.modulation, config.norm_eps) == ("film_identity", 1e-5)
    assert (config.qk_norm, config.softclamp) == ("per_head", 50.0)
    tokens = {"text": randn(2 * num_streams, 3, 6), "image": randn(2 * num_streams, 4, 8, seed=1)}
    masks, condition = {"text": random_mask(2, 3), "image": random_mask(2, 4)}, randn(2, 5)
    found = block(
        text_tokens=tokens["text"],
        image_tokens=tokens["image"],
        text_mask=masks["text"],
        image_mask=masks["image"],
        time_cond=condition,
    )
    streams = tokens
    if num_streams > 1:  # sample after sample, stream after stream
        streams = {
            name: torch.stack([torch.stack(list(x[b * 3 : b * 3 + 3]), dim=1) for b in range(2)])
            for name, x in tokens.items()
        }
    expected = naive_block(block.block, streams, condition, masks, ("text",))
    for name, x in zip(tokens, found, strict=True):
        if num_streams > 1:
            flat = [expected[name][b, :, k] for b in range(2) for k in range(3)]
            expected[name] = torch.stack(flat)
        close(x, expected[name])


def test_text_leaves_its_feed_forward_network_out_by_default():
    block = seed_block()
    text, image = call(block)
    skipped, same_image = call(block, skip_feedforward_text_tokens=True)
    close(image, same_image)
    assert differs(text, skipped)
    with torch.no_grad():
        block.block.feed_forward["text"].w2.weight.zero_()
        block.block.feed_forward["text"].w2.bias.zero_()
    close(call(block)[0], skipped)


ARGUMENTS = {
    "dim_text": {"dim_text": 7},
    "dim_image": {"dim_image": 9},
    "dim_joint_attn": {"dim_joint_attn": 12, "heads": None},
    "dim_cond": {"dim_cond": None},
    "dim_head": {"dim_head": 8},
    "heads": {"heads": 3},
    "qk_rmsnorm": {"qk_rmsnorm": True},
    "softclamp": {"softclamp": True, "softclamp_value": 1.0},
    "softclamp_value": {"softclamp": True, "softclamp_value": 0.5},
    "num_residual_streams": {"num_residual_streams": 2},
    "dynamic_streams": {"num_residual_streams": 4, "dynamic_streams": False},
    "layer_index": {"num_residual_streams": 4, "layer_index": 1},
    "ff_kwargs": {"ff_kwargs": {"swish": True}},
    "modulation": {"modulation": "zero"},
    "num_adaptive_weights": {"num_adaptive_weights": 2},
    "pre_only_text": {"pre_only_text": True},
}
# What the others are without the change.
BEFORE = {
    "softclamp_value": {"softclamp": True},
    "dynamic_streams": {"num_residual_streams": 4},
    "layer_index": {"num_residual_streams": 4},
}


def test_the_table_has_every_argument():
    assert set(ARGUMENTS) == set(inspect.signature(MMDiTBlock).parameters)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_does_something(name):
    before, after = seed_block(**BEFORE.get(name, {})), seed_block(**ARGUMENTS[name])
    shapes = [{n: p.shape for n, p in block.named_parameters()} for block in (before, after)]
    if shapes[0] == shapes[1]:
        assert differs(call(before)[1], call(after)[1])


def test_the_number_of_a_block_decides_which_stream_it_reads_at_first():
    tokens = randn(2 * 4, 3, 6), randn(2 * 4, 4, 8)
    images = []
    for layer_index in (0, 1, 2):
        torch.manual_seed(0)
        block = MMDiTBlock(**SEED, num_residual_streams=4, layer_index=layer_index).double()
        images.append(call(block, text_tokens=tokens[0], image_tokens=tokens[1])[1])
    close(images[0], images[2])
    assert differs(images[0], images[1])


def test_options_of_feed_forward_networks_reach_them():
    for options in ({"mult": 2}, {"glu": True}, {"no_bias": True}, {"post_act_ln": True}):
        assert count(seed_block(ff_kwargs=options)) != count(seed_block())
    quiet = MMDiTBlock(**SEED, ff_kwargs={"zero_init_output": True})
    assert not quiet.block.feed_forward["image"].w2.weight.any()


def test_a_block_without_text_output_returns_the_image_alone():
    text, image = call(seed_block(pre_only_text=True))
    assert text is None and image.shape == (2, 4, 8)


def test_a_time_of_each_modality_or_token_can_be_given():
    block, time = seed_block(), randn(2, 5)
    expected = call(block)
    of_token = time[:, None].repeat(1, 4, 1)
    close(call(block, time_cond=(time, time)), expected)
    close(call(block, time_cond=(time, of_token)), expected)
    assert differs(call(block, time_cond=(time, of_token + randn(2, 4, 5)))[1], expected[1])


BAD_CALLS = {
    "width": ({"text_tokens": randn(2, 3, 7)}, r"text_tokens is \(2, 3, 7\).*dim = 6"),
    "axes": ({"image_tokens": randn(2, 8)}, r"image_tokens is \(2, 8\).*\(batch, seq, dim\)"),
    "batch": ({"text_tokens": randn(3, 3, 6)}, r"3 of text, 2 of image.*as many samples"),
    "mask type": ({"text_mask": torch.ones(2, 3)}, r"text_mask is torch.float32.*torch.bool"),
    "mask shape": (
        {"image_mask": torch.ones(2, 3, dtype=torch.bool)},
        r"image_mask is \(2, 3\).*\(2, 4\)",
    ),
    "no time": ({"time_cond": None}, r"time_cond = None, but dim_cond = 5"),
    "time of another width": ({"time_cond": randn(2, 4)}, r"time_cond is \(2, 4\).*\(2, 5\)"),
    "time of tokens for all": ({"time_cond": randn(2, 3, 5)}, r"time_cond is \(2, 3, 5\)"),
    "times of three": ({"time_cond": (randn(2, 5),) * 3}, r"3 conditions for 2 modalities"),
    "time of a wrong length": (
        {"time_cond": (randn(2, 5), randn(2, 3, 5))},
        r"time_cond of image is \(2, 3, 5\).*\(2, 4, 5\)",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_wrong_inputs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        call(seed_block(), **changes)


def test_superfluous_conditions_and_missing_streams_are_refused():
    with pytest.raises(ValueError, match=r"time_cond is given, but dim_cond = None"):
        call(seed_block(dim_cond=None), time_cond=randn(2, 5))
    with pytest.raises(ValueError, match=r"text_tokens is \(2, 3, 6\).*num_residual_streams = 3"):
        call(seed_block(num_residual_streams=3), text_tokens=randn(2, 3, 6))


BAD_ARGUMENTS = {
    "joint width": ({"dim_joint_attn": 9}, r"dim_joint_attn = 9.*heads = 2.*dim_head = 4"),
    "indivisible": ({"dim_joint_attn": 10, "heads": None}, r"dim_joint_attn = 10.*dim_head = 4"),
    "modulation": ({"modulation": "film"}, r"modulation = 'film'.*'film_identity'"),
    "streams": ({"num_residual_streams": 0}, r"num_residual_streams = 0.*whole number from 1"),
    "softclamp": ({"softclamp": True, "softclamp_value": -1.0}, r"softclamp = -1.0"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_arguments_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MMDiTBlock(**{**SEED, **changes})


BAD_OPTIONS = {
    "unknown": ({"multiplier": 2}, r"no option 'multiplier'.*mult, glu"),
    "two activations": ({"swish": True, "relu_squared": True}, r"swish and relu_squared"),
    "no gate": ({"glu_mult_bias": True}, r"glu_mult_bias.*glu = True"),
    "dropout": ({"dropout": 1.0}, r"dropout = 1.0.*below 1"),
    "mult": ({"mult": 0}, r"mult = 0.*positive"),
    "no hidden unit": ({"mult": 0.01}, r"mult = 0.01.*dim = 6"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MMDiTBlock(dim_text=6, dim_image=8, dim_head=4, heads=2, ff_kwargs=options)


def weights_of(seed, python_seed=0, **fields):
    random.seed(python_seed)
    torch.manual_seed(seed)
    return MMDiTBlock(**SEED, num_residual_streams=4, qk_rmsnorm=True, **fields).state_dict()


def test_initial_weights_depend_on_pytorchs_seed_alone():
    first, again, other = weights_of(0), weights_of(0, python_seed=1), weights_of(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        first["block.attention.wqkv.text.weight"], other["block.attention.wqkv.text.weight"]
    )


def test_blocks_that_are_built_one_after_the_other_differ():
    first, second = (MMDiTBlock(**SEED).block.attention.wo["text"].weight for _ in range(2))
    assert not torch.equal(first, second)
