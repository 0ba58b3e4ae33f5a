"""MMDiT that is trained: a diffusion transformer with weights of its own for each modality.

Source: Esser et al. 2024, arXiv 2403.03206 (Stable Diffusion 3), figure 2 and section 4; what it
takes from DiT: Peebles and Xie 2022, arXiv 2212.09748; registers: Darcet et al. 2023, arXiv
2309.16588; residual streams: Zhu et al. 2024, arXiv 2409.19606.

Deviations:
    - Any number of prompts, each a stream of its own beside the image.
    - Prompts may be token ids, which a small encoder in the model embeds.
    - A dropped prompt of ids is empty (of padding); one of embeddings is zero, as in the source.
    - Positions are computed for the grid that an image has, not cut out of a stored table; they are
      the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchtitan.protocols.model import ModelProtocol

from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.common.dit import FinalLayer
from torchtitan_mixtures.models.common.embeddings import (
    EMBEDDING_STD,
    TimestepEmbedder,
    centred_position_table,
    timestep_features,
)
from torchtitan_mixtures.models.mmdit.args import IMAGE, MMDiTModelArgs
from torchtitan_mixtures.models.mmdit.block import JointBlock
from torchtitan_mixtures.models.mmdit.hyper_connections import expand, reduce
from torchtitan_mixtures.models.mmdit.prompt_encoder import PromptEncoder
from torchtitan_mixtures.objectives.outputs import DenoiserOutput
from torchtitan_mixtures.objectives.patches import patchify

REGISTERS = "registers."
"""Prefix of the part of a stream that is its registers, where it is cut for parallelism."""


class Registers(nn.Module):
    """Learned tokens that belong to no input.

    State dict:

        weight  (number, dim)
    """

    def __init__(self, number: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(number, dim))

    def forward(self, batch: int) -> Tensor:
        """The registers for each sample, `(batch, number, dim)`."""
        return self.weight.expand(batch, -1, -1)

    def init_weights(self) -> None:
        """Initialise all weights."""
        init.normal_(self.weight, std=EMBEDDING_STD)


class MMDiTDenoiser(ModelProtocol):
    """Diffusion transformer, conditioned on time and on prompts, that draws images.

    State dict:

        x_embedder.weight          (dim, patch_size**2 * in_channels)    x_embedder.bias  (dim,)
        t_embedder.*               see `TimestepEmbedder`
        prompt_encoder.{name}.*    of prompts that are token ids: see `PromptEncoder`
        prompt_embedder.{name}.*   weight (width, channels of the embeddings), bias (width,)
        pooled_embedder.{name}.*   of prompts with a pooled embedding: see `TimestepEmbedder`
        registers.{name}.weight    (number, width), of streams with registers
        layers.{0..}.*             see `JointBlock`; of the last the image's stream alone is whole
        final_layer.*              see `FinalLayer`, out = patch_size**2 * out_channels
    """

    def __init__(self, model_args: MMDiTModelArgs) -> None:
        super().__init__(model_args)
        self.model_args = args = model_args
        widths = args.stream_dims
        self.x_embedder = nn.Linear(args.patch_size**2 * args.in_channels, args.dim)
        self.t_embedder = TimestepEmbedder(args.num_timestep_features, args.dim)
        self.prompt_encoder = nn.ModuleDict()
        self.prompt_embedder = nn.ModuleDict()
        self.pooled_embedder = nn.ModuleDict()
        for spec in args.prompts:
            channels = spec.dim
            if spec.kind == "tokens":
                channels = args.encoder_dim
                self.prompt_encoder[spec.name] = PromptEncoder(
                    spec.vocab_size, spec.length, channels, args.encoder_layers, args.encoder_heads
                )
            self.prompt_embedder[spec.name] = nn.Linear(channels, widths.get(spec.name, args.dim))
            if pooled := args.pooled_dim(spec):
                self.pooled_embedder[spec.name] = TimestepEmbedder(pooled, args.dim)
        self.registers = nn.ModuleDict(
            {name: Registers(number, widths[name]) for name, number in args.registers.items()}
        )
        self._places: dict[Any, Tensor] = {}  # positions of images of each shape
        self.streams = nn.Identity()  # for parallelism to cut what enters the blocks
        last = args.n_layers - 1
        prompts = [name for name in widths if name != IMAGE]
        self.layers = nn.ModuleDict(
            {
                str(i): JointBlock(widths, args.block_config, i, prompts if i == last else ())
                for i in range(args.n_layers)
            }
        )
        self.final_layer = FinalLayer(args.dim, args.patch_size**2 * args.out_channels)

    def forward(
        self,
        latents: Tensor,
        times: Tensor,
        prompts: Mapping[str, Tensor],
        kept: Tensor | None = None,
    ) -> DenoiserOutput:
        """Predict what was done to images.

        Args:
            latents: Noised images or latents, `(batch, in_channels, height, width)`; multiples of
                the patch, of any shape.
            times: From 0 to about 1000 (noise), `(batch,)` float32.
            prompts: Of each `PromptSpec` its `name`: ids `(batch, length)` int64 or embeddings
                `(batch, length, channels)`, and then `{name}_pooled`, `(batch, pooled_dim)`.
            kept: Which encoders' parts of its prompts a sample keeps, `(batch, num_encoders)` bool;
                None: all. With none it is told nothing, as guidance needs.

        Returns:
            The prediction in patch space, `(batch, tokens, patch_size**2 * out_channels)`.

        Raises:
            ValueError: Images or prompts of another shape than the model's.
        """
        args = self.model_args
        self._check_inputs(latents, prompts, kept)
        condition = self.t_embedder(timestep_features(times, args.num_timestep_features))
        parts: dict[str, Tensor] = {}
        first = 0  # of the columns of `kept`
        for spec in args.prompts:
            columns = None if kept is None else kept[:, first : first + spec.num_encoders]
            first += spec.num_encoders
            parts[spec.name], pooled = self._embed_prompt(spec, prompts, columns)
            condition = condition if pooled is None else condition + pooled
        parts[IMAGE] = self._embed_image(latents)
        for name, registers in self.registers.items():
            parts[REGISTERS + name] = registers(len(latents))
        x = self._run_blocks(self.streams(parts), condition)
        return DenoiserOutput(self.final_layer(x, condition))

    def _run_blocks(self, parts: dict[str, Tensor], condition: Tensor) -> Tensor:
        """Make streams of the parts, and keep the image's tokens of what the blocks make of them.

        Args:
            parts: Prompts, image and registers, each `(batch, seq, width)`; of ranks that share
                sequences this rank's part of each.
            condition: `(batch, dim)`.

        Returns:
            `(batch, image tokens, dim)`.
        """
        args, streams = self.model_args, {}
        if args.single_stream:
            names = [REGISTERS + IMAGE, *args.prompt_names, IMAGE]
            streams[IMAGE] = torch.cat([parts[name] for name in names if name in parts], 1)
        else:
            for name in args.stream_dims:
                tokens, registers = parts[name], parts.get(REGISTERS + name)
                joined = tokens if registers is None else torch.cat([registers, tokens], 1)
                streams[name] = joined
        if args.num_residual_streams > 1:
            streams = {k: expand(x, args.num_residual_streams) for k, x in streams.items()}
        for block in self.layers.values():
            streams = block(streams, condition)
        x = streams[IMAGE]
        if args.num_residual_streams > 1:
            x = reduce(x)
        return x[:, x.shape[1] - parts[IMAGE].shape[1] :]

    def _embed_image(self, latents: Tensor) -> Tensor:
        """Embed patches and their places, `(batch, tokens, dim)`."""
        args = self.model_args
        patches = patchify(latents, args.patch_size).to(self.x_embedder.weight.dtype)
        rows, columns = (side // args.patch_size for side in latents.shape[2:])
        key = rows, columns, latents.device, patches.dtype
        if key not in self._places:
            side = args.image_size // args.patch_size
            scaled = args.position_grid or side
            table = centred_position_table(args.dim, rows, columns, side, scaled, latents.device)
            self._places[key] = table.to(patches.dtype)
        return self.x_embedder(patches) + self._places[key]

    def _embed_prompt(
        self, spec: PromptSpec, prompts: Mapping[str, Tensor], kept: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Embed a prompt.

        Args:
            spec: Which one.
            prompts: All of them.
            kept: `(batch, encoders of the prompt)` bool; None: all.

        Returns:
            `(batch, length, width)`, and `(batch, dim)` if there is a pooled embedding.
        """
        dtype = cast(nn.Linear, self.prompt_embedder[spec.name]).weight.dtype
        if spec.kind == "tokens":
            ids = prompts[spec.name]
            if kept is not None:
                ids = torch.where(kept, ids, spec.null_token)
            tokens, pooled = self.prompt_encoder[spec.name](ids)
        else:
            tokens = prompts[spec.name].to(dtype)
            pooled = prompts[f"{spec.name}_pooled"].to(dtype) if spec.pooled_dim else None
            if kept is not None:
                tokens, pooled = drop_spans(spec, tokens, pooled, kept)
        if pooled is not None:
            pooled = self.pooled_embedder[spec.name](pooled)
        return self.prompt_embedder[spec.name](tokens), pooled

    def _check_inputs(
        self, latents: Tensor, prompts: Mapping[str, Tensor], kept: Tensor | None
    ) -> None:
        args, batch = self.model_args, latents.shape[0]
        if latents.ndim != 4 or latents.shape[1] != args.in_channels:
            raise ValueError(
                f"images are {tuple(latents.shape)}, but the model's are (batch, "
                f"{args.in_channels}, height, width)."
            )
        expected: dict[str, tuple[int, ...]] = {}
        for spec in args.prompts:
            expected[spec.name] = (batch, spec.length)
            if spec.kind == "embeddings":
                expected[spec.name] += (spec.dim,)
                if spec.pooled_dim:
                    expected[f"{spec.name}_pooled"] = (batch, spec.pooled_dim)
        found = {name: tuple(tensor.shape) for name, tensor in prompts.items()}
        if found != expected:
            raise ValueError(f"prompts have shapes {found}, but the model's are {expected}.")
        if kept is not None and tuple(kept.shape) != (batch, args.num_encoders):
            raise ValueError(
                f"kept has shape {tuple(kept.shape)}, but there are {batch} samples and "
                f"{args.num_encoders} encoders."
            )

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Initialise all parameters, by the rule of DiT.

        Args:
            buffer_device: Not used: there are no buffers.
        """
        with init.parameter_names(self, self.model_args.init_seed):
            init.xavier_uniform_(self.x_embedder.weight)
            nn.init.zeros_(self.x_embedder.bias)
            self.t_embedder.init_weights()
            for module in (*self.prompt_encoder.values(), *self.pooled_embedder.values()):
                cast(PromptEncoder | TimestepEmbedder, module).init_weights()
            for linear in self.prompt_embedder.values():
                init.xavier_uniform_(cast(nn.Linear, linear).weight)
                nn.init.zeros_(cast(nn.Linear, linear).bias)
            for module in (*self.registers.values(), *self.layers.values(), self.final_layer):
                cast(Registers | JointBlock | FinalLayer, module).init_weights()


def drop_spans(
    spec: PromptSpec, tokens: Tensor, pooled: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Set to zero what dropped encoders say of prompts.

    Args:
        spec: Whose parts are whose.
        tokens: `(batch, length, channels)`.
        pooled: `(batch, pooled_dim)` or None.
        kept: `(batch, encoders)` bool.
    """
    if not spec.spans:
        return tokens * kept[:, :, None], None if pooled is None else pooled * kept
    tokens, pooled = tokens.clone(), None if pooled is None else pooled.clone()
    for column, span in enumerate(spec.spans):
        factor = kept[:, column, None].to(tokens.dtype)
        tokens[:, slice(*span.rows), slice(*span.channels)] *= factor[:, :, None]
        if pooled is not None:
            pooled[:, slice(*span.pooled)] *= factor
    return tokens, pooled
