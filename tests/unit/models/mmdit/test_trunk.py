import inspect
import random

import pytest
import torch
from torch import nn

from tests.unit.models.mmdit.naive import count, naive_trunk, randn, random_mask, shake
from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.mmdit.block import MMDiTBlock
from torchtitan_mixtures.models.mmdit.trunk import MMDiT

BASE = {"depth": 2, "dim_modalities": (6, 8, 5), "dim_cond": 5, "dim_head": 4, "heads": 2}
ONE_STREAM = {"num_residual_streams": 1}
LENGTHS = (3, 4, 2)


def trunk_of(is_shaken=True, **fields):
    torch.manual_seed(0)
    trunk = MMDiT(**{**BASE, **fields})
    return shake(trunk) if is_shaken else trunk.double()


def tokens_of(trunk, lengths=LENGTHS):
    return tuple(
        randn(2, length, dim, seed=i)
        for i, (length, dim) in enumerate(zip(lengths, trunk.dims.values(), strict=True))
    )


def call(trunk, **changes):
    arguments = {
        "modality_tokens": tokens_of(trunk),
        "time_cond": None if trunk.dim_cond is None else randn(2, 5, seed=9),
    }
    return trunk(**{**arguments, **changes})


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def differs(found, expected):
    return (found - expected).abs().max() > 1e-6


KINDS = {
    "as the seed": {},
    "one stream": ONE_STREAM,
    "static streams": {"num_residual_streams": 2, "dynamic_streams": False},
    "no condition": {"dim_cond": None, **ONE_STREAM},
    "registers": {"num_register_tokens": (1, 2, 0), **ONE_STREAM},
    "no norms": {"final_norms": False, "modulation": "zero", "num_residual_streams": 2},
    "all": {
        "qk_rmsnorm": True,
        "softclamp": True,
        "softclamp_value": 2.0,
        "num_residual_streams": 3,
        "num_register_tokens": 1,
        "num_adaptive_weights": 2,
    },
}


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_is_what_the_specification_says(fields, is_masked):
    trunk = trunk_of(**fields)
    tokens = tokens_of(trunk)
    condition = None if trunk.dim_cond is None else randn(2, 5)
    masks = (random_mask(2, 3), None, random_mask(2, 2)) if is_masked else (None,) * 3
    found = trunk(modality_tokens=tokens, modality_masks=masks, time_cond=condition)
    expected = naive_trunk(trunk, tokens, masks, condition)
    close(list(found), expected)


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_every_parameter_gets_a_gradient(fields):
    for pre_only_last in ((), (0, 2)):
        trunk = trunk_of(pre_only_last=pre_only_last, **fields)
        sum(x.square().sum() for x in call(trunk) if x is not None).backward()
        for name, parameter in trunk.named_parameters():
            assert parameter.grad is not None, name
            # The queries of modalities without output ask for nothing.
            if not any(f"layers.1.attention.q_norm.{i}" in name for i in pre_only_last):
                assert parameter.grad.any(), name


def test_the_seeds_trunk_has_as_many_parameters():
    with torch.device("meta"):
        trunk = MMDiT(depth=2, dim_modalities=(768, 512, 384), dim_joint_attn=512, dim_cond=256)
        two = MMDiT(
            depth=2,
            dim_modalities=(768, 512),
            dim_joint_attn=512,
            dim_cond=256,
            num_register_tokens=(0, 4),
        )
    assert count(trunk) == 28_003_512
    block = trunk.layers["0"]
    assert count(block) == 14_000_924
    assert count(block.attention_streams) + count(block.ffn_streams) == 23_452
    assert count(block.modulation) == 855_296 + 1_710_592
    assert count(block.attention) == 3_407_872
    assert count(block.feed_forward) == 8_003_712
    # The package's trunk of two modalities norms the image alone.
    assert count(two) - count(two.norms["0"]) == 22_873_296


def test_the_seeds_example_runs():
    mmdit = MMDiT(
        depth=2, dim_modalities=(768, 512, 384), dim_joint_attn=512, dim_cond=256, qk_rmsnorm=True
    )
    time_cond = torch.randn(2, 256)
    text_tokens = torch.randn(2, 512, 768)
    text_mask = torch.ones((2, 512)).bool()
    video_tokens = torch.randn(2, 1024, 512)
    audio_tokens = torch.randn(2, 256, 384)
    with torch.no_grad():
        outputs = mmdit(
            modality_tokens=(text_tokens, video_tokens, audio_tokens),
            modality_masks=(text_mask, None, None),
            time_cond=time_cond,
        )
    shapes = [x.shape for x in (text_tokens, video_tokens, audio_tokens)]
    assert [x.shape for x in outputs] == shapes


