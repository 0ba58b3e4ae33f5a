import math

import pytest
import torch

from tests.unit.models.mot.helpers import build, random_batch, tiny_args
from torchtitan_mixtures.models.mot.model import MoTTransformer


def meta_built(args):
    with torch.device("meta"):
        model = MoTTransformer(args)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
    model.init_weights(torch.device("cpu"))
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qk_normalization": True, "untie_final_norm": True},
        {"init_towers": "copy"},
        {"zero_init_branch": True},
        {"untie_attention": False, "untie_ffn": False, "untie_norm": False},
    ],
)
def test_no_value_is_left_uninitialised(fields):
    model = meta_built(tiny_args(3, **fields))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.isfinite(tensor).all(), name
    assert "rope_table" in dict(model.named_buffers())
    assert "rope_table" not in model.state_dict()


def test_weights_do_not_depend_on_how_the_model_came_about():
    meta, direct = meta_built(tiny_args()), MoTTransformer(tiny_args())
    direct.init_weights()
    stage = MoTTransformer(tiny_args())
    stage.tok_embeddings = None
    del stage.layers["0"]
    stage.init_weights()
    for model in (direct, stage):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, meta.get_parameter(name)), name
    assert torch.equal(meta.rope_table, direct.rope_table)


def test_seed_comes_from_the_global_generator_unless_given():
    def weights(seed, init_seed=None):
        torch.manual_seed(seed)
        model = MoTTransformer(tiny_args(init_seed=init_seed))
        model.init_weights()
        return model.output.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert torch.equal(weights(1, 7), weights(2, 7))


def test_standard_deviations_are_those_of_llama3():
    model = MoTTransformer(tiny_args(dim=256, n_layers=3, multiple_of=256, vocab_size=512))
    model.init_weights()
    expected = {"tok_embeddings": 1.0, "output": 256**-0.5 * 0.9866}
    for layer in range(3):
        for name in ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1"):
            expected[f"layers.{layer}.{name}.image"] = 0.02
        for name in ("attention.wo", "feed_forward.w2", "feed_forward.w3"):
            expected[f"layers.{layer}.{name}.image"] = 0.02 / math.sqrt(2 * (layer + 1))
    for name, std in expected.items():
        weight = model.get_parameter(f"{name}.weight")
        assert weight.std().item() == pytest.approx(std, rel=0.02), name
    assert model.output.weight.abs().max() <= 3 * 256**-0.5
    assert all((norm.weight == 1).all() for norm in model.layers["0"].ffn_norm.values())


def test_towers_are_drawn_apart_unless_copied():
    independent, copied = build(tiny_args(3)), MoTTransformer(tiny_args(3, init_towers="copy"))
    copied.init_weights()
    for path in ("attention.wq", "feed_forward.w2"):
        towers = [t.weight for t in independent.layers["1"].get_submodule(path).values()]
        assert not torch.equal(towers[0], towers[1])
        assert not torch.equal(towers[1], towers[2])
        towers = [t.weight for t in copied.layers["1"].get_submodule(path).values()]
        assert torch.equal(towers[0], towers[1])
        assert torch.equal(towers[1], towers[2])


def test_copied_towers_do_not_care_about_modalities():
    model = MoTTransformer(tiny_args(3, init_towers="copy"))
    model.init_weights()
    tokens, masks = random_batch(3)
    with torch.no_grad():
        expected = model(tokens, masks)
        torch.testing.assert_close(model(tokens, masks.roll(1, 1)), expected)


@pytest.mark.parametrize("init_towers", ["independent", "copy"])
def test_zeroed_branches_pass_tokens_through_at_first(init_towers):
    args = tiny_args(zero_init_branch=True, init_towers=init_towers)
    model = MoTTransformer(args)
    model.init_weights()
    for layer in model.layers.values():
        for towers in (layer.attention.wo, layer.feed_forward.w2):
            assert towers["text"].weight.any()
            assert not towers["image"].weight.any()
    tokens, masks = random_batch()
    model.norm = model.output = None
    is_image = masks[:, 1]
    out = model(tokens, masks)
    assert torch.equal(out[is_image], model.tok_embeddings(tokens)[is_image])
    assert not torch.equal(out[~is_image], model.tok_embeddings(tokens)[~is_image])
