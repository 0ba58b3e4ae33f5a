import pytest
import torch
from torch import nn

from tests.unit.models.mmdit.naive import (
    config_of,
    naive_block,
    randn,
    randn_streams,
    random_mask,
    shake,
)
from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.mmdit.block import BlockConfig, JointBlock
from torchtitan_mixtures.models.mmdit.hyper_connections import expand

DIMS = {"text": 6, "image": 8, "sound": 5}
LENGTHS = (3, 4, 2)
KINDS = {
    "zero": {},
    "film": {"modulation": "film_identity", "norm_eps": 1e-5},
    "no condition": {"condition_dim": None},
    "shared norm and biases": {"qk_norm": "shared", "qkv_bias": True, "out_bias": True},
    "norm per head and soft clamp": {"qk_norm": "per_head", "softclamp": 0.7},
    "adaptive": {"num_adaptive_weights": 2},
    "dynamic streams": {"num_residual_streams": 3},
    "static streams": {"num_residual_streams": 2, "dynamic_streams": False},
    "all": {
        "modulation": "film_identity",
        "qk_norm": "per_head",
        "softclamp": 2.0,
        "num_adaptive_weights": 2,
        "num_residual_streams": 4,
    },
}


def block_of(dims=DIMS, layer_index=1, pre_only=(), **fields):
    torch.manual_seed(0)
    return shake(JointBlock(dims, config_of(**fields), layer_index, pre_only))


def inputs_of(block, dims=DIMS, lengths=LENGTHS, seed=0):
    streams, config = randn_streams(dims, lengths, seed=seed), block.config
    if config.num_residual_streams > 1:  # streams that differ
        count_ = config.num_residual_streams
        streams = {
            name: expand(x, count_) + 0.3 * randn(*x.shape[:2], count_, x.shape[2], seed=20)
            for name, x in streams.items()
        }
    return streams, None if config.condition_dim is None else randn(2, 5, seed=30)


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def differs(found, expected):
    return (found - expected).abs().max() > 1e-6


@pytest.mark.parametrize("masked", [(), ("text", "sound")])
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_is_what_the_specification_says(fields, masked):
    block = block_of(**fields)
    streams, condition = inputs_of(block)
    masks = {name: random_mask(2, streams[name].shape[1], i) for i, name in enumerate(masked)}
    close(block(streams, condition, masks), naive_block(block, streams, condition, masks))


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_a_block_without_outputs_of_some_modalities_is_what_the_specification_says(fields):
    block = block_of(pre_only=("text",), **fields)
    streams, condition = inputs_of(block)
    found = block(streams, condition, None, ("sound",))
    assert list(found) == ["image", "sound"]
    close(found, naive_block(block, streams, condition, None, ("sound",)))


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_every_parameter_gets_a_gradient(fields):
    for pre_only in ((), ("text", "sound")):
        block = block_of(pre_only=pre_only, **fields)
        streams, condition = inputs_of(block)
        sum(x.square().sum() for x in block(streams, condition).values()).backward()
        for name, parameter in block.named_parameters():
            assert parameter.grad is not None, name
            # The queries of modalities without output ask for nothing.
            if not any(f"q_norm.{modality}" in name for modality in pre_only):
                assert parameter.grad.any(), name


@pytest.mark.parametrize("fields", [{}, {"num_residual_streams": 4}])
def test_zero_modulation_is_an_identity_at_first(fields):
    block = JointBlock(DIMS, config_of(**fields)).double()
    streams, condition = inputs_of(block)
    close(block(streams, condition), streams, tolerance=0)


def test_film_modulation_is_an_ordinary_transformer_block_at_first():
    torch.manual_seed(0)
    film = JointBlock(DIMS, config_of(modulation="film_identity")).double()
    plain = JointBlock(DIMS, config_of(condition_dim=None)).double()
    plain.load_state_dict(film.state_dict(), strict=False)
    streams, condition = inputs_of(film)
    found = film(streams, condition)
    close(found, plain(streams, None))
    close(found, film(streams, 9 * condition))
    assert all(differs(found[name], streams[name]) for name in DIMS)


