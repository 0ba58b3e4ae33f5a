"""The router of a mixture of diffusers: how likely it is that an image is of each expert's domain.

Source: McAllister et al. 2025, arXiv 2501.05450, 3.1: the velocity of a union of domains is the sum
of each domain's, weighted by its posterior given the noisy image and the time. So a router learns
to tell domains apart on noised images; with a prompt that says the domain it may read that alone.

It computes in float32 whatever the experts do. Kinds:

    linear       a linear function of the embedded prompt, the latent averaged to 8 x 8, and the
                 cosines and sines of the time
    mlp          two layers of that, with SiLU
    transformer  DiT blocks over the latent's patches, the prompt and a token that is read in the
                 end; they are conditioned on the time

Deviations:
    - The source's router reads noisy image and time; here it may read the prompt too, or alone.
    - A prompt is one vector: the mean of its tokens' embeddings, or of its embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.common.dit import DiTBlock
from torchtitan_mixtures.models.common.embeddings import (
    EMBEDDING_STD,
    LabelEmbedder,
    TimestepEmbedder,
    centred_position_table,
    timestep_features,
)
from torchtitan_mixtures.models.common.modulation import modulated_norm
from torchtitan_mixtures.models.mixdiff.args import MixDiffModelArgs
from torchtitan_mixtures.objectives.patches import patchify

GRID = 8
"""Height and width that latents are averaged to, for the router kinds without attention."""

MLP_RATIO = 4
"""Hidden units of a transformer's feed-forward network / width."""


class TokenEmbedder(nn.Embedding):
    """The mean of a prompt's token embeddings; of an empty prompt zero.

    State dict:

        weight  (vocabulary, dim)
    """

    def __init__(self, spec: PromptSpec, dim: int) -> None:
        super().__init__(spec.vocab_size, dim)
        self.null_token = spec.null_token

    def forward(self, ids: Tensor, pooled: Tensor | None, kept: Tensor | None) -> Tensor:  # pyrefly: ignore [bad-override]
        """Embed prompts.

        Args:
            ids: `(batch, length)` int64.
            pooled: Not used: tokens have no pooled embedding.
            kept: Whether a sample keeps its prompt, `(batch, 1)` bool; None: all do.

        Returns:
            `(batch, dim)`.
        """
        is_read = ids != self.null_token
        if kept is not None:
            is_read = is_read & kept
        weights = is_read / is_read.sum(1, keepdim=True).clamp(min=1)  # (batch, length)
        embeddings = F.embedding(ids, self.table())
        return (embeddings * weights[:, :, None].to(embeddings.dtype)).sum(1)

    def table(self) -> Tensor:
        """The embeddings; what parallelism makes of the weight."""
        return self.weight

    def init_weights(self) -> None:
        """Initialise all weights."""
        init.normal_(self.weight, std=EMBEDDING_STD)


class MeanEmbedder(nn.Module):
    """A linear layer for the mean of what each encoder says of a prompt; dropped ones say zero.

    State dict, for each encoder:

        layers.{0..}.weight  (dim, its channels + its pooled channels)
        layers.{0..}.bias    (dim,)
    """

    def __init__(self, spec: PromptSpec, dim: int) -> None:
        super().__init__()
        whole = ((0, spec.length), (0, spec.dim), (0, spec.pooled_dim))
        spans = [(s.rows, s.channels, s.pooled) for s in spec.spans] or [whole]
        self.spans = [tuple(slice(*limits) for limits in span) for span in spans]
        widths = [
            channels[1] - channels[0] + pooled[1] - pooled[0] for _, channels, pooled in spans
        ]
        self.layers = nn.ModuleList([nn.Linear(width, dim) for width in widths])

    def forward(self, embeddings: Tensor, pooled: Tensor | None, kept: Tensor | None) -> Tensor:
        """Embed prompts.

        Args:
            embeddings: `(batch, length, channels)`.
            pooled: `(batch, pooled channels)`; None: there are none.
            kept: Which encoders a sample keeps, `(batch, encoders)` bool; None: all.

        Returns:
            `(batch, dim)`.
        """
        terms = []
        for column, (layer, (rows, channels, of_pooled)) in enumerate(
            zip(self.layers, self.spans, strict=True)
        ):
            dtype = cast(nn.Linear, layer).weight.dtype
            features = embeddings[:, rows, channels].to(dtype).mean(1)
            if pooled is not None:
                features = torch.cat([features, pooled[:, of_pooled].to(dtype)], 1)
            term = layer(features)
            terms.append(term if kept is None else term * kept[:, column, None])
        return torch.stack(terms).sum(0)

    def init_weights(self) -> None:
        """Initialise all weights."""
        for layer in self.layers:
            init.xavier_uniform_(cast(nn.Linear, layer).weight)
            nn.init.zeros_(cast(nn.Linear, layer).bias)


