import dataclasses
import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.jobs import debug_job
from tests.unit.models.mone.helpers import build, random_images, tiny_args
from torchtitan_mixtures.models.mone import mone_args
from torchtitan_mixtures.models.mone.args import MoNEModelArgs
from torchtitan_mixtures.models.mone.capacity import Budget
from torchtitan_mixtures.models.mone.model import MoNE

# Without a head, router and alpha; with 1,000 and 21,841 classes and both.
COUNTS = {
    "Ti": (5_524_032, 5_717_805, 9_740_118),
    "S": (21_664_896, 22_051_437, 30_075_222),
    "B": (85_797_120, 86_569_197, 102_595_926),
    "L": (303_299_584, 304_328_685, 325_690_710),
    "G": (2_419_177_472, 2_421_234_669, 2_463_937_878),
}
# 10^9 multiply-adds of an image at e_c 1, .6, .5, .4, .3, .2, and attention's part of them. They
# count patches and a head of 21,841 classes (Ti: 1,000), but no router.
CAPACITIES = (1.0, 0.6, 0.5, 0.4, 0.3, 0.2)
GIGA_MACS = {
    "Ti": (1.247, 0.830, 0.726, 0.622, 0.518, 0.414, 0.177),
    "S": (4.582, 2.917, 2.501, 2.085, 1.669, 1.253, 0.354),
    "B": (17.488, 10.829, 9.164, 7.499, 5.835, 4.170, 0.708),
    "L": (61.255, 37.579, 31.660, 25.741, 19.822, 13.903, 1.888),
    "G": (481.4, 292.0, 244.7, 197.3, 150.0, 102.6, 7.553),
}


def count(args):
    with torch.device("meta"):
        model = MoNE(args)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == args.num_total_parameters == args.get_nparams_and_flops(model, 0)[0]
    return model, total


@pytest.mark.parametrize("size", COUNTS)
def test_parameters_are_those_of_the_specification(size):
    trunk, small, large = COUNTS[size]
    for classes, expected in ((1000, small), (21_841, large)):
        args = mone_args[f"{size}/16"]
        args.num_classes = classes
        model, total = count(args)
        assert total == expected
        router = sum(p.numel() for p in (*model.routers.parameters(), model.router_scale.alpha))
        assert router == (args.dim + 1) * 4 + 1
        assert total - router - (args.dim + 1) * classes == trunk
        dense = mone_args[f"ViT-{size}/16"]
        dense.num_classes = classes
        assert count(dense)[1] == total - router


@pytest.mark.parametrize("flavor", mone_args)
def test_parameters_of_all_flavours_are_counted_right(flavor):
    args = mone_args[flavor]
    model, _ = count(args)
    assert any(name.startswith("router") for name in model.state_dict()) == args.is_nested
    json.dumps(dataclasses.asdict(args))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_routers": 2},
        {"num_routers": 2, "shared_router": True},
        {"alpha_per_layer": True, "pool": "class_token"},
        {"num_experts": 1, "pool": "class_token", "mlp_ratio": 1.5},
        {"in_channels": 1, "image_size": 12, "num_classes": 1},
    ],
    ids=str,
)
def test_parameters_of_other_arguments_are_counted_right(fields):
    count(tiny_args(**fields))


def macs_by_formula(args, e_c):
    """Of blocks, as the specification has it, and of patches and head."""
    tokens, dim = 196, args.dim
    block = 12 * dim**2 * tokens * e_c + 2 * tokens**2 * dim
    return args.n_layers * block + tokens * 768 * dim + dim * args.num_classes


@pytest.mark.parametrize("size", GIGA_MACS)
def test_multiply_adds_are_those_of_the_table(size):
    args = mone_args[f"{size}/16"]
    args.num_classes = 1000 if size == "Ti" else 21_841
    *table, attention = GIGA_MACS[size]
    router = 196 * args.dim * 4
    digits = 0.0006 if size != "G" else 0.06
    for e_c, expected in zip(CAPACITIES, table, strict=True):
        assert macs_by_formula(args, e_c) / 1e9 == pytest.approx(expected, abs=digits)
        budget = args.budget(e_c)
        found = args.macs_per_image(budget)
        exact = macs_by_formula(args, budget.effective_capacity) + router
        assert found == pytest.approx(exact, rel=1e-12)
        # Budgets are rounded down, by up to 1.6 % of what they are at 0.3.
        assert found / 1e9 == pytest.approx(expected, rel=0.016)
    assert args.n_layers * 2 * 196**2 * args.dim / 1e9 == pytest.approx(attention, abs=0.0006)
    dense = mone_args[f"ViT-{size}/16"]
    dense.num_classes = args.num_classes
    assert dense.macs_per_image() == args.dense_macs_per_image == macs_by_formula(args, 1)


