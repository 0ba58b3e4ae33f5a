import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.unit.models.mot.helpers import (
    build,
    masks_of,
    naive_forward,
    random_batch,
    tiny_args,
)
from torchtitan_mixtures.models.common.dispatch import plan_by_sorting
from torchtitan_mixtures.models.mot import mot_args
from torchtitan_mixtures.models.mot.attention import ModalityUntiedAttention, merge_modalities
from torchtitan_mixtures.models.mot.feed_forward import ModalityUntiedFeedForward
from torchtitan_mixtures.models.mot.model import MoTTransformer, MoTTransformerBlock

MASKED = {"attn_type": "sdpa_dense", "attn_mask_type": "block_causal"}


@pytest.mark.parametrize("dispatch", ["split", "grouped", "reference"])
@pytest.mark.parametrize(
    ("n_modalities", "fields"),
    [
        (2, {}),
        (2, {"norm_position": "post"}),
        (3, {"qk_normalization": True}),
        (3, {"norm_position": "post", "qk_normalization": True, "n_kv_heads": None}),
        (3, {"tower_of_modality": [0, 0, 1]}),
        (3, {"tower_of_modality": [1, 0, 1], "untie_final_norm": True}),
        (3, {"tower_of_modality": [0, 0, 0]}),
        (2, {"untie_attention": False, "qk_normalization": True}),
        (2, {"untie_ffn": False}),
        (2, {"untie_norm": False}),
        (2, {"untie_attention": False, "untie_ffn": False, "untie_norm": False}),
        (2, {"n_heads": 2, "n_kv_heads": 1, "rope_theta": 100.0}),
        (3, {**MASKED, "n_layers": 1}),
    ],
)
def test_equals_the_paper_token_by_token(n_modalities, fields, dispatch):
    model = build(tiny_args(n_modalities, dispatch=dispatch, **fields))
    tokens, masks = random_batch(n_modalities, seq=11)
    documents = (
        torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [1] * 2]) if "attn_type" in fields else None
    )
    positions = torch.tensor([[*range(4), *range(7)], [*range(9), *range(2)]])
    with torch.no_grad():
        ours = model(tokens, masks, document_ids=documents, positions=positions)
        theirs = naive_forward(model, tokens, masks, documents, positions)
    # The rotary table is float32, the naive one float64.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_seed_example_runs_verbatim():
    model = MoTTransformer(tiny_args())
    model.init_weights()
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])  # (2, 4)
    modality_masks = [
        torch.tensor([True, True, False, False, True, False, False, True]),  # Text
        torch.tensor([False, False, True, True, False, True, True, False]),  # Image
    ]
    logits = model(tokens, modality_masks)
    stacked = torch.stack([mask.view(2, 4) for mask in modality_masks], dim=1)
    assert logits.shape == (2, 4, 48)
    assert torch.equal(logits, model(tokens, stacked))


def test_merge_modalities_equals_a_loop():
    masks = [torch.tensor([True, False, True, False, False])]
    masks += [torch.tensor([False, False, False, True, False]), ~masks[0]]
    masks[2] = ~(masks[0] | masks[1])
    outputs = [torch.randn(int(mask.sum()), 3, requires_grad=True) for mask in masks]
    rows = [iter(output) for output in outputs]
    expected = [next(rows[[bool(m[i]) for m in masks].index(True)]) for i in range(5)]
    assert torch.equal(merge_modalities(outputs, masks), torch.stack(expected))


def gradients(model, *inputs, **kwargs):
    model.zero_grad()
    output = model(*inputs, **kwargs)
    output.square().mean().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("pattern", ["random", "none", "one", "all", "one sequence each"])
@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("dispatch", ["split", "grouped"])
def test_executions_agree_in_outputs_and_every_gradient(dispatch, norm_position, pattern):
    tokens, masks = random_batch(3, seq=21)
    modality = {
        "random": masks.int().argmax(1),
        "none": masks[:, 1].long(),
        "one": torch.zeros(2, 21, dtype=torch.int64).index_put(
            (torch.tensor(1), torch.tensor(5)), torch.tensor(2)
        ),
        "all": torch.full((2, 21), 2),
        "one sequence each": torch.tensor([0, 1])[:, None].expand(2, 21),
    }[pattern]
    masks = masks_of(modality, 3)
    fields = {"qk_normalization": True, "norm_position": norm_position, "n_kv_heads": 4}
    results = []
    for kind in (dispatch, "reference"):
        # 24 / 16 wide in float64: the fallback of grouped_mm; float32 has its own test.
        model = build(tiny_args(3, dispatch=kind, **fields))
        results.append(gradients(model, tokens, masks))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    for name, grad in results[0][1].items():
        assert grad is not None, name
        torch.testing.assert_close(grad, results[1][1][name], rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_execution_agrees_in_training_precision(dtype):
    tokens, masks = random_batch(3)
    results = []
    for kind in ("grouped", "split"):
        results.append(gradients(build(tiny_args(3, dispatch=kind), dtype), tokens, masks))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=tolerance, atol=tolerance)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dispatch", ["split", "grouped", "reference"])
