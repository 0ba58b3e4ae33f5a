"""Mixture of Nested Experts: a vision transformer that spends less on some tokens.

Source: Jain et al. 2024, "Mixture of Nested Experts: Adaptive Processing of Visual Tokens", arXiv
2407.19985 (`block.py`, `routing.py` and `capacity.py` name the equations); the vision transformer
is that of Dosovitskiy et al. 2020, arXiv 2010.11929, with the mean of all tokens for the head.

Deviations:
    - Tokens are sorted by expert at the router and stay so: nested layers then are plain matrix
      products on slices (`nested_mm.py`), and no layer gathers or scatters.
    - alpha is free; the paper keeps it in [0, 1).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torchtitan.protocols.model import ModelProtocol

from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.mone.args import MoNEModelArgs
from torchtitan_mixtures.models.mone.block import NestedBlock
from torchtitan_mixtures.models.mone.capacity import Budget
from torchtitan_mixtures.models.mone.layers import INIT_STD, NestedLinear
from torchtitan_mixtures.models.mone.resize import resize_state_dict
from torchtitan_mixtures.models.mone.routing import ExpertPreferredRouter, Routing, expert_mask
from torchtitan_mixtures.objectives.outputs import ClassifierOutput, NestedStatistics
from torchtitan_mixtures.objectives.patches import patchify


class Embedder(nn.Module):
    """From patches to tokens with learned positions.

    State dict:

        proj.weight  (dim, patch_size**2 * in_channels), columns as `patchify` lays out a patch
        proj.bias    (dim,)
        positions    (seq, dim); the class token's, if there is one, is the first
        class_token  (dim,), if there is one
    """

    def __init__(self, patch_dim: int, dim: int, seq_len: int, has_class_token: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(patch_dim, dim)
        self.positions = nn.Parameter(torch.empty(seq_len, dim))
        self.class_token: nn.Parameter | None
        token = nn.Parameter(torch.empty(dim)) if has_class_token else None
        self.register_parameter("class_token", token)

    def forward(self, patches: Tensor) -> Tensor:
        """Embed.

        Args:
            patches: `(batch, tokens, patch_size**2 * in_channels)`.

        Returns:
            `(batch, seq, dim)`, neighbours in memory as nested layers read them.
        """
        positions, class_token = self.parameters_of_tokens()
        rows = patches.transpose(0, 1).to(self.proj.weight.dtype)  # (tokens, batch, )
        x = self.proj(rows)
        if class_token is not None:
            x = torch.cat([class_token.expand(1, x.shape[1], -1), x])
        return (x + positions[:, None]).transpose(0, 1)

    def parameters_of_tokens(self) -> tuple[Tensor, Tensor | None]:
        """Positions and class token; a method of its own for parallelism to say otherwise."""
        return self.positions, self.class_token

    def init_weights(self) -> None:
        """Initialise all weights."""
        init.trunc_normal_(self.proj.weight, std=INIT_STD)
        nn.init.zeros_(self.proj.bias)
        init.trunc_normal_(self.positions, std=INIT_STD)
        if self.class_token is not None:
            init.trunc_normal_(self.class_token, std=INIT_STD)


class RouterScale(nn.Module):
    """What the router says about the output of feed-forward networks: `alpha r`.

    State dict:

        alpha  (1,) for all layers, or (layers,)
    """

    def __init__(self, num_alphas: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(num_alphas))

    def forward(self, probabilities: Tensor) -> Tensor:
        """Scale.

        Args:
            probabilities: Of each token's expert, `(batch, seq)` float32.

        Returns:
            `(alphas, batch, seq, 1)`.
        """
        return self.alphas().to(probabilities.dtype)[:, None, None, None] * probabilities[..., None]

    def alphas(self) -> Tensor:
        """The parameter; a method of its own for parallelism to say otherwise."""
        return self.alpha

    def init_weights(self, value: float) -> None:
        """Set all to one value."""
        nn.init.constant_(self.alpha, value)


class SortedTokens(nn.Module):
    """Sorts tokens at a router; a module of its own for context parallelism to deal them out."""

    def forward(
        self, x: Tensor, numbers: Tensor, routing: Routing, budget: Budget
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Budget]:
        """Sort.

        Args:
            x: `(batch, seq, dim)`.
            numbers: Which token of the image each is, `(batch, seq)` int64.
            routing: What the router decided about these tokens.
            budget: What it went by.

        Returns:
            Tokens `(batch, seq, dim)`; of them, `(batch, seq)` each, their numbers, their experts
            and their experts' probabilities; and the budget of the blocks.
        """
        numbers, experts, chosen = (
            value.gather(1, routing.order)
            for value in (numbers, routing.experts, routing.probabilities)
        )
        return routing.sort(x), numbers, experts, chosen, budget


class TokenMean(nn.Module):
    """Mean over tokens; a module of its own for context parallelism, which has parts of them."""

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, dim)` -> `(batch, dim)`."""
        return x.mean(1)


