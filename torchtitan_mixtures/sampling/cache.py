"""Keys and values of earlier tokens, kept so that a new token costs one token's work.

The model file knows nothing of this: while sampling, the parameter-free attention of every block
is replaced by one that remembers (context parallelism attaches to the same modules), and the model
is called with the new tokens, their positions and a mask over all that is remembered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan_mixtures.models.common.attention import AttentionMask, InnerAttention


class CachedAttention(InnerAttention):
    """Attention over all keys and values that were written so far.

    Buffers are `(batch, kv_heads, capacity, head_dim)`, made at the first call in the shape and
    dtype that arrive: under tensor parallelism a rank has a part of the heads.
    """

    def __init__(self, cache: CachedModel) -> None:
        super().__init__()
        # Not as an attribute of its own: a module would register the model as its child.
        self._cache = [cache]
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

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
        """Remember keys and values at the slots of this call, then attend to the slots in use.

        Args:
            q: Queries of the new tokens, `(batch, heads, seq, head_dim)`.
            k: Their keys, `(batch, kv_heads, seq, head_dim)`.
            v: Their values, `(batch, kv_heads, seq, head_dim)`.
            mask: True where attention is allowed, `(batch, 1, seq, slots in use)`.
            is_causal: False; the mask says what is hidden.
            enable_gqa: Whether `kv_heads` may be fewer than `heads`.

        Returns:
            `(batch, heads, seq, head_dim)`.
        """
        (cache,) = self._cache
        if self._keys is None or self._values is None:
            shape = (*k.shape[:2], cache.capacity, k.shape[3])
            self._keys, self._values = k.new_zeros(shape), v.new_zeros(shape)
        slots = cache.slots[:, None, :, None].expand_as(k)
        keys = self._keys.scatter_(2, slots, k)[:, :, : cache.num_slots]
        values = self._values.scatter_(2, slots, v)[:, :, : cache.num_slots]
        return super().forward(q, keys, values, mask, is_causal=is_causal, enable_gqa=enable_gqa)


class CachedModel:
    """A model over tokens whose attention remembers; made by `cached_attention`.

    Attributes:
        capacity: Number of slots, one for each position.
        slots: Where the keys and values of the running call are written, `(batch, seq)`, int64.
        num_slots: Slots that the running call looks at.
    """

    slots: Tensor

    def __init__(self, model: nn.Module, capacity: int) -> None:
        self.capacity = capacity
        self.num_slots = 0
        self._model = model

    def __call__(
        self, tokens: Tensor, positions: Tensor, num_slots: int, image_ids: Tensor | None = None
    ) -> Tensor:
        """Compute the logits of new tokens.

        A row may write a position again: what was there is forgotten. So prompts of unequal length
        are padded on the right, and the padding is overwritten by what is generated, before any
        query may see it.

        Args:
            tokens: New tokens, `(batch, seq)`, int64.
            positions: Their positions, `(batch, seq)`, int64, below `capacity`.
            num_slots: More than any position; later slots are not looked at.
            image_ids: Image of each token, -1 outside, `(batch, seq)`, of tokens at positions 0,
                1, ...: tokens of one image see one another in both directions.

        Returns:
            `(batch, seq, vocab)`, float32 or better.
        """
        self.slots, self.num_slots = positions, num_slots
        seen = torch.arange(num_slots, device=tokens.device) <= positions[:, :, None]
        if image_ids is not None:
            same = (image_ids[:, :, None] == image_ids[:, None]) & (image_ids >= 0)[:, :, None]
            seen = seen | same
        logits = self._model(tokens, positions=positions, attention_masks=seen[:, None])
        if isinstance(logits, DTensor):  # cut along the vocabulary for a loss on its parts
            logits = logits.full_tensor()
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def cached_attention(model: nn.Module, capacity: int) -> Iterator[CachedModel]:
    """Let the attention of a model remember; undone at the end.

    Args:
        model: A model over tokens, on one device or under FSDP, DDP or tensor parallelism.
        capacity: Number of positions to make room for.

    Raises:
        ValueError: The model has no `InnerAttention`.
    """
    cached = CachedModel(model, capacity)
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, InnerAttention)
    ]
    if not places:
        raise ValueError(f"{type(model).__name__} has no attention that could be cached")
    for parent, name, _ in places:
        setattr(parent, name, CachedAttention(cached))
    try:
        # Compiled blocks would be compiled anew for this attention and for every length.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield cached
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)
