"""A transformer block of several modalities that meet in attention.

Source: Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image
Synthesis", arXiv 2403.03206, section 4 and figure 2; Zhu et al. 2024, "Hyper-Connections", arXiv
2409.19606, for several residual streams; the package `mmdit` for more than two modalities and for
the interface of `MMDiTBlock`. For modality i with tokens x_i and a condition c:

    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = W_i silu(c) + b_i
    u_i  = modulate(LN(x_i); shift, scale)
    x_i += gate * JointAttention(u_1, u_2, ...)_i
    x_i += ffn_gate * FFN_i(modulate(LN(x_i); ffn_shift, ffn_scale))

Deviations:
    - Modulation "zero" is SD3's, an identity at first; "film_identity" the package's, an ordinary
      transformer block at first. Each modality has one linear layer for all its vectors in either
      case (in the package modalities share one for what scales branches).
    - A modality without output ("pre-only", SD3's text in the last block) has no weights behind
      attention; the package has them and leaves them out. Its queries attend and nobody reads what
      they find, as in SD3, so a norm of them never learns.
    - A condition may be of a modality or of a token.
    - Weights are drawn as in DiT: Xavier's uniform distribution, biases 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from torchtitan_mixtures.models.common.building import initialise
from torchtitan_mixtures.models.common.modulation import Modulation, modulated_norm
from torchtitan_mixtures.models.mmdit.feed_forward import FeedForward, FeedForwardOptions
from torchtitan_mixtures.models.mmdit.hyper_connections import (
    Connection,
    HyperConnection,
    StreamReader,
)
from torchtitan_mixtures.models.mmdit.inputs import (
    check_batches,
    check_counts,
    check_mask,
    check_tokens,
    check_widths,
    count_heads,
    read_condition,
)
from torchtitan_mixtures.models.mmdit.joint_attention import JointAttention, QKNorm

SEED_NORM_EPS = 1e-5
"""Epsilon of the package's layer norms."""

ModulationKind = Literal["zero", "film_identity"]

Condition = Tensor | Mapping[str, Tensor] | None
"""One for all tokens of a sample, `(batch, condition_dim)`, or one per modality, which may then be
of each token, `(batch, seq, condition_dim)`."""


@dataclass(frozen=True)
class BlockConfig:
    """Form of a `JointBlock`."""

    n_heads: int
    head_dim: int
    condition_dim: int | None  # None: no condition; norms have weights, and branches no gates
    modulation: ModulationKind = "zero"
    qk_norm: QKNorm = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    softclamp: float | None = None
    num_adaptive_weights: int = 1
    feed_forward: FeedForwardOptions = field(default_factory=FeedForwardOptions)
    num_residual_streams: int = 1
    dynamic_streams: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.modulation not in get_args(ModulationKind):
            raise ValueError(
                f"modulation = {self.modulation!r}: must be one of {get_args(ModulationKind)}."
            )
        check_counts(num_residual_streams=self.num_residual_streams)
        if self.condition_dim is not None:
            check_counts(condition_dim=self.condition_dim)


