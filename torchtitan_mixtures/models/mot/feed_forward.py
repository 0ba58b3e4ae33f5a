"""SwiGLU feed-forward network, untied per modality.

Source: Liang et al. 2025, arXiv 2411.04996, Eq. 3 and Algorithm 1 (lines 10 to 14).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.common.dispatch import LinearTowers, Plan, merge_slices
from torchtitan_mixtures.models.mot.args import MoTModelArgs


class ModalityUntiedFeedForward(nn.Module):
    """`w2(silu(w1 x) * w3 x)` with one set of weights per tower.

    State dict, for each tower name (the first one only if the FFN is tied):

        w1.{tower}.weight  (hidden, dim)
        w2.{tower}.weight  (dim, hidden)
        w3.{tower}.weight  (hidden, dim)
    """

    def __init__(self, args: MoTModelArgs) -> None:
        super().__init__()
        names = args.names_of(args.untie_ffn)
        self.w1 = LinearTowers(names, args.dim, args.ffn_hidden_dim)
        self.w2 = LinearTowers(names, args.ffn_hidden_dim, args.dim)
        self.w3 = LinearTowers(names, args.dim, args.ffn_hidden_dim)

    def forward(self, x: Tensor, plan: Plan | None) -> Tensor:
        """Apply each tower to its rows.

        Args:
            x: Activations in the order of the plan, `(rows, dim)`; `(batch, seq, dim)` without one.
            plan: Which rows belong to which tower.

        Returns:
            Same shape as `x`; under tensor parallelism a partial sum of it on each rank.
        """
        slices = self.w1.split(x, plan)
        gates, values = self.w1(slices, plan), self.w3(slices, plan)
        hidden = [F.silu(gate) * value for gate, value in zip(gates, values, strict=True)]
        return merge_slices(self.w2(hidden, plan), plan)

    def init_weights(self, std: float) -> None:
        """Initialise all towers; `std` is that of `w2` and `w3`."""
        for weight in self.w1.weights:
            init.trunc_normal_(weight, std=0.02)
        for linears in (self.w2, self.w3):
            for weight in linears.weights:
                init.trunc_normal_(weight, std=std)
