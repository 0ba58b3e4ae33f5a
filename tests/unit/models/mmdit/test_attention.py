import pytest
import torch

from tests.unit.models.mmdit.naive import (
    count,
    naive_attention,
    randn,
    randn_streams,
    random_mask,
    shake,
)
from torchtitan_mixtures.models.mmdit.joint_attention import (
    AdaptiveAttention,
    JointAttention,
    SoftclampAttention,
)

DIMS = {"text": 6, "image": 8, "sound": 5}
LENGTHS = (3, 4, 2)
KINDS = {
    "plain": {},
    "biases": {"qkv_bias": True, "out_bias": True},
    "norm of all heads": {"qk_norm": "shared"},
    "norm per head": {"qk_norm": "per_head"},
    "soft clamp": {"softclamp": 0.7},
    "adaptive": {"num_adaptive_weights": 3},
    "all": {
        "num_adaptive_weights": 2,
        "softclamp": 1.5,
        "qk_norm": "per_head",
        "qkv_bias": True,
        "out_bias": True,
    },
}


def attention_of(dims=DIMS, heads=2, head_dim=4, **fields):
    torch.manual_seed(0)
    return shake(JointAttention(dims, heads, head_dim, **fields))


def naive(attention, streams, masks=None, heads=2, head_dim=4, **fields):
    return naive_attention(
        dict(attention.named_parameters()),
        streams,
        masks,
        heads=heads,
        head_dim=head_dim,
        qk_norm=fields.get("qk_norm", "none"),
        softclamp=fields.get("softclamp"),
        weights=fields.get("num_adaptive_weights", 1),
    )


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("masked", [(), ("text",), ("text", "image", "sound")])
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_is_a_loop_over_tokens_heads_and_weights(fields, masked):
    attention, streams = attention_of(**fields), randn_streams(DIMS, LENGTHS)
    masks = {name: random_mask(2, streams[name].shape[1], i) for i, name in enumerate(masked)}
    close(attention(streams, masks), naive(attention, streams, masks, **fields))


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_gradients_are_those_of_the_loop(fields):
    attention, streams = attention_of(**fields), randn_streams(DIMS, LENGTHS, batch=1)
    masks = {"text": torch.tensor([[True, False, True]])}
    grads = []
    for outputs in (attention(streams, masks), naive(attention, streams, masks, **fields)):
        loss = sum(x.square().sum() for x in outputs.values())
        grads.append(torch.autograd.grad(loss, list(attention.parameters())))
    close(*grads, tolerance=1e-9)


def test_the_fused_projection_is_ordered_by_head():
    # Half of the rows are half of the heads, as tensor parallelism needs it.
    attention, streams = attention_of(), randn_streams(DIMS, LENGTHS)
    halves = []
    for rank in range(2):
        half = attention_of(heads=1)
        for name in DIMS:
            half.wqkv[name].weight.data = attention.wqkv[name].weight.data.chunk(2)[rank]
            half.wo[name].weight.data = attention.wo[name].weight.data.chunk(2, dim=1)[rank]
        halves.append(half(streams))
    close({name: halves[0][name] + halves[1][name] for name in DIMS}, attention(streams))


def test_adaptive_weights_are_ordered_by_head():
    attention, streams = attention_of(num_adaptive_weights=3), randn_streams(DIMS, LENGTHS)
    halves = []
    for rank in range(2):
        half = attention_of(heads=1, num_adaptive_weights=3)
        for name in DIMS:
            half.wqkv[name].weight.data = attention.wqkv[name].weight.data.chunk(2)[rank]
            half.gates[name].weight.data = attention.gates[name].weight.data.chunk(2)[rank]
            half.gates[name].bias.data = attention.gates[name].bias.data.chunk(2)[rank]
            half.wo[name].weight.data = attention.wo[name].weight.data.chunk(2, dim=1)[rank]
        halves.append(half(streams))
    close({name: halves[0][name] + halves[1][name] for name in DIMS}, attention(streams))


@pytest.mark.parametrize("qk_norm", ["none", "shared", "per_head"])
def test_modalities_with_equal_weights_are_one_sequence(qk_norm):
    two = attention_of({"text": 6, "image": 6}, qk_norm=qk_norm)
    one = attention_of({"text": 6}, qk_norm=qk_norm)
    weights = {n: p for n, p in two.state_dict().items() if ".text." in n}
    one.load_state_dict(weights)
    two.load_state_dict(weights | {n.replace(".text.", ".image."): p for n, p in weights.items()})
    streams = randn_streams({"text": 6, "image": 6}, (3, 4))
    joined = one({"text": torch.cat(list(streams.values()), dim=1)})["text"]
    close(torch.cat(list(two(streams).values()), dim=1), joined)


def test_the_order_of_modalities_does_not_matter():
    attention, streams = attention_of(qk_norm="shared"), randn_streams(DIMS, LENGTHS)
    masks = {"image": random_mask(2, 4)}
    turned = {name: streams[name] for name in ("sound", "text", "image")}
    found = attention(turned, masks)
    assert list(found) == ["sound", "text", "image"]
    close(found, {name: attention(streams, masks)[name] for name in found})


