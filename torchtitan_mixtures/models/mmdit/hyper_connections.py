"""Several residual streams of one modality, between which a branch chooses.

Source: Zhu et al. 2024, "Hyper-Connections", arXiv 2409.19606, equations 2 to 5 (static) and 10 to
13 (dynamic). With streams H (s x dim) of a token and a branch f:

    alpha = A + scale_a tanh(norm(H) W_a)        (s x (s + 1))
    beta  = b + scale_b tanh(norm(H) w_b)        (s)
    M     = alpha^T H                            rows: what the branch reads, then s streams
    H'_j  = M_j + beta_j f(M_0)

Deviations:
    - The stream that a branch reads at first is that of the layer's number, not a random one.
    - Streams are joined by their mean; the paper's sum is s times it.
    - Output weights of branches are drawn as without streams (the paper: times the root of s).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_mixtures.models.common.building import assign

SCALE_INIT = 0.01
"""Weight of what depends on the token, at first."""

TINY = 1e-12
"""Least mean square a stream is divided by, which keeps streams of zeros zero."""


def expand(x: Tensor, num_streams: int) -> Tensor:
    """Copy `(batch, seq, dim)` to each stream, `(batch, seq, streams, dim)`."""
    return x.unsqueeze(2).repeat(1, 1, num_streams, 1)


def reduce(state: Tensor) -> Tensor:
    """Join streams by their mean, `(batch, seq, streams, dim)` -> `(batch, seq, dim)`."""
    return state.mean(2)


class Connection(nn.Module):
    """Weights between the streams of a token and a branch: one column for each use of the streams.

    State dict:

        static       (streams, columns)  A and b
        weight       (columns, dim)      W_a and w_b; the last three only if dynamic
        norm_weight  (dim,)
        scale        (scales,)           scale_a and scale_b

    Args:
        dim: Width of a stream.
        num_streams: Number of streams.
        index: Number of the branch in the model: at first it reads stream `index % num_streams`.
        dynamic: Whether each token decides; otherwise it is the same for all.
    """

    num_scales: int

    def __init__(self, dim: int, num_streams: int, index: int, *, dynamic: bool = True) -> None:
        super().__init__()
        self.num_streams, self.index, self.dynamic = num_streams, index, dynamic
        columns = self.initial_columns().shape[1]
        self.static = nn.Parameter(torch.empty(num_streams, columns))
        if dynamic:
            self.weight = nn.Parameter(torch.empty(columns, dim))
            self.norm_weight = nn.Parameter(torch.empty(dim))
            self.scale = nn.Parameter(torch.empty(self.num_scales))
        self.init_weights()

    def initial_columns(self) -> Tensor:
        """`static` at first: the branch reads one stream."""
        return F.one_hot(torch.tensor(self.index % self.num_streams), self.num_streams)[:, None]

    def parameter(self, name: str) -> Tensor:
        """A parameter, for parallelism to say what part of it a rank uses."""
        return getattr(self, name)

    def scales(self) -> Tensor:
        """How much the token matters, `(columns,)` or `(1,)`."""
        return self.parameter("scale")

    def coefficients(self, state: Tensor) -> Tensor:
        """`(batch, seq, streams, columns)`, float32 or better; if static `(streams, columns)`."""
        static = self.parameter("static")
        static = static.to(torch.promote_types(static.dtype, torch.float32))
        if not self.dynamic:
            return static
        # The norm of a stream is a factor of its products: no normed copy of the state is made.
        square = torch.linalg.vector_norm(state, dim=3, keepdim=True, dtype=static.dtype).square()
        inverse = (square / state.shape[3]).clamp(min=TINY).rsqrt()
        weight = self.parameter("weight") * self.parameter("norm_weight")
        logits = F.linear(state, weight) * inverse
        return static + self.scales() * logits.tanh()

    def init_weights(self) -> None:
        """Let the branch read one stream, and all streams go on as they are."""
        assign(self.static, self.initial_columns())
        if self.dynamic:
            nn.init.zeros_(self.weight)
            nn.init.ones_(self.norm_weight)
            nn.init.constant_(self.scale, SCALE_INIT)


class StreamReader(Connection):
    """What a branch reads of the streams, where nothing is written back.

    State dict: see `Connection`; 1 column and 1 scale.
    """

    num_scales = 1

    def forward(self, state: Tensor) -> Tensor:
        """`(batch, seq, streams, dim)` -> what the branch reads, `(batch, seq, dim)`."""
        return _mix(self.coefficients(state), state).squeeze(2)


class HyperConnection(Connection):
    """What a branch reads of the streams, and how its output is written back.

    State dict: see `Connection`; `streams + 2` columns (what is read, the streams that are carried
    on, and how much of the output each stream gets) and 2 scales.
    """

    num_scales = 2

    def initial_columns(self) -> Tensor:
        """`static` at first: the branch reads one stream, and all streams get its output."""
        streams = self.num_streams
        return torch.cat(
            [super().initial_columns(), torch.eye(streams), torch.ones(streams, 1)], dim=1
        )

    def scales(self) -> Tensor:
        """How much the token matters, `(columns,)`."""
        scale_a, scale_b = self.parameter("scale").split(1)
        return torch.cat([scale_a.expand(self.num_streams + 1), scale_b])

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read.

        Args:
            state: Streams, `(batch, seq, streams, dim)`.

        Returns:
            What the branch reads `(batch, seq, dim)`, the streams that are carried on `(batch, seq,
            streams, dim)`, and how much of the output each gets, `(batch, seq, streams)` or
            `(streams,)`; the last two are for `combine`.
        """
        coefficients = self.coefficients(state)
        # Not slices: the gradient of each would be as large as all of it.
        mixing, beta = coefficients.split([self.num_streams + 1, 1], dim=-1)
        read, carried = _mix(mixing, state).split([1, self.num_streams], dim=2)
        return read.squeeze(2), carried, beta.squeeze(-1)

    @staticmethod
    def combine(carried: Tensor, beta: Tensor, out: Tensor) -> Tensor:
        """Add what a branch puts out, `(batch, seq, dim)`, to the streams."""
        shares = beta.to(out.dtype).expand(carried.shape[:3]).flatten(0, 1).unsqueeze(2)
        state = torch.baddbmm(carried.flatten(0, 1), shares, out.flatten(0, 1).unsqueeze(1))
        return state.unflatten(0, carried.shape[:2])


def _mix(coefficients: Tensor, state: Tensor) -> Tensor:
    """Weighted sums of the streams, one per column, `(batch, seq, columns, dim)`."""
    batch, seq, streams, _ = state.shape
    mixing = coefficients.to(state.dtype).expand(batch, seq, streams, -1).flatten(0, 1)
    return torch.bmm(mixing.mT, state.flatten(0, 1)).unflatten(0, (batch, seq))
