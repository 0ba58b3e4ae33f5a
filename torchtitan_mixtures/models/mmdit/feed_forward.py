"""Feed-forward network of one modality, with the options of the seed's `ff_kwargs`.

Source: the options that the package `mmdit` hands to its feed-forward network; gated linear units
as in Shazeer 2020, arXiv 2002.05202; squared ReLU as in So et al. 2021, arXiv 2109.08668.

Deviations:
    - `no_bias` takes the bias of gated units too, and `post_act_ln` has one (in the package the
      former stays, and the latter has none).
    - Options that contradict each other are refused; there one of them wins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_mixtures.models.common import init


@dataclass(frozen=True)
class FeedForwardOptions:
    """Form of a feed-forward network; by default two layers with a GELU (exact form) between."""

    mult: float = 4  # hidden units / dim
    glu: bool = False  # hidden units are values times activated gates
    glu_mult_bias: bool = False  # and times a factor each that is learned
    swish: bool = False  # SiLU in place of GELU
    relu_squared: bool = False  # in place of GELU
    tanh_gelu: bool = False  # GELU in the form of SD3
    post_act_ln: bool = False  # layer norm of hidden units
    dropout: float = 0.0  # of hidden units
    no_bias: bool = False
    zero_init_output: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            is_right = isinstance(value, bool) if kind is bool else _is_number(value)
            if not is_right:
                allowed = "True or False" if kind is bool else "a finite number"
                raise ValueError(f"{field.name} = {value!r}: must be {allowed}.")
        chosen = [name for name in ("swish", "relu_squared", "tanh_gelu") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} = True: there is one activation; choose one.")
        if self.glu_mult_bias and not self.glu:
            raise ValueError(
                "glu_mult_bias = True: is of gated units; set glu = True or remove it."
            )
        if not self.mult > 0:
            raise ValueError(f"mult = {self.mult!r}: must be a positive number.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout!r}: must be at least 0 and below 1.")

    @classmethod
    def from_kwargs(cls, ff_kwargs: Mapping[str, Any] | None) -> FeedForwardOptions:
        """Read the seed's `ff_kwargs`.

        Raises:
            ValueError: An option that there is not, or ones that contradict each other.
        """
        known = [field.name for field in fields(cls)]
        for name, value in (ff_kwargs or {}).items():
            if name not in known:
                raise ValueError(
                    f"ff_kwargs: there is no option {name!r} (= {value!r}); there are "
                    f"{', '.join(known)}."
                )
        return cls(**(ff_kwargs or {}))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class FeedForward(nn.Module):
    """Two layers, the same for each token of a modality.

    State dict:

        w1.weight  (hidden, dim); with `glu` (2 * hidden, dim): values, then gates
        w1.bias    (hidden,) or (2 * hidden,); none with `no_bias`
        w2.weight  (dim, hidden)
        w2.bias    (dim,); none with `no_bias`
        mult_bias  (hidden,); only with `glu_mult_bias`
        norm.weight, norm.bias  (hidden,); only with `post_act_ln`

    Args:
        dim: Width of the residual stream.
        options: Form of the network.
    """

    def __init__(self, dim: int, options: FeedForwardOptions) -> None:
        super().__init__()
        self.options = options
        hidden_dim, has_bias = int(options.mult * dim), not options.no_bias
        if hidden_dim < 1:
            raise ValueError(f"mult = {options.mult}: leaves no hidden unit with dim = {dim}.")
        self.w1 = nn.Linear(dim, (1 + options.glu) * hidden_dim, bias=has_bias)
        self.mult_bias = nn.Parameter(torch.ones(hidden_dim)) if options.glu_mult_bias else None
        self.norm = nn.LayerNorm(hidden_dim) if options.post_act_ln else None
        self.w2 = nn.Linear(hidden_dim, dim, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, dim)` -> the same shape."""
        hidden = self.w1(x)
        if self.options.glu:
            value, gate = hidden.chunk(2, dim=-1)
            hidden = value * self._activate(gate)
            if self.mult_bias is not None:
                hidden = hidden * self.mult_bias
        else:
            hidden = self._activate(hidden)
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.options.dropout:
            hidden = F.dropout(hidden, self.options.dropout, self.training)
        return self.w2(hidden)

    def _activate(self, x: Tensor) -> Tensor:
        if self.options.swish:
            return F.silu(x)
        if self.options.relu_squared:
            return F.relu(x).square()
        return F.gelu(x, approximate="tanh" if self.options.tanh_gelu else "none")

    def init_weights(self) -> None:
        """Initialise all weights."""
        for linear in (self.w1, self.w2):
            init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.options.zero_init_output:
            nn.init.zeros_(self.w2.weight)
        if self.mult_bias is not None:
            nn.init.ones_(self.mult_bias)
        if self.norm is not None:
            self.norm.reset_parameters()
