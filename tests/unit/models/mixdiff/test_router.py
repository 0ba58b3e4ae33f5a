"""Routers against naive ones, written out with the weights of their state dicts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.unit.models.mixdiff.helpers import make_args, make_batch, make_model
from torchtitan_mixtures.data.prompt_spec import EncoderSpan, PromptSpec
from torchtitan_mixtures.models.mixdiff.router import Router, count_macs


def time_features(times):
    """Cosines, then sines, of 256 features."""
    rates = torch.tensor([10000.0 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angles = times.double()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], 1)


def class_vector(state, condition):
    return torch.stack([state["prompt.classes.weight"][c] for c in condition["class_labels"]])


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def silu(x):
    return x / (1 + (-x).exp())


def naive_features(state, latents, times, condition):
    means = latents.reshape(len(latents), 3, 8, 4, 8, 4).mean((3, 5))
    return torch.cat([class_vector(state, condition), means.flatten(1), time_features(times)], 1)


def test_a_linear_router_is_linear_in_what_it_reads():
    model = make_model(router="linear")
    latents, times, condition = make_batch(model.model_args)
    state = model.router.state_dict()
    features = naive_features(state, latents, times, condition)
    found = model.router(latents, times, **condition)
    torch.testing.assert_close(found, linear(features, state, "head"))


def test_a_perceptron_has_two_layers():
    model = make_model(router="mlp")
    latents, times, condition = make_batch(model.model_args)
    state = model.router.state_dict()
    hidden = naive_features(state, latents, times, condition)
    for name in ("body.w1", "body.w2"):
        hidden = silu(linear(hidden, state, name))
    found = model.router(latents, times, **condition)
    torch.testing.assert_close(found, linear(hidden, state, "head"))


def norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()


def places(dim, side):
    """Sines and cosines of the column, then of the row, of each place."""
    rows = []
    for row in range(side):
        for column in range(side):
            values = []
            for place in (column, row):
                angles = [place / 10000 ** (i / (dim // 4)) for i in range(dim // 4)]
                values += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(values)
    return torch.tensor(rows, dtype=torch.float64)


def naive_block(x, condition, state, name, heads):
    parts = linear(silu(condition), state, f"{name}.modulation.linear").chunk(6, 1)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (part[:, None] for part in parts)
    y = norm(x) * (1 + scale) + shift
    q, k, v = (
        linear(y, state, f"{name}.attention.{w}").unflatten(2, (heads, -1)).transpose(1, 2)
        for w in ("wq", "wk", "wv")
    )
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)
    attended = (scores @ v).transpose(1, 2).flatten(2)
    x = x + gate * linear(attended, state, f"{name}.attention.wo")
    y = norm(x) * (1 + ffn_scale) + ffn_shift
    hidden = F.gelu(linear(y, state, f"{name}.feed_forward.w1"), approximate="tanh")
    return x + ffn_gate * linear(hidden, state, f"{name}.feed_forward.w2")


def test_a_transformer_is_a_small_dit_whose_first_token_is_read():
    model = make_model()
    args = model.model_args
    latents, times, condition = make_batch(args)
    state, dim, side = model.router.state_dict(), args.router_dim, 4
    patches = latents.reshape(-1, 3, side, 8, side, 8).permute(0, 2, 4, 3, 5, 1).flatten(3)
    patches = linear(patches.flatten(1, 2), state, "body.x_embedder") + places(dim, side)
    first = state["body.token"].expand(len(latents), 1, dim)
    x = torch.cat([first, class_vector(state, condition)[:, None], patches], 1)
    told = linear(time_features(times), state, "body.t_embedder.w1")
    told = linear(silu(told), state, "body.t_embedder.w2")
    for layer in range(args.router_layers):
        x = naive_block(x, told, state, f"body.layers.{layer}", args.router_heads)
    expected = linear(norm(x[:, 0]), state, "head")
    # Places are float32 in the package.
    found = model.router(latents, times, **condition)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_of_tokens_is_the_mean_of_those_that_are_kept():
    model = make_model("debugmodel_mmdit", router="linear", router_inputs=("prompt",))
    router = model.router
    ids = torch.zeros(3, 40, dtype=torch.int64)
    ids[0, :3] = torch.tensor([5, 7, 7])
    ids[1, :2] = torch.tensor([9, 4])
    kept = torch.tensor([[True], [False], [True]])
    table = router.prompt.prompts["text"].weight
    empty = torch.zeros_like(table[0])
    vectors = torch.stack([(table[5] + 2 * table[7]) / 3, empty, empty])
    latents, times, _ = make_batch(model.model_args, batch=3)
    found = router(latents, times, prompts={"text": ids}, kept=kept)
    torch.testing.assert_close(found, linear(vectors, router.state_dict(), "head"))


SPANS = (
    EncoderSpan("a", rows=(0, 4), channels=(0, 3), pooled=(0, 2)),
    EncoderSpan("b", rows=(0, 4), channels=(3, 8), pooled=(2, 5)),
    EncoderSpan("c", rows=(4, 6), channels=(0, 8)),
)


@pytest.mark.parametrize("spans", [SPANS, ()])
def test_a_prompt_of_embeddings_is_the_mean_of_what_each_encoder_says(spans):
    spec = PromptSpec("text", "embeddings", length=6, dim=8, pooled_dim=5, spans=spans)
    args = make_args("debugmodel_mmdit", prompts=(spec,), router="linear",
                     router_inputs=("prompt",))  # fmt: skip
    router = Router(args).double()
    rng = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
    embeddings = torch.randn(2, 6, 8, generator=rng, dtype=torch.float64)
    pooled = torch.randn(2, 5, generator=rng, dtype=torch.float64)
    kept = torch.tensor([[True, False, True], [False, True, True]])[:, : max(1, len(spans))]
    state, vectors = router.state_dict(), []
    whole = (EncoderSpan("all", (0, 6), (0, 8), (0, 5)),)
    for sample in range(2):
        total = torch.zeros(args.router_dim, dtype=torch.float64)
        for number, span in enumerate(spans or whole):
            if not kept[sample, number]:
                continue
            mean = embeddings[sample, slice(*span.rows), slice(*span.channels)].mean(0)
            features = torch.cat([mean, pooled[sample, slice(*span.pooled)]])
            total += linear(features, state, f"prompt.prompts.text.layers.{number}")
        vectors.append(total)
    latents, times = torch.zeros(2, 3, 32, 32), torch.zeros(2)
    prompts = {"text": embeddings, "text_pooled": pooled}
    found = router(latents, times, prompts=prompts, kept=kept)
    torch.testing.assert_close(found, linear(torch.stack(vectors), state, "head"))


def test_latents_of_any_size_can_be_read():
    for kind in ("linear", "mlp", "transformer"):
        model = make_model("debugmodel_mmdit", router=kind)
        _, times, condition = make_batch(model.model_args)
        latents = torch.randn(6, 3, 24, 40, dtype=torch.float64)
        assert model.router(latents, times, **condition).shape == (6, 3)


@pytest.mark.parametrize("kind", ["linear", "mlp", "transformer"])
def test_a_router_costs_what_it_says(kind):
    args = make_args(router=kind)
    width = 64 + 3 * 64 + 256
    expected = {"linear": width * 3, "mlp": width * 64 + 64**2 + 64 * 3}
    tokens = 1 + 1 + 16
    block = 4 * tokens * 64**2 + 2 * tokens**2 * 64 + 2 * tokens * 64 * 256 + 6 * 64**2
    expected["transformer"] = 2 * block + 16 * 192 * 64 + 256 * 64 + 64**2 + 64 * 3
    assert count_macs(args) == expected[kind]
