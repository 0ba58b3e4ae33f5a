"""The trainable MMDiT: its counts, its prompts, its positions, and what must not change it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from torchtitan_mixtures.data.prompt_spec import EncoderSpan, PromptSpec
from torchtitan_mixtures.models.common.embeddings import centred_position_table, position_table
from torchtitan_mixtures.models.mmdit import mmdit_args
from torchtitan_mixtures.models.mmdit.args import MMDiTModelArgs
from torchtitan_mixtures.models.mmdit.model import MMDiTDenoiser, drop_spans

# Specification 2.3: without and with norms of queries and keys.
COUNTS = {
    "d15": (496_066_624, 496_070_464),
    "d18": (856_159_552, 856_164_160),
    "d24": (2_028_328_000, 2_028_334_144),
    "d30": (3_962_392_384, 3_962_400_064),
    "d38": (8_056_617_792, 8_056_627_520),
}

IDS = PromptSpec("text", "tokens", length=6, vocab_size=20, null_token=3)
SOUND = PromptSpec("speech", "tokens", length=4, vocab_size=9, null_token=8)
VECTORS = PromptSpec(
    "text",
    "embeddings",
    length=5,
    dim=12,
    pooled_dim=7,
    spans=(
        EncoderSpan("a", (0, 3), (0, 8), (0, 4)),
        EncoderSpan("b", (0, 3), (8, 12), (4, 7)),
        EncoderSpan("c", (3, 5), (0, 12)),
    ),
)


def tiny_args(prompts=(IDS,), **keys):
    return MMDiTModelArgs(
        dim=16,
        n_layers=2,
        n_heads=2,
        patch_size=2,
        in_channels=3,
        image_size=8,
        prompt_names=tuple(spec.name for spec in prompts),
        prompts=prompts,
        encoder_layers=1,
        encoder_dim=8,
        encoder_heads=2,
        init_seed=0,
        **keys,
    )


def build(args, perturb=True):
    model = MMDiTDenoiser(args)
    model.init_weights()
    if perturb:  # gates and head start at zero and would hide everything
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model.double()


def make_inputs(args, batch=3, height=8, width=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, args.in_channels, height, width, generator=rng, dtype=torch.float64)
    times = torch.rand(batch, generator=rng, dtype=torch.float64) * 1000
    prompts = {}
    for spec in args.prompts:
        shape = (batch, spec.length)
        if spec.kind == "tokens":
            prompts[spec.name] = torch.randint(0, spec.vocab_size, shape, generator=rng)
            continue
        prompts[spec.name] = torch.randn(*shape, spec.dim, generator=rng, dtype=torch.float64)
        pooled = torch.randn(batch, spec.pooled_dim, generator=rng, dtype=torch.float64)
        prompts[f"{spec.name}_pooled"] = pooled
    return images, times, prompts


def predict(model, inputs, kept=None):
    return model(*inputs, kept=kept).prediction


@pytest.mark.parametrize("flavor", COUNTS)
@pytest.mark.parametrize("normed", [False, True])
def test_the_counts_of_stable_diffusion_3_are_those_of_the_specification(flavor, normed):
    args = dataclasses.replace(mmdit_args[flavor], qk_norm="shared" if normed else "none")
    with torch.device("meta"):
        model = MMDiTDenoiser(args)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[flavor][normed]


@pytest.mark.parametrize("prompts", [(IDS,), (VECTORS,), (IDS, SOUND)])
def test_at_first_the_prediction_is_zero(prompts):
    args = tiny_args(prompts)
    assert predict(build(args, perturb=False), make_inputs(args)).abs().max() == 0


@pytest.mark.parametrize("prompts", [(IDS,), (VECTORS,), (IDS, SOUND)])
@pytest.mark.parametrize("single_stream", [False, True])
def test_all_inputs_change_the_prediction_of_their_own_sample_alone(prompts, single_stream):
    args = tiny_args(prompts, single_stream=single_stream)
    model, inputs = build(args), make_inputs(args)
    first = predict(model, inputs)
    assert first.shape == (3, 16, 12)
    images, times, others = make_inputs(args, seed=7)
    changed = [(images, *inputs[1:]), (inputs[0], times, inputs[2])]
    for name in others:
        changed.append((*inputs[:2], {**inputs[2], name: others[name]}))
    for given in changed:
        mixed = [_last_of(new, old) for new, old in zip(given[:2], inputs[:2], strict=True)]
        mixed.append({k: _last_of(given[2][k], inputs[2][k]) for k in inputs[2]})
        second = predict(model, mixed)
        torch.testing.assert_close(second[:2], first[:2])
        assert (second[2] - first[2]).abs().max() > 1e-3


def _last_of(new, old):
    return torch.cat([old[:2], new[2:]])


def test_dropped_ids_are_padding():
    args = tiny_args((IDS, SOUND))
    model, (images, times, prompts) = build(args), make_inputs(args)
    kept = torch.tensor([[True, True], [False, True], [True, False]])
    empty = {name: ids.clone() for name, ids in prompts.items()}
    empty["text"][1], empty["speech"][2] = IDS.null_token, SOUND.null_token
    expected = predict(model, (images, times, empty))
    torch.testing.assert_close(predict(model, (images, times, prompts), kept), expected)
    assert (expected - predict(model, (images, times, prompts)))[1:].abs().max() > 1e-3


def test_dropped_encoders_leave_zeros_where_their_spans_are():
    args = tiny_args((VECTORS,))
    model, (images, times, prompts) = build(args), make_inputs(args, batch=4)
    kept = torch.eye(3, dtype=torch.bool)
    kept = torch.cat([~kept, torch.zeros(1, 3, dtype=torch.bool)])
    changed = {name: x.clone() for name, x in prompts.items()}
    changed["text"][0, :3, :8], changed["text_pooled"][0, :4] = 0, 0
    changed["text"][1, :3, 8:], changed["text_pooled"][1, 4:] = 0, 0
    changed["text"][2, 3:] = 0
    changed["text"][3], changed["text_pooled"][3] = 0, 0
    # Nothing is there outside of the spans.
    expected = predict(model, (images, times, changed))
    torch.testing.assert_close(predict(model, (images, times, prompts), kept), expected)
    before = {name: x.clone() for name, x in prompts.items()}
    drop_spans(VECTORS, prompts["text"], prompts["text_pooled"], kept)
    assert all(torch.equal(before[name], prompts[name]) for name in prompts)


def test_one_stream_is_two_streams_with_the_same_weights():
    single = build(tiny_args(single_stream=True))
    double = MMDiTDenoiser(tiny_args()).double()
    # The last block of the latter has no text behind attention.
    state = {
        name: single.state_dict()[name.replace(".text.", ".image.") if "layers" in name else name]
        for name in double.state_dict()
    }
    dim = double.model_args.dim
    for name in ("weight", "bias"):
        key = f"layers.1.modulation.text.linear.{name}"
        state[key] = state[key][: 2 * dim]
    double.load_state_dict(state)
    inputs = make_inputs(double.model_args)
    torch.testing.assert_close(predict(double, inputs), predict(single, inputs))


def test_residual_streams_change_nothing_at_first():
    plain = build(tiny_args())
    for dynamic in (True, False):
        args = tiny_args(num_residual_streams=4, dynamic_streams=dynamic)
        several = build(args, perturb=False)
        missing, unexpected = several.load_state_dict(plain.state_dict(), strict=False)
        assert missing and all("_streams." in name for name in missing) and not unexpected
        inputs = make_inputs(args)
        torch.testing.assert_close(predict(several, inputs), predict(plain, inputs))


@pytest.mark.parametrize("single_stream", [False, True])
def test_registers_are_seen_and_taken_away_again(single_stream):
    counts = (2,) if single_stream else (3, 2)
    args = tiny_args(num_registers=counts, single_stream=single_stream)
    model = build(args)
    inputs = make_inputs(args)
    first = predict(model, inputs)
    assert first.shape == (3, 16, 12)
    for name in model.registers:
        with torch.no_grad():
            model.registers[name].weight.mul_(-1)
        second = predict(model, inputs)
        assert (second - first).abs().max() > 1e-4
        first = second
    none = MMDiTDenoiser(tiny_args(single_stream=single_stream, num_registers=(0,) * len(counts)))
    assert not any(name.startswith("registers") for name in none.state_dict())


def test_images_of_any_shape_have_as_many_tokens_as_patches():
    args = tiny_args()
    model = build(args)
    assert predict(model, make_inputs(args, height=4, width=14)).shape == (3, 14, 12)
    with pytest.raises(ValueError, match="patch_size = 2"):
        model(*make_inputs(args, height=5, width=8))


def test_square_images_have_the_places_of_dit():
    table = centred_position_table(16, 6, 6, 6, 6, torch.device("cpu"))
    assert torch.equal(table, position_table(16, 6))


@pytest.mark.parametrize(("rows", "columns"), [(4, 9), (3, 12), (5, 7), (6, 6), (8, 5)])
def test_other_shapes_are_cut_out_of_the_middle_of_a_large_table(rows, columns):
    # arXiv 2403.03206, 4.2: places (p - (largest - side) / 2) * 256 / S, here with 4 of 6 a side.
    largest, side, scaled = 20, 6, 4
    places = (torch.arange(largest, dtype=torch.float64) - (largest - side) / 2) * scaled / side
    powers = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angles = places[:, None] * powers
    line = torch.cat([angles.sin(), angles.cos()], 1)  # (largest, 8)
    top, left = (largest - rows) // 2, (largest - columns) // 2
    expected = torch.empty(rows, columns, 16, dtype=torch.float64)
    expected[..., :8] = line[left : left + columns]
    expected[..., 8:] = line[top : top + rows, None]
    found = centred_position_table(16, rows, columns, side, scaled, torch.device("cpu"))
    torch.testing.assert_close(found, expected.flatten(0, 1).float())


def test_wrong_inputs_are_refused_with_both_shapes():
    args = tiny_args((VECTORS,))
    model, (images, times, prompts) = build(args), make_inputs(args)
    with pytest.raises(ValueError, match=r"\(3, 4, 12\).*\(3, 5, 12\)"):
        model(images, times, {**prompts, "text": prompts["text"][:, :4]})
    with pytest.raises(ValueError, match="text_pooled"):
        model(images, times, {"text": prompts["text"]})
    with pytest.raises(ValueError, match="3 encoders"):
        model(images, times, prompts, kept=torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="3, height, width"):
        model(images[:, :2], times, prompts)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"n_heads": 5}, "n_heads = 5"),
        ({"dim": 18, "n_heads": 2}, "dim = 18"),
        ({"patch_size": 3}, "multimodal.image_size = 8"),
        ({"qk_norm": "all"}, "qk_norm = 'all'"),
        ({"modulation": "film"}, "modulation = 'film'"),
        ({"softclamp": 0.0}, "softclamp = 0.0"),
        ({"num_registers": (1, 2, 3)}, "num_registers"),
        ({"num_registers": (1, -2)}, "num_registers"),
        ({"prompt_dims": (8, 8)}, "prompt_dims"),
        ({"prompt_dims": (8,), "single_stream": True}, "prompt_dims"),
        ({"prompt_names": ("image",)}, "prompts"),
        ({"num_residual_streams": 0}, "num_residual_streams = 0"),
    ],
)
def test_arguments_that_cannot_work_are_named(keys, named):
    with pytest.raises(ValueError, match=named.replace("(", r"\(")):
        dataclasses.replace(tiny_args(), **keys)
