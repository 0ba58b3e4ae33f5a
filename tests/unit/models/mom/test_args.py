import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from tests.unit.models.mom.helpers import build, random_inputs, shake, tiny_args
from torchtitan_mixtures.job_config import Mixture
from torchtitan_mixtures.models.mom import args as args_module
from torchtitan_mixtures.models.mom import mom_args
from torchtitan_mixtures.models.mom.args import MoMModelArgs
from torchtitan_mixtures.models.mom.model import MoM

# Total, and active with 2 token mixers, one of each, 2 channel mixers. These count the position
# table too, which is no parameter.
COUNTS = {
    "MoM-S/2": (107_846_432, 38_517_536, 46_389_536, 54_261_536),
    "MoM-S/4": (84_189_056, 26_679_680, 40_461_440, 54_243_200),
    "MoM-S/8": (82_906_112, 26_139_776, 40_293_056, 54_446_336),
    "MoM-B/2": (354_141_728, 114_851_360, 165_213_728, 215_576_096),
    "MoM-B/4": (330_465_920, 102_995_072, 159_267_200, 215_539_328),
    "MoM-L/2": (1_213_790_240, 382_765_088, 571_600_928, 760_436_768),
    "MoM-L/4": (1_166_463_104, 359_076_992, 559_732_352, 760_387_712),
    "MoM-XL/2": (1_775_216_928, 556_054_816, 838_771_488, 1_121_488_160),
    "MoM-XL/4": (1_720_003_968, 528_420_736, 824_926_848, 1_121_432_960),
    "MoM-S/4-matched": (48_753_536, 26_679_680, 31_602_560, 36_525_440),
    "DiT-S/2": (32_963_360,),
    "DiT-S/4": (32_945_024,),
    "DiT-S/8": (33_148_160,),
    "DiT-B/2": (130_512_416,),
    "DiT-B/4": (130_475_648,),
    "DiT-L/2": (458_102_816,),
    "DiT-L/4": (458_053_760,),
    "DiT-XL/2": (675_129_632,),
    "DiT-XL/4": (675_074_432,),
}
# By the closed form: the token mixers of p = 8 have N = 16, and tables of N * D.
OTHERS = {
    "MoM-B/8": 329_385_728,
    "MoM-L/8": 1_164_032_000,
    "MoM-XL/8": 1_717_145_088,
    "DiT-B/8": 130_881_536,
    "DiT-L/8": 458_594_816,
    "DiT-XL/8": 675_683_072,
    "debugmodel": 3_674_720,
    "debugmodel_dit": 1_298_016,
    "debugmodel_dit_224": 3_884_256,
    "debugmodel_matched": 1_832_544,
}
GIGA_MACS = {  # DiT; 2 token mixers, one of each, 2 channel mixers
    "S/4": (1.41, 1.22, 1.97, 2.73),
    "B/4": (5.55, 4.27, 7.59, 10.91),
    "L/4": (19.68, 14.65, 26.73, 38.81),
    "XL/4": (29.03, 21.36, 39.33, 57.30),
    "XL/2": (118.60, 110.15, 169.34, 228.53),
}


def count(flavor):
    args = mom_args[flavor]
    with torch.device("meta"):
        model = MoM(args)
    parameters, _ = args.get_nparams_and_flops(model, args.num_tokens)
    assert parameters == args.num_total_parameters
    return args, parameters + args.num_tokens * args.dim


@pytest.mark.parametrize("flavor", COUNTS)
def test_parameters_are_those_of_the_specification(flavor):
    args, total = count(flavor)
    table = args.num_tokens * args.dim
    active = [args.count_active_parameters(n) + table for n in (2, 1, 0)]
    assert (total, *active)[: len(COUNTS[flavor])] == COUNTS[flavor]
    assert args.num_active_parameters == args.count_active_parameters(1)


@pytest.mark.parametrize("flavor", OTHERS)
def test_parameters_of_the_other_flavours(flavor):
    assert count(flavor)[1] == OTHERS[flavor]


def test_flavour_table_is_complete():
    assert set(mom_args) == {*COUNTS, *OTHERS}


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_totals_follow_the_closed_forms(size, patch):
    args, total = count(f"MoM-{size}/{patch}")
    dim, tokens, layers = args.dim, args.num_tokens, args.n_layers
    token, channel = 8 * tokens**2 + 5 * tokens, 8 * dim**2 + 5 * dim
    dit = count(f"DiT-{size}/{patch}")[1]
    assert total == dit + layers * (4 * token + 4 * channel + 8 * dim - 4 * dim**2 - 4 * dim)


