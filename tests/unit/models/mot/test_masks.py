from types import SimpleNamespace

import pytest
import torch

from tests.unit.models.mot.helpers import build, random_batch, tiny_args
from torchtitan_mixtures.models.mot.model import MoTTransformer

SEQ = 24
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 9 + [2] * 8, [0] * 20 + [1] * 4])
IMAGES = torch.full((2, SEQ), -1)
IMAGES[0, 2:6], IMAGES[0, 8:12], IMAGES[1, 5:15] = 0, 1, 0
BACKENDS = {
    "sdpa": "causal",
    "sdpa_dense": "block_causal",
    "flex": "block_causal",
    "varlen": "block_causal",
}


def sensitivity(model, **kwargs):
    """Which outputs change with which inputs, `(batch, seq of output, seq of input)` bool."""
    tokens, masks = random_batch(seq=SEQ)
    with torch.no_grad():
        before = model(tokens, masks, **kwargs)
        changes = []
        for place in range(SEQ):
            other = tokens.clone()
            other[:, place] = (other[:, place] + 1) % 48
            changes.append((model(other, masks, **kwargs) != before).any(-1))
    return torch.stack(changes, dim=-1)


@pytest.mark.parametrize("attn_type", BACKENDS)
def test_later_tokens_and_other_documents_have_no_influence(attn_type):
    mask_type = BACKENDS[attn_type]
    # One layer: what a token sees directly.
    model = build(tiny_args(attn_type=attn_type, attn_mask_type=mask_type, n_layers=1))
    expected = torch.ones(SEQ, SEQ, dtype=torch.bool).tril().expand(2, SEQ, SEQ)
    if mask_type == "block_causal":
        expected = expected & (DOCUMENTS[:, :, None] == DOCUMENTS[:, None, :])
    assert torch.equal(sensitivity(model, document_ids=DOCUMENTS), expected)


@pytest.mark.parametrize("attn_type", ["sdpa_dense", "flex"])
@pytest.mark.parametrize("mask_type", ["causal", "block_causal"])
def test_tokens_of_one_image_see_one_another(attn_type, mask_type):
    args = tiny_args(
        attn_type=attn_type, attn_mask_type=mask_type, bidirectional_images=True, n_layers=1
    )
    seen = sensitivity(build(args), document_ids=DOCUMENTS, image_ids=IMAGES)
    for b in range(2):
        for q in range(SEQ):
            for k in range(SEQ):
                allowed = q >= k or (IMAGES[b, q] >= 0 and IMAGES[b, q] == IMAGES[b, k])
                if mask_type == "block_causal":
                    allowed = allowed and DOCUMENTS[b, q] == DOCUMENTS[b, k]
                assert seen[b, q, k] == bool(allowed), (b, q, k)


def test_causality_goes_by_place_and_not_by_position():
    model = build(tiny_args())
    positions = torch.arange(SEQ).flip(0).expand(2, SEQ)
    seen = sensitivity(model, positions=positions)
    assert torch.equal(seen, torch.ones(SEQ, SEQ, dtype=torch.bool).tril().expand(2, SEQ, SEQ))


def test_packed_documents_equal_documents_on_their_own():
    model = build(tiny_args(attn_type="sdpa_dense", attn_mask_type="block_causal"))
    tokens, masks = random_batch(seq=SEQ)
    positions = torch.cat([torch.arange(7), torch.arange(9), torch.arange(8)]).expand(2, SEQ)
    documents = DOCUMENTS[:1].expand(2, SEQ)
    packed = model(tokens, masks, document_ids=documents, positions=positions)
    for span in (slice(0, 7), slice(7, 16), slice(16, 24)):
        alone = model(tokens[:, span], masks[:, :, span], document_ids=documents[:, span])
        torch.testing.assert_close(packed[:, span], alone)


@pytest.mark.parametrize("attn_type", ["flex", "varlen", "sdpa_dense"])
def test_get_attention_masks_gives_what_forward_builds(attn_type):
    model = build(tiny_args(attn_type=attn_type, attn_mask_type="block_causal"))
    tokens, masks = random_batch(seq=SEQ)
    tokenizer = SimpleNamespace(eos_id=47)
    extra = {"document_ids": DOCUMENTS, "image_ids": IMAGES}
    mask = model.get_attention_masks(tokens, tokenizer, extra)
    given = model(tokens, masks, attention_masks=mask)
    assert torch.equal(given, model(tokens, masks, document_ids=DOCUMENTS))

    # Documents end with an end-of-sequence token where the batch does not number them.
    tokens = tokens.clamp(max=46)
    ends = torch.zeros_like(tokens, dtype=torch.bool)
    ends[:, :-1] = DOCUMENTS[:, :-1] != DOCUMENTS[:, 1:]
    tokens[ends] = 47
    from_eos = model.get_attention_masks(tokens, tokenizer)
    assert torch.equal(from_eos, mask)


def test_sdpa_takes_no_mask():
    with pytest.raises(TypeError, match="sdpa"):
        MoTTransformer(tiny_args()).get_attention_masks(torch.zeros(1, 4), None)


def test_missing_ids_are_named():
    tokens, masks = random_batch()
    model = build(tiny_args(attn_type="sdpa_dense", attn_mask_type="block_causal"))
    with pytest.raises(ValueError, match="document_ids"):
        model(tokens, masks)
    model = build(tiny_args(attn_type="sdpa_dense", bidirectional_images=True))
    with pytest.raises(ValueError, match="image_ids"):
        model(tokens, masks)