def test_two_modalities_are_the_block_of_text_and_image():
    trunk = trunk_of(dim_modalities=(6, 8), depth=1, final_norms=False, **ONE_STREAM)
    block = MMDiTBlock(dim_text=6, dim_image=8, dim_cond=5, dim_head=4, heads=2).double()
    names = {".0.": ".text.", ".1.": ".image."}
    weights = {}
    for name, parameter in trunk.layers["0"].state_dict().items():
        for number, modality in names.items():
            if number in name:
                weights[f"block.{name.replace(number, modality)}"] = parameter
    block.load_state_dict(weights)
    text, image, time, mask = randn(2, 3, 6), randn(2, 4, 8), randn(2, 5), random_mask(2, 3)
    expected = block(
        text_tokens=text,
        image_tokens=image,
        text_mask=mask,
        time_cond=time,
        skip_feedforward_text_tokens=False,
    )
    found = trunk(modality_tokens=(text, image), modality_masks=(mask, None), time_cond=time)
    close(found, expected)


def test_equal_streams_are_the_plain_residual_network_at_first():
    plain, several = trunk_of(is_shaken=False, **ONE_STREAM), trunk_of(is_shaken=False)
    several.load_state_dict(plain.state_dict(), strict=False)
    close(call(several), call(plain))


def test_the_order_of_modalities_does_not_matter():
    trunk = trunk_of(num_register_tokens=(1, 0, 2), num_residual_streams=2)
    turned = trunk_of(
        dim_modalities=(5, 6, 8), num_register_tokens=(2, 1, 0), num_residual_streams=2
    )
    places = {"0": "1", "1": "2", "2": "0"}

    def turn(name):
        return ".".join(
            places.get(part, part) if i and parts[i - 1] != "layers" else part
            for parts in [name.split(".")]
            for i, part in enumerate(parts)
        )

    turned.load_state_dict({turn(name): p for name, p in trunk.state_dict().items()})
    text, image, sound = tokens_of(trunk)
    first = call(trunk)
    second = call(turned, modality_tokens=(sound, text, image))
    close((second[1], second[2], second[0]), first)


def test_masked_tokens_influence_nobody_else():
    trunk = trunk_of()
    text, image, sound = tokens_of(trunk)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    moved = torch.where(mask[:, :, None], text, randn(2, 3, 6, seed=5))
    masks = (mask, None, None)
    before = call(trunk, modality_masks=masks)
    after = call(trunk, modality_tokens=(moved, image, sound), modality_masks=masks)
    close(before[1:], after[1:])
    assert differs(call(trunk, modality_tokens=(moved, image, sound))[1], call(trunk)[1])


def test_later_tokens_influence_earlier_ones():
    trunk = trunk_of()
    text, image, sound = tokens_of(trunk)
    moved = torch.cat([sound[:, :1], randn(2, 1, 5, seed=5)], dim=1)
    before, after = call(trunk), call(trunk, modality_tokens=(text, image, moved))
    for x, y in zip(before, after, strict=True):
        assert ((x - y).abs().amax(2) > 1e-8).all()


def test_registers_leave_with_no_trace_but_their_influence():
    none, some = trunk_of(), trunk_of(num_register_tokens=(0, 3, 1))
    assert not none.registers and count(some) - count(none) == 3 * 8 + 5
    assert count(trunk_of(num_register_tokens=2)) - count(none) == 2 * (6 + 8 + 5)
    some.load_state_dict(none.state_dict(), strict=False)
    for x, y in zip(call(some), call(none), strict=True):
        assert x.shape == y.shape and differs(x, y)


def test_registers_start_small():
    trunk = MMDiT(**BASE, num_register_tokens=500)
    for registers in trunk.registers.values():
        assert registers.std().item() == pytest.approx(0.02, rel=0.1)


def test_times_of_samples_modalities_and_tokens_agree_if_equal():
    trunk, time = trunk_of(num_register_tokens=(1, 2, 0)), randn(2, 5, seed=9)
    masks = (random_mask(2, 3), None, None)
    expected = call(trunk, modality_masks=masks)
    of_token = tuple(time[:, None].repeat(1, length, 1) for length in LENGTHS)
    for times in ((time,) * 3, of_token, (time, *of_token[1:])):
        close(call(trunk, modality_masks=masks, time_cond=times), expected)


def test_times_of_modalities_and_tokens_differ_if_not():
    trunk, time = trunk_of(), randn(2, 5, seed=9)
    expected = call(trunk)
    for times in ((time, time + 1, time), (time, randn(2, 4, 5), time)):
        for x, y in zip(call(trunk, time_cond=times), expected, strict=True):
            assert differs(x, y)