class CountedAttention(torch.nn.Module):
    """PyTorch does not count the CPU's attention kernel, but matrix products."""

    def forward(self, q, k, v, *, is_causal):
        return (q @ k.mT / q.shape[3] ** 0.5).softmax(3) @ v


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_experts": 1},
        {"num_experts": 1, "pool": "class_token"},
        {"pool": "class_token"},
        {"n_layers": 3, "router_layer": 1},
        {"n_layers": 3, "router_layer": 1, "num_routers": 2, "pool": "class_token"},
        {"num_routers": 2, "shared_router": True},
        {"allocation": "skip"},
        {"allocation": "skip", "pool": "class_token", "capacity": 0.2},
        {"allocation": "greedy"},
        {"routing": "argmax"},
        {"mlp_ratio": 1.5, "in_channels": 1, "num_classes": 3},
        {"num_experts": 4},
    ],
    ids=str,
)
def test_multiply_adds_are_those_that_happen(fields):
    args = tiny_args(**fields)
    model, images = build(args), random_images(args)
    for block in model.layers.values():
        block.attention.inner_attention = CountedAttention()
    budgets = [None, args.budget()]
    if args.is_nested and args.routing != "argmax":
        budgets += [args.budget(0.3), args.budget(0.8), args.full_budget]
    for budget in budgets:
        macs = args.macs_per_image(budget)
        with FlopCounterMode(display=False) as forward:
            output = model(images, budget)
        assert forward.get_total_flops() == 2 * 3 * macs
        with FlopCounterMode(display=False) as backward:
            output.logits.sum().backward()
        # Pixels need no gradient.
        patches = args.num_tokens * args.patch_size**2 * args.in_channels * args.dim
        assert backward.get_total_flops() == 2 * 3 * (2 * macs - patches)
    assert args.get_nparams_and_flops(model, 0)[1] == 6 * args.macs_per_image()


def test_multiply_adds_of_a_block_follow_the_closed_form():
    args = tiny_args(dim=16, mlp_ratio=4.0, image_size=4, num_experts=2, capacity=0.75)
    assert args.macs_per_block(Budget((2, 2))) == 12 * 16**2 * 4 * 3 // 4 + 2 * 4**2 * 16
    assert args.macs_per_block(Budget((0, 4))) == 12 * 16**2 * 4 + 2 * 4**2 * 16
    assert args.macs_per_block(Budget((0, 1), 3)) == 12 * 16**2 + 2 * 16


def test_budgets_of_flavours_are_those_of_the_specification():
    args = mone_args["B/16"]
    assert args.num_tokens == args.seq_len == 196
    assert args.budget() == args.budget(0.5) == Budget((46, 45, 49, 56))
    assert args.budget(0.3) == Budget((83, 62, 38, 13))
    assert args.budget(1) == args.full_budget == Budget((0, 0, 0, 196))
    assert mone_args["debugmodel"].budget() == Budget((15, 15, 16, 18))
    assert mone_args["ViT-B/16"].budget() == mone_args["ViT-B/16"].budget(0.3) == Budget((196,))
    cls = mone_args["B/16-cls"]
    assert (cls.num_tokens, cls.seq_len) == (196, 197)
    assert cls.budget() == Budget((46, 45, 49, 56))
    multiple = dataclasses.replace(args, tokens_multiple=8)
    assert multiple.budget() == Budget((52, 40, 48, 56))


@pytest.mark.parametrize("capacity", [0.1, 1.2, 0.0, -1.0, math.nan])
def test_capacities_out_of_range_are_refused(capacity):
    with pytest.raises(ValueError, match=f"e_c = {capacity}.*0.125 to 1"):
        mone_args["B/16"].budget(capacity)


