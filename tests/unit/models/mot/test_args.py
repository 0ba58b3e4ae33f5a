import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from tests.unit.models.mot.helpers import build, random_batch, tiny_args
from torchtitan_mixtures.models.mot import mot_args
from torchtitan_mixtures.models.mot.args import MoTModelArgs
from torchtitan_mixtures.models.mot.model import MoTTransformer

ACTIVE = {
    "debugmodel": 6_163_712,
    "ladder1": 252_144,
    "ladder2": 725_664,
    "ladder3": 1_926_560,
    "ladder4": 5_868_800,
    "8B": 8_030_261_248,
    "70B": 70_553_706_496,
}
TOTAL = {
    "debugmodel": 11_278_592,
    "debugmodel_flex_attn": 11_278_592,
    "debugmodel_varlen_attn": 11_278_592,
    "debugmodel_post_norm": 11_278_592,
    "debugmodel_dense": 6_163_712,
    "debugmodel_3modality": 16_393_472,
    "debugmodel_3modality_dense": 6_163_712,
    "ladder1": 307_632,
    "ladder1_dense": 252_144,
    "ladder2": 1_058_016,
    "ladder2_dense": 725_664,
    "ladder3": 3_197_600,
    "ladder3_dense": 1_926_560,
    "ladder4": 10_688_768,
    "ladder4_dense": 5_868_800,
    "8B_2modality": 15_009_845_248,
    "8B_2modality_dense": 8_030_261_248,
    "8B_3modality": 21_989_429_248,
    "8B_3modality_dense": 8_030_261_248,
    "70B_2modality": 139_006_058_496,
    "70B_2modality_dense": 70_553_706_496,
    "70B_3modality": 207_458_410_496,
    "70B_3modality_dense": 70_553_706_496,
}
# 6 * (active - embedding) + 6 * layers * heads * 2 * head_dim * seq_len, worked out by hand.
FLOPS = {
    "debugmodel": 184_831_488,
    "ladder1": 10_360_224,
    "ladder2": 31_485_888,
    "ladder3": 72_507_840,
    "ladder4": 183_062_016,
    "8B": 57_914_449_920,
    "70B": 481_442_709_504,
}


@pytest.mark.parametrize("flavor", mot_args)
def test_parameters_and_flops_of_each_flavour(flavor):
    size = flavor.split("_")[0]
    args = mot_args[flavor]
    with torch.device("meta"):
        model = MoTTransformer(args)
    assert args.get_nparams_and_flops(model, 8192) == (TOTAL[flavor], FLOPS[size])
    assert args.num_total_parameters == TOTAL[flavor]
    assert args.num_active_parameters == ACTIVE[size]


def test_flavour_table_is_complete():
    assert set(mot_args) == set(TOTAL)
    widths = {flavor: mot_args[flavor].ffn_hidden_dim for flavor in mot_args}
    sizes = {"debugmodel": 768, "8B": 14336, "70B": 28672}
    sizes |= {"ladder1": 128, "ladder2": 256, "ladder3": 448, "ladder4": 704}
    assert widths == {flavor: sizes[flavor.split("_")[0]] for flavor in mot_args}


def test_an_added_code_costs_two_rows():
    args = mot_args["debugmodel"]
    args.code_vocab_sizes = [512]
    with torch.device("meta"):
        model = MoTTransformer(args)
    assert args.vocab_ranges == [(0, 2048), (2048, 2560)]
    assert args.get_nparams_and_flops(model, 8192)[0] == 11_278_592 + 2 * 512 * 256
    assert args.num_active_parameters == 6_163_712 + 2 * 512 * 256


@pytest.mark.parametrize(
    "fields",
    [
        {"untie_attention": False, "qk_normalization": True},
        {"untie_ffn": False},
        {"untie_norm": False, "untie_final_norm": True},
        {"tower_of_modality": [0, 1, 0], "qk_normalization": True},
    ],
)
def test_parameters_are_counted_right_for_ties(fields):
    args = tiny_args(3, **fields)
    model = MoTTransformer(args)
    assert args.num_total_parameters == sum(p.numel() for p in model.parameters())
    dense = tiny_args(1, **{k: v for k, v in fields.items() if k == "qk_normalization"})
    one_tower = MoTTransformer(dense)
    assert args.num_active_parameters == sum(p.numel() for p in one_tower.parameters())
    owned = {args.tower_of_parameter(name) for name, _ in model.named_parameters()}
    assert owned == {None, *args.tower_names}