def test_the_time_of_registers_is_the_mean_of_tokens_that_are_seen():
    trunk = trunk_of(num_register_tokens=(0, 2, 0))
    mask = torch.tensor([[True, True, False, True]] * 2)
    times = (randn(2, 5), randn(2, 4, 5, seed=1), randn(2, 5, seed=2))
    masks = (None, mask, None)
    found = call(trunk, time_cond=times, modality_masks=masks)
    hidden = torch.where(mask[:, :, None], times[1], 100.0)
    other = call(trunk, time_cond=(times[0], hidden, times[2]), modality_masks=masks)
    close((other[0], other[1][mask], other[2]), (found[0], found[1][mask], found[2]))
    # Registers of the caller's own, with that time.
    bare = trunk_of()
    bare.load_state_dict(trunk.state_dict(), strict=False)
    text, image, sound = tokens_of(trunk)
    mean = times[1][mask].view(2, 3, 5).mean(1, keepdim=True).expand(2, 2, 5)
    image = torch.cat([trunk.registers["1"].expand(2, -1, -1), image], dim=1)
    by_hand = bare(
        modality_tokens=(text, image, sound),
        modality_masks=(None, torch.cat([mask.new_ones(2, 2), mask], dim=1), None),
        time_cond=(times[0], torch.cat([mean, times[1]], dim=1), times[2]),
    )
    close((by_hand[0], by_hand[1][:, 2:], by_hand[2]), found)


def test_modalities_without_output_change_nothing_in_the_others():
    full = trunk_of(**ONE_STREAM)
    last = trunk_of(pre_only_last=(0, 2), **ONE_STREAM)
    own = last.state_dict()
    last.load_state_dict({n: full.state_dict()[n][: len(p)] for n, p in own.items()})
    text, image, sound = call(last)
    assert text is None and sound is None
    close(image, call(full)[1])
    gone = ("wo", "feed_forward", "ffn_norm")
    assert not [n for part in gone for n in own if f"layers.1.{part}.0" in n or "norms.0" in n]
    assert [n for n in own if "layers.0.feed_forward.0" in n]


ARGUMENTS = {
    "depth": {"depth": 3},
    "dim_modalities": {"dim_modalities": (6, 8, 7)},
    "dim_joint_attn": {"dim_joint_attn": 12, "heads": None},
    "dim_cond": {"dim_cond": None},
    "dim_head": {"dim_head": 8},
    "heads": {"heads": 3},
    "qk_rmsnorm": {"qk_rmsnorm": True},
    "softclamp": {"softclamp": True, "softclamp_value": 1.0},
    "softclamp_value": {"softclamp": True, "softclamp_value": 0.5},
    "num_residual_streams": {"num_residual_streams": 2},
    "dynamic_streams": {"dynamic_streams": False},
    "num_register_tokens": {"num_register_tokens": 1},
    "final_norms": {"final_norms": False},
    "ff_kwargs": {"ff_kwargs": {"relu_squared": True}},
    "modulation": {"modulation": "zero"},
    "num_adaptive_weights": {"num_adaptive_weights": 2},
    "pre_only_last": {"pre_only_last": (0,)},
}


def test_the_table_has_every_argument():
    assert set(ARGUMENTS) == set(inspect.signature(MMDiT).parameters)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_changes_the_output_or_the_parameters(name):
    before = trunk_of(**({"softclamp": True} if name == "softclamp_value" else {}))
    after = trunk_of(**ARGUMENTS[name])
    shapes = [{n: p.shape for n, p in trunk.named_parameters()} for trunk in (before, after)]
    if shapes[0] == shapes[1]:
        assert differs(call(before)[1], call(after)[1])