class PromptReader(nn.Module):
    """One vector for what an image is to be of.

    State dict:

        classes.weight      (classes + 1, dim), of experts that are told classes
        prompts.{name}.*    see `TokenEmbedder` and `MeanEmbedder`, of those that are told prompts
    """

    def __init__(self, args: MixDiffModelArgs) -> None:
        super().__init__()
        self.specs = args.prompts if args.is_prompted else ()
        dim = args.router_dim
        self.classes = None if args.is_prompted else LabelEmbedder(args.num_classes, dim)
        self.prompts = nn.ModuleDict(
            {
                spec.name: (TokenEmbedder if spec.kind == "tokens" else MeanEmbedder)(spec, dim)
                for spec in self.specs
            }
        )

    def forward(
        self,
        class_labels: Tensor | None,
        prompts: Mapping[str, Tensor] | None,
        kept: Tensor | None,
    ) -> Tensor:
        """Read; arguments as for `Router`. Returns `(batch, dim)`."""
        if self.classes is not None:
            assert class_labels is not None
            return self.classes(class_labels)
        assert prompts is not None
        terms, first = [], 0
        for spec in self.specs:
            columns = None if kept is None else kept[:, first : first + spec.num_encoders]
            first += spec.num_encoders
            pooled = prompts.get(f"{spec.name}_pooled")
            terms.append(self.prompts[spec.name](prompts[spec.name], pooled, columns))
        return torch.stack(terms).sum(0)

    def init_weights(self) -> None:
        """Initialise all weights."""
        if self.classes is not None:
            self.classes.init_weights()
        for module in self.prompts.values():
            cast(TokenEmbedder | MeanEmbedder, module).init_weights()


class Features(nn.Module):
    """Everything that a router without attention reads, in one vector. Has no weights."""

    def __init__(self, args: MixDiffModelArgs) -> None:
        super().__init__()
        inputs = args.router_inputs
        self.reads_latent = "latent" in inputs
        self.num_timestep_features = args.num_timestep_features if "time" in inputs else 0
        self.width = args.router_dim * ("prompt" in inputs)
        self.width += args.in_channels * GRID**2 * self.reads_latent + self.num_timestep_features

    def forward(self, prompt: Tensor | None, latents: Tensor, times: Tensor) -> Tensor:
        """Join; arguments as for `Router`, the prompt `(batch, dim)`. Returns `(batch, width)`."""
        parts = [] if prompt is None else [prompt]
        if self.reads_latent:
            parts.append(F.adaptive_avg_pool2d(latents, GRID).flatten(1))
        if self.num_timestep_features:
            features = timestep_features(times, self.num_timestep_features)
            parts.append(features.to(latents.dtype))
        return torch.cat(parts, 1)