class JointBlock(nn.Module):
    """Attention among all modalities, then a feed-forward network of each.

    State dict, for each modality:

        modulation.{name}.*         see `Modulation`, 6 vectors; only with a condition
        attention_norm.{name}.weight, attention_norm.{name}.bias, ffn_norm.{name}.*
                                    (dim,); only without a condition
        attention.*                 see `JointAttention`
        feed_forward.{name}.*       see `FeedForward`
        attention_streams.{name}.*, ffn_streams.{name}.*
                                    see `HyperConnection`; only with several residual streams

    A modality without output has 2 vectors, a `StreamReader` and nothing of feed-forward networks.

    Args:
        dims: Width of each modality, by name.
        config: Form of the block.
        layer_index: Number of the block, by which branches choose the stream they read at first.
        pre_only: Modalities that attention sees, but that get no output.

    Raises:
        ValueError: A value that cannot be.
    """

    def __init__(
        self,
        dims: Mapping[str, int],
        config: BlockConfig,
        layer_index: int = 0,
        pre_only: Collection[str] = (),
    ) -> None:
        super().__init__()
        check_widths(dims)
        unknown = [name for name in pre_only if name not in dims]
        if unknown or len(set(pre_only)) == len(dims):
            raise ValueError(
                f"pre_only = {tuple(pre_only)}: must be modalities of {tuple(dims)}, but not all."
            )
        self.config = config
        kept = {name: dim for name, dim in dims.items() if name not in pre_only}
        self.modulation = nn.ModuleDict()
        if config.condition_dim is not None:
            for name, dim in dims.items():
                self.modulation[name] = _modulation(dim, config, 6 if name in kept else 2)
        self.attention_norm = nn.ModuleDict({name: _norm(d, config) for name, d in dims.items()})
        self.attention = JointAttention(
            dims,
            config.n_heads,
            config.head_dim,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            qk_norm=config.qk_norm,
            softclamp=config.softclamp,
            num_adaptive_weights=config.num_adaptive_weights,
            pre_only=pre_only,
        )
        self.ffn_norm = nn.ModuleDict({name: _norm(d, config) for name, d in kept.items()})
        self.feed_forward = nn.ModuleDict(
            {name: FeedForward(dim, config.feed_forward) for name, dim in kept.items()}
        )
        self.attention_streams, self.ffn_streams = nn.ModuleDict(), nn.ModuleDict()
        if config.num_residual_streams > 1:
            for name, dim in dims.items():
                kind = HyperConnection if name in kept else StreamReader
                self.attention_streams[name] = kind(
                    dim,
                    config.num_residual_streams,
                    2 * layer_index,
                    dynamic=config.dynamic_streams,
                )
            for name, dim in kept.items():
                self.ffn_streams[name] = HyperConnection(
                    dim,
                    config.num_residual_streams,
                    2 * layer_index + 1,
                    dynamic=config.dynamic_streams,
                )
        initialise(self)

    def forward(
        self,
        streams: Mapping[str, Tensor],
        condition: Condition,
        masks: Mapping[str, Tensor | None] | None = None,
        skip_feed_forward: Collection[str] = (),
    ) -> dict[str, Tensor]:
        """Run the block.

        Args:
            streams: Residual stream of each modality, `(batch, seq_of_modality, dim_of_modality)`;
                with several `(batch, seq_of_modality, streams, dim_of_modality)`. The order is that
                of the joint sequence.
            condition: One for all modalities, or of each by name; None if the block takes none.
            masks: Which tokens are seen, `(batch, seq_of_modality)` bool; None: all.
            skip_feed_forward: Modalities that leave their feed-forward network out.

        Returns:
            Of each modality that is not `pre_only` the same shape.

        Raises:
            ValueError: No condition though the block takes one, or the other way around.
        """
        self._check_condition(streams, condition)
        vectors = {name: self._vectors(name, condition) for name in streams}
        inputs, carried, betas = {}, {}, {}
        for name, x in streams.items():
            read, carried[name], betas[name] = _read(self.attention_streams, name, x)
            inputs[name] = _modulate(self.attention_norm[name](read), *vectors[name][:2])
        outputs = {}
        for name, attended in self.attention(inputs, masks).items():
            gate, ffn_shift, ffn_scale, ffn_gate = vectors[name][2:]
            x = _write(carried[name], betas[name], attended, gate)
            if name not in skip_feed_forward:
                read, rest, beta = _read(self.ffn_streams, name, x)
                normed = _modulate(self.ffn_norm[name](read), ffn_shift, ffn_scale)
                x = _write(rest, beta, self.feed_forward[name](normed), ffn_gate)
            outputs[name] = x
        return outputs

    def _check_condition(self, streams: Mapping[str, Tensor], condition: Condition) -> None:
        width = self.config.condition_dim
        if (condition is None) != (width is None):
            given = "missing" if condition is None else "given"
            takes = "none" if width is None else f"one of width {width}"
            raise ValueError(f"the condition is {given}, but the block takes {takes}.")
        if isinstance(condition, Mapping) and set(condition) != set(streams):
            raise ValueError(
                f"there are conditions of {tuple(condition)}, but the modalities are "
                f"{tuple(streams)}."
            )

    def _vectors(self, name: str, condition: Condition) -> tuple[Tensor | None, ...]:
        """Shift, factor, gate, and the same of the feed-forward network."""
        if condition is None:
            return (None,) * 6
        own = condition if isinstance(condition, Tensor) else condition[name]
        vectors = list(self.modulation[name](own))  # each (batch, 1 or seq, dim)
        if self.config.modulation == "zero":
            vectors[1::3] = [1 + scale for scale in vectors[1::3]]
        return tuple(vectors)

    def init_weights(self) -> None:
        """Initialise all weights."""
        self.attention.init_weights()
        for norms in (self.attention_norm, self.ffn_norm):
            for norm in cast(Iterable[nn.LayerNorm], norms.values()):
                norm.reset_parameters()
        for modules in (
            self.modulation,
            self.feed_forward,
            self.attention_streams,
            self.ffn_streams,
        ):
            for module in cast(Iterable[Modulation | FeedForward | Connection], modules.values()):
                module.init_weights()


def _norm(dim: int, config: BlockConfig) -> nn.LayerNorm:
    if config.condition_dim is None:
        return nn.LayerNorm(dim, eps=config.norm_eps)
    return modulated_norm(dim, config.norm_eps)


def _modulation(dim: int, config: BlockConfig, num_vectors: int) -> Modulation:
    # Scales and gates of the package are factors; SD3's scales are added to one.
    ones = [n for n in (1, 2, 4, 5) if n < num_vectors and config.modulation == "film_identity"]
    return Modulation(dim, num_vectors, config.condition_dim, ones)


def _modulate(x: Tensor, shift: Tensor | None, factor: Tensor | None) -> Tensor:
    return x if shift is None or factor is None else torch.addcmul(shift, x, factor)


