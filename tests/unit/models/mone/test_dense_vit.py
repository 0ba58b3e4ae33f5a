"""Weights of dense ViTs, in and out. The oracle is transformers; timm's names are a list."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from torchtitan_mixtures.models.mone import mone_args
from torchtitan_mixtures.models.mone.args import MoNEModelArgs
from torchtitan_mixtures.models.mone.capacity import Budget
from torchtitan_mixtures.models.mone.dense_vit import (
    dense_state,
    dense_twin,
    from_huggingface,
    from_timm,
    to_huggingface,
    to_timm,
)
from torchtitan_mixtures.models.mone.model import MoNE
from torchtitan_mixtures.models.mone.resize import resize_positions

SIZES = {
    "dim": 32, "n_layers": 3, "n_heads": 4, "patch_size": 4, "image_size": 16, "num_classes": 5,
}  # fmt: skip


def make_args(pool="class_token", **options):
    eps = 1e-12 if pool == "class_token" else 1e-6
    return MoNEModelArgs(**{**SIZES, "pool": pool, "norm_eps": eps, **options})


def randomise(model: nn.Module) -> nn.Module:
    """Biases and norms are not zero and one, so that none can be mixed up or left out."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def make_model(args, alpha=0.0):
    model = randomise(MoNE(args))
    if args.is_nested:
        nn.init.constant_(model.router_scale.alpha, alpha)
    return model


def state_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def all_at(args, expert):
    tokens = [0] * args.num_experts
    tokens[expert] = args.num_tokens
    return Budget(tuple(tokens))


def draw_images(args, dtype=torch.float32, image_size=None):
    size = image_size or args.image_size
    generator = torch.Generator().manual_seed(2)
    return torch.rand(3, 3, size, size, dtype=dtype, generator=generator) * 2 - 1


def oracle_config(args):
    return ViTConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        intermediate_size=args.hidden_dim,
        image_size=args.image_size,
        patch_size=args.patch_size,
        num_labels=args.num_classes,
    )


def weights_of_files(oracle, folder):
    oracle.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """A ViT of transformers and its weights, by the names of its files."""
    model = randomise(ViTForImageClassification(oracle_config(make_args())))
    return model, weights_of_files(model, tmp_path_factory.mktemp("oracle"))


def load(args, state):
    """Build a model from weights; what they lack is random."""
    model = make_model(args)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith(("routers.", "router_scale.")) for name in missing)
    return model