class Perceptron(nn.Module):
    """Two layers with SiLU behind each.

    State dict:

        w1.weight  (dim, width)    w1.bias  (dim,)
        w2.weight  (dim, dim)      w2.bias  (dim,)
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, dim)
        self.w2 = nn.Linear(dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        """`(batch, width)` -> `(batch, dim)`."""
        return F.silu(self.w2(F.silu(self.w1(features))))

    def init_weights(self) -> None:
        """Initialise all weights."""
        for linear in (self.w1, self.w2):
            init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)


class Transformer(nn.Module):
    """A small DiT over patches of the latent and the prompt, of which one more token is read.

    State dict:

        token               (dim,)
        x_embedder.weight   (dim, patch_size**2 * channels)    x_embedder.bias  (dim,)
        t_embedder.*        see `TimestepEmbedder`
        layers.{0..}.*      see `DiTBlock`
    """

    def __init__(self, args: MixDiffModelArgs) -> None:
        super().__init__()
        dim, inputs = args.router_dim, args.router_inputs
        self.patch_size = args.router_patch_size
        self.side = args.image_size // args.router_patch_size
        self.num_timestep_features = args.num_timestep_features
        self.token = nn.Parameter(torch.empty(dim))
        self.x_embedder, self.t_embedder = None, None
        if "latent" in inputs:
            self.x_embedder = nn.Linear(args.router_patch_size**2 * args.in_channels, dim)
        if "time" in inputs:
            self.t_embedder = TimestepEmbedder(args.num_timestep_features, dim)
        self.layers = nn.ModuleList(
            [DiTBlock(dim, args.router_heads, MLP_RATIO * dim) for _ in range(args.router_layers)]
        )
        self.norm = modulated_norm(dim)

    def forward(self, prompt: Tensor | None, latents: Tensor, times: Tensor) -> Tensor:
        """Run; arguments as for `Router`, the prompt `(batch, dim)`. Returns `(batch, dim)`."""
        token, batch = self.first_token(), len(times)
        dim = len(token)
        tokens = [token.expand(batch, 1, dim)]
        if prompt is not None:
            tokens.append(prompt[:, None])
        if self.x_embedder is not None:
            rows, columns = (side // self.patch_size for side in latents.shape[2:])
            places = centred_position_table(
                dim, rows, columns, self.side, self.side, latents.device
            )
            patches = self.x_embedder(patchify(latents, self.patch_size))
            tokens.append(patches + places.to(patches.dtype))
        condition = token.new_zeros(batch, dim)
        if self.t_embedder is not None:
            condition = self.t_embedder(timestep_features(times, self.num_timestep_features))
        x = torch.cat(tokens, 1)
        for block in self.layers:
            x = block(x, condition)
        return self.norm(x[:, 0])

    def first_token(self) -> Tensor:
        """The token that is read in the end, `(dim,)`; what parallelism makes of the weight."""
        return self.token

    def init_weights(self) -> None:
        """Initialise all weights, by the rule of DiT."""
        init.normal_(self.token, std=EMBEDDING_STD)
        if self.x_embedder is not None:
            init.xavier_uniform_(self.x_embedder.weight)
            nn.init.zeros_(self.x_embedder.bias)
        if self.t_embedder is not None:
            self.t_embedder.init_weights()
        for block in self.layers:
            cast(DiTBlock, block).init_weights()


class Router(nn.Module):
    """Says how likely each expert is the right one, as logits.

    State dict:

        prompt.*      see `PromptReader`, if the router reads the prompt
        body.*        of an mlp see `Perceptron`, of a transformer see `Transformer`
        head.weight   (experts, width): a row for each expert
        head.bias     (experts,)
    """

    def __init__(self, args: MixDiffModelArgs) -> None:
        super().__init__()
        self.prompt = PromptReader(args) if "prompt" in args.router_inputs else None
        self.features = None if args.router == "transformer" else Features(args)
        self.body: Perceptron | Transformer | None = None
        width = args.router_dim
        if args.router == "transformer":
            self.body = Transformer(args)
        elif args.router == "mlp":
            assert self.features is not None
            self.body = Perceptron(self.features.width, width)
        elif self.features is not None:
            width = self.features.width
        self.head = nn.Linear(width, args.num_experts)
        # Whatever the rest of the model is built in.
        self.to(torch.float32)

    def forward(
        self,
        latents: Tensor,
        times: Tensor,
        class_labels: Tensor | None = None,
        prompts: Mapping[str, Tensor] | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Compare the experts.

        Args:
            latents: Noised images or latents, `(batch, channels, height, width)`.
            times: From 0 to about 1000 (noise), `(batch,)` float32.
            class_labels: `(batch,)` int64, of experts that are told classes.
            prompts: See `MMDiTDenoiser`, of experts that are told prompts.
            kept: Which encoders' parts of its prompts a sample keeps, `(batch, encoders)` bool.

        Returns:
            Logits `(batch, experts)`, float32 (of a model in float64 that).
        """
        with torch.autocast(latents.device.type, enabled=False):
            dtype = self.dtype()
            latents, times = latents.to(dtype), times.to(dtype)
            prompt = None
            if self.prompt is not None:
                prompt = self.prompt(class_labels, prompts, kept)
            if self.features is None:
                assert self.body is not None
                x = self.body(prompt, latents, times)
            else:
                x = self.features(prompt, latents, times)
                x = x if self.body is None else self.body(x)
            return self.head(x)

    def dtype(self) -> torch.dtype:
        """What the router computes in."""
        return self.head.weight.dtype

    def init_weights(self) -> None:
        """Initialise all weights. Nearly no expert is preferred at first."""
        if self.prompt is not None:
            self.prompt.init_weights()
        if self.body is not None:
            self.body.init_weights()
        init.normal_(self.head.weight, std=EMBEDDING_STD)
        nn.init.zeros_(self.head.bias)


def count_macs(args: MixDiffModelArgs) -> float:
    """Count multiply-adds of a router's matrix products for one image, forward.

    Those that embed prompts are left out: they are few.
    """
    dim, inputs = args.router_dim, args.router_inputs
    if args.router != "transformer":
        width = Features(args).width
        hidden = width * dim + dim**2 if args.router == "mlp" else 0
        return float(hidden + (dim if hidden else width) * args.num_experts)
    tokens = 1 + ("prompt" in inputs)
    total = float(dim * args.num_experts)
    if "latent" in inputs:
        places = (args.image_size // args.router_patch_size) ** 2
        tokens += places
        total += places * args.router_patch_size**2 * args.in_channels * dim
    if "time" in inputs:
        total += args.num_timestep_features * dim + dim**2
    block = (4 + 2 * MLP_RATIO) * tokens * dim**2 + 2 * tokens**2 * dim + 6 * dim**2
    return total + args.router_layers * block
