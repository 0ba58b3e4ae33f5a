"""Blocks for any number of modalities, with the seed's interface.

Source: the package `mmdit` (its generalised form), after Esser et al. 2024, arXiv 2403.03206;
registers as in Darcet et al. 2023, "Vision Transformers Need Registers", arXiv 2309.16588.

Deviations:
    - Residual streams are joined by their mean (the package's sum is `num_residual_streams` times
      it), and the stream that a branch reads at first is that of its number, not a random one.
    - Registers may be of any modality, and outputs are normed only if `final_norms` says so (the
      package's generalised form has no registers, and norms in any case).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.mmdit.block import (
    SEED_NORM_EPS,
    BlockConfig,
    Condition,
    JointBlock,
    ModulationKind,
)
from torchtitan_mixtures.models.mmdit.feed_forward import FeedForwardOptions
from torchtitan_mixtures.models.mmdit.hyper_connections import expand, reduce
from torchtitan_mixtures.models.mmdit.inputs import (
    check_batches,
    check_counts,
    check_mask,
    check_tokens,
    check_widths,
    count_heads,
    read_condition,
)

FINAL_NORM_EPS = 1e-12
"""Epsilon of the norms of outputs, which in the package have none."""

REGISTER_STD = 0.02
"""Standard deviation of registers at first."""


class MMDiT(nn.Module):
    """Blocks of several modalities, which have no names but numbers.

    State dict:

        layers.{0..}.*        see `JointBlock`; its modalities are "0", "1", ...
        registers.{modality}  (registers, dim); of modalities that have some
        norms.{modality}.weight
                              (dim,); with `final_norms`, of modalities with an output

    Args:
        depth: Number of blocks.
        dim_modalities: Width of each modality.
        dim_joint_attn: Width of all attention heads; must be `heads * dim_head`.
        dim_cond: Width of the condition; None: there is none.
        dim_head: Width of a head.
        heads: Attention heads; None: as many as fill `dim_joint_attn`, or 8.
        qk_rmsnorm: Whether queries and keys have a norm for each head.
        softclamp: Whether attention logits are bounded.
        softclamp_value: By what.
        num_residual_streams: Residual streams of each token.
        dynamic_streams: Whether each token decides how streams are mixed.
        num_register_tokens: Learned tokens in front of each modality, or how many of each.
        final_norms: Whether outputs have an RMS norm.
        ff_kwargs: Options of feed-forward networks; see `FeedForwardOptions`.
        modulation: "film_identity" (the package's), or "zero" (SD3's: an identity at first).
        num_adaptive_weights: Candidates of each projection that tokens choose between.
        pre_only_last: Numbers of the modalities that have no output.

    Raises:
        ValueError: A value that cannot be.
    """

    def __init__(
        self,
        *,
        depth: int,
        dim_modalities: Sequence[int],
        dim_joint_attn: int | None = None,
        dim_cond: int | None = None,
        dim_head: int = 64,
        heads: int | None = None,
        qk_rmsnorm: bool = False,
        softclamp: bool = False,
        softclamp_value: float = 50.0,
        num_residual_streams: int = 4,
        dynamic_streams: bool = True,
        num_register_tokens: int | Sequence[int] = 0,
        final_norms: bool = True,
        ff_kwargs: Mapping[str, Any] | None = None,
        modulation: ModulationKind = "film_identity",
        num_adaptive_weights: int = 1,
        pre_only_last: Collection[int] = (),
    ) -> None:
        super().__init__()
        check_counts(depth=depth)
        self.num_streams = num_residual_streams
        self.dims = {str(number): dim for number, dim in enumerate(dim_modalities)}
        check_widths(self.dims)
        config = BlockConfig(
            n_heads=count_heads(dim_joint_attn, heads, dim_head),
            head_dim=dim_head,
            condition_dim=dim_cond,
            modulation=modulation,
            qk_norm="per_head" if qk_rmsnorm else "none",
            softclamp=softclamp_value if softclamp else None,
            num_adaptive_weights=num_adaptive_weights,
            feed_forward=FeedForwardOptions.from_kwargs(ff_kwargs),
            num_residual_streams=num_residual_streams,
            dynamic_streams=dynamic_streams,
            norm_eps=SEED_NORM_EPS,
        )
        self.dim_cond = dim_cond
        self.num_registers = _count_registers(num_register_tokens, self.dims)
        self.registers = nn.ParameterDict(
            {
                name: nn.Parameter(REGISTER_STD * torch.randn(self.num_registers[name], dim))
                for name, dim in self.dims.items()
                if self.num_registers[name]
            }
        )
        last = [str(number) for number in pre_only_last]
        self.layers = nn.ModuleDict(
            {
                str(i): JointBlock(self.dims, config, i, last if i == depth - 1 else ())
                for i in range(depth)
            }
        )
        normed = [name for name in self.dims if final_norms and name not in last]
        self.norms = nn.ModuleDict(
            {name: nn.RMSNorm(self.dims[name], eps=FINAL_NORM_EPS) for name in normed}
        )

    def forward(
        self,
        *,
        modality_tokens: Sequence[Tensor],
        modality_masks: Sequence[Tensor | None] | None = None,
        time_cond: Tensor | Sequence[Tensor] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Run the blocks.

        Args:
            modality_tokens: Tokens of each modality, `(batch, seq, dim)`.
            modality_masks: Which of them are seen, `(batch, seq)` bool each, or None: all.
            time_cond: `(batch, dim_cond)`; or one of each modality, each that or one of each token,
                `(batch, seq, dim_cond)`. None if the model takes none. Registers of a modality have
                the mean of its tokens that are seen.

        Returns:
            Of each modality the shape of its tokens; None of those without an output.

        Raises:
            ValueError: Inputs of a wrong number, shape or type.
        """
        streams, masks = self._read(modality_tokens, modality_masks)
        shapes = {name: (x.shape[0], x.shape[1]) for name, x in streams.items()}
        condition = read_condition(time_cond, shapes, self.dim_cond)
        streams, masks, condition = self._add_registers(streams, masks, condition)
        if self.num_streams > 1:
            streams = {name: expand(x, self.num_streams) for name, x in streams.items()}
        for block in self.layers.values():
            streams = block(streams, condition, masks)
        return tuple(self._put_out(name, streams.get(name)) for name in self.dims)

    def _read(
        self, tokens: Sequence[Tensor], masks: Sequence[Tensor | None] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """Tokens and masks by modality."""
        masks = [None] * len(self.dims) if masks is None else masks
        for what, given in (("modality_tokens", tokens), ("modality_masks", masks)):
            if len(given) != len(self.dims):
                raise ValueError(
                    f"{what} has {len(given)} entries, but there are {len(self.dims)} modalities "
                    f"(dim_modalities = {tuple(self.dims.values())})."
                )
        streams = dict(zip(self.dims, tokens, strict=True))
        for (name, x), mask in zip(streams.items(), masks, strict=True):
            check_tokens(f"modality_tokens[{name}]", x, self.dims[name])
            check_mask(f"modality_masks[{name}]", mask, x.shape[:2])
        check_batches({f"modality {name}": len(x) for name, x in streams.items()})
        return streams, dict(zip(self.dims, masks, strict=True))

    def _add_registers(
        self,
        streams: dict[str, Tensor],
        masks: dict[str, Tensor | None],
        condition: Condition,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | None], Condition]:
        """Put registers in front; they are seen."""
        streams, masks = dict(streams), dict(masks)
        of_modality = dict(condition) if isinstance(condition, Mapping) else None
        for name, registers in self.registers.items():
            number, x, mask = self.num_registers[name], streams[name], masks[name]
            own = registers.to(x.dtype).expand(len(x), -1, -1)
            streams[name] = torch.cat([own, x], dim=1)
            if of_modality is not None and of_modality[name].ndim == 3:
                of_tokens = of_modality[name]
                mean = _mean_of_seen(of_tokens, mask).expand(-1, number, -1)
                of_modality[name] = torch.cat([mean, of_tokens], dim=1)
            if mask is not None:
                masks[name] = F.pad(mask, (number, 0), value=True)
        return streams, masks, condition if of_modality is None else of_modality

    def _put_out(self, name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x[:, self.num_registers[name] :]
        if self.num_streams > 1:
            x = reduce(x)
        return self.norms[name](x) if name in self.norms else x

    def init_weights(self) -> None:
        """Initialise all weights."""
        for registers in self.registers.values():
            init.normal_(registers, std=REGISTER_STD)
        for block in cast(Iterable[JointBlock], self.layers.values()):
            block.init_weights()
        for norm in cast(Iterable[nn.RMSNorm], self.norms.values()):
            norm.reset_parameters()


def _mean_of_seen(condition: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens, `(batch, seq, condition_dim)` -> `(batch, 1, condition_dim)`."""
    if mask is None:
        return condition.mean(1, keepdim=True)
    is_seen = mask.unsqueeze(2).to(condition.dtype)
    return (condition * is_seen).sum(1, keepdim=True) / is_seen.sum(1, keepdim=True).clamp(min=1)


def _count_registers(numbers: int | Sequence[int], dims: Mapping[str, int]) -> dict[str, int]:
    """Registers of each modality."""
    listed = list(numbers) if isinstance(numbers, Sequence) else [numbers] * len(dims)
    if len(listed) != len(dims) or not all(isinstance(n, int) and n >= 0 for n in listed):
        raise ValueError(
            f"num_register_tokens = {numbers}: must be a number from 0, or one for each of the "
            f"{len(dims)} modalities."
        )
    return dict(zip(dims, listed, strict=True))