def test_absent_tower_has_gradients_of_exactly_zero(dispatch):
    model = build(tiny_args(3, dispatch=dispatch))
    tokens, masks = random_batch(3)
    masks = masks_of(masks[:, 1].long(), 3)
    _, grads = gradients(model, tokens, masks)
    absent = {name: grad for name, grad in grads.items() if ".speech." in name}
    assert len(absent) == 9 * 2
    assert all(grad is not None and not grad.any() for grad in absent.values())
    assert all(grad.any() for name, grad in grads.items() if ".speech." not in name)


def test_padding_contributes_nothing_whatever_its_amount():
    tokens, masks = random_batch(3)
    results = []
    for row_multiple in (1, 8, 64):
        model = build(tiny_args(3))
        model.row_multiple = row_multiple
        results.append(gradients(model, tokens, masks))
    for output, grads in results[1:]:
        torch.testing.assert_close(output, results[0][0], rtol=1e-12, atol=1e-12)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][1][name], rtol=1e-10, atol=1e-13)


def test_permuting_towers_together_with_labels_changes_nothing():
    model = build(tiny_args(3))
    tokens, masks = random_batch(3)
    permuted = build(tiny_args(3, modality_names=["speech", "text", "image"]))
    permuted.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(tokens, masks)
        torch.testing.assert_close(permuted(tokens, masks[:, [2, 0, 1]]), expected)


def test_modality_is_derived_from_the_vocabulary_ranges():
    model = build(tiny_args(3, vocab_size=20, code_vocab_sizes=[15, 13]))
    assert model.model_args.vocab_ranges == [(0, 20), (20, 35), (35, 48)]
    tokens, _ = random_batch(3)
    masks = masks_of((tokens >= 20).long() + (tokens >= 35).long(), 3)
    assert torch.equal(model(tokens), model(tokens, masks))


def test_tokens_without_exactly_one_modality_are_refused():
    model = build(tiny_args())
    tokens, masks = random_batch()
    masks[1, :, 3] = False
    masks[1, :, 7] = False
    message = (
        "2 of 38 tokens are covered by no modality mask; the first is position 3 of sequence 1"
    )
    with pytest.raises(ValueError, match=message):
        model(tokens, masks)
    tokens, masks = random_batch()
    masks[0, :, 4] = True
    with pytest.raises(ValueError, match="1 of 38 tokens are covered by more than one"):
        model(tokens, masks)


@pytest.mark.parametrize("has_masks", [True, False])
@pytest.mark.parametrize("token", [-1, 48])
def test_token_ids_outside_the_vocabulary_are_refused(token, has_masks):
    tokens, masks = random_batch()
    tokens[0, 2] = token
    message = r"1 of 38 tokens have an id outside .*\[\(0, 48\), \(48, 48\)\].* position 2 of seq"
    with pytest.raises(ValueError, match=message):
        build(tiny_args())(tokens, masks if has_masks else None)


def test_masks_of_another_shape_are_refused():
    model, (tokens, masks) = build(tiny_args()), random_batch()
    with pytest.raises(ValueError, match="modality_masks"):
        model(tokens, masks[:, :1])
    with pytest.raises(ValueError, match="modality_masks"):
        model(tokens, masks.long())
    with pytest.raises(ValueError, match="modality_masks"):
        model(tokens, [masks[0, 0], masks[0, 1]])


def test_pipeline_stages_compose_to_the_whole_model():
    tokens, masks = random_batch(3)
    whole = build(tiny_args(3))
    stages = [build(tiny_args(3)) for _ in range(2)]
    stages[0].norm = stages[0].output = None
    stages[1].tok_embeddings = None
    del stages[0].layers["1"], stages[1].layers["0"]
    with pytest.raises(ValueError, match="modality_masks"):
        stages[1](stages[0](tokens, masks))
    torch.testing.assert_close(stages[1](stages[0](tokens, masks), masks), whole(tokens, masks))