def _read(connections: nn.ModuleDict, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a branch reads, what is carried past it, and the weights its output is written with."""
    if name not in connections:
        return x, x, None
    read = connections[name](x)
    return read if isinstance(read, tuple) else (read, x, None)


def _write(carried: Tensor, beta: Tensor | None, out: Tensor, gate: Tensor | None) -> Tensor:
    """Add what a branch puts out to the stream, or the streams, that are carried past it."""
    if beta is not None:
        return HyperConnection.combine(carried, beta, out if gate is None else gate * out)
    return carried + out if gate is None else torch.addcmul(carried, gate, out)


class MMDiTBlock(nn.Module):
    """A block of text and image, with the seed's arguments.

    State dict:

        block.*  see `JointBlock`; its modalities are "text" and "image"

    Args:
        dim_text: Width of text tokens.
        dim_image: Width of image tokens.
        dim_joint_attn: Width of all attention heads; must be `heads * dim_head`.
        dim_cond: Width of the condition; None: there is none.
        dim_head: Width of a head.
        heads: Attention heads; None: as many as fill `dim_joint_attn`, or 8.
        qk_rmsnorm: Whether queries and keys have a norm for each head.
        softclamp: Whether attention logits are bounded.
        softclamp_value: By what.
        num_residual_streams: Residual streams of each token. Several come and go as the package
            has them: `(batch * streams, seq, dim)`, those of a sample one after the other.
        dynamic_streams: Whether each token decides how streams are mixed.
        ff_kwargs: Options of feed-forward networks; see `FeedForwardOptions`.
        modulation: "film_identity" (the package's), or "zero" (SD3's: an identity at first).
        num_adaptive_weights: Candidates of each projection that tokens choose between.
        pre_only_text: Whether text has no output.
        layer_index: Number of the block; see `HyperConnection`.

    Raises:
        ValueError: A value that cannot be.
    """

    def __init__(
        self,
        *,
        dim_text: int,
        dim_image: int,
        dim_joint_attn: int | None = None,
        dim_cond: int | None = None,
        dim_head: int = 64,
        heads: int | None = None,
        qk_rmsnorm: bool = False,
        softclamp: bool = False,
        softclamp_value: float = 50.0,
        num_residual_streams: int = 1,
        dynamic_streams: bool = True,
        ff_kwargs: Mapping[str, Any] | None = None,
        modulation: ModulationKind = "film_identity",
        num_adaptive_weights: int = 1,
        pre_only_text: bool = False,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        self.dims = {"text": dim_text, "image": dim_image}
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
        pre_only = ("text",) if pre_only_text else ()
        self.block = JointBlock(self.dims, config, layer_index, pre_only)

    def forward(
        self,
        *,
        text_tokens: Tensor,
        image_tokens: Tensor,
        text_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        time_cond: Tensor | tuple[Tensor, Tensor] | None = None,
        skip_feedforward_text_tokens: bool = True,
    ) -> tuple[Tensor | None, Tensor]:
        """Run the block.

        Args:
            text_tokens: `(batch, text_seq, dim_text)`.
            image_tokens: `(batch, image_seq, dim_image)`.
            text_mask: Which text tokens are seen, `(batch, text_seq)` bool; None: all.
            image_mask: The same of image tokens, `(batch, image_seq)`.
            time_cond: `(batch, dim_cond)`; or one for text and one for the image, each that or one
                of each token, `(batch, seq, dim_cond)`. None if the block takes none.
            skip_feedforward_text_tokens: Whether text leaves its feed-forward network out.

        Returns:
            Text (None with `pre_only_text`) and image, each of the shape it came in.

        Raises:
            ValueError: Inputs of a wrong shape or type.
        """
        num_streams = self.block.config.num_residual_streams
        streams = {"text": text_tokens, "image": image_tokens}
        masks = {"text": text_mask, "image": image_mask}
        shapes = {}
        for name, x in streams.items():
            check_tokens(f"{name}_tokens", x, self.dims[name])
            if len(x) % num_streams:
                raise ValueError(
                    f"{name}_tokens is {tuple(x.shape)}: its first size must be a multiple of "
                    f"num_residual_streams = {num_streams}."
                )
            shapes[name] = (len(x) // num_streams, x.shape[1])
            check_mask(f"{name}_mask", masks[name], shapes[name])
        check_batches({name: batch for name, (batch, _) in shapes.items()})
        condition = read_condition(time_cond, shapes, self.block.config.condition_dim)
        if num_streams > 1:
            streams = {
                name: x.unflatten(0, (-1, num_streams)).transpose(1, 2)
                for name, x in streams.items()
            }  # (batch, seq, streams, dim)
        skipped = ("text",) if skip_feedforward_text_tokens else ()
        outputs = self.block(streams, condition, masks, skipped)
        if num_streams > 1:
            outputs = {name: x.transpose(1, 2).flatten(0, 1) for name, x in outputs.items()}
        return outputs.get("text"), outputs["image"]

    def init_weights(self) -> None:
        """Initialise all weights."""
        self.block.init_weights()
