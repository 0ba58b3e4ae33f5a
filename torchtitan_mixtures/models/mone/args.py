"""Model arguments of the `mone` family."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, cast, get_args

from torch import nn
from torchtitan.config import JobConfig
from torchtitan.protocols.model import BaseModelArgs

from torchtitan_mixtures.data.image_data import image_spec
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.models.mone.capacity import (
    Allocation,
    Budget,
    Incentive,
    allocate,
    count_tokens,
    expert_shares,
    fixed_capacity,
)
from torchtitan_mixtures.models.mone.routing import RoutingKind


@dataclass
class MoNEModelArgs(BaseModelArgs):
    """Hyper-parameters of a vision transformer with nested experts, or of a plain one.

    An image is square and cut into patches; a patch is a token. With `num_experts = 1` the model is
    a ViT without a router.
    """

    dim: int = 384
    n_layers: int = 12
    n_heads: int = 6
    patch_size: int = 16
    in_channels: int = 3  # the TOML's data decides these three
    image_size: int = 224
    num_classes: int = 1000
    mlp_ratio: float = 4.0  # hidden units of the feed-forward network / dim
    norm_eps: float = 1e-6
    pool: Literal["mean", "class_token"] = "mean"  # what the head reads

    num_experts: int = 4
    capacity: float = 0.5  # effective, e_c
    allocation: Allocation = "entropy"
    delta: float = 2.0
    beta: float = 10.0
    incentive: Incentive = "multiplicative"
    routing: RoutingKind = "expert_preferred"
    router_layer: int = 0  # first block with routed tokens; blocks before it are dense
    num_routers: int = 1  # evenly spaced from there on
    shared_router: bool = False
    alpha_init: float = 0.0
    alpha_per_layer: bool = False
    tokens_multiple: int = 1  # of the numbers of tokens of larger experts
    kernels: Literal["plain", "triton"] = "plain"  # of nested layers

    head_bias: float = 0.0  # initial
    init_seed: int | None = None  # None: PyTorch's initial seed

    is_classifier: ClassVar[bool] = True
    undecayed_parameters: ClassVar[tuple[str, ...]] = ("embedder.positions",)
    # What may differ between a checkpoint and the run that goes on from it.
    resumable_fields: ClassVar[frozenset[str]] = frozenset(
        {
            "capacity",
            "allocation",
            "delta",
            "beta",
            "incentive",
            "routing",
            "alpha_init",
            "tokens_multiple",
            "kernels",
            "head_bias",
            "init_seed",
        }
    )

    def __post_init__(self) -> None:
        self.check()

    @property
    def num_tokens(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_full_tokens(self) -> int:
        """Tokens that the largest expert gets in any case: the class token, if there is one."""
        return int(self.pool == "class_token")

    @property
    def seq_len(self) -> int:
        """Tokens of an image, with the class token."""
        return self.num_tokens + self.num_full_tokens

    @property
    def hidden_dim(self) -> int:
        """Hidden units of the feed-forward network."""
        return round(self.mlp_ratio * self.dim)

    @property
    def is_nested(self) -> bool:
        """Whether there is a choice of experts."""
        return self.num_experts > 1

    @property
    def router_layers(self) -> tuple[int, ...]:
        """Blocks in front of which tokens are routed."""
        if not self.is_nested:
            return ()
        left = self.n_layers - self.router_layer
        return tuple(self.router_layer + i * left // self.num_routers
                     for i in range(self.num_routers))  # fmt: skip

    def budget(self, capacity: float | None = None) -> Budget:
        """Say how many tokens of an image each expert gets, without a class token.

        Args:
            capacity: Effective capacity; None: that of the arguments.

        Raises:
            ValueError: It is out of range.
        """
        if not self.is_nested:
            return Budget((self.num_tokens,))
        if self.routing == "argmax":  # known once they have chosen
            return self.full_budget
        capacity = self.capacity if capacity is None else capacity
        rule = (self.allocation, self.num_experts, self.delta, self.beta, self.incentive)
        return _budget(capacity, rule, self.num_tokens, self.tokens_multiple)

    @property
    def full_budget(self) -> Budget:
        """All tokens at the largest expert, as before the first router."""
        return Budget((*[0] * (self.num_experts - 1), self.num_tokens))

    @property
    def num_total_parameters(self) -> int:
        """Parameters of the whole model."""
        dim, hidden, experts = self.dim, self.hidden_dim, self.num_experts
        embedder = dim * (self.patch_size**2 * self.in_channels + 1 + self.seq_len)
        embedder += dim * self.num_full_tokens
        block = 4 * dim + 4 * dim**2 + 4 * dim + 2 * dim * hidden + hidden + dim
        router = 0
        if self.is_nested:
            router = (dim + 1) * experts * (1 if self.shared_router else self.num_routers)
            router += self.n_layers if self.alpha_per_layer else 1
        head = 2 * dim + (dim + 1) * self.num_classes
        return embedder + self.n_layers * block + router + head

    def macs_per_block(self, budget: Budget | None = None) -> int:
        """Count multiply-adds of a block's matrix products for one image, forward.

        Args:
            budget: Of the image's tokens, without a class token; None: `budget()`.
        """
        budget = (self.budget() if budget is None else budget).with_full_tokens(
            self.num_full_tokens
        )
        dim, active = self.dim, sum(budget.tokens)
        channels = round(budget.effective_capacity * budget.num_tokens * dim)  # of all tokens
        return channels * (4 * dim + 2 * self.hidden_dim) + 2 * active**2 * dim

    def macs_per_image(self, budget: Budget | None = None) -> int:
        """Count multiply-adds of the whole model for one image, forward.

        Args:
            budget: As in `macs_per_block`.
        """
        dim, first = self.dim, self.router_layer if self.is_nested else self.n_layers
        embedder = self.num_tokens * self.patch_size**2 * self.in_channels * dim
        blocks = first * self.macs_per_block(self.full_budget)
        blocks += (self.n_layers - first) * self.macs_per_block(budget)
        routers = len(self.router_layers) * self.seq_len * dim * self.num_experts
        return embedder + blocks + routers + dim * self.num_classes

    @property
    def dense_macs_per_image(self) -> int:
        """As `macs_per_image`, of the model without nesting."""
        routers = len(self.router_layers) * self.seq_len * self.dim * self.num_experts
        return self.macs_per_image(self.full_budget) - routers

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Count parameters, and FLOPs by TorchTitan's convention.

        Args:
            model: The model; all its parameters are counted.
            seq_len: Not used: an image always has `num_tokens` tokens.

        Returns:
            Number of parameters, and FLOPs per image of a training step: 6 per multiply-add, at
            the capacity of the arguments.
        """
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        return num_parameters, 6 * self.macs_per_image()

    def update_from_config(self, job_config: JobConfig, **kwargs) -> None:
        """Take over what the TOML decides: the data, and how compute is spent."""
        config = cast(MixtureJobConfig, job_config)
        spec = image_spec(config)
        self.in_channels, self.image_size = spec.channels, spec.size
        self.num_classes = spec.num_classes
        self.init_seed = config.debug.seed
        if config.classification.multi_label:
            # Each class begins as likely as by a fair draw, so that sums over classes start small.
            self.head_bias = -math.log(max(self.num_classes - 1, 1))
        if self.is_nested:
            self._take_nested(config)
        self.check()

    def _take_nested(self, job_config: MixtureJobConfig) -> None:
        nested = job_config.nested
        for key in ("allocation", "incentive", "routing"):
            setattr(self, key, getattr(nested, key) or getattr(self, key))
        for key in ("capacity", "delta", "beta", "num_routers", "router_layer", "alpha_init"):
            if getattr(nested, key) != -1:
                setattr(self, key, getattr(nested, key))
        only = fixed_capacity(self.allocation, self.num_experts)
        if only is not None and nested.capacity == -1:
            self.capacity = only
        self.shared_router = nested.shared_router or self.shared_router
        self.alpha_per_layer = nested.alpha_per_layer or self.alpha_per_layer
        self.tokens_multiple, self.kernels = nested.tokens_multiple, nested.kernels

    def check(self) -> None:
        """Raise ValueError, naming the field, for values and combinations that cannot work."""
        for name in ("dim", "n_layers", "n_heads", "patch_size", "in_channels", "num_classes"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        divides = self.image_size > 0 and self.image_size % self.patch_size == 0
        allowed = f"a multiple of patch_size = {self.patch_size} of the flavour"
        _require(divides, "multimodal.image_size", self.image_size, allowed)
        _require(self.dim % self.n_heads == 0, "n_heads", self.n_heads, f"a divisor of {self.dim}")
        is_possible = math.isfinite(self.mlp_ratio) and self.hidden_dim > 0
        _require(is_possible, "mlp_ratio", self.mlp_ratio, "a number > 1 / dim")
        _require(self.pool in ("mean", "class_token"), "pool", self.pool, "mean, class_token")
        _require(self.num_experts > 0, "num_experts", self.num_experts, "1 (a ViT) or more")
        if self.is_nested:
            self._check_nested()

    def _check_nested(self) -> None:
        halved = 2 ** (self.num_experts - 1)
        allowed = f"a multiple of 2^(num_experts - 1) = {halved}"
        _require(self.dim % halved == 0, "dim", self.dim, allowed)
        is_known = self.allocation in get_args(Allocation)
        _require(is_known, "nested.allocation", self.allocation, f"one of {get_args(Allocation)}")
        multiple = self.tokens_multiple
        _require(multiple >= 1, "nested.tokens_multiple", multiple, "1 or more")
        _require(
            self.kernels in ("plain", "triton"), "nested.kernels", self.kernels, "plain, triton"
        )
        is_known = self.routing in get_args(RoutingKind)
        _require(is_known, "nested.routing", self.routing, f"one of {get_args(RoutingKind)}")
        first, routers = self.router_layer, self.num_routers
        allowed = f"0 to {self.n_layers - 1}, the blocks of the flavour"
        _require(0 <= first < self.n_layers, "nested.router_layer", first, allowed)
        allowed = f"1 to {self.n_layers - first}, the blocks from router_layer on"
        _require(1 <= routers <= self.n_layers - first, "nested.num_routers", routers, allowed)
        _require(
            0 <= self.alpha_init < 1, "nested.alpha_init", self.alpha_init, "at least 0, below 1"
        )
        _require(
            self.num_tokens >= self.num_experts,
            "multimodal.image_size",
            self.image_size,
            f"one that gives at least {self.num_experts} tokens, one for each expert, in patches "
            f"of {self.patch_size}",
        )
        try:
            self.budget()
        except ValueError as error:
            least = expert_shares(self.num_experts)[0]
            raise ValueError(
                f"nested.capacity = {self.capacity} (e_c): {error} The flavour has "
                f"{self.num_experts} experts, the smallest with {least:g} of the width."
            ) from None


@lru_cache(maxsize=256)
def _budget(capacity: float, rule: tuple, num_tokens: int, multiple: int) -> Budget:
    """Solve once for each capacity."""
    allocation, num_experts, delta, beta, incentive = rule
    distribution = allocate(allocation, capacity, num_experts, delta, beta, incentive)
    return count_tokens(distribution, num_tokens, multiple, skips=allocation == "skip")


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r} is not allowed; allowed: {allowed}")
