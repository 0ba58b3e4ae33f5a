"""Arguments: experts of other families, names, and what cannot be."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from tests.jobs import TRAIN_CONFIGS, debug_job, load_job
from tests.unit.models.mixdiff.helpers import make_args
from torchtitan_mixtures.models.mixdiff import MixtureOfDiffusers, mixdiff_args
from torchtitan_mixtures.models.mixdiff.args import MixDiffModelArgs

# Of the published sizes: DiT-S/4 1.41, S/2 6.06, B/2 23.0, XL/2 118.6 G multiply-adds.
MACS = {"S/4x4": 1.41, "S/2x8": 6.06, "B/2x8": 23.0, "XL/2x8": 118.6}


@pytest.mark.parametrize("flavor", MACS)
def test_experts_have_the_published_cost_and_the_router_a_few_per_cent_of_it(flavor):
    args = mixdiff_args[flavor]
    expert = (args.macs_per_image() - args.router_macs_per_image()) / args.top_k
    assert expert / 1e9 == pytest.approx(MACS[flavor], rel=0.01)
    assert 0.005 < args.router_macs_per_image() / expert < 0.05


def test_eight_experts_of_xl_2_have_eight_times_its_parameters():
    with torch.device("meta"):
        model = MixtureOfDiffusers(mixdiff_args["XL/2x8"])
    parameters = sum(parameter.numel() for parameter in model.experts.parameters())
    # Published with the fixed table of positions, 256 x 1152.
    assert parameters == 8 * (675_129_632 - 256 * 1152)


@pytest.mark.parametrize("flavor", list(mixdiff_args))
def test_arguments_survive_json(flavor):
    args = mixdiff_args[flavor]
    again = MixDiffModelArgs(**json.loads(json.dumps(dataclasses.asdict(args))))
    assert again == args and again.names == args.names


def test_experts_see_what_the_mixture_sees():
    args = make_args(in_channels=5, image_size=16, num_classes=7, learned_variance=False)
    for own in args.expert_args:
        assert (own.in_channels, own.image_size, own.num_classes) == (5, 16, 7)
        assert own.out_channels == args.out_channels == 5
    assert args.num_tokens == 16 and args.patch_size == 4


def test_names_are_those_of_domains_or_numbers():
    args = mixdiff_args["debugmodel"]
    assert args.names == ("0", "1", "2")
    args.update_from_config(debug_job("mixdiff"))
    assert args.names == ("noto", "noto_v1", "fluent")
    assert args.tower_names == ("noto", "noto_v1", "fluent", "router")
    assert args.tower_of_parameter("experts.noto.layers.0.attention.wq.weight") == "noto"
    assert args.tower_of_parameter("router.head.weight") == "router"
    job = debug_job("mixdiff", "--diffusers.training=joint", "--multimodal.domains=")
    args.update_from_config(job)
    assert args.names == ("0", "1", "2")


def test_the_toml_decides_about_experts_and_router():
    job = debug_job(
        "mixdiff", "--diffusers.experts=mom/DiT-S/8,mom/DiT-S/4", "--diffusers.router=mlp",
        "--diffusers.router_inputs=time,latent", "--diffusers.renormalize=no", "--mixture.top_k=1",
        "--multimodal.train_domains=noto,fluent", "--mixture.router_noise=0",
    )  # fmt: skip
    args = mixdiff_args["debugmodel"]
    args.update_from_config(job)
    assert args.experts == ("mom/DiT-S/8", "mom/DiT-S/4") and args.names == ("noto", "fluent")
    assert (args.router, args.router_inputs) == ("mlp", ("time", "latent"))
    assert (args.renormalize, args.top_k, args.router_only) == (False, 1, False)
    args = mixdiff_args["debugmodel"]
    args.update_from_config(debug_job("mixdiff", "--diffusers.training=router"))
    assert args.router_only and args.parts == [] and args.tower_names == ("router",)


def test_experts_that_are_told_prompts_take_those_of_the_data():
    args = mixdiff_args["debugmodel_mmdit"]
    args.update_from_config(load_job(TRAIN_CONFIGS / "mixdiff" / "debugmodel_mmdit.toml"))
    assert args.is_prompted and all(own.prompts == args.prompts for own in args.expert_args)
    assert args.prompt_names == ("text",)


def test_experts_of_the_toml_may_be_told_prompts_where_the_flavours_are_told_classes():
    config = TRAIN_CONFIGS / "mixdiff" / "debugmodel_mmdit.toml"
    job = load_job(config, "--model.flavor=debugmodel", "--diffusers.experts=" + ",".join(
        ["mmdit/debugmodel"] * 3), "--diffusers.training=joint")  # fmt: skip
    args = mixdiff_args["debugmodel"]
    args.update_from_config(job)
    assert args.is_prompted and args.prompts[0].name == "text"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": ()}, "experts = .* one expert or more"),
        ({"top_k": 0}, "top_k = 0 .* a positive number"),
        ({"top_k": 4}, "mixture.top_k = 4 .* from 1 to 3"),
        ({"router": "cnn"}, "router = 'cnn'"),
        ({"router_inputs": ()}, "router_inputs"),
        ({"router_inputs": ("noise",)}, "router_inputs"),
        ({"router_dim": 66}, "router_dim = 66 .* a multiple of 4"),
        ({"router_heads": 5}, "router_heads = 5 .* a divisor of router_dim = 64"),
        ({"router_patch_size": 5}, "image_size = 32 .* a multiple of router_patch_size = 5"),
        ({"router_noise": -1.0}, "router_noise"),
        ({"expert_names": ("a", "b")}, "expert_names = .* one for each expert"),
        ({"expert_names": ("a", "b", "a")}, "expert_names = .* different names"),
        ({"expert_names": ("a", "b", "router")}, "expert_names = .* different names"),
        ({"expert_names": ("a", "b", "c/d")}, "expert_names = 'c/d'"),
        ({"expert_names": ("a", "b", "keys")}, "expert_names = 'keys'"),
        ({"image_size": 30}, "image_size"),
    ],
)
def test_what_cannot_be_is_said(fields, message):
    with pytest.raises(ValueError, match=message):
        make_args(**fields)