@pytest.mark.parametrize("modulation", ["zero", "film_identity"])
def test_trained_modulation_listens_to_the_condition(modulation):
    block = block_of(modulation=modulation)
    streams, condition = inputs_of(block)
    before, after = block(streams, condition), block(streams, condition + 1)
    assert all(differs(before[name], after[name]) for name in DIMS)


def test_two_modalities_with_equal_weights_are_one_sequence():
    dims = {"text": 6, "image": 6}
    two, one = block_of(dims), block_of({"text": 6})
    weights = {n: p for n, p in two.state_dict().items() if ".text." in n}
    two.load_state_dict(weights | {n.replace(".text.", ".image."): p for n, p in weights.items()})
    one.load_state_dict(weights)
    streams, condition = randn_streams(dims, (3, 4)), randn(2, 5)
    joined = one({"text": torch.cat(list(streams.values()), dim=1)}, condition)["text"]
    close(torch.cat(list(two(streams, condition).values()), dim=1), joined)


def test_the_order_of_modalities_does_not_matter():
    block = block_of()
    streams, condition = inputs_of(block)
    turned = {name: streams[name] for name in ("image", "sound", "text")}
    expected = block(streams, condition)
    close(block(turned, condition), {name: expected[name] for name in turned})


def test_masked_text_does_not_influence_the_image():
    block = block_of(qk_norm="shared")
    streams, condition = inputs_of(block)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    changed = streams | {"text": streams["text"].masked_fill(~mask[:, :, None], 5.0)}
    before, after = (block(x, condition, {"text": mask}) for x in (streams, changed))
    close(before["image"], after["image"])
    assert differs(block(changed, condition)["image"], block(streams, condition)["image"])


def test_later_tokens_influence_earlier_ones():
    block = block_of()
    streams, condition = inputs_of(block)
    moved = streams["image"].clone()
    moved[:, -1] = randn(2, 8, seed=9)
    before, after = block(streams, condition), block(streams | {"image": moved}, condition)
    for name in DIMS:
        assert ((after[name] - before[name]).abs().amax(2) > 1e-8).all()


@pytest.mark.parametrize("fields", [{}, {"condition_dim": None}, {"num_residual_streams": 2}])
def test_a_modality_without_output_costs_nothing_of_what_it_would_not_use(fields):
    full, last = block_of(**fields), block_of(pre_only=("text",), **fields)
    own = last.state_dict()
    # A smaller modulation or connection is the first part of the whole one.
    weights = {n: p[: len(own[n])] for n, p in full.state_dict().items() if n in own}
    if "attention_streams.text.static" in own:
        weights["attention_streams.text.static"] = full.attention_streams["text"].static[:, :1]
    last.load_state_dict(weights)
    gone = ("wo.text", "feed_forward.text", "ffn_norm.text", "ffn_streams.text")
    assert not [n for n in own if any(part in n for part in gone)]
    if last.config.condition_dim is not None:
        assert own["modulation.text.linear.bias"].shape == (2 * 6,)
    streams, condition = inputs_of(full)
    found, expected = last(streams, condition), full(streams, condition)
    assert list(found) == ["image", "sound"]
    close(found, {name: expected[name] for name in found})


def test_times_of_samples_modalities_and_tokens_agree_if_equal():
    block = block_of()
    streams, condition = inputs_of(block)
    expected = block(streams, condition)
    of_modality = dict.fromkeys(DIMS, condition)
    lengths = {name: x.shape[1] for name, x in streams.items()}
    of_token = {n: condition[:, None].repeat(1, seq, 1) for n, seq in lengths.items()}
    close(block(streams, of_modality), expected)
    close(block(streams, of_token), expected)
    close(block(streams, of_token | {"text": condition}), expected)