class MoNE(ModelProtocol):
    """Vision transformer for classification, nested or dense.

    State dict:

        embedder.*          see `Embedder`
        routers.{0..}.*     see `ExpertPreferredRouter`; not in a dense model
        router_scale.alpha  see `RouterScale`; not in a dense model
        layers.{0..}.*      see `NestedBlock`
        norm.weight, norm.bias  (dim,)
        head.weight         (classes, dim)
        head.bias           (classes,)
    """

    resize_state_dict = staticmethod(resize_state_dict)
    """How weights become those of a model for images of another size."""

    def __init__(self, model_args: MoNEModelArgs) -> None:
        super().__init__(model_args)
        self.model_args = args = model_args
        has_class_token = args.pool == "class_token"
        patch_dim = args.patch_size**2 * args.in_channels
        self.embedder = Embedder(patch_dim, args.dim, args.seq_len, has_class_token)
        # Where context parallelism cuts the tokens of dense blocks, and joins those of a router
        # behind them.
        self.stream = nn.Identity()
        self.whole = nn.Identity()
        if args.is_nested:
            count = 1 if args.shared_router else args.num_routers
            self.routers = nn.ModuleDict(
                {
                    str(i): ExpertPreferredRouter(args.dim, args.num_experts, kind=args.routing)
                    for i in range(count)
                }
            )
            self.router_scale = RouterScale(args.n_layers if args.alpha_per_layer else 1)
            self.sorted = SortedTokens()
        self.layers = nn.ModuleDict(
            {
                str(i): NestedBlock(
                    args.dim,
                    args.n_heads,
                    args.num_experts,
                    mlp_ratio=args.mlp_ratio,
                    norm_eps=args.norm_eps,
                )
                for i in range(args.n_layers)
            }
        )
        for module in self.modules():
            if isinstance(module, NestedLinear):
                module.uses_triton = args.kernels == "triton"
        self.norm = nn.LayerNorm(args.dim, eps=args.norm_eps)
        self.pool = TokenMean()
        self.head = nn.Linear(args.dim, args.num_classes)

    def forward(
        self, images: Tensor, budget: Budget | None = None, scores: Tensor | None = None
    ) -> ClassifierOutput:
        """Classify.

        Args:
            images: Pixels in [-1, 1], `(batch, in_channels, image_size, image_size)`.
            budget: How many patches of an image each expert gets, see `MoNEModelArgs.budget`; any
                one, whatever the model was trained with. None: that of the arguments.
            scores: What experts choose patches by at each router, `(batch, num_routers, num_tokens,
                num_experts)`; None: the router's probabilities, or with `routing = "random"` what
                is drawn.

        Returns:
            Logits `(batch, classes)`, and how the routers decided (None of a dense model).

        Raises:
            ValueError: Images of another shape than the model's.
        """
        args = self.model_args
        shape = (args.in_channels, args.image_size, args.image_size)
        if images.shape[1:] != shape:
            raise ValueError(
                f"images are {tuple(images.shape[1:])} (channels, height, width), but the model's "
                f"are {shape}; resize the images, or train a model of their size "
                "(multimodal.image_size)."
            )
        x = self.stream(self.embedder(patchify(images, args.patch_size)))  # (batch, seq, dim)
        if not args.is_nested:
            budget = Budget((x.shape[1],))
            for block in self.layers.values():
                x = block(x, budget)
            return ClassifierOutput(self._classify(x))
        of_scores = (args.num_routers, args.num_tokens, args.num_experts)
        if scores is not None and scores.shape[1:] != of_scores:
            raise ValueError(
                f"scores are {tuple(scores.shape[1:])} (routers, tokens, experts), but the model "
                f"has {of_scores}."
            )
        budget = args.budget() if budget is None else budget
        numbers = torch.arange(args.seq_len, device=x.device).expand(len(x), -1)
        x, statistics = self._run_nested(x, self.stream(numbers), budget, scores)
        stacked = (torch.stack(rows) for rows in zip(*statistics, strict=True))
        return ClassifierOutput(self._classify(x), NestedStatistics(*stacked))

    def _run_nested(
        self, x: Tensor, numbers: Tensor, budget: Budget, scores: Tensor | None
    ) -> tuple[Tensor, list[NestedStatistics]]:
        """Route tokens and run all blocks."""
        args = self.model_args
        dense = (0,) * (args.num_experts - 1)
        of_blocks, offsets, mask = Budget((*dense, x.shape[1])), None, None
        statistics: list[NestedStatistics] = []
        for index, block in enumerate(self.layers.values()):
            if index in args.router_layers:
                if index > 0:
                    x, numbers = self.whole(x), self.whole(numbers)
                of_tokens = (
                    None
                    if scores is None
                    else _pick(scores[:, len(statistics)], numbers, args.num_full_tokens)
                )
                router = self.routers["0" if args.shared_router else str(len(statistics))]
                routing = router(x, budget, of_tokens, args.num_full_tokens)
                whole = budget if routing.is_sorted else args.full_budget
                whole = whole.with_full_tokens(args.num_full_tokens)
                x, numbers, experts, chosen, of_blocks = self.sorted(x, numbers, routing, whole)
                offsets = self.router_scale(chosen)  # (alphas, batch, seq, 1)
                if not routing.is_sorted:
                    mask = expert_mask(experts, args.dim, args.num_experts)
                statistics.append(routing.statistics)
            offset = None
            if offsets is not None:
                offset = offsets[index if args.alpha_per_layer else 0]
            x = block(x, of_blocks, offset, mask)
        return x, statistics

    def _classify(self, x: Tensor) -> Tensor:
        """`(batch, seq, dim)` -> logits `(batch, classes)`."""
        if self.model_args.pool == "class_token":
            # The largest expert's tokens come first, and the class token first of them.
            return self.head(self.norm(x[:, 0]))
        return self.head(self.pool(self.norm(x)))

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Initialise all parameters: matrices and positions truncated normal, the head zero.

        Args:
            buffer_device: Not used, there are no buffers.
        """
        args = self.model_args
        with init.parameter_names(self, args.init_seed):
            self.embedder.init_weights()
            if args.is_nested:
                for router in self.routers.values():
                    cast(ExpertPreferredRouter, router).init_weights()
                self.router_scale.init_weights(args.alpha_init)
            for block in self.layers.values():
                cast(NestedBlock, block).init_weights()
            self.norm.reset_parameters()
            nn.init.zeros_(self.head.weight)
            nn.init.constant_(self.head.bias, args.head_bias)


def _pick(scores: Tensor, numbers: Tensor, num_full_tokens: int) -> Tensor:
    """Take the scores `(batch, num_tokens, experts)` of tokens by their numbers `(batch, seq)`.

    Full tokens have none; they are the first in `numbers`, and have the first numbers.
    """
    patches = numbers[:, num_full_tokens:] - num_full_tokens
    return scores.gather(1, patches[:, :, None].expand(-1, -1, scores.shape[2]))