@pytest.mark.parametrize("size", GIGA_MACS)
def test_multiply_adds_are_those_of_the_specification(size):
    pool = mom_args[f"MoM-{size}"]
    macs = [mom_args[f"DiT-{size}"].macs_per_image(), *(pool.macs_per_image(n) for n in (2, 1, 0))]
    assert [round(m / 1e9, 2) for m in macs] == pytest.approx(GIGA_MACS[size], abs=0.0051)
    assert pool.macs_per_image() == pool.macs_per_image(1)


@pytest.mark.parametrize(
    ("matched", "dit"), [("MoM-S/4-matched", "DiT-S/4"), ("debugmodel_matched", "debugmodel_dit")]
)
def test_a_matched_flavour_computes_as_much_as_its_dit(matched, dit):
    assert mom_args[matched].total_macs_per_image() == mom_args[dit].total_macs_per_image()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 1),
        ({"min_token_experts": 0, "min_channel_experts": 0}, 1),
        ({"min_token_experts": 0, "min_channel_experts": 0, "num_channel_experts": 12}, 0.5),
        ({"top_k": 3}, 1.5),
        ({"num_token_experts": 3, "top_k": 3}, 1 + 2 / 5),
        ({"num_channel_experts": 0, "min_channel_experts": 0}, 2),
    ],
)
def test_cost_of_free_choices_is_that_of_even_ones(fields, expected):
    args = tiny_args(**fields)
    assert args.mean_token_experts == pytest.approx(expected)
    cost = args.macs_per_image(0), args.macs_per_image(1)
    mean = cost[0] + expected * (cost[1] - cost[0])
    assert args.macs_per_image() == pytest.approx(mean)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"dim": 0}, "dim"),
        ({"dim": 34}, "dim"),
        ({"n_layers": 0}, "n_layers"),
        ({"image_size": 18}, "multimodal.image_size"),
        ({"num_timestep_features": 15}, "num_timestep_features"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"mixer": "soft"}, "mixer"),
        ({"mixer": "attention", "n_heads": 5}, "n_heads"),
        ({"mixer": "attention", "n_heads": 0}, "n_heads"),
        ({"num_token_experts": -1}, "num_token_experts"),
        ({"min_token_experts": -1}, "min_token_experts"),
        ({"min_token_experts": 5}, "min_token_experts"),
        ({"num_channel_experts": 0}, "min_channel_experts"),
        ({"top_k": 9}, "mixture.top_k"),
        ({"top_k": 1}, "mixture.top_k"),
        ({"top_k": 0, "min_token_experts": 0, "min_channel_experts": 0}, "mixture.top_k"),
        ({"min_token_experts": 2, "min_channel_experts": 1}, "mixture.top_k"),
        ({"min_token_experts": 2, "min_channel_experts": 0}, "num_channel_experts"),
        ({"token_ratio": 0.0}, "token_ratio"),
        ({"channel_ratio": -1.0}, "channel_ratio"),
        ({"router_noise": -0.1}, "router_noise"),
        ({"router_noise": float("nan")}, "router_noise"),
    ],
)
def test_impossible_arguments_are_refused_by_name(fields, name):
    with pytest.raises(ValueError, match=f"^{name} = .* is not allowed; allowed: "):
        tiny_args(**fields)


def test_arguments_survive_json():
    for flavor in mom_args:
        args = mom_args[flavor]
        assert MoMModelArgs(**json.loads(json.dumps(dataclasses.asdict(args)))) == args


def job_config(kind="ddpm", learned_variance=True, **mixture):
    return SimpleNamespace(
        mixture=Mixture(**mixture),
        objective=SimpleNamespace(kind=kind, learned_variance=learned_variance),
        debug=SimpleNamespace(seed=3),
    )


@pytest.fixture
def data(monkeypatch):
    spec = SimpleNamespace(channels=3, size=64, num_classes=7, class_names=())
    monkeypatch.setattr(args_module, "image_spec", lambda config: spec)
    return spec


