"""Attention whose projections are untied per modality and whose softmax is shared by all.

Source: Liang et al. 2025, arXiv 2411.04996, Eq. 2 and Algorithm 1 (lines 3 to 9).
"""

from torch import Tensor, nn

from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.common.attention import AttentionMask, InnerAttention
from torchtitan_mixtures.models.common.dispatch import (
    LinearTowers,
    NormTowers,
    Plan,
    merge_modalities,
    merge_slices,
)
from torchtitan_mixtures.models.common.rope import Rotation, rotate
from torchtitan_mixtures.models.mot.args import MoTModelArgs

__all__ = ["ModalityUntiedAttention", "merge_modalities"]


class ModalityUntiedAttention(nn.Module):
    """Global self-attention with one set of projections per tower.

    State dict, for each tower name (the first one only if attention is tied):

        wq.{tower}.weight      (heads * head_dim, dim)
        wk.{tower}.weight      (kv_heads * head_dim, dim)
        wv.{tower}.weight      (kv_heads * head_dim, dim)
        wo.{tower}.weight      (dim, heads * head_dim)
        q_norm.{tower}.weight  (head_dim,), with qk_normalization only
        k_norm.{tower}.weight  (head_dim,), with qk_normalization only
    """

    def __init__(self, args: MoTModelArgs) -> None:
        super().__init__()
        names = args.names_of(args.untie_attention)
        self.head_dim = args.head_dim
        self.enable_gqa = args.num_kv_heads < args.n_heads
        self.wq = LinearTowers(names, args.dim, args.n_heads * args.head_dim)
        self.wk = LinearTowers(names, args.dim, args.num_kv_heads * args.head_dim)
        self.wv = LinearTowers(names, args.dim, args.num_kv_heads * args.head_dim)
        self.wo = LinearTowers(names, args.n_heads * args.head_dim, args.dim)
        self.q_norm, self.k_norm = None, None
        if args.qk_normalization:
            self.q_norm = NormTowers(names, args.head_dim, args.norm_eps)
            self.k_norm = NormTowers(names, args.head_dim, args.norm_eps)
        self.inner_attention = InnerAttention()

    def forward(
        self, x: Tensor, rotation: Rotation, mask: AttentionMask | None, plan: Plan | None
    ) -> Tensor:
        """Attend across all modalities.

        Args:
            x: Activations in the order of the plan, `(rows, dim)`; `(batch, seq, dim)` without one.
            rotation: Rotary embedding of each position, in original order.
            mask: Attention mask in original order; None for a plain causal one.
            plan: Which rows belong to which tower.

        Returns:
            Same shape as `x`; under tensor parallelism a partial sum of it on each rank.
        """
        slices = self.wq.split(x, plan)
        q = rotate(self._heads(self.wq(slices, plan), self.q_norm, plan), rotation)
        k = rotate(self._heads(self.wk(slices, plan), self.k_norm, plan), rotation)
        v = self._heads(self.wv(slices, plan), None, plan)
        attended = self.inner_attention(
            q.transpose(1, 2),  # (batch, heads, seq, head_dim)
            k.transpose(1, 2),  # (batch, kv_heads, seq, head_dim)
            v.transpose(1, 2),  # (batch, kv_heads, seq, head_dim)
            mask,
            is_causal=mask is None,
            enable_gqa=self.enable_gqa,
        )
        attended = attended.transpose(1, 2).flatten(2)  # (batch, seq, heads * head_dim)
        if plan is not None:
            attended = plan.sort(attended)  # (rows, heads * head_dim)
        return merge_slices(self.wo(self.wo.split(attended, plan), plan), plan)

    def _heads(self, slices: list[Tensor], norm: NormTowers | None, plan: Plan | None) -> Tensor:
        """Projections of all towers -> `(batch, seq, heads, head_dim)` in original order."""
        # -1 and not the number of heads: tensor parallelism leaves each rank a part of them.
        if norm is not None:
            slices = norm([x.unflatten(-1, (-1, self.head_dim)) for x in slices], plan)
            slices = [x.flatten(-2) for x in slices]
        x = merge_slices(slices, plan)
        if plan is not None:
            x = plan.unsort(x)
        return x.unflatten(-1, (-1, self.head_dim))

    def init_weights(self, std: float) -> None:
        """Initialise all towers; `std` is that of the output projection."""
        for linears in (self.wq, self.wk, self.wv):
            for weight in linears.weights:
                init.trunc_normal_(weight, std=0.02)
        for weight in self.wo.weights:
            init.trunc_normal_(weight, std=std)
        for norms in (self.q_norm, self.k_norm):
            if norms is not None:
                norms.reset_parameters()
