"""Model arguments of the `mom` family."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import nn
from torchtitan.config import JobConfig
from torchtitan.protocols.model import BaseModelArgs

from torchtitan_mixtures.data.image_data import image_spec
from torchtitan_mixtures.job_config import Mixture
from torchtitan_mixtures.models.mom.routing import Picks, count_picks

Mixer = Literal["pool", "attention"]


@dataclass
class MoMModelArgs(BaseModelArgs):
    """Hyper-parameters of a diffusion transformer with a mixture of mixers, or with attention.

    A sample is a square image of `image_size` (of pixels or latents), cut into patches; a patch is
    a token. With `mixer = "attention"` the model is a DiT.
    """

    dim: int = 384
    n_layers: int = 12
    patch_size: int = 4
    in_channels: int = 4  # of what the model sees; the TOML's data decides these three
    image_size: int = 32
    num_classes: int = 1000
    learned_variance: bool = True  # the TOML's objective decides
    mlp_ratio: float = 4.0  # hidden units of the feed-forward network / dim
    num_timestep_features: int = 256

    mixer: Mixer = "pool"
    n_heads: int = 6  # of attention; a pool has none
    num_token_experts: int = 4
    num_channel_experts: int = 4
    top_k: int = 2
    min_token_experts: int = 1  # of the top k; with 0 for both kinds the choice is free
    min_channel_experts: int = 1
    token_ratio: float = 4.0  # hidden units of a token mixer / tokens
    channel_ratio: float = 4.0  # hidden units of a channel mixer / dim
    router_noise: float = 0.0  # relative, in training

    init_seed: int | None = None  # None: PyTorch's initial seed

    # What may differ between a checkpoint and the run that goes on from it.
    resumable_fields: ClassVar[frozenset[str]] = frozenset({"router_noise", "init_seed"})

    def __post_init__(self) -> None:
        self.check()

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: noise or velocity, then the variance if it is learned."""
        return 2 * self.in_channels if self.learned_variance else self.in_channels

    @property
    def has_routers(self) -> bool:
        """Whether blocks choose among experts."""
        return self.mixer == "pool"

    @property
    def router_noise_shape(self) -> tuple[int, ...]:
        """Shape of the routers' noise of a sample."""
        return self.n_layers, self.dim

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def ffn_hidden_dim(self) -> int:
        """Hidden units of the feed-forward network."""
        return round(self.mlp_ratio * self.dim)

    @property
    def token_hidden_dim(self) -> int:
        """Hidden units of a token mixer."""
        return round(self.token_ratio * self.num_tokens)

    @property
    def channel_hidden_dim(self) -> int:
        """Hidden units of a channel mixer."""
        return round(self.channel_ratio * self.dim)

    def mixer_widths(self, tensor_parallel: int = 1) -> dict[str, int]:
        """What a matrix of a mixer has as rows or columns on a rank: description -> number."""
        widths = {}
        if self.mixer == "pool" and self.num_token_experts:
            widths["tokens"] = self.num_tokens
            widths["hidden units of a token mixer"] = self.token_hidden_dim
        if self.mixer == "pool" and self.num_channel_experts:
            hidden = self.channel_hidden_dim // tensor_parallel
            widths |= {"channels": self.dim, "hidden units of a channel mixer": hidden}
        return widths

    @property
    def picks(self) -> Picks:
        """Of which kind the chosen experts are."""
        return count_picks(
            self.top_k,
            self.num_token_experts,
            self.num_channel_experts,
            self.min_token_experts,
            self.min_channel_experts,
        )

    @property
    def mean_token_experts(self) -> float:
        """Token mixers among the chosen experts; where the choice is free, if it were even."""
        picks = self.picks
        if not picks.free:
            return picks.token
        token, channel = self.num_token_experts - picks.token, self.num_channel_experts
        return picks.token + picks.free * token / (token + channel - picks.channel)

    @property
    def num_total_parameters(self) -> int:
        """Parameters of the whole model. The position table is none, it is fixed."""
        experts = self.num_token_experts, self.num_channel_experts
        return round(self._num_parameters(*experts))

    @property
    def num_active_parameters(self) -> int:
        """Parameters an image passes through; see `count_active_parameters`."""
        return self.count_active_parameters()

    def count_active_parameters(self, token_experts: float | None = None) -> int:
        """Count the parameters an image passes through; all of the class table among them.

        Args:
            token_experts: Token mixers among the `top_k` chosen experts of a layer; None:
                `mean_token_experts`.
        """
        return round(self._num_parameters(*self._split(token_experts)))

    def _split(self, token_experts: float | None) -> tuple[float, float]:
        """Chosen experts of either kind."""
        if token_experts is None:
            token_experts = self.mean_token_experts
        return token_experts, self.top_k - token_experts

    def _num_parameters(self, token_experts: float, channel_experts: float) -> float:
        dim, tokens = self.dim, self.num_tokens
        patch = self.patch_size**2

        def two_layers(width: int, hidden: int) -> int:
            return 2 * width * hidden + width + hidden

        if self.mixer == "attention":
            mixer = 4 * (dim * dim + dim)
        else:
            mixer = dim * (self.num_token_experts + self.num_channel_experts)
            mixer += token_experts * two_layers(tokens, self.token_hidden_dim)
            mixer += channel_experts * two_layers(dim, self.channel_hidden_dim)
        layer = mixer + two_layers(dim, self.ffn_hidden_dim) + 6 * (dim * dim + dim)
        embedders = (
            (patch * self.in_channels + 1) * dim
            + (self.num_timestep_features + 1) * dim
            + dim * dim
            + dim
            + (self.num_classes + 1) * dim
        )
        final = 2 * (dim * dim + dim) + (dim + 1) * patch * self.out_channels
        return embedders + self.n_layers * layer + final

    def macs_per_image(self, token_experts: float | None = None) -> float:
        """Count multiply-adds of the blocks' matrix products for one image, forward.

        Args:
            token_experts: As for `count_active_parameters`. One token mixer costs `num_tokens /
                dim` of a channel mixer, so with free choices the cost is what the router makes it.
        """
        dim, tokens = self.dim, self.num_tokens
        if self.mixer == "attention":
            mixer: float = 4 * tokens * dim**2 + 2 * tokens**2 * dim
        else:
            token_experts, channel_experts = self._split(token_experts)
            mixer = token_experts * 2 * tokens * self.token_hidden_dim * dim
            mixer += channel_experts * 2 * tokens * dim * self.channel_hidden_dim
        return self.n_layers * (mixer + 2 * tokens * dim * self.ffn_hidden_dim + 6 * dim**2)

    def total_macs_per_image(self, token_experts: float | None = None) -> float:
        """As `macs_per_image`, with the embedders and the final layer."""
        dim, patch = self.dim, self.patch_size**2
        embedders = self.num_tokens * patch * self.in_channels * dim
        embedders += self.num_timestep_features * dim + dim**2
        final = 2 * dim**2 + self.num_tokens * dim * patch * self.out_channels
        return self.macs_per_image(token_experts) + embedders + final

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Count parameters, and FLOPs by TorchTitan's convention.

        Args:
            model: The model; all its parameters are counted.
            seq_len: Not used: an image always has `num_tokens` tokens.

        Returns:
            Number of parameters, and FLOPs per token of a training step: 6 per multiply-add.
        """
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        return num_parameters, round(6 * self.total_macs_per_image() / self.num_tokens)

    def update_from_config(self, job_config: JobConfig, **kwargs) -> None:
        """Take over what the TOML decides: the data and the objective."""
        spec = image_spec(job_config)
        self.in_channels, self.image_size = spec.channels, spec.size
        self.num_classes = spec.num_classes
        objective = job_config.objective  # pyrefly: ignore [missing-attribute]
        self.learned_variance = objective.kind == "ddpm" and objective.learned_variance
        self.init_seed = job_config.debug.seed
        self._take_mixture(job_config.mixture)  # pyrefly: ignore [missing-attribute]
        self.check()

    def _take_mixture(self, mixture: Mixture) -> None:
        """Take over how the router chooses.

        Raises:
            ValueError: The flavour has no router.
        """
        defaults = Mixture()
        for key in ("routing", "top_k", "router_noise"):
            value = getattr(mixture, key)
            if value != getattr(defaults, key) and self.mixer != "pool":
                raise ValueError(
                    f"mixture.{key} = {value!r}: a flavour with attention has no router; remove it."
                )
        if mixture.routing:
            least = int(mixture.routing == "typed")
            self.min_token_experts = min(least, self.num_token_experts)
            self.min_channel_experts = min(least, self.num_channel_experts)
        if mixture.top_k:
            self.top_k = mixture.top_k
        if mixture.router_noise >= 0:
            self.router_noise = mixture.router_noise

    def check(self) -> None:
        """Raise ValueError, naming the field, for values and combinations that cannot work."""
        for name in ("dim", "n_layers", "patch_size", "in_channels", "image_size", "num_classes"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        _require(self.dim % 4 == 0, "dim", self.dim, "a multiple of 4")
        features = self.num_timestep_features
        is_even = features > 0 and features % 2 == 0
        _require(is_even, "num_timestep_features", features, "a positive even number")
        divides = self.image_size % self.patch_size == 0
        allowed = f"a multiple of patch_size = {self.patch_size} of the flavour"
        _require(divides, "multimodal.image_size", self.image_size, allowed)
        _require(self.ffn_hidden_dim > 0, "mlp_ratio", self.mlp_ratio, "a number > 1 / dim")
        allowed = f"one of {get_args(Mixer)}"
        _require(self.mixer in get_args(Mixer), "mixer", self.mixer, allowed)
        if self.mixer == "pool":
            self._check_pool()
        else:
            divides = self.n_heads > 0 and self.dim % self.n_heads == 0
            _require(divides, "n_heads", self.n_heads, f"a divisor of dim = {self.dim}")

    def _check_pool(self) -> None:
        for kind in ("token", "channel"):
            name = f"num_{kind}_experts"
            experts: int = getattr(self, name)
            _require(experts >= 0, name, experts, "a number >= 0")
            name = f"min_{kind}_experts"
            allowed = f"0 to num_{kind}_experts = {experts}"
            _require(0 <= getattr(self, name) <= experts, name, getattr(self, name), allowed)
        experts = self.num_token_experts + self.num_channel_experts
        allowed = f"1 to {experts}, the experts of the flavour"
        _require(0 < self.top_k <= experts, "mixture.top_k", self.top_k, allowed)
        minimum = self.min_token_experts + self.min_channel_experts
        allowed = (
            f"at least {minimum}, of which {self.min_token_experts} mix tokens and "
            f'{self.min_channel_experts} channels; less with mixture.routing = "free"'
        )
        _require(minimum <= self.top_k, "mixture.top_k", self.top_k, allowed)
        for kind, picks in (("token", self.picks.token), ("channel", self.picks.channel)):
            name = f"num_{kind}_experts"
            is_used = getattr(self, name) == 0 or picks + self.picks.free > 0
            _require(is_used, name, getattr(self, name), "0, as top_k leaves no choice of them")
        for kind in ("token", "channel"):
            name = f"{kind}_ratio"
            is_positive = getattr(self, f"{kind}_hidden_dim") > 0
            _require(is_positive, name, getattr(self, name), "a number that gives hidden units")
        is_positive = 0 <= self.router_noise < math.inf
        _require(is_positive, "router_noise", self.router_noise, "a finite number >= 0")


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r} is not allowed; allowed: {allowed}")
