"""Attention among the tokens of all modalities, each with weights of its own.

Source: Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image
Synthesis", arXiv 2403.03206, section 4 and figure 2; the package `mmdit` for more than two
modalities, soft clamp and adaptive weights.

With adaptive weights each head of a token chooses between several projections: its queries, keys
and values, and what it puts out, are sums of candidates weighted by a softmax,

    q[n, h] = sum_w gate[n, h, w] W_q[h, w] x[n]        (k and v alike)
    y[n]    = sum_h sum_w gate[n, h, w] W_o[h, w] o[n, h]

Deviations:
    - The package never passes its `qk_rmsnorm` on, nor the soft clamp of two modalities, and the
      output of its adaptive attention has the wrong shape. Here all three do what they say.
    - Queries, keys and values are one projection whose rows are ordered by head, so that tensor
      parallelism can share heads. It is drawn as one matrix, as in DiT.
    - Candidates are drawn like the projection they take the place of.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.common.attention import InnerAttention
from torchtitan_mixtures.models.common.building import initialise
from torchtitan_mixtures.models.mmdit.inputs import check_mask, check_tokens

QKNorm = Literal["none", "shared", "per_head"]

NORM_EPS = 1e-6
"""Epsilon of the "shared" norm."""


class PerHeadNorm(nn.Module):
    """Give vectors a length of the root of their size, then scale channels of each head.

    State dict:

        weight  (heads, head_dim)
    """

    def __init__(self, n_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, heads, head_dim)` -> the same shape."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        normed = F.normalize(x.to(dtype), dim=3) * x.shape[3] ** 0.5
        return (normed * self.scales().to(dtype)).to(x.dtype)

    def scales(self) -> Tensor:
        """Scales of the heads of this rank, `(heads, head_dim)`."""
        return self.weight

    def reset_parameters(self) -> None:
        """Set all weights to one."""
        nn.init.ones_(self.weight)


class SoftclampAttention(nn.Module):
    """Softmax attention whose logits stay between `-value` and `value`; as `InnerAttention`."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool
    ) -> Tensor:
        """Attend.

        Args:
            q: Queries, `(batch, heads, seq, head_dim)`.
            k: Keys, `(batch, heads, seq, head_dim)`.
            v: Values, `(batch, heads, seq, head_dim)`.
            mask: True where attention is allowed; anything that broadcasts to `(batch, heads, seq,
                seq)`. None: everywhere.
            is_causal: False; there for the interface.

        Returns:
            `(batch, heads, seq, head_dim)`.
        """
        if is_causal:
            raise ValueError("is_causal = True: attention with a soft clamp sees all tokens.")
        logits = ((q * q.shape[3] ** -0.5) @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
        logits = self.value * torch.tanh(logits / self.value)
        if mask is None:
            return logits.softmax(3).to(v.dtype) @ v
        # As in the fused kernels, nothing comes of a sample of which no token is seen; with
        # infinity that would be no number.
        shares = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(3)
        return shares.masked_fill(~mask, 0).to(v.dtype) @ v


class JointAttention(nn.Module):
    """Attention in which every token of every modality sees every other.

    State dict, for each modality (`w` = num_adaptive_weights):

        wqkv.{name}.weight   (w * 3 * heads * head_dim, dim), rows ordered (head, w, query | key |
                             value, head_dim)
        wqkv.{name}.bias     (w * 3 * heads * head_dim,); only with `qkv_bias`
        wo.{name}.weight     (dim, w * heads * head_dim), columns ordered (head, w, head_dim); none
                             of `pre_only` modalities
        wo.{name}.bias       (dim,); only with `out_bias`
        gates.{name}.weight  (heads * w, dim); only with w > 1
        gates.{name}.bias    (heads * w,)
        q_norm.{name}.weight, k_norm.{name}.weight
                             (head_dim,), or (heads, head_dim) with `qk_norm = "per_head"`

    Args:
        dims: Width of each modality, by name.
        n_heads: Attention heads.
        head_dim: Width of a head.
        qkv_bias: Whether queries, keys and values have biases.
        out_bias: Whether outputs have biases.
        qk_norm: Norm of queries and keys: "none", "shared" (one RMS norm for all heads), or
            "per_head" (of unit length, times a scale of each head's own).
        softclamp: Logits are `softclamp * tanh(logits / softclamp)`; None: as they are.
        num_adaptive_weights: Candidates of each projection that tokens choose between.
        pre_only: Modalities that are seen but get no output.

    Raises:
        ValueError: A value that cannot be.
    """

    def __init__(
        self,
        dims: Mapping[str, int],
        n_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: QKNorm = "none",
        softclamp: float | None = None,
        num_adaptive_weights: int = 1,
        pre_only: Collection[str] = (),
    ) -> None:
        super().__init__()
        _check(n_heads, head_dim, qk_norm, softclamp, num_adaptive_weights)
        self.head_dim, self.num_weights = head_dim, num_adaptive_weights
        inner = n_heads * num_adaptive_weights * head_dim
        self.wqkv = nn.ModuleDict(
            {name: nn.Linear(dim, 3 * inner, bias=qkv_bias) for name, dim in dims.items()}
        )
        self.wo = nn.ModuleDict(
            {
                name: nn.Linear(inner, dim, bias=out_bias)
                for name, dim in dims.items()
                if name not in pre_only
            }
        )
        adaptive = dims if num_adaptive_weights > 1 else {}
        self.gates = nn.ModuleDict(
            {name: nn.Linear(dim, n_heads * num_adaptive_weights) for name, dim in adaptive.items()}
        )
        normed = () if qk_norm == "none" else dims

        def norm() -> nn.Module:
            if qk_norm == "shared":
                return nn.RMSNorm(head_dim, eps=NORM_EPS)
            return PerHeadNorm(n_heads, head_dim)

        self.q_norm = nn.ModuleDict({name: norm() for name in normed})
        self.k_norm = nn.ModuleDict({name: norm() for name in normed})
        self.inner_attention = (
            InnerAttention() if softclamp is None else SoftclampAttention(softclamp)
        )

    def forward(
        self, streams: Mapping[str, Tensor], masks: Mapping[str, Tensor | None] | None = None
    ) -> dict[str, Tensor]:
        """Attend.

        Args:
            streams: Tokens of each modality, `(batch, seq_of_modality, dim_of_modality)`; the
                order is that of the joint sequence.
            masks: Which tokens are seen, `(batch, seq_of_modality)` bool; None: all.

        Returns:
            Of each modality that is not `pre_only` the same shape.
        """
        gates = {name: self._gate(name, x) for name, x in streams.items()}
        heads = [self._project(name, x, gates[name]) for name, x in streams.items()]
        q, k, v = (_join(parts).transpose(1, 2) for parts in zip(*heads, strict=True))
        mask = _join_masks(streams, masks)
        # No mask at all where none is needed: kernels that take none are faster.
        arguments = (q, k, v) if mask is None else (q, k, v, mask)
        attended = self.inner_attention(*arguments, is_causal=False).transpose(1, 2)
        lengths = [x.shape[1] for x in streams.values()]
        parts = attended.split(lengths, dim=1)  # (batch, seq_of_modality, heads, head_dim)
        return {
            name: self._put_out(name, part, gates[name])
            for name, part in zip(streams, parts, strict=True)
            if name in self.wo
        }

    def _gate(self, name: str, x: Tensor) -> Tensor | None:
        """Weight of each candidate, `(batch, seq, heads, weights, 1)`; None if there is one."""
        if self.num_weights == 1:
            return None
        logits = self.gates[name](x).unflatten(2, (-1, self.num_weights, 1))
        return logits.softmax(3, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)

    def _project(self, name: str, x: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a modality, each `(batch, seq, heads, head_dim)`."""
        # -1 and not the number of heads: tensor parallelism leaves each rank a part of them.
        qkv = self.wqkv[name](x)
        if gate is not None:
            candidates = qkv.unflatten(2, (-1, self.num_weights, 3 * self.head_dim))
            qkv = (gate * candidates).sum(3).flatten(2)
        q, k, v = qkv.unflatten(2, (-1, 3, self.head_dim)).unbind(3)
        if name in self.q_norm:
            q, k = self.q_norm[name](q), self.k_norm[name](k)
        return q, k, v

    def _put_out(self, name: str, attended: Tensor, gate: Tensor | None) -> Tensor:
        if gate is not None:
            attended = gate * attended.unsqueeze(3)  # (batch, seq, heads, weights, head_dim)
        return self.wo[name](attended.flatten(2))

    def init_weights(self) -> None:
        """Initialise all weights."""
        for linears in (self.wqkv, self.wo, self.gates):
            for linear in cast(Iterable[nn.Linear], linears.values()):
                # A sum of candidates whose weights add up to one has the size of one of them.
                fan_in, fan_out = linear.in_features, linear.out_features
                fan_in //= self.num_weights if linears is self.wo else 1
                fan_out //= self.num_weights if linears is self.wqkv else 1
                init.xavier_uniform_(linear.weight, fan_in, fan_out)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        for norms in (self.q_norm, self.k_norm):
            for norm in cast(Iterable[PerHeadNorm | nn.RMSNorm], norms.values()):
                norm.reset_parameters()


class AdaptiveAttention(nn.Module):
    """Attention of one modality in which tokens choose between weights.

    State dict:

        attention.*  see `JointAttention`; its modality is "tokens"

    Args:
        dim: Width of the tokens.
        dim_head: Width of a head.
        heads: Attention heads.
        num_adaptive_weights: Candidates of each projection; with 1 it is plain attention.
        qk_rmsnorm: Whether queries and keys have a norm for each head.
        softclamp: Whether logits are bounded.
        softclamp_value: By what.
    """

    def __init__(
        self,
        dim: int,
        *,
        dim_head: int = 64,
        heads: int = 8,
        num_adaptive_weights: int = 1,
        qk_rmsnorm: bool = False,
        softclamp: bool = False,
        softclamp_value: float = 50.0,
    ) -> None:
        super().__init__()
        self.attention = JointAttention(
            {"tokens": dim},
            heads,
            dim_head,
            qk_norm="per_head" if qk_rmsnorm else "none",
            softclamp=softclamp_value if softclamp else None,
            num_adaptive_weights=num_adaptive_weights,
        )
        self.dim = dim
        initialise(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: Tokens, `(batch, seq, dim)`.
            mask: Which tokens are seen, `(batch, seq)` bool; None: all.

        Returns:
            `(batch, seq, dim)`.

        Raises:
            ValueError: Tokens or a mask of a wrong shape, or a mask that is not bool.
        """
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[:2])
        return self.attention({"tokens": x}, {"tokens": mask})["tokens"]

    def init_weights(self) -> None:
        """Initialise all weights."""
        self.attention.init_weights()


def _check(
    n_heads: int, head_dim: int, qk_norm: str, softclamp: float | None, num_weights: int
) -> None:
    sizes = {"n_heads": n_heads, "head_dim": head_dim, "num_adaptive_weights": num_weights}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} = {size}: must be a positive number.")
    if qk_norm not in get_args(QKNorm):
        raise ValueError(f"qk_norm = {qk_norm!r}: must be one of {get_args(QKNorm)}.")
    if softclamp is not None and not 0 < softclamp < torch.inf:
        raise ValueError(f"softclamp = {softclamp}: must be a positive number, or None for none.")


def _join(parts: Sequence[Tensor]) -> Tensor:
    """One sequence of all modalities; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _join_masks(
    streams: Mapping[str, Tensor], masks: Mapping[str, Tensor | None] | None
) -> Tensor | None:
    """Keys that are seen, `(batch, 1, 1, seq)`; None if all are."""
    given = {name: mask for name, mask in (masks or {}).items() if mask is not None}
    if not given:
        return None
    parts = [
        given[name] if name in given else x.new_ones(x.shape[:2], dtype=torch.bool)
        for name, x in streams.items()
    ]
    return _join(parts)[:, None, None]