@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_an_imported_vit_computes_what_transformers_does(oracle, num_experts, dtype, tolerance):
    theirs, weights = oracle
    args = make_args(num_experts=num_experts)
    model = load(args, from_huggingface(weights, args)).to(dtype)
    images = draw_images(args, dtype)
    with torch.no_grad():
        expected = theirs.to(dtype)(images).logits
        logits = model(images, all_at(args, num_experts - 1)).logits
    theirs.float()
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits / scale, expected / scale, atol=tolerance, rtol=0)
    if num_experts > 1:  # and does not where tokens are at other experts
        with torch.no_grad():
            assert (model(images, all_at(args, 0)).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("into", ["huggingface", "timm", "timm_mean"])
def test_what_goes_out_comes_back_in(into):
    args = make_args("mean" if into == "timm_mean" else "class_token")
    state = dense_state(state_of(make_model(args)), args, 3)
    convert, back = (
        (to_huggingface, from_huggingface) if into == "huggingface" else (to_timm, from_timm)
    )
    returned = back(convert(state, args), args)
    assert returned.keys() == state.keys() == state_of(MoNE(dense_twin(args))).keys()
    assert all(torch.equal(returned[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("router_layer", [0, 1])
@pytest.mark.parametrize("expert", [0, 1, 2, 3])
def test_a_sub_model_is_the_nested_model_with_all_tokens_at_its_expert(expert, router_layer):
    args = make_args("mean", router_layer=router_layer)
    nested = make_model(args).double()
    dense = MoNE(dense_twin(args)).double()
    dense.load_state_dict(dense_state(state_of(nested), args, expert))
    images = draw_images(args, torch.float64)
    with torch.no_grad():
        expected = nested(images, all_at(args, expert)).logits
        torch.testing.assert_close(dense(images).logits, expected, atol=1e-12, rtol=1e-12)


def test_the_router_is_left_out_of_a_sub_model_with_a_warning(caplog):
    args = make_args("mean")
    state = state_of(make_model(args, alpha=0.25))
    with caplog.at_level(logging.WARNING):
        left = dense_state(state, args, 3)
    assert "alpha = 0.25" in caplog.text
    caplog.clear()
    assert all(torch.equal(left[name], state[name]) for name in left)
    dense_state(state_of(make_model(args)), args, 3)
    assert not caplog.text


def test_an_expert_that_no_vit_does_the_same_as_is_refused():
    args = make_args("mean")
    state = state_of(make_model(args))
    for expert in (-1, 4):
        with pytest.raises(ValueError, match=rf"--expert {expert}: the model has 4, .* to 3"):
            dense_state(state, args, expert)
    with pytest.raises(ValueError, match="the class token always has the largest expert"):
        dense_state(state, make_args(), 2)


def test_an_exported_vit_computes_the_same_in_transformers(tmp_path):
    args = make_args()
    nested = make_model(args)
    theirs = ViTForImageClassification(oracle_config(args)).eval()
    names = weights_of_files(theirs, tmp_path).keys()
    exported = to_huggingface(dense_state(state_of(nested), args, 3), args)
    assert exported.keys() == names
    theirs.save_pretrained(tmp_path)
    exported = {name: tensor.contiguous() for name, tensor in exported.items()}
    save_file(exported, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = ViTForImageClassification.from_pretrained(tmp_path).eval()
    images = draw_images(args)
    with torch.no_grad():
        expected = nested(images, all_at(args, 3)).logits
        torch.testing.assert_close(theirs(images).logits, expected, atol=2e-5, rtol=1e-5)


def naive_timm(state, images, heads, eps, pools_mean):
    """Timm's ViT, of its state dict."""
    dim = state["norm.weight"].shape[0]
    patch = state["patch_embed.proj.weight"].shape[-1]
    x = nn.functional.conv2d(
        images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch
    )
    x = x.flatten(2).transpose(1, 2)
    if not pools_mean:
        x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + state["pos_embed"]

    def norm(name, x):
        return nn.functional.layer_norm(
            x, (dim,), state[f"{name}.weight"], state[f"{name}.bias"], eps
        )

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    i = 0
    while f"blocks.{i}.norm1.weight" in state:
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x))
        joined = []
        for h in range(heads):
            columns = [slice(part * dim + h * dim // heads, part * dim + (h + 1) * dim // heads)
                       for part in range(3)]  # fmt: skip
            q, k, v = (qkv[:, :, c] for c in columns)
            joined.append((q @ k.transpose(1, 2) / math.sqrt(dim // heads)).softmax(-1) @ v)
        x = x + linear(f"blocks.{i}.attn.proj", torch.cat(joined, -1))
        hidden = nn.functional.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x)))
        x = x + linear(f"blocks.{i}.mlp.fc2", hidden)
        i += 1
    x = norm("norm", x)
    return linear("head", x.mean(1) if pools_mean else x[:, 0])


@pytest.mark.parametrize("pool", ["mean", "class_token"])
def test_weights_in_timms_layout_compute_the_same(pool):
    args = make_args(pool)
    nested = make_model(args).double()
    theirs = to_timm(dense_state(state_of(nested), args, 3), args)
    images = draw_images(args, torch.float64)
    logits = naive_timm(theirs, images, args.n_heads, args.norm_eps, pool == "mean")
    with torch.no_grad():
        expected = nested(images, all_at(args, 3)).logits
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=1e-12)


def timm_shapes(depth=12, dim=384, hidden=1536, classes=1000):
    """What timm's vit_small_patch16_224 has."""
    shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 197, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "head.weight": (classes, dim),
        "head.bias": (classes,),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.norm1.weight": (dim,),
            f"blocks.{i}.norm1.bias": (dim,),
            f"blocks.{i}.attn.qkv.weight": (3 * dim, dim),
            f"blocks.{i}.attn.qkv.bias": (3 * dim,),
            f"blocks.{i}.attn.proj.weight": (dim, dim),
            f"blocks.{i}.attn.proj.bias": (dim,),
            f"blocks.{i}.norm2.weight": (dim,),
            f"blocks.{i}.norm2.bias": (dim,),
            f"blocks.{i}.mlp.fc1.weight": (hidden, dim),
            f"blocks.{i}.mlp.fc1.bias": (hidden,),
            f"blocks.{i}.mlp.fc2.weight": (dim, hidden),
            f"blocks.{i}.mlp.fc2.bias": (dim,),
        }
    return shapes


def on_meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_names_and_shapes_are_those_of_timms_small_vit():
    args = mone_args["S/16-cls"]
    with torch.device("meta"):
        state = state_of(MoNE(dense_twin(args)))
    exported = {name: tuple(tensor.shape) for name, tensor in to_timm(state, args).items()}
    assert exported == timm_shapes()
    imported = from_timm(on_meta(timm_shapes()), args)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    assert {name: tensor.shape for name, tensor in imported.items()} == shapes
    without = {k: v for k, v in timm_shapes().items() if k != "cls_token"}
    without["pos_embed"] = (1, 196, 384)
    assert "embedder.class_token" not in from_timm(on_meta(without), mone_args["S/16"])


def changed(weights, **changes):
    """Weights with some replaced, or removed where the change is None."""
    weights = {**weights, **{name.replace("__", "."): new for name, new in changes.items()}}
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


def test_all_that_is_missing_unexpected_or_of_another_shape_is_one_message(oracle):
    weights = changed(
        oracle[1],
        vit__layernorm__bias=None,
        vit__encoder__layer__0__output__dense__bias=torch.zeros(7),
        vit__extra=torch.zeros(1),
    )
    with pytest.raises(ValueError) as raised:
        from_huggingface(weights, make_args())
    message = str(raised.value)
    assert "missing: vit.layernorm.bias" in message
    assert "unexpected: vit.extra" in message
    assert "vit.encoder.layer.0.output.dense.bias (7,) instead of (32,)" in message


def test_a_checkpoint_of_other_sizes_is_refused_with_each_of_them(oracle):
    args = make_args(dim=64, n_layers=2, patch_size=8, mlp_ratio=2.0, n_heads=8)
    with pytest.raises(ValueError) as raised:
        from_huggingface(oracle[1], args)
    for part in ("dim = 32 (model: 64)", "n_layers = 3 (model: 2)", "patch_size = 4 (model: 8)"):
        assert part in str(raised.value)
    timm = to_timm(state_of(MoNE(dense_twin(make_args()))), make_args())
    with pytest.raises(ValueError, match=r"pool = 'class_token' \(model: 'mean'\)"):
        from_timm(timm, make_args("mean"))
    with pytest.raises(ValueError, match="reads a class token"):
        from_huggingface(oracle[1], make_args("mean"))


def test_a_head_of_other_classes_is_left_out_only_if_asked(oracle, caplog):
    args = make_args(num_classes=7)
    with pytest.raises(ValueError, match="head has 5 classes, the data 7; --new-head"):
        from_huggingface(oracle[1], args)
    with caplog.at_level(logging.INFO):
        state = from_huggingface(oracle[1], args, new_head=True)
    assert "head of 5 classes is left out" in caplog.text
    assert "head.weight" not in state and "norm.weight" in state


def test_a_model_without_a_head_is_imported_without_its_pooler(tmp_path, caplog):
    theirs = randomise(ViTModel(oracle_config(make_args()), add_pooling_layer=True))
    weights = weights_of_files(theirs, tmp_path)
    args = make_args()
    with pytest.raises(ValueError, match="no head; --new-head initialises one"):
        from_huggingface(weights, args)
    with caplog.at_level(logging.INFO):
        state = from_huggingface(weights, args, new_head=True)
    assert "Not used: vit.pooler.dense.weight, vit.pooler.dense.bias" in caplog.text
    assert torch.equal(state["norm.bias"], theirs.layernorm.bias)


def test_positions_of_another_resolution_are_interpolated_as_in_transformers(oracle):
    theirs, weights = oracle
    args = make_args(image_size=24)
    remedy = "multimodal.image_size = 24: .* of 16 pixels. Set it to 16, .* --image-size 24"
    with pytest.raises(ValueError, match=remedy):
        from_huggingface(weights, args)
    model = load(args, from_huggingface(weights, args, new_size=True))
    images = draw_images(args)
    with torch.no_grad():
        expected = theirs(images, interpolate_pos_encoding=True).logits
        logits = model(images, all_at(args, 3)).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


def test_positions_that_are_constant_or_fit_stay_as_they_are():
    positions = torch.randn(17, 8)
    assert torch.equal(resize_positions(positions, 1, 16), positions)
    constant = torch.ones(16, 8)
    assert torch.allclose(resize_positions(constant, 0, 36), torch.ones(36, 8))


def test_what_is_no_vit_or_another_kind_of_one_is_refused():
    args = make_args("mean")
    with pytest.raises(ValueError, match=r"unexpected: layer\.weight"):
        from_timm({"layer.weight": torch.zeros(1)}, args)
    theirs = to_timm(state_of(MoNE(dense_twin(args))), args)
    with pytest.raises(ValueError, match="fc_norm=False"):
        from_timm({**theirs, "fc_norm.weight": torch.zeros(32)}, args)
    odd = {**theirs, "pos_embed": torch.zeros(1, 15, 32)}
    with pytest.raises(ValueError, match="positions of 15 patches: not of square images"):
        from_timm(odd, args)
    with pytest.raises(ValueError, match=r"blocks\.0\.ls1\.gamma"):
        from_timm({**theirs, "blocks.0.ls1.gamma": torch.zeros(32)}, args)