BAD_CALLS = {
    "two modalities": (
        {"modality_tokens": (randn(2, 3, 6), randn(2, 4, 8))},
        r"modality_tokens has 2 entries.*3 modalities.*\(6, 8, 5\)",
    ),
    "two masks": ({"modality_masks": (None, None)}, r"modality_masks has 2 entries.*3 modalities"),
    "width": (
        {"modality_tokens": (randn(2, 3, 6), randn(2, 4, 6), randn(2, 2, 5))},
        r"modality_tokens\[1\] is \(2, 4, 6\).*dim = 8",
    ),
    "batch": (
        {"modality_tokens": (randn(2, 3, 6), randn(3, 4, 8), randn(2, 2, 5))},
        r"2 of modality 0, 3 of modality 1.*as many samples",
    ),
    "mask type": (
        {"modality_masks": (None, torch.ones(2, 4).long(), None)},
        r"modality_masks\[1\] is torch.int64.*torch.bool",
    ),
    "mask shape": (
        {"modality_masks": (torch.ones(2, 4).bool(), None, None)},
        r"modality_masks\[0\] is \(2, 4\).*\(2, 3\)",
    ),
    "no tokens": ({"modality_tokens": (None, None, None)}, r"modality_tokens\[0\] is NoneType"),
    "ids": (
        {"modality_tokens": tuple(torch.ones(2, n, d).long() for n, d in ((3, 6), (4, 8), (2, 5)))},
        r"modality_tokens\[0\] is torch.int64.*embedded",
    ),
    "a list as mask": ({"modality_masks": ([True], None, None)}, r"modality_masks\[0\] is list"),
    "a missing time": ({"time_cond": [randn(2, 5), None, randn(2, 5)]}, r"of 1 is NoneType"),
    "no time": ({"time_cond": None}, r"time_cond = None, but dim_cond = 5"),
    "width of times": ({"time_cond": randn(2, 6)}, r"time_cond is \(2, 6\).*\(2, 5\)"),
    "number of times": ({"time_cond": [randn(2, 5)] * 2}, r"2 conditions for 3 modalities"),
    "times of tokens": (
        {"time_cond": [randn(2, 5), randn(2, 3, 5), randn(2, 5)]},
        r"time_cond of 1 is \(2, 3, 5\).*\(2, 4, 5\)",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_wrong_inputs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        call(trunk_of(), **changes)


def test_a_superfluous_time_is_refused():
    with pytest.raises(ValueError, match=r"time_cond is given, but dim_cond = None"):
        call(trunk_of(dim_cond=None), time_cond=randn(2, 5))


BAD_ARGUMENTS = {
    "depth": ({"depth": 0}, r"depth = 0.*whole number from 1"),
    "half a block": ({"depth": 1.5}, r"depth = 1\.5"),
    "no modalities": ({"dim_modalities": ()}, r"widths of modalities are \[\]"),
    "half a channel": ({"dim_modalities": (8, 8.5, 4)}, r"widths of modalities"),
    "no width of times": ({"dim_cond": -3}, r"condition_dim = -3"),
    "registers of no number": ({"num_register_tokens": None}, r"num_register_tokens = None"),
    "options of no number": ({"ff_kwargs": {"mult": "x"}}, r"mult = 'x'.*finite number"),
    "options of no choice": ({"ff_kwargs": {"glu": "no"}}, r"glu = 'no'.*True or False"),
    "joint width": ({"dim_joint_attn": 9}, r"dim_joint_attn = 9.*heads = 2.*dim_head = 4"),
    "registers": ({"num_register_tokens": (1, 2)}, r"num_register_tokens = \(1, 2\).*3 modalities"),
    "fewer than none": ({"num_register_tokens": -1}, r"num_register_tokens = -1.*from 0"),
    "no output": ({"pre_only_last": (0, 1, 2)}, r"pre_only.*but not all"),
    "unknown modality": ({"pre_only_last": (3,)}, r"pre_only = \('3',\).*\('0', '1', '2'\)"),
    "streams": ({"num_residual_streams": 0}, r"num_residual_streams = 0.*whole number from 1"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_arguments_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MMDiT(**{**BASE, **changes})


def test_initial_weights_depend_on_pytorchs_seed_alone():
    models = []
    for python_seed, seed in ((0, 0), (1, 0), (0, 1)):
        random.seed(python_seed)
        torch.manual_seed(seed)
        models.append(MMDiT(**BASE, num_register_tokens=1).state_dict())
    first, again, other = models
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("registers.1", "layers.1.attention.wo.0.weight"):
        assert not torch.equal(first[name], other[name])
    assert not torch.equal(
        first["layers.0.attention.wo.0.weight"], first["layers.1.attention.wo.0.weight"]
    )


def test_a_trunk_built_on_the_meta_device_is_filled_whole():
    with torch.device("meta"):
        trunk = MMDiT(**BASE, num_register_tokens=1, qk_rmsnorm=True)
    assert all(parameter.is_meta for parameter in trunk.parameters())
    trunk.to_empty(device="cpu")
    for parameter in trunk.parameters():
        nn.init.constant_(parameter, torch.nan)
    built = MMDiT(**BASE, num_register_tokens=1, qk_rmsnorm=True)
    for model in (trunk, built):
        with init.parameter_names(model, 0):
            model.init_weights()
    close(trunk.state_dict(), built.state_dict(), tolerance=0)
