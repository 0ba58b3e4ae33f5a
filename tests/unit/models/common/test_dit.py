import math

import pytest
import torch
from torch import Tensor

from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.common.dit import DiTBlock, FinalLayer
from torchtitan_mixtures.models.common.modulation import Modulation, modulate


def build(module, dtype=torch.float64, is_trained=True):
    """An initialised module; trained: with random weights where it starts with zeros."""
    with init.parameter_names(module, 0):
        module.init_weights()
    generator = torch.Generator().manual_seed(1)
    if is_trained:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.to(dtype)


def inputs(batch=2, seq=5, dim=16):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, seq, dim, generator=generator, dtype=torch.float64)
    return x, torch.randn(batch, dim, generator=generator, dtype=torch.float64)


def norm(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(correction=0) + 1e-6).sqrt()


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def naive_block(block: DiTBlock, x: Tensor, condition: Tensor, heads: int) -> Tensor:
    """The block, one token and one head at a time, from the state dict alone."""
    w = dict(block.named_parameters())

    def linear(name: str, vector: Tensor) -> Tensor:
        return w[f"{name}.weight"] @ vector + w[f"{name}.bias"]

    samples = []
    for tokens, c in zip(x, condition, strict=True):
        dim = len(c)
        width = dim // heads
        vectors = linear("modulation.linear", c * torch.sigmoid(c)).view(6, dim)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = vectors
        modulated = [norm(token) * (1 + scale) + shift for token in tokens]
        q, k, v = ([linear(f"attention.{n}", t) for t in modulated] for n in ("wq", "wk", "wv"))
        stream = []
        for i, token in enumerate(tokens):
            attended = []
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                scores = torch.stack([q[i][part] @ key[part] for key in k]) / math.sqrt(width)
                attended.append(scores.softmax(0) @ torch.stack([value[part] for value in v]))
            stream.append(token + gate * linear("attention.wo", torch.cat(attended)))
        for i, token in enumerate(stream):
            modulated = norm(token) * (1 + ffn_scale) + ffn_shift
            hidden = gelu(linear("feed_forward.w1", modulated))
            stream[i] = token + ffn_gate * linear("feed_forward.w2", hidden)
        samples.append(torch.stack(stream))
    return torch.stack(samples)


def test_block_equals_a_naive_one():
    block, (x, condition) = build(DiTBlock(16, 4, 64)), inputs()
    with torch.no_grad():
        torch.testing.assert_close(block(x, condition), naive_block(block, x, condition, 4))


def test_block_is_an_identity_at_first():
    block, (x, condition) = build(DiTBlock(16, 4, 64), is_trained=False), inputs()
    assert torch.equal(block(x, condition), x)


def test_every_token_sees_every_other():
    block, (x, condition) = build(DiTBlock(16, 4, 64)), inputs(batch=1)
    x.requires_grad_()
    for position in range(5):
        (gradient,) = torch.autograd.grad(block(x, condition)[0, position].sum(), x)
        assert (gradient[0].abs().sum(1) > 0).all()


def test_condition_of_a_sample_is_its_own():
    block, (x, condition) = build(DiTBlock(16, 4, 64)), inputs()
    changed = condition.clone()
    changed[1] += 1
    before, after = block(x, condition), block(x, changed)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_final_layer_norms_modulates_and_projects():
    layer, (x, condition) = build(FinalLayer(16, 12)), inputs()
    w = dict(layer.named_parameters())
    with torch.no_grad():
        out = layer(x, condition)
        for b, t in ((0, 0), (1, 4)):
            c = condition[b] * torch.sigmoid(condition[b])
            shift, scale = (w["modulation.linear.weight"] @ c + w["modulation.linear.bias"]).view(
                2, -1
            )
            modulated = norm(x[b, t]) * (1 + scale) + shift
            torch.testing.assert_close(out[b, t], w["linear.weight"] @ modulated + w["linear.bias"])
    assert not build(FinalLayer(16, 12), is_trained=False)(x, condition).any()


def test_modulation_that_says_nothing_changes_nothing():
    x, condition = inputs()
    shift, scale = build(Modulation(16, 2), is_trained=False)(condition)
    assert shift.shape == scale.shape == (2, 1, 16)
    assert torch.equal(modulate(x, shift, scale), x)


def test_linear_layers_are_drawn_as_in_dit():
    block = build(DiTBlock(64, 4, 256), torch.float32, is_trained=False)
    expected = {
        "attention.wq": 6 / (64 + 192),  # one matrix in DiT
        "attention.wk": 6 / (64 + 192),
        "attention.wv": 6 / (64 + 192),
        "attention.wo": 6 / (64 + 64),
        "feed_forward.w1": 6 / (64 + 256),
        "feed_forward.w2": 6 / (64 + 256),
    }
    for name, square in expected.items():
        weight = block.get_parameter(f"{name}.weight")
        assert weight.abs().max().item() == pytest.approx(math.sqrt(square), rel=0.01)
        assert weight.abs().max() <= math.sqrt(square)
        assert not block.get_parameter(f"{name}.bias").any()
    assert not torch.equal(block.attention.wq.weight, block.attention.wk.weight)


def test_bfloat16_runs_through():
    block, (x, condition) = build(DiTBlock(16, 4, 64), torch.bfloat16), inputs()
    out = block(x.bfloat16(), condition.bfloat16())
    assert out.dtype == torch.bfloat16
    exact = build(DiTBlock(16, 4, 64))(x, condition)
    torch.testing.assert_close(out.double(), exact, atol=0.1, rtol=0.1)