def test_times_of_modalities_and_tokens_differ_if_not():
    block = block_of()
    streams, condition = inputs_of(block)
    expected = block(streams, condition)
    other = dict.fromkeys(DIMS, condition) | {"text": condition + 1}
    found = block(streams, other)
    close(found, naive_block(block, streams, other))
    assert differs(found["text"], expected["text"])
    of_token = dict.fromkeys(DIMS, condition) | {"image": randn(2, 4, 5, seed=3)}
    found = block(streams, of_token)
    close(found, naive_block(block, streams, of_token))
    assert differs(found["image"], expected["image"])


def test_conditions_that_do_not_fit_are_refused():
    block = block_of()
    streams, condition = inputs_of(block)
    with pytest.raises(ValueError, match=r"condition is missing.*width 5"):
        block(streams, None)
    with pytest.raises(ValueError, match=r"condition is given.*takes none"):
        block_of(condition_dim=None)(streams, condition)
    with pytest.raises(ValueError, match=r"conditions of \('text',\).*'sound'"):
        block(streams, {"text": condition})


@pytest.mark.parametrize("pre_only", [("speech",), tuple(DIMS)])
def test_some_known_modality_must_have_an_output(pre_only):
    with pytest.raises(ValueError, match=r"pre_only.*modalities of .*but not all"):
        JointBlock(DIMS, config_of(), pre_only=pre_only)


def test_initial_weights_are_xaviers_and_biases_zero():
    block = JointBlock({"text": 64, "image": 96}, BlockConfig(4, 32, 16, qkv_bias=True))
    for name, dim in (("text", 64), ("image", 96)):
        bounds = {
            block.attention.wqkv[name]: (6 / (dim + 3 * 128)) ** 0.5,
            block.attention.wo[name]: (6 / (dim + 128)) ** 0.5,
            block.feed_forward[name].w1: (6 / (5 * dim)) ** 0.5,
            block.feed_forward[name].w2: (6 / (5 * dim)) ** 0.5,
        }
        for linear, bound in bounds.items():
            assert 0.97 * bound < linear.weight.abs().max() <= bound
            assert linear.bias is None or not linear.bias.any()


@pytest.mark.parametrize("modulation", ["zero", "film_identity"])
def test_a_block_built_on_the_meta_device_is_filled_whole(modulation):
    config = config_of(
        modulation=modulation, num_residual_streams=3, qk_norm="per_head", num_adaptive_weights=2
    )
    with torch.device("meta"):
        block = JointBlock(DIMS, config, layer_index=1, pre_only=("text",))
    assert all(parameter.is_meta for parameter in block.parameters())
    block.to_empty(device="cpu")
    for parameter in block.parameters():
        nn.init.constant_(parameter, torch.nan)
    with init.parameter_names(block, 0):
        block.init_weights()
    built = JointBlock(DIMS, config, layer_index=1, pre_only=("text",))
    with init.parameter_names(built, 0):
        built.init_weights()
    close(block.state_dict(), built.state_dict(), tolerance=0)
    assert all(parameter.isfinite().all() for parameter in block.parameters())
    biases = block.modulation["image"].linear.bias.view(6, -1)
    ones = [0, 1, 1, 0, 1, 1] if modulation == "film_identity" else [0] * 6
    assert [row.unique().tolist() for row in biases] == [[float(one)] for one in ones]


COMPILED = {
    "without masks": ({"qk_norm": "shared", "qkv_bias": True}, {}),
    "with masks and streams": (
        {"modulation": "film_identity", "softclamp": 2.0, "num_residual_streams": 2},
        {"text": random_mask(2, 3)},
    ),
}


@pytest.mark.parametrize(("fields", "masks"), COMPILED.values(), ids=COMPILED)
def test_compiles_whole(fields, masks):
    torch._dynamo.reset()
    dims = {"text": 6, "image": 8}
    block = block_of(dims, pre_only=("text",), **fields)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    streams, condition = inputs_of(block, dims, (3, 4))
    results = []
    for function in (block, compiled):
        block.zero_grad()
        outputs = function(streams, condition, masks)
        outputs["image"].square().sum().backward()
        results.append((outputs, [p.grad for p in block.parameters()]))
    close(*results, tolerance=1e-9)
    torch._dynamo.reset()