def test_dense_flavour_needs_no_masks_and_keeps_the_order():
    args = tiny_args(3, tower_of_modality=[0, 0, 0])
    model = build(args)
    tokens, masks = random_batch(3)
    assert set(model.layers["0"].attention.wq) == {"text"}
    assert torch.equal(model(tokens), model(tokens, masks))


def test_dense_flavour_refuses_what_the_untied_one_refuses():
    model = build(tiny_args(3, tower_of_modality=[0, 0, 0]))
    tokens, masks = random_batch(3)
    nobody = masks.clone()
    nobody[0, :, 1] = False
    with pytest.raises(ValueError, match="covered by no modality mask"):
        model(tokens, nobody)
    with pytest.raises(ValueError, match="covered by more than one"):
        model(tokens, torch.ones_like(masks))
    tokens[1, 2] = 99999
    with pytest.raises(ValueError, match=r"1 of \d+ tokens have an id outside the vocabulary"):
        model(tokens, masks)


def count_host_reads(monkeypatch, run):
    calls = []

    def spy(name):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, **kwargs):
            calls.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount")
            if any(name in str(func) for name in waits):
                calls.append(str(func))
            is_mask = (
                [x is not None and x.dtype == torch.bool for x in args[1]]
                if str(func).startswith("aten.index") and isinstance(args[1], list | tuple)
                else []
            )
            calls.extend("bool index" for flag in is_mask if flag)
            return func(*args, **(kwargs or {}))

    for name in ("tolist", "item", "cpu", "__bool__", "__int__", "__float__"):
        spy(name)
    with Spy():
        run()
    return calls


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["tolist"]),
        ({"dispatch": "grouped"}, ["tolist"]),
        (MASKED, ["tolist"]),
        ({"tower_of_modality": [0, 0]}, ["tolist"]),
    ],
)
def test_host_waits_for_the_device_once_per_step(monkeypatch, fields, expected):
    model = build(tiny_args(**fields), torch.float32)
    tokens, masks = random_batch()
    documents = torch.zeros_like(tokens)

    def step():
        model(tokens, masks, document_ids=documents).float().mean().backward()

    assert count_host_reads(monkeypatch, step) == expected


@pytest.mark.parametrize("fields", [{}, {"dispatch": "grouped"}, {"tower_of_modality": [0, 0]}])
def test_activation_checkpointing_gives_the_same_gradients(fields):
    model = build(tiny_args(**fields))
    inputs = random_batch()
    expected = gradients(model, *inputs)
    for layer in model.layers.values():
        forward = layer.forward
        layer.forward = lambda *args, forward=forward: checkpoint(
            forward, *args, use_reentrant=False
        )
    output, grads = gradients(model, *inputs)
    assert torch.equal(output, expected[0])
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[1][name], rtol=1e-12, atol=1e-14)


def test_parts_have_the_names_of_the_seed():
    model = MoTTransformer(mot_args["debugmodel"])
    block = model.layers["0"]
    assert type(block) is MoTTransformerBlock
    assert type(block.attention) is ModalityUntiedAttention
    assert type(block.feed_forward) is ModalityUntiedFeedForward


def test_state_dict_layout():
    state = MoTTransformer(tiny_args(n_layers=1, qk_normalization=True)).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    expected = {"tok_embeddings.weight": (48, 32), "norm.weight": (32,), "output.weight": (48, 32)}
    for tower in ("text", "image"):
        for path, shape in {
            "attention.wq": (32, 32),
            "attention.wk": (16, 32),
            "attention.wv": (16, 32),
            "attention.wo": (32, 32),
            "attention.q_norm": (8,),
            "attention.k_norm": (8,),
            "attention_norm": (32,),
            "ffn_norm": (32,),
            "feed_forward.w1": (96, 32),
            "feed_forward.w2": (32, 96),
            "feed_forward.w3": (96, 32),
        }.items():
            expected[f"layers.0.{path}.{tower}.weight"] = shape
    assert shapes == expected


@pytest.mark.parametrize("is_grouped", [False, True])
def test_shapes_are_estimated_without_values(is_grouped):
    dispatch = "grouped" if is_grouped else "split"
    with torch.device("meta"):
        model = MoTTransformer(tiny_args(dispatch=dispatch))
        tokens = torch.zeros(2, 16, dtype=torch.int64)
        logits = model(tokens, torch.zeros(2, 2, 16, dtype=torch.bool))
    assert logits.shape == (2, 16, 48)
    assert plan_by_sorting(tokens, 2, checks={}).sizes == (16, 24)
