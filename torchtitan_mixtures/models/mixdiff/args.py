"""Model arguments of the `mixdiff` family."""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import nn
from torchtitan.config import JobConfig
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.diffusers_config import ROUTER_INPUTS, Diffusers

RouterKind = Literal["linear", "mlp", "transformer"]

ROUTER = "router"
"""What the router is called among the towers of `[mixture]`; no expert can have this name."""

_COMMON = ("in_channels", "image_size", "num_classes", "prompts", "learned_variance")
"""What all experts see and predict; those of these fields that an expert's arguments have."""


@dataclass
class MixDiffModelArgs(BaseModelArgs):
    """Hyper-parameters of a mixture of diffusers: its experts and its router.

    An expert is a flavour of another family, written "mom/DiT-S/4", with its own width and depth.
    What it sees and what it predicts is the same for all.
    """

    experts: tuple[str, ...] = ("mom/DiT-S/4",) * 4
    expert_names: tuple[str, ...] = ()  # one for each; () = their numbers
    top_k: int = 2
    renormalize: bool = True  # weights of the chosen experts sum to 1

    router: RouterKind = "transformer"
    router_inputs: tuple[str, ...] = ("prompt", "latent", "time")
    router_dim: int = 128
    router_layers: int = 4  # of a transformer
    router_heads: int = 4
    router_patch_size: int = 4
    router_noise: float = 0.0  # standard deviation, added to logits in joint training
    router_only: bool = False  # there are no experts, to train the router alone

    in_channels: int = 4  # of what experts see; the TOML's data decides these four
    image_size: int = 32
    num_classes: int = 1000  # of experts that are told classes
    prompts: tuple[PromptSpec, ...] = ()  # of experts that are told prompts
    learned_variance: bool = True  # the TOML's objective decides
    num_timestep_features: int = 256  # of the router

    init_seed: int | None = None  # None: PyTorch's initial seed

    # What may differ between a checkpoint and the run that goes on from it.
    resumable_fields: ClassVar[frozenset[str]] = frozenset(
        {"router_noise", "init_seed", "top_k", "renormalize"}
    )

    def __post_init__(self) -> None:
        # In JSON tuples are lists, and prompts tables.
        for name in ("experts", "expert_names", "router_inputs"):
            setattr(self, name, tuple(getattr(self, name)))
        self.prompts = tuple(
            spec if isinstance(spec, PromptSpec) else PromptSpec.from_table(spec)
            for spec in self.prompts
        )
        self._check_experts()
        if self.is_prompted and not self.prompts:
            self.prompts = flavor_args(self.experts[0]).prompts
        self.check()

    @property
    def num_experts(self) -> int:
        """How many there are."""
        return len(self.experts)

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each expert."""
        return self.expert_names or tuple(str(number) for number in range(self.num_experts))

    @property
    def expert_args(self) -> list[Any]:
        """The arguments of each expert, complete."""
        return [self._args_of(expert) for expert in self.experts]

    def _args_of(self, expert: str) -> Any:
        args = flavor_args(expert)
        fields = {field.name for field in dataclasses.fields(args)}
        common = {name: getattr(self, name) for name in _COMMON if name in fields}
        return dataclasses.replace(args, **common)

    @property
    def parts(self) -> list[tuple[str, Any]]:
        """Family and arguments of each model in it."""
        families = [_family(expert)[0] for expert in self.experts]
        return [] if self.router_only else list(zip(families, self.expert_args, strict=True))

    @property
    def is_prompted(self) -> bool:
        """Whether images are drawn to prompts, and not to classes."""
        return getattr(flavor_args(self.experts[0]), "is_prompted", False)

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """Names of the prompts that experts are told."""
        return flavor_args(self.experts[0]).prompt_names

    @property
    def prompt_length(self) -> int:
        """Tokens of a text if the TOML does not say it."""
        return flavor_args(self.experts[0]).prompt_length

    @property
    def speech_length(self) -> int:
        """Units of a spoken prompt."""
        return flavor_args(self.experts[0]).speech_length

    @property
    def patch_size(self) -> int:
        """Height and width of the patches that the mixture's prediction consists of."""
        return flavor_args(self.experts[0]).patch_size

    @property
    def same_patches(self) -> bool:
        """Whether all experts predict the same patches."""
        return len({flavor_args(expert).patch_size for expert in self.experts}) == 1

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: noise or velocity, then the variance if it is learned."""
        return 2 * self.in_channels if self.learned_variance else self.in_channels

    @property
    def num_tokens(self) -> int:
        """Tokens of a square image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def router_noise_shape(self) -> tuple[int, ...]:
        """Shape of a sample's noise."""
        return (self.num_experts,)

    # --- towers: what `mixture.frozen_towers`, `tower_lr` and `tower_weight_decay` name -----------

    @property
    def tower_names(self) -> tuple[str, ...]:
        """The experts and the router."""
        return (ROUTER,) if self.router_only else (*self.names, ROUTER)

    def tower_of_parameter(self, name: str) -> str | None:
        """The expert that a parameter is of, or the router."""
        first, _, rest = name.partition(".")
        return rest.partition(".")[0] if first == "experts" else ROUTER

    # --- counts -----------------------------------------------------------------------------------

    def router_macs_per_image(self) -> float:
        """Count multiply-adds of the router's matrix products for one image, forward."""
        from torchtitan_mixtures.models.mixdiff.router import count_macs

        return count_macs(self)

    def macs_per_image(self) -> float:
        """Count multiply-adds for one image, forward: of the router and of `top_k` experts."""
        if self.router_only:
            return self.router_macs_per_image()
        costs = [_macs(args) for args in self.expert_args]
        return self.router_macs_per_image() + self.top_k * sum(costs) / len(costs)

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Count parameters, and FLOPs by TorchTitan's convention.

        Args:
            model: The model; all its parameters are counted.
            seq_len: Not used: a square image has `num_tokens` tokens.

        Returns:
            Number of parameters, and FLOPs per image token of a training step: 6 per multiply-add
            of the router and of `top_k` experts (of one, in decentralised training, it does fewer).
        """
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        return num_parameters, round(6 * self.macs_per_image() / self.num_tokens)

    # --- what the TOML decides --------------------------------------------------------------------

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        """Take over what the TOML decides: the data, the objective, experts and router."""
        config: Diffusers = job_config.diffusers  # pyrefly: ignore [missing-attribute]
        self.take_experts(job_config)
        self._take_data(job_config)
        objective = job_config.objective  # pyrefly: ignore [missing-attribute]
        self.learned_variance = objective.kind == "ddpm" and objective.learned_variance
        self.init_seed = job_config.debug.seed
        mixture = job_config.mixture  # pyrefly: ignore [missing-attribute]
        if mixture.top_k:
            self.top_k = mixture.top_k
        if mixture.router_noise >= 0:
            self.router_noise = mixture.router_noise
        self.router = config.router or self.router
        self.router_inputs = tuple(config.router_inputs) or self.router_inputs
        if config.renormalize:
            self.renormalize = config.renormalize == "yes"
        self.router_only = config.training == "router"
        self.check()

    def take_experts(self, job_config: JobConfig) -> None:
        """Take over which experts the TOML names.

        Raises:
            ValueError: Names an expert that there is not, or that is told something else.
        """
        config: Diffusers = job_config.diffusers  # pyrefly: ignore [missing-attribute]
        if config.experts:
            self.experts = tuple(config.experts)
        elif config.num_experts:
            self.experts = self.experts[:1] * config.num_experts
        self._check_experts()

    def _take_data(self, job_config: JobConfig) -> None:
        # Imported late: loaders look up flavours.
        from torchtitan_mixtures.data import prompt_loader, prompts
        from torchtitan_mixtures.data.domains import domain_names
        from torchtitan_mixtures.data.image_data import image_spec

        if self.is_prompted:
            images = prompt_loader.prompted_image_spec(job_config)
            self.prompts = prompts.prompt_specs(job_config, self)
        else:
            images = image_spec(job_config)
            self.num_classes = images.num_classes
        self.in_channels, self.image_size = images.channels, images.size
        names = domain_names(job_config)
        config: Diffusers = job_config.diffusers  # pyrefly: ignore [missing-attribute]
        if not names and config.start:
            from torchtitan_mixtures.expert_folder import read_mixture

            names = read_mixture(config.start).names
            names += tuple(str(number) for number in range(len(names), self.num_experts))
        self.expert_names = tuple(names) if len(names) == self.num_experts else ()

    # --- checks -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ValueError, naming the field, for values and combinations that cannot work."""
        self._check_experts()
        for name in ("top_k", "router_dim", "router_layers", "router_heads"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        _require(self.router in get_args(RouterKind), "router", self.router, get_args(RouterKind))
        is_known = bool(self.router_inputs) and set(self.router_inputs) <= set(ROUTER_INPUTS)
        _require(is_known, "router_inputs", self.router_inputs, f"some of {ROUTER_INPUTS}")
        allowed = f"from 1 to {self.num_experts}, the experts there are"
        _require(self.top_k <= self.num_experts, "mixture.top_k", self.top_k, allowed)
        _require(self.router_dim % 4 == 0, "router_dim", self.router_dim, "a multiple of 4")
        divides = self.router_dim % self.router_heads == 0
        allowed = f"a divisor of router_dim = {self.router_dim}"
        _require(divides, "router_heads", self.router_heads, allowed)
        if self.router == "transformer" and "latent" in self.router_inputs:
            divides = self.image_size % self.router_patch_size == 0
            allowed = f"a multiple of router_patch_size = {self.router_patch_size} of the flavour"
            _require(divides, "multimodal.image_size", self.image_size, allowed)
        _require(self.router_noise >= 0, "router_noise", self.router_noise, "a number >= 0")
        names = self.names
        _require(len(names) == self.num_experts, "expert_names", names, "one for each expert")
        _require(len({*names, ROUTER}) > len(names), "expert_names", names, "different names")
        for name in names:
            is_name = re.fullmatch(r"[A-Za-z0-9_-]+", name) and not hasattr(nn.ModuleDict, name)
            _require(bool(is_name), "expert_names", name, "letters, digits, _ and -, no method's")

    def _check_experts(self) -> None:
        _require(bool(self.experts), "experts", self.experts, "one expert or more")
        kinds = {}
        for expert in self.experts:
            args = flavor_args(expert)
            if getattr(args, "has_routers", False):
                raise ValueError(
                    f"expert {expert!r} has routers of its own; take a DiT or MMDiT flavour."
                )
            is_prompted = getattr(args, "is_prompted", False)
            kinds[expert] = args.prompt_names if is_prompted else "classes"
        if len(set(kinds.values())) > 1:
            raise ValueError(
                f"experts = {list(self.experts)}: they are told different things ({kinds}); all "
                "must take classes, or the same prompts."
            )


def flavor_args(expert: str) -> Any:
    """Look up the arguments of an expert's flavour.

    Args:
        expert: Family and flavour, such as "mom/DiT-S/4".

    Raises:
        ValueError: There is no such family or flavour; names those there are.
    """
    family, flavor = _family(expert)
    from torchtitan_mixtures.models import FAMILIES

    if family not in FAMILIES or not _is_expert_family(family):
        denoisers = [name for name in FAMILIES if _is_expert_family(name)]
        raise ValueError(
            f"expert {expert!r}: must be family/flavour of one of {', '.join(denoisers)}."
        )
    try:
        return get_train_spec(family).model_args[flavor]
    except KeyError as error:
        raise ValueError(f"expert {expert!r}: {error.args[0]}.") from None


@functools.cache
def _is_expert_family(family: str) -> bool:
    """Whether a family's models denoise images, and are no mixtures of diffusers themselves."""
    try:
        args = next(iter(get_train_spec(family).model_args.values()))
    except ValueError:  # this family, while its own flavours are made
        return False
    return hasattr(args, "learned_variance") and not isinstance(args, MixDiffModelArgs)


def _family(expert: str) -> tuple[str, str]:
    family, _, flavor = expert.partition("/")
    return family, flavor


def build_expert(expert: str, args: Any) -> nn.Module:
    """Build an expert of a family and flavour with these arguments."""
    return get_train_spec(_family(expert)[0]).model_cls(args)


def _macs(args: Any) -> float:
    """Multiply-adds of an expert for one image, embedders and final layer included."""
    count = getattr(args, "total_macs_per_image", args.macs_per_image)
    return count()


def _require(condition: bool, name: str, value: object, allowed: object) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r} is not allowed; allowed: {allowed}")
