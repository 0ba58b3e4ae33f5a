"""Mixture of Diffusers: whole diffusion models as experts, whose predictions a router weighs.

Source: routed experts and their training apart: McAllister et al. 2025, arXiv 2501.05450
(Decentralized Diffusion Models), equations 5 to 7. For data that is divided into domains the
velocity (or noise) of all of it is

    u(x, t, c) = sum_k p(k | x, t, c) u_k(x, t, c),

where the weight of expert k is the probability of its domain given the noisy image x, the time t
and the prompt c. The router learns that probability. Of the experts the `top_k` likeliest are
computed, their weights divided by their sum: with S the chosen ones

    prediction = sum_{k in S} (P_k / sum_{j in S} P_j) prediction_k.

Deviations:
    - Experts may have different widths, depths and patches; what they predict is the same.
    - The router may read the prompt alone, or with the others.
    - With `top_k = 1` and joint training weights are not divided by their sum, which would be 1 and
      give the router no gradient: `renormalize` must be off then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.protocols.model import ModelProtocol

from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.mixdiff.args import MixDiffModelArgs, build_expert
from torchtitan_mixtures.models.mixdiff.dispatch import (
    Choice,
    choose_by_gates,
    choose_top_k,
    combine,
    deal_out,
    select_rows,
)
from torchtitan_mixtures.models.mixdiff.router import Router
from torchtitan_mixtures.objectives.outputs import DenoiserOutput, RouterStatistics
from torchtitan_mixtures.objectives.patches import patchify, unpatchify


class MixtureOfDiffusers(ModelProtocol):
    """Denoising models and their router.

    State dict:

        router.*           see `Router`
        experts.{name}.*   see the model of the expert's family; none of a router alone
    """

    def __init__(self, model_args: MixDiffModelArgs) -> None:
        super().__init__(model_args)
        self.model_args = args = model_args
        self.router = Router(args)
        self.experts = nn.ModuleDict()
        if not args.router_only:
            for name, expert, of_expert in zip(
                args.names, args.experts, args.expert_args, strict=True
            ):
                self.experts[name] = build_expert(expert, of_expert)
        self._patch_sizes = [] if args.router_only else [own.patch_size for own in args.expert_args]
        self.least_rows = 1
        """Samples that every expert gets in training. Parallelism sets it."""
        self.runs_all = False
        """Whether every expert is run without gradients too, as ranks that share weights must."""

    def forward(
        self,
        latents: Tensor,
        times: Tensor,
        class_labels: Tensor | None = None,
        prompts: Mapping[str, Tensor] | None = None,
        kept: Tensor | None = None,
        router_noise: Tensor | None = None,
        domain_labels: Tensor | None = None,
        gates: Tensor | None = None,
        copies: int = 1,
    ) -> DenoiserOutput:
        """Predict what was done to images.

        Args:
            latents: Noised images or latents, `(batch, in_channels, height, width)`.
            times: From 0 to about 1000 (noise), `(batch,)` float32.
            class_labels: `(batch,)` int64, of experts that are told classes.
            prompts: See `MMDiTDenoiser`, of experts that are told prompts.
            kept: Which encoders' parts of its prompts a sample keeps, `(batch, encoders)` bool.
            router_noise: Standard normal, `(batch, experts)`, for the choice of experts.
            domain_labels: `(batch,)` int64: each sample is the business of this expert alone.
            gates: Weights to use instead of the router's, `(batch / copies, experts)`.
            copies: The batch is so many copies of the same samples, one after the other, told
                different things (guidance): all have the experts and weights of the first.

        Returns:
            The prediction in patch space, `(batch, tokens, patch_size**2 * out_channels)` float32,
            empty of a router alone; the weights of the experts, `(batch, experts)`; the router's
            logits, unless weights were given; and its statistics, where it has chosen.
        """
        condition = {"class_labels": class_labels, "prompts": prompts, "kept": kept}
        condition = {name: value for name, value in condition.items() if value is not None}
        logits = statistics = None
        if gates is None:
            logits = self._compare(latents, times, condition, len(times) // copies)
        if domain_labels is not None:
            experts = domain_labels[:, None]
            choice = Choice(experts, torch.ones_like(experts, dtype=torch.float32))
        elif logits is not None:
            choice, statistics = self._choose(logits, router_noise)
        else:
            assert gates is not None
            choice = choose_by_gates(gates)
        choice = choice.repeat(copies)
        dense = choice.dense(self.model_args.num_experts)
        if not self.experts:
            return DenoiserOutput(latents.new_empty(len(latents), 0, 0), None, dense, logits)
        prediction = self._run_experts(latents, times, condition, choice)
        # Of the logits a tensor of their own: what parallelism does to the gradients of outputs
        # must not be done to those that come out of the prediction.
        logits = None if logits is None else logits.view_as(logits)
        return DenoiserOutput(prediction, statistics, dense, logits)

    def _compare(
        self, latents: Tensor, times: Tensor, condition: dict[str, Any], count: int
    ) -> Tensor:
        """The router's logits of the first so many samples, `(count, experts)`."""
        if count < len(times):
            rows = torch.arange(count, device=times.device)
            condition = select_rows(condition, rows)
        return self.router(latents[:count], times[:count], **condition)

    def _choose(self, logits: Tensor, noise: Tensor | None) -> tuple[Choice, RouterStatistics]:
        args = self.model_args
        if noise is not None:
            noise = args.router_noise * noise.to(logits.dtype)
        choice = choose_top_k(logits, noise, args.top_k, args.renormalize)
        numbers = torch.arange(args.num_experts, device=logits.device)
        load = (choice.experts.flatten()[:, None] == numbers).to(logits.dtype).mean(0)
        statistics = RouterStatistics(
            logits.softmax(1).mean(0)[None], load[None], logits.logsumexp(1).square().mean()[None]
        )
        return choice, statistics

    def _run_experts(
        self, latents: Tensor, times: Tensor, condition: dict[str, Any], choice: Choice
    ) -> Tensor:
        """Sum the chosen experts' predictions, `(batch, tokens, patch_size**2 * out_channels)`."""
        at_least = self.least_rows if torch.is_grad_enabled() or self.runs_all else 0
        plan = deal_out(choice, len(self.experts), at_least)
        outputs = []
        for number, (expert, rows) in enumerate(zip(self.experts.values(), plan.rows, strict=True)):
            if len(rows):
                noised, at = latents.index_select(0, rows), times.index_select(0, rows)
                output = expert(noised, at, **select_rows(condition, rows)).prediction
                outputs.append(self._to_common_patches(number, output, latents.shape[2:]))
        return combine(torch.cat(outputs), plan, choice.gates)

    def _to_common_patches(self, expert: int, prediction: Tensor, size: torch.Size) -> Tensor:
        """Cut an expert's prediction into the mixture's patches, if its own are others."""
        own, common = self._patch_sizes[expert], self._patch_sizes[0]
        if own == common:
            return prediction
        images = unpatchify(prediction, own, self.model_args.out_channels, *size)
        return patchify(images, common)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Initialise all weights; experts that are built alike differ.

        Args:
            buffer_device: Device of the experts' position tables; None leaves them where they are.
        """
        seed = self.model_args.init_seed
        seed = torch.initial_seed() if seed is None else seed
        with init.parameter_names(self.router, seed):
            self.router.init_weights()
        for name, expert in self.experts.items():
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            model: Any = expert
            model.model_args.init_seed = int.from_bytes(digest[:7], "big")
            model.init_weights(buffer_device=buffer_device)
