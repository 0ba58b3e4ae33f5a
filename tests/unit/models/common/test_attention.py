import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from torchtitan_mixtures.models.common.attention import (
    InnerAttention,
    build_attention_mask,
    dense_mask,
    document_ids_from_eos,
    mask_mod,
    varlen_metadata,
)

CPU = torch.device("cpu")
DOCUMENTS = (torch.arange(160).expand(2, 160) // torch.tensor([[50], [90]])).long()
IMAGES = torch.where(torch.arange(160) % 40 < 20, torch.arange(160) // 40, -1).expand(2, 160)


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("images", [None, IMAGES])
def test_flex_and_dense_masks_are_the_same(documents, images):
    mod = mask_mod(documents, images)
    dense = dense_mask(160, CPU, documents, images)
    assert torch.equal(create_mask(mod, 2, 1, 160, 160, device="cpu"), dense.expand(2, 1, 160, 160))

    q, k, v = (torch.randn(2, heads, 160, 16) for heads in (4, 2, 2))
    block_mask = create_block_mask(mod, 2, None, 160, 160, device="cpu")
    flex = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
    ours = InnerAttention()(q, k, v, dense, is_causal=False, enable_gqa=True)
    torch.testing.assert_close(ours, flex, rtol=1e-4, atol=1e-5)


def test_causality_is_what_the_caller_says():
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    attend = InnerAttention()
    causal = attend(q, k, v, is_causal=True)
    torch.testing.assert_close(causal, attend(q, k, v, dense_mask(6, CPU), is_causal=False))
    torch.testing.assert_close(causal[:, :, 0], v[:, :, 0])
    assert not torch.allclose(causal[:, :, 0], attend(q, k, v, is_causal=False)[:, :, 0])
    with pytest.raises(ValueError, match="is_causal"):
        attend(q, k, v, dense_mask(6, CPU), is_causal=True)


def test_varlen_boundaries_are_those_of_the_documents():
    documents = torch.tensor([[0, 0, 1, 1, 1], [4, 5, 5, 5, 5]])
    metadata = varlen_metadata(2, 5, CPU, documents)
    assert metadata.cu_seq_q.tolist() == metadata.cu_seq_k.tolist() == [0, 2, 5, 6, 10]
    assert metadata.cu_seq_q.dtype == torch.int32
    assert metadata.max_q == metadata.max_k == 5
    # Neighbouring sequences stay apart even where their documents have the same number.
    assert varlen_metadata(2, 5, CPU).cu_seq_q.tolist() == [0, 5, 10]


@pytest.mark.parametrize("backend", ["flex", "varlen"])
def test_kernels_without_cpu_training_fall_back_and_say_so_once(backend, caplog):
    from torchtitan.tools.logging import logger

    from torchtitan_mixtures.models.common import attention

    attention._log_dense_fallback.cache_clear()
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level("INFO", logger=logger.name):
            masks = [build_attention_mask(backend, 2, 160, CPU, DOCUMENTS) for _ in range(2)]
    finally:
        logger.removeHandler(caplog.handler)
    assert torch.equal(masks[0], dense_mask(160, CPU, DOCUMENTS))
    assert sum("sdpa_dense" in record.message for record in caplog.records) == 1


def test_what_a_backend_cannot_do_is_refused():
    with pytest.raises(ValueError, match="varlen"):
        build_attention_mask("varlen", 2, 160, CPU, DOCUMENTS, IMAGES)
    with pytest.raises(ValueError, match="sdpa"):
        build_attention_mask("sdpa", 2, 160, CPU)


def test_end_of_sequence_token_belongs_to_its_document():
    tokens = torch.tensor([[5, 9, 6, 7, 9, 9, 3]])
    assert document_ids_from_eos(tokens, 9).tolist() == [[0, 0, 1, 1, 1, 2, 3]]