@pytest.mark.parametrize(
    ("layers", "first", "routers", "expected"),
    [
        (12, 0, 1, (0,)),
        (12, 0, 2, (0, 6)),
        (12, 0, 3, (0, 4, 8)),
        (12, 4, 2, (4, 8)),
        (12, 11, 1, (11,)),
        (5, 0, 5, (0, 1, 2, 3, 4)),
        (5, 1, 3, (1, 2, 3)),
        (5, 0, 3, (0, 1, 3)),
    ],
)
def test_routers_are_spread_evenly(layers, first, routers, expected):
    args = tiny_args(n_layers=layers, router_layer=first, num_routers=routers)
    assert args.router_layers == expected
    assert tiny_args(num_experts=1).router_layers == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 0}, "dim = 0"),
        ({"dim": 18}, "dim = 18.*multiple of.*4"),
        ({"n_layers": 0}, "n_layers = 0"),
        ({"n_heads": 0}, "n_heads = 0"),
        ({"n_heads": 3}, "n_heads = 3"),
        ({"patch_size": 0}, "patch_size = 0"),
        ({"in_channels": 0}, "in_channels = 0"),
        ({"num_classes": 0}, "num_classes = 0"),
        ({"image_size": 0}, "image_size = 0"),
        ({"image_size": 9}, "image_size = 9.*patch_size = 2"),
        ({"image_size": 2}, "image_size = 2.*3 tokens"),
        ({"mlp_ratio": 0.0}, "mlp_ratio = 0"),
        ({"pool": "max"}, "pool = 'max'"),
        ({"num_experts": 0}, "num_experts = 0"),
        ({"capacity": 0.2}, "nested.capacity = 0.2.*0.25"),
        ({"capacity": 1.5}, "nested.capacity = 1.5"),
        ({"delta": 1.0}, "delta = 1"),
        ({"beta": 0.0}, "beta = 0"),
        ({"incentive": "additive"}, "incentive = 'additive'"),
        ({"allocation": "uniform"}, "nested.capacity = 0.6.*'uniform'"),
        ({"allocation": "proportionate"}, "nested.capacity = 0.6.*'proportionate'"),
        ({"routing": "top_k"}, "nested.routing = 'top_k'"),
        ({"router_layer": -1}, "nested.router_layer = -1"),
        ({"router_layer": 2}, "nested.router_layer = 2.*0 to 1"),
        ({"num_routers": 0}, "nested.num_routers = 0"),
        ({"num_routers": 3}, "nested.num_routers = 3.*1 to 2"),
        ({"router_layer": 1, "num_routers": 2}, "nested.num_routers = 2"),
        ({"alpha_init": 1.0}, "nested.alpha_init = 1"),
        ({"alpha_init": -0.1}, "nested.alpha_init = -0.1"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_args(**fields)


def test_dense_models_do_not_care_about_nesting():
    tiny_args(num_experts=1, dim=18, capacity=0.01, router_layer=9, num_routers=0)


def from_job(args, *overrides):
    job = debug_job("mone", *overrides)
    args.update_from_config(job)
    again = dataclasses.asdict(args)
    args.update_from_config(job)
    assert dataclasses.asdict(args) == again
    return args


def test_a_job_says_what_the_data_is():
    args = from_job(mone_args["debugmodel"], "--debug.seed=7", "--multimodal.image_size=64")
    assert (args.in_channels, args.image_size, args.init_seed) == (3, 64, 7)
    assert args.num_tokens == 256 and args.head_bias == 0
    assert args.budget() == Budget((59, 60, 64, 73))
    with pytest.raises(ValueError, match=r"image_size = 32.*patch_size = 3"):
        from_job(tiny_args(patch_size=3, image_size=9))


def test_a_job_says_how_compute_is_spent():
    overrides = {
        "capacity": 0.3,
        "delta": 3.0,
        "beta": 1.0,
        "incentive": "divisive",
        "routing": "random",
        "router_layer": 1,
        "num_routers": 2,
        "alpha_init": 0.25,
        "tokens_multiple": 4,
    }
    flags = [f"--nested.{key}={value}" for key, value in overrides.items()]
    flags += ["--nested.shared_router", "--nested.alpha_per_layer"]
    args = from_job(mone_args["debugmodel"], *flags)
    for key, value in overrides.items():
        assert getattr(args, key) == value, key
    assert args.shared_router and args.alpha_per_layer
    unchanged = from_job(mone_args["debugmodel"])
    assert (unchanged.capacity, unchanged.router_layer, unchanged.alpha_init) == (0.5, 0, 0.0)
    # An empty key leaves what the flavour says.
    assert from_job(tiny_args(router_layer=1, patch_size=4)).router_layer == 1
    assert from_job(mone_args["debugmodel"], "--nested.router_layer=0").router_layer == 0


@pytest.mark.parametrize(
    ("allocation", "capacity"), [("uniform", 0.46875), ("proportionate", 4 / 15)]
)
def test_allocations_with_one_capacity_need_not_be_told(allocation, capacity):
    args = from_job(mone_args["debugmodel"], f"--nested.allocation={allocation}")
    assert args.capacity == pytest.approx(capacity)
    with pytest.raises(ValueError, match=r"nested.capacity = 0.3"):
        from_job(
            mone_args["debugmodel"], f"--nested.allocation={allocation}", "--nested.capacity=0.3"
        )


def test_dense_flavours_take_a_job_of_nested_ones():
    args = from_job(mone_args["debugmodel_dense"], "--nested.capacity=0.3")
    assert args.num_experts == 1 and not args.is_nested
    assert isinstance(args, MoNEModelArgs)