def test_masked_tokens_influence_nobody_else():
    attention, streams = attention_of(), randn_streams(DIMS, LENGTHS)
    mask = torch.tensor([[True, False, True]] * 2)
    changed = streams | {"text": streams["text"].masked_fill(~mask[:, :, None], 7.0)}
    before, after = (attention(x, {"text": mask}) for x in (streams, changed))
    for name in ("image", "sound"):
        close(before[name], after[name])
    close(before["text"][mask], after["text"][mask])
    assert (attention(changed)["image"] - attention(streams)["image"]).abs().min() > 1e-6


@pytest.mark.parametrize("softclamp", [None, 3.0])
def test_without_masks_no_mask_is_made(softclamp):
    attention, given = attention_of(softclamp=softclamp), []
    attention.inner_attention.register_forward_pre_hook(lambda module, args: given.append(args))
    streams = randn_streams(DIMS, LENGTHS)
    everything = {name: torch.ones(x.shape[:2], dtype=torch.bool) for name, x in streams.items()}
    close(attention(streams), attention(streams, {"text": None}))
    close(attention(streams), attention(streams, everything))
    assert [len(args) for args in given] == [3, 3, 3, 4]
    assert given[-1][3].shape == (2, 1, 1, 9)


@pytest.mark.parametrize("softclamp", [None, 3.0])
def test_nothing_comes_of_a_sample_of_which_no_token_is_seen(softclamp):
    attention, streams = attention_of(softclamp=softclamp), randn_streams(DIMS, LENGTHS)
    masks = {n: torch.tensor([[True], [False]]).expand(x.shape[:2]) for n, x in streams.items()}
    streams = {name: x.requires_grad_() for name, x in streams.items()}
    found = attention(streams, masks)
    close(found["image"][0], attention(streams)["image"][0])
    assert not found["image"][1].any()
    grads = torch.autograd.grad(found["image"].sum(), list(streams.values()))
    assert all(grad.isfinite().all() for grad in grads)


def test_every_token_sees_later_ones():
    attention, streams = attention_of(), randn_streams(DIMS, LENGTHS)
    changed = streams | {"sound": streams["sound"] + randn(2, 2, 5, seed=9)}
    before, after = attention(streams), attention(changed)
    for name in DIMS:
        assert ((after[name] - before[name]).abs().amax(2) > 1e-6).all()


def test_modalities_without_output_are_seen_all_the_same():
    full, streams = attention_of(), randn_streams(DIMS, LENGTHS)
    pre_only = attention_of(pre_only=("text", "sound"))
    pre_only.load_state_dict({n: full.state_dict()[n] for n in pre_only.state_dict()})
    assert [n for n in pre_only.state_dict() if n.startswith("wo")] == ["wo.image.weight"]
    found = pre_only(streams)
    assert list(found) == ["image"]
    close(found["image"], full(streams)["image"])


def test_norms_per_head_make_the_size_of_projections_irrelevant():
    attention, streams = attention_of(qk_norm="per_head"), randn_streams(DIMS, LENGTHS)
    expected = attention(streams)
    factors = torch.tensor([3.0, 0.02, 1.0], dtype=torch.float64)  # queries, keys, values
    with torch.no_grad():
        for linear in attention.wqkv.values():
            linear.weight.view(2, 3, 4, -1).mul_(factors[:, None, None])
    close(attention(streams), expected)


def test_norms_have_weights_of_each_modality_and_head():
    assert attention_of(qk_norm="shared").q_norm["text"].weight.shape == (4,)
    assert attention_of(qk_norm="per_head").k_norm["sound"].weight.shape == (2, 4)
    plain, shared, per_head = (
        count(attention_of(qk_norm=k)) for k in ("none", "shared", "per_head")
    )
    assert (shared - plain, per_head - plain) == (3 * 2 * 4, 3 * 2 * 2 * 4)


def test_a_soft_clamp_bounds_logits():
    # With logits of at most 1 a share is at most e^2 times another.
    q = 100 * randn(1, 2, 4, 8)
    values = torch.eye(4, dtype=torch.float64).expand(1, 2, 4, 4)
    shares = SoftclampAttention(1.0)(q, q, values, is_causal=False)
    ratio = shares.amax(3) / shares.amin(3)
    assert 5 < ratio.max() <= torch.e**2 + 1e-9
    plain = SoftclampAttention(1e9)(q, q, values, is_causal=False)
    assert plain.amin() < 1e-30


def test_a_wide_soft_clamp_is_none():
    streams = randn_streams(DIMS, LENGTHS)
    masks = {"text": random_mask(2, 3)}
    plain, clamped = attention_of(), attention_of(softclamp=1e7)
    close(clamped(streams, masks), plain(streams, masks))
    tight = attention_of(softclamp=0.5)(streams, masks)
    assert (tight["image"] - plain(streams, masks)["image"]).abs().max() > 1e-3