def test_parameters_know_their_tower():
    args = tiny_args(untie_ffn=False)
    assert args.tower_of_parameter("layers.0.attention.wq.image.weight") == "image"
    assert args.tower_of_parameter("layers.0.attention_norm.text.weight") == "text"
    assert args.tower_of_parameter("layers.0.feed_forward.w1.text.weight") is None
    assert args.tower_of_parameter("norm.weight") is None
    assert args.tower_of_parameter("output.weight") is None


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"norm_position": "sandwich"}, "norm_position"),
        ({"dispatch": "static"}, "dispatch"),
        ({"attn_type": "math"}, "attn_type"),
        ({"attn_mask_type": "full"}, "attn_mask_type"),
        ({"init_towers": "zero"}, "init_towers"),
        ({"n_heads": 5}, "n_heads"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
        ({"dim": 0}, "dim"),
        ({"modality_names": ["text"]}, "modality_names"),
        ({"modality_names": ["text", "text"]}, "modality_names"),
        ({"code_vocab_sizes": [1, 2]}, "code_vocab_sizes"),
        ({"tower_of_modality": [0, 2]}, "tower_of_modality"),
        ({"tower_of_modality": [0]}, "tower_of_modality"),
        ({"tower_of_modality": [0, 0], "zero_init_branch": True}, "zero_init_branch"),
        ({"norm_position": "post", "zero_init_branch": True}, "zero_init_branch"),
        ({"attn_mask_type": "block_causal"}, "attn_mask_type"),
        ({"attn_type": "varlen"}, "attn_mask_type"),
        ({"bidirectional_images": True}, "attn_type"),
    ],
)
def test_impossible_arguments_are_refused_by_name(fields, name):
    with pytest.raises(ValueError, match=f"^{name} = .* is not allowed; allowed: "):
        tiny_args(**fields)


def test_arguments_survive_json():
    for flavor in mot_args:
        args = mot_args[flavor]
        assert MoTModelArgs(**json.loads(json.dumps(dataclasses.asdict(args)))) == args


def test_looking_up_a_flavour_gives_a_copy():
    args = mot_args["debugmodel"]
    args.max_seq_len = 1
    args.modality_names.append("speech")
    assert mot_args["debugmodel"].max_seq_len == 2048
    assert mot_args["debugmodel"].modality_names == ["text", "image"]


def job_config(**mixture):
    defaults = {"dispatch": "", "untie": "", "tower_of_modality": []}
    return SimpleNamespace(
        training=SimpleNamespace(seq_len=64),
        validation=SimpleNamespace(enable=False, seq_len=64),
        debug=SimpleNamespace(seed=3),
        mixture=SimpleNamespace(**{**defaults, **mixture}),
        multimodal=None,
    )


@pytest.fixture
def codes(monkeypatch):
    monkeypatch.setattr(
        "torchtitan_mixtures.models.mot.args.code_vocab_sizes", lambda names, config: [100]
    )


def test_update_from_config_twice_is_once(codes):
    args = mot_args["debugmodel"]
    config = job_config(dispatch="grouped", untie="ffn+norm")
    args.update_from_config(config)
    once = dataclasses.asdict(args)
    args.update_from_config(config)
    assert dataclasses.asdict(args) == once
    assert (args.max_seq_len, args.dispatch, args.init_seed) == (64, "grouped", 3)
    assert (args.untie_attention, args.untie_ffn, args.untie_norm) == (False, True, True)
    assert args.vocab_ranges == [(0, 2048), (2048, 2148)]


def test_empty_config_values_keep_the_flavour(codes):
    args, before = mot_args["debugmodel_dense"], mot_args["debugmodel_dense"]
    args.update_from_config(job_config())
    for name in ("dispatch", "untie_attention", "untie_ffn", "untie_norm", "tower_of_modality"):
        assert getattr(args, name) == getattr(before, name)
    args.update_from_config(job_config(untie="none", tower_of_modality=[0, 1]))
    assert not args.is_untied


def test_update_from_config_checks_the_result(codes):
    with pytest.raises(ValueError, match="tower_of_modality"):
        mot_args["debugmodel"].update_from_config(job_config(tower_of_modality=[0, 0, 1]))


FLIPS = {
    "qk_normalization": True,
    "norm_position": "post",
    "untie_attention": False,
    "untie_ffn": False,
    "untie_norm": False,
    "untie_final_norm": True,
    "init_towers": "copy",
    "zero_init_branch": True,
    "depth_init": False,
    "init_seed": 5,
    "attn_mask_type": "block_causal",
    "bidirectional_images": True,
    "tower_of_modality": [0, 0],
    "n_kv_heads": 4,
    "code_vocab_sizes": [7],
    "ffn_dim_multiplier": 2.0,
    "norm_eps": 1e-2,
    "rope_theta": 1000.0,
    "rope_scaling_factor": 2.0,
    "rope_low_freq_factor": 0.5,
    "rope_high_freq_factor": 8.0,
    "rope_original_max_positions": 16,
}


@pytest.mark.parametrize("field", FLIPS)
def test_each_field_changes_parameters_or_outputs(field):
    def run(**fields):
        base = {"attn_type": "sdpa_dense", "n_layers": 3}
        base |= {"rope_theta": 100.0, "rope_original_max_positions": 64}
        model = build(tiny_args(**{**base, **fields}))
        tokens, masks = random_batch(seq=32)
        place = torch.arange(32).expand(2, 32)
        ids = {"document_ids": place // 16, "image_ids": torch.where(place % 8 < 4, place // 8, -1)}
        return model(tokens, masks, **ids), {n: p.shape for n, p in model.named_parameters()}

    before, after = run(), run(**{field: FLIPS[field]})
    assert before[1] != after[1] or not torch.allclose(before[0], after[0], atol=1e-6)
