"""Attention kernels behind one interface, and the masks they take.

A token may attend to the tokens of its own document that are not later than itself and, where
images are bidirectional, to all tokens of its own image. "Later" is meant by place in the sequence:
positions may start again in each document and matter to rotary embeddings only.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torchtitan.models.attention import (
    FlexAttentionWrapper,
    ScaledDotProductAttentionWrapper,
    VarlenAttentionWrapper,
    VarlenMetadata,
    create_attention_mask,
)
from torchtitan.tools.logging import logger

BACKENDS = ("sdpa", "flex", "varlen", "sdpa_dense")

AttentionMask = Tensor | BlockMask | VarlenMetadata

_sdpa = ScaledDotProductAttentionWrapper()
_flex = FlexAttentionWrapper()
_varlen = VarlenAttentionWrapper()


class InnerAttention(nn.Module):
    """Softmax attention without parameters; the kernel is chosen by the type of the mask.

    A module of its own so that context parallelism can wrap it by path: queries, keys and values
    come first, with the sequence on axis 2.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask | None = None,
        *,
        is_causal: bool,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attend.

        Args:
            q: Queries, `(batch, heads, seq, head_dim)`.
            k: Keys, `(batch, kv_heads, seq, head_dim)`.
            v: Values, `(batch, kv_heads, seq, head_dim)`.
            mask: True where attention is allowed, `(batch or 1, 1, seq, seq)`, or its FlexAttention
                or variable-length form. None allows everything, or the past if `is_causal`.
            is_causal: Whether later tokens are hidden. A mask says so itself: with one, False.
            enable_gqa: Whether `kv_heads` may be fewer than `heads`.

        Returns:
            `(batch, heads, seq, head_dim)`.
        """
        if mask is None:
            return _sdpa(q, k, v, is_causal=is_causal, enable_gqa=enable_gqa)
        if is_causal:
            raise ValueError("is_causal = True beside a mask: the mask itself must be causal")
        if isinstance(mask, Tensor):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=False, enable_gqa=enable_gqa
            )
        if isinstance(mask, BlockMask):
            return _flex(q, k, v, block_mask=mask, enable_gqa=enable_gqa)
        # TorchTitan's wrapper does not pass enable_gqa on.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        packed = _varlen(q, k, v, mask)  # (batch * seq, heads, head_dim)
        return packed.view(q.shape[0], q.shape[2], -1, q.shape[3]).transpose(1, 2)


def build_attention_mask(
    backend: str,
    batch: int,
    seq: int,
    device: torch.device,
    document_ids: Tensor | None = None,
    image_ids: Tensor | None = None,
) -> AttentionMask:
    """Build the mask of one batch in the form its backend takes.

    Args:
        backend: "flex", "varlen" or "sdpa_dense".
        batch: Number of sequences.
        seq: Length of the sequences.
        device: Where the mask is used. FlexAttention and variable-length attention do not train
            on a CPU: there the same mask is built for `sdpa_dense`.
        document_ids: Document of each token, `(batch, seq)`, int64; None: one per sequence.
        image_ids: Image of each token, -1 outside, `(batch, seq)`, int64; tokens of one image see
            one another in both directions. None: no such images.
    """
    if backend == "varlen" and image_ids is not None:
        raise ValueError(
            "attn_type = 'varlen' cannot attend in both directions inside images; "
            "use 'flex' or 'sdpa_dense'"
        )
    if backend in ("flex", "varlen") and device.type in ("cpu", "meta"):
        _log_dense_fallback(backend)
        backend = "sdpa_dense"
    match backend:
        case "sdpa_dense":
            return dense_mask(seq, device, document_ids, image_ids)
        case "flex":
            batched = document_ids is not None or image_ids is not None
            return create_attention_mask(
                mask_mod(document_ids, image_ids),
                batch if batched else None,
                None,
                seq,
                seq,
                device=device,
            )
        case "varlen":
            return varlen_metadata(batch, seq, device, document_ids)
        case _:
            raise ValueError(f"attn_type = {backend!r} takes no mask; one of {BACKENDS[1:]} does")


@cache
def _log_dense_fallback(backend: str) -> None:
    logger.info(f"attn_type = '{backend}' does not train on a CPU: running it as 'sdpa_dense'")


def mask_mod(
    document_ids: Tensor | None, image_ids: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask as the function of (batch, head, query, key) indices that FlexAttention takes."""

    def allow(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = q >= k
        if image_ids is not None:
            allowed = allowed | ((image_ids[b, q] >= 0) & (image_ids[b, q] == image_ids[b, k]))
        if document_ids is not None:
            allowed = allowed & (document_ids[b, q] == document_ids[b, k])
        return allowed

    return allow


def dense_mask(
    seq: int,
    device: torch.device,
    document_ids: Tensor | None = None,
    image_ids: Tensor | None = None,
) -> Tensor:
    """The mask written out, `(batch or 1, 1, seq, seq)`, bool."""
    allowed = torch.ones(seq, seq, dtype=torch.bool, device=device).tril()[None]
    if image_ids is not None:
        same_image = image_ids[:, :, None] == image_ids[:, None, :]
        allowed = allowed | (same_image & (image_ids >= 0)[:, :, None])
    if document_ids is not None:
        allowed = allowed & (document_ids[:, :, None] == document_ids[:, None, :])
    return allowed[:, None]


def varlen_metadata(
    batch: int, seq: int, device: torch.device, document_ids: Tensor | None = None
) -> VarlenMetadata:
    """Boundaries of the documents in the flattened batch. Waits for the device once."""
    starts = torch.zeros(batch, seq, dtype=torch.bool, device=device)
    starts[:, 0] = True
    if document_ids is not None:
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    stops = F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=batch * seq)
    # A document is at most a sequence long; the exact maximum would cost a second wait.
    return VarlenMetadata(stops.int(), stops.int(), seq, seq)


def document_ids_from_eos(tokens: Tensor, eos_id: int) -> Tensor:
    """Number the documents of each sequence; an end-of-sequence token belongs to what it ends.

    Args:
        tokens: Token ids, `(batch, seq)`.
        eos_id: Id of the end-of-sequence token.

    Returns:
        `(batch, seq)`, int64.
    """
    is_eos = (tokens == eos_id).long()
    return is_eos.cumsum(1) - is_eos