def test_a_soft_clamp_is_computed_in_float32():
    q, k, v = (randn(1, 1, 6, 8, seed=i) for i in range(3))
    low = [x.bfloat16() for x in (q, k, v)]
    found = SoftclampAttention(50.0)(*low, is_causal=False)
    assert found.dtype == torch.bfloat16
    expected = SoftclampAttention(50.0)(*(x.double() for x in low), is_causal=False)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)


def test_a_soft_clamp_hides_nothing_by_order():
    with pytest.raises(ValueError, match=r"is_causal.*sees all tokens"):
        SoftclampAttention(1.0)(*[randn(1, 1, 2, 4)] * 3, is_causal=True)


@pytest.mark.parametrize("fields", [{}, {"qk_rmsnorm": True, "softclamp": True}])
def test_adaptive_attention_is_a_loop(fields):
    torch.manual_seed(0)
    module = shake(AdaptiveAttention(8, dim_head=4, heads=2, num_adaptive_weights=3, **fields))
    x, mask = randn(2, 5, 8), random_mask(2, 5)
    expected = naive(
        module.attention,
        {"tokens": x},
        {"tokens": mask},
        num_adaptive_weights=3,
        qk_norm="per_head" if fields else "none",
        softclamp=50.0 if fields else None,
    )
    close(module(x, mask), expected["tokens"])
    assert module(x).shape == x.shape


def test_adaptive_attention_with_one_weight_is_plain():
    torch.manual_seed(0)
    module, x = AdaptiveAttention(8, dim_head=4, heads=2).double(), randn(2, 5, 8)
    assert not module.attention.gates
    heads = (x @ module.attention.wqkv["tokens"].weight.t()).view(2, 5, 2, 3, 4)
    q, k, v = heads.permute(3, 0, 2, 1, 4)
    attended = (q @ k.mT / 2).softmax(3) @ v
    expected = attended.transpose(1, 2).flatten(2) @ module.attention.wo["tokens"].weight.t()
    close(module(x), expected)


def test_equal_candidates_are_plain_attention():
    plain, adaptive = attention_of(), attention_of(num_adaptive_weights=3)
    weights = adaptive.state_dict()
    for name in DIMS:
        rows = plain.wqkv[name].weight.data.view(2, 1, 12, -1)
        weights[f"wqkv.{name}.weight"] = rows.expand(2, 3, 12, -1).flatten(0, 2)
        columns = plain.wo[name].weight.data.view(-1, 2, 1, 4)
        weights[f"wo.{name}.weight"] = columns.expand(-1, 2, 3, 4).flatten(1)
    adaptive.load_state_dict(weights)
    streams, masks = randn_streams(DIMS, LENGTHS), {"text": random_mask(2, 3)}
    close(adaptive(streams, masks), plain(streams, masks))


def test_tokens_choose_between_candidates():
    attention, streams = attention_of(num_adaptive_weights=2), randn_streams(DIMS, LENGTHS)
    before = attention(streams)
    with torch.no_grad():
        attention.gates["text"].bias.add_(torch.tensor([3.0, -3.0] * 2))
    assert (attention(streams)["image"] - before["image"]).abs().max() > 1e-4


def test_candidates_start_as_large_as_what_they_replace():
    torch.manual_seed(0)
    one, four = (AdaptiveAttention(64, heads=2, num_adaptive_weights=w).attention for w in (1, 4))
    for name in ("wqkv", "wo"):
        first, second = (getattr(module, name)["tokens"].weight for module in (one, four))
        assert second.std().item() == pytest.approx(first.std().item(), rel=0.03)
        assert second.numel() == 4 * first.numel()


BAD = {
    "n_heads": ({"heads": 0}, r"n_heads = 0.*positive"),
    "head_dim": ({"head_dim": -1}, r"head_dim = -1.*positive"),
    "weights": ({"num_adaptive_weights": 0}, r"num_adaptive_weights = 0.*positive"),
    "qk_norm": ({"qk_norm": "rms"}, r"qk_norm = 'rms'.*'shared'"),
    "softclamp": ({"softclamp": 0.0}, r"softclamp = 0.0.*positive"),
    "infinite": ({"softclamp": float("inf")}, r"softclamp = inf.*None"),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD)
def test_values_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        attention_of(**fields)


def test_adaptive_attention_refuses_wrong_inputs():
    module = AdaptiveAttention(8, dim_head=4, heads=2)
    with pytest.raises(ValueError, match=r"x is \(2, 5, 7\).*dim = 8"):
        module(torch.zeros(2, 5, 7))
    with pytest.raises(ValueError, match=r"mask is torch.float32.*torch.bool"):
        module(torch.zeros(2, 5, 8), torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"mask is \(2, 4\).*\(2, 5\)"):
        module(torch.zeros(2, 5, 8), torch.ones(2, 4, dtype=torch.bool))