def test_update_from_config_twice_is_once(data):
    args = mom_args["MoM-S/8"]
    args.update_from_config(job_config())
    once = dataclasses.asdict(args)
    args.update_from_config(job_config())
    assert dataclasses.asdict(args) == once
    assert (args.in_channels, args.image_size, args.num_classes) == (3, 64, 7)
    assert (args.num_tokens, args.out_channels, args.init_seed) == (64, 6, 3)


@pytest.mark.parametrize(
    ("kind", "learned", "channels"), [("ddpm", True, 6), ("ddpm", False, 3), ("flow", True, 3)]
)
def test_objective_decides_about_the_channels_of_the_output(data, kind, learned, channels):
    args = mom_args["debugmodel"]
    args.update_from_config(job_config(kind, learned))
    assert args.out_channels == channels


def test_routing_can_be_set_in_the_toml(data):
    args = mom_args["debugmodel"]
    args.update_from_config(job_config())
    assert (args.min_token_experts, args.min_channel_experts, args.top_k) == (1, 1, 2)
    args.update_from_config(job_config(routing="free", top_k=3, router_noise=0.1))
    assert (args.min_token_experts, args.min_channel_experts, args.top_k) == (0, 0, 3)
    assert args.router_noise == 0.1
    args.update_from_config(job_config(routing="typed", router_noise=0.0))
    assert (args.min_token_experts, args.min_channel_experts, args.router_noise) == (1, 1, 0)


@pytest.mark.parametrize("field", [{"routing": "free"}, {"top_k": 2}, {"router_noise": 0.0}])
def test_attention_has_no_routing_to_set(data, field):
    (name,) = field
    with pytest.raises(ValueError, match=f"mixture.{name} = "):
        mom_args["debugmodel_dit"].update_from_config(job_config(**field))


def test_a_number_of_chosen_experts_that_cannot_be_is_refused_with_its_remedy(data):
    message = r'^mixture\.top_k = 1 is .* at least 2, .* less with mixture\.routing = "free"$'
    with pytest.raises(ValueError, match=message):
        mom_args["debugmodel"].update_from_config(job_config(top_k=1))
    mom_args["debugmodel"].update_from_config(job_config(top_k=1, routing="free"))
    with pytest.raises(ValueError, match=r"^mixture\.top_k = 9 is .*: 1 to 8, the experts of the"):
        mom_args["debugmodel"].update_from_config(job_config(top_k=9))


def test_images_that_the_patch_does_not_divide_are_refused(data):
    data.size = 30
    with pytest.raises(
        ValueError, match=r"multimodal.image_size = 30 .* multiple of patch_size = 4"
    ):
        mom_args["debugmodel"].update_from_config(job_config())


FLIPS = {
    "dim": 64,
    "n_layers": 3,
    "patch_size": 8,
    "in_channels": 1,
    "image_size": 32,
    "num_classes": 6,
    "learned_variance": False,
    "mlp_ratio": 2.0,
    "num_timestep_features": 32,
    "mixer": "attention",
    "num_token_experts": 3,
    "num_channel_experts": 3,
    "top_k": 3,
    "min_token_experts": 0,
    "min_channel_experts": 0,
    "token_ratio": 2.0,
    "channel_ratio": 2.0,
    "router_noise": 0.5,
    "init_seed": 5,
}


def test_every_field_is_flipped():
    names = {field.name for field in dataclasses.fields(MoMModelArgs)}
    assert names == {*FLIPS, "n_heads", "_enforced"}


@pytest.mark.parametrize("field", FLIPS)
def test_each_field_changes_parameters_or_outputs(field):
    def run(**fields):
        args = tiny_args(**fields)
        model = build(args)
        noise = torch.randn(
            6, args.n_layers, args.dim, generator=torch.Generator().manual_seed(0)
        ).double()
        shapes = {name: p.shape for name, p in model.named_parameters()}
        return shapes, model(*random_inputs(args), noise).prediction

    (before, expected), (after, output) = run(), run(**{field: FLIPS[field]})
    is_same = before == after and output.shape == expected.shape
    assert not is_same or not torch.allclose(output, expected)


def test_heads_change_the_output_of_attention():
    outputs = []
    for heads in (2, 4):
        args = tiny_args(mixer="attention", n_heads=heads)
        model = build(args)
        shake(model)
        outputs.append(model(*random_inputs(args)).prediction)
    assert not torch.allclose(*outputs)


def test_looking_up_a_flavour_gives_a_copy():
    args = mom_args["debugmodel"]
    args.image_size = 64
    assert mom_args["debugmodel"].image_size == 32
