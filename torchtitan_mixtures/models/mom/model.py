"""Mixture of Mixers: a diffusion transformer that mixes tokens and channels by chosen networks.

Source: the project "Mixture of Mixers" (MoM); blocks as in DiT, Peebles and Xie 2022, arXiv
2212.09748; token mixers as in MLP-Mixer, Tolstikhin et al. 2021, arXiv 2105.01601; router and its
losses as in Fedus, Zoph, Shazeer 2021, arXiv 2101.03961.

Deviations:
    - The choice is typed by default: at least one mixer of either kind (the source chooses freely,
      and a sample may then pass a layer without mixing its tokens).
    - With `top_k = 1` the weight is the probability itself, which trains the router.
    - The load that is balanced is of all choices, not of the first alone.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torchtitan.protocols.model import ModelProtocol

from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.common.dit import DiTBlock, FeedForward, FinalLayer
from torchtitan_mixtures.models.common.embeddings import (
    LabelEmbedder,
    TimestepEmbedder,
    position_table,
    timestep_features,
)
from torchtitan_mixtures.models.common.modulation import Modulation, modulate, modulated_norm
from torchtitan_mixtures.models.mom.args import MoMModelArgs
from torchtitan_mixtures.models.mom.mixers import MixtureOfMixers
from torchtitan_mixtures.models.mom.resize import resize_token_mixers
from torchtitan_mixtures.models.mom.routing import LayerStatistics
from torchtitan_mixtures.objectives.outputs import DenoiserOutput, RouterStatistics
from torchtitan_mixtures.objectives.patches import patchify


class MoMBlock(nn.Module):
    """A DiT block with a mixture of mixers in place of attention; an identity at first.

    State dict:

        mixer.*         see `MixtureOfMixers`
        feed_forward.*  see `FeedForward`
        modulation.*    see `Modulation`, 6 vectors
    """

    def __init__(self, args: MoMModelArgs) -> None:
        super().__init__()
        self.modulation = Modulation(args.dim, 6)
        self.mixer_norm = modulated_norm(args.dim)
        self.mixer = MixtureOfMixers(
            args.dim,
            args.num_tokens,
            args.num_token_experts,
            args.num_channel_experts,
            args.top_k,
            min_token_experts=args.min_token_experts,
            min_channel_experts=args.min_channel_experts,
            token_hidden_dim=args.token_hidden_dim,
            channel_hidden_dim=args.channel_hidden_dim,
            router_noise=args.router_noise,
        )
        self.ffn_norm = modulated_norm(args.dim)
        self.feed_forward = FeedForward(args.dim, args.ffn_hidden_dim)

    def forward(
        self, x: Tensor, condition: Tensor, router_noise: Tensor | None = None
    ) -> tuple[Tensor, LayerStatistics]:
        """Run the block.

        Args:
            x: Residual stream, `(batch, seq, dim)`.
            condition: `(batch, dim)`.
            router_noise: Standard normal, `(batch, dim)`; None: none.

        Returns:
            `(batch, seq, dim)`, and how the router decided.
        """
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.modulation(condition)
        mixed, statistics = self.mixer(modulate(self.mixer_norm(x), shift, scale), router_noise)
        x = x + gate * mixed
        x = x + ffn_gate * self.feed_forward(modulate(self.ffn_norm(x), ffn_shift, ffn_scale))
        return x, statistics

    def init_weights(self) -> None:
        """Initialise all weights."""
        self.modulation.init_weights()
        self.mixer.init_weights()
        self.feed_forward.init_weights()


class MoM(ModelProtocol):
    """Diffusion transformer, conditioned on time and class, whose blocks are MoM's or DiT's.

    State dict:

        x_embedder.weight  (dim, patch_size**2 * in_channels)    x_embedder.bias  (dim,)
        t_embedder.*       see `TimestepEmbedder`
        y_embedder.weight  (classes + 1, dim)
        layers.{0..}.*     see `MoMBlock`; of a DiT `DiTBlock`
        final_layer.*      see `FinalLayer`, out = patch_size**2 * out_channels
    """

    resize_state_dict = staticmethod(resize_token_mixers)
    """How weights become those of a model for images of another size."""

    def __init__(self, model_args: MoMModelArgs) -> None:
        super().__init__(model_args)
        self.model_args = args = model_args
        self.x_embedder = nn.Linear(args.patch_size**2 * args.in_channels, args.dim)
        self.t_embedder = TimestepEmbedder(args.num_timestep_features, args.dim)
        self.y_embedder = LabelEmbedder(args.num_classes, args.dim)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", self._build_pos_embed(), persistent=False)
        self.stream = nn.Identity()  # for parallelism to cut what enters the blocks
        blocks = (
            MoMBlock(args)
            if args.mixer == "pool"
            else DiTBlock(args.dim, args.n_heads, args.ffn_hidden_dim)
            for _ in range(args.n_layers)
        )
        self.layers = nn.ModuleDict({str(i): block for i, block in enumerate(blocks)})
        self.final_layer = FinalLayer(args.dim, args.patch_size**2 * args.out_channels)

    def forward(
        self,
        latents: Tensor,
        times: Tensor,
        class_labels: Tensor,
        router_noise: Tensor | None = None,
    ) -> DenoiserOutput:
        """Predict what was done to images.

        Args:
            latents: Noised images or latents, `(batch, in_channels, image_size, image_size)`.
            times: From 0 to about 1000 (noise), `(batch,)` float32.
            class_labels: `(batch,)` int64; `num_classes` = no class.
            router_noise: Standard normal, `(batch, layers, dim)`; read with `router_noise > 0` in
                the arguments. None: none.

        Returns:
            The prediction in patch space, `(batch, tokens, patch_size**2 * out_channels)`, and how
            the routers decided (None of a DiT).

        Raises:
            ValueError: Images of another shape than the model's.
        """
        args = self.model_args
        shape = (args.in_channels, args.image_size, args.image_size)
        if latents.shape[1:] != shape:
            raise ValueError(
                f"images are {tuple(latents.shape[1:])} (channels, height, width), but the model's "
                f"are {shape}; resize the model (multimodal.image_size) or the images."
            )
        patches = patchify(latents, args.patch_size).to(self.x_embedder.weight.dtype)
        x = self.x_embedder(patches)  # (batch, tokens, dim)
        x = self.stream(x + self.pos_embed.to(x.dtype))
        features = timestep_features(times, args.num_timestep_features)
        condition = self.t_embedder(features) + self.y_embedder(class_labels)  # (batch, dim)
        if args.mixer == "attention":
            for block in self.layers.values():
                x = block(x, condition)
            return DenoiserOutput(self.final_layer(x, condition))
        statistics = []
        for index, block in enumerate(self.layers.values()):
            noise = None if router_noise is None else router_noise[:, index]
            x, of_layer = block(x, condition, noise)
            statistics.append(of_layer)
        router = RouterStatistics(*(torch.stack(rows) for rows in zip(*statistics, strict=True)))
        return DenoiserOutput(self.final_layer(x, condition), router)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Initialise all parameters and buffers, by the rule of DiT.

        Args:
            buffer_device: Device of the position table; None leaves it where it is.
        """
        with torch.device(buffer_device or self.pos_embed.device):
            self.pos_embed = self._build_pos_embed()
        with init.parameter_names(self, self.model_args.init_seed):
            init.xavier_uniform_(self.x_embedder.weight)
            nn.init.zeros_(self.x_embedder.bias)
            self.t_embedder.init_weights()
            self.y_embedder.init_weights()
            for block in self.layers.values():
                cast(MoMBlock | DiTBlock, block).init_weights()
            self.final_layer.init_weights()

    def _build_pos_embed(self) -> Tensor:
        args = self.model_args
        return position_table(args.dim, args.image_size // args.patch_size)
