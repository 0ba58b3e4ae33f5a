import math

import pytest
import torch
import torch.nn.functional as F

from tests.jobs import debug_job
from tests.unit.models.mone.helpers import random_images, tiny_args
from torchtitan_mixtures.models.mone import mone_args
from torchtitan_mixtures.models.mone.block import NestedBlock
from torchtitan_mixtures.models.mone.capacity import Budget
from torchtitan_mixtures.models.mone.model import MoNE

ALL_PARTS = {"pool": "class_token", "num_routers": 2, "alpha_per_layer": True}


def meta_built(args):
    with torch.device("meta"):
        model = MoNE(args)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
    model.init_weights(torch.device("cpu"))
    return model


def built(args):
    model = MoNE(args)
    model.init_weights()
    return model


@pytest.mark.parametrize("fields", [{}, {"num_experts": 1}, ALL_PARTS], ids=str)
def test_no_value_is_left_uninitialised(fields):
    model = meta_built(tiny_args(**fields))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize("fields", [{}, {"num_experts": 1}, ALL_PARTS], ids=str)
def test_weights_do_not_depend_on_how_the_model_came_about(fields):
    meta = meta_built(tiny_args(**fields))
    torch.manual_seed(123)  # what was drawn before plays no part
    direct = built(tiny_args(**fields))
    for name, parameter in direct.named_parameters():
        assert torch.equal(parameter, meta.get_parameter(name)), name


def test_weights_depend_on_the_seed():
    first, second = built(tiny_args()), built(tiny_args(init_seed=1))
    for name in ("embedder.positions", "routers.0.weight", "layers.0.attention.wqkv.weight"):
        assert not torch.equal(first.get_parameter(name), second.get_parameter(name))


def test_a_nested_model_starts_as_the_dense_one_of_the_same_seed():
    nested, dense = built(tiny_args(**ALL_PARTS)), built(tiny_args(num_experts=1, **ALL_PARTS))
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter, nested.get_parameter(name)), name


def test_layers_and_routers_are_drawn_apart():
    model = built(tiny_args(**ALL_PARTS))
    for first, second in (
        ("layers.0.attention.wqkv.weight", "layers.1.attention.wqkv.weight"),
        ("layers.0.attention.wo.weight", "layers.1.attention.wo.weight"),
        ("routers.0.weight", "routers.1.weight"),
    ):
        assert not torch.equal(model.get_parameter(first), model.get_parameter(second))


def test_parameters_are_drawn_by_the_rule():
    args = tiny_args(dim=64, image_size=32, patch_size=4, num_experts=4, alpha_init=0.25)
    for name, parameter in built(args).named_parameters():
        if "norm.weight" in name:
            assert (parameter == 1).all(), name
        elif name == "router_scale.alpha":
            assert parameter.tolist() == [0.25]
        elif name.endswith("bias") or name.startswith("head"):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
            assert parameter.mean().abs() < 0.005, name


@pytest.mark.parametrize("fields", [{}, {"num_experts": 1}, {"pool": "class_token"}], ids=str)
def test_the_first_loss_is_that_of_a_guess(fields):
    args = tiny_args(num_classes=7, **fields)
    logits = built(args)(random_images(args, dtype=torch.float32)).logits
    loss = F.cross_entropy(logits, torch.tensor([0, 3, 6]))
    assert loss.item() == pytest.approx(math.log(7), rel=1e-6)


def test_each_of_several_labels_starts_as_likely_as_by_a_fair_draw():
    args = mone_args["debugmodel"]
    args.update_from_config(debug_job("mone", "--classification.multi_label"))
    assert args.head_bias == pytest.approx(-math.log(args.num_classes - 1))
    small = tiny_args(num_classes=args.num_classes, head_bias=args.head_bias)
    logits = built(small)(random_images(small, dtype=torch.float32)).logits
    expected = torch.full_like(logits, 1 / args.num_classes)
    torch.testing.assert_close(logits.sigmoid(), expected)


def test_routers_start_close_to_undecided_and_still_share_out():
    args = tiny_args(num_experts=4)
    router = built(args)(random_images(args, dtype=torch.float32)).router
    assert router.entropy.item() == pytest.approx(math.log(4), abs=1e-3)
    torch.testing.assert_close(router.load, torch.tensor([args.budget().tokens]) / 16)


def test_a_block_that_was_only_constructed_has_weights():
    block = NestedBlock(16, 2, 2)
    assert all(torch.isfinite(parameter).all() for parameter in block.parameters())
    assert torch.isfinite(block(torch.randn(1, 4, 16), Budget((2, 2)))).all()
