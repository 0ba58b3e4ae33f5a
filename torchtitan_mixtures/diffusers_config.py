"""The TOML section about mixtures of diffusers, part of `job_config.py`."""

# No `from __future__ import annotations` here: TorchTitan merges the real types of the fields.

import math
from dataclasses import dataclass, field
from typing import Literal

from torchtitan_mixtures.config_values import check_rules, check_section

ROUTER_INPUTS = ("prompt", "latent", "time")
"""What a router may read."""


@dataclass
class Diffusers:
    """The experts of a mixture of diffusers, their router, and how both learn.

    How many experts an image gets is `mixture.top_k`, noise of the router's logits in joint
    training `mixture.router_noise`; experts named in `mixture.frozen_towers` keep their weights.
    """

    training: Literal["joint", "decentralised", "router"] = "joint"
    """`joint`: the loss of the mixture's prediction trains everything. `decentralised`: an image
    trains the expert of its domain (`multimodal.domains`) and no other, and the router learns to
    tell domains. `router`: the router alone, without experts; these are trained in jobs of their
    own (`multimodal.train_domains`)."""

    experts: list[str] = field(default_factory=list)
    """Family and flavour of each expert, "mom/DiT-S/4" or "mmdit/d15". Empty = as the flavour
    says."""

    num_experts: int = 0
    """So many experts like the flavour's first. 0 = as the flavour says."""

    router: Literal["", "linear", "mlp", "transformer"] = ""
    """What the router is. Empty = as the flavour says."""

    router_inputs: list[str] = field(default_factory=list)
    """What the router reads, some of "prompt" (or class), "latent" (noisy) and "time". Empty = as
    the flavour says."""

    renormalize: Literal["", "yes", "no"] = ""
    """Whether the weights of the chosen experts are divided by their sum. Empty = as the flavour
    says."""

    router_weight: float = 1.0
    """For `decentralised`: weight of the router's cross-entropy."""

    start: str = ""
    """Folder of experts (`scripts/experts.py`) that a new run begins with: those of the same names
    have their weights from there. Experts that are not in it are new."""

    new_expert_from: str = ""
    """For `start`: expert of that folder that new experts begin as copies of. Empty = they begin
    with weights of their own."""

    def __post_init__(self) -> None:
        check_section("diffusers", self)
        rules = {
            "num_experts": (self.num_experts >= 0, "1 or more (0: as the flavour says)"),
            "router_weight": (0 < self.router_weight < math.inf, "a finite number > 0"),
        }
        check_rules("diffusers", self, rules)
        if self.experts and self.num_experts:
            raise ValueError(
                f"diffusers.num_experts = {self.num_experts}: diffusers.experts = {self.experts} "
                "says it already; remove one of them."
            )
        inputs = self.router_inputs
        if len(set(inputs)) < len(inputs) or not set(inputs) <= set(ROUTER_INPUTS):
            raise ValueError(
                f"diffusers.router_inputs = {inputs}: must be some of {', '.join(ROUTER_INPUTS)}, "
                "each once."
            )
        if self.new_expert_from and not self.start:
            raise ValueError(
                f"diffusers.new_expert_from = {self.new_expert_from!r}: is an expert of "
                "diffusers.start, which is empty; name that folder."
            )
