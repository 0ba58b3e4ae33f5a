"""The TOML sections this plugin adds to TorchTitan's job configuration.

A TOML enables them (and so registers every family) with one line:

    [job]
    custom_config_module = "torchtitan_mixtures.job_config"

Only new sections are declared: TorchTitan drops the methods of a section that it declares too.
Each section checks its own values in ``__post_init__``, which runs twice (for the TOML, then for
the command line) and so changes nothing. Checks across keys are in ``checks.py``.
"""

# No `from __future__ import annotations` here: TorchTitan merges the real types of the fields.

import math
from dataclasses import dataclass, field
from typing import Literal

from torchtitan.config import JobConfig as HostJobConfig

from torchtitan_mixtures.classifier_config import Classification, Nested
from torchtitan_mixtures.config_values import Numbers, check_rules, check_section
from torchtitan_mixtures.diffusers_config import Diffusers
from torchtitan_mixtures.multimodal_config import Multimodal
from torchtitan_mixtures.sampling.settings import (
    DenoisingSettings,
    SamplingSettings,
    check_denoising,
    check_values,
)


@dataclass
class Mixture:
    """How the experts of a mixture are laid out and computed."""

    dispatch: Literal["", "split", "grouped", "reference"] = ""
    """How tokens reach their modality's weights. Empty = what the flavour says.
    `split`: one GEMM per modality on contiguous slices. `grouped`: one grouped GEMM.
    `reference`: boolean masks, slow, for tests."""

    untie: str = ""
    """Which components are untied per modality: "none" or a "+"-joined choice of attention, ffn
    and norm, e.g. "ffn" or "attention+ffn". Empty = what the flavour says."""

    tower_of_modality: list[int] = field(default_factory=list)
    """Tower of each modality, e.g. [0, 0, 1] lets text and image share one. Empty = as the
    flavour says."""

    context_parallel: Literal["all_to_all", "ring"] = "all_to_all"
    """How attention sees whole sequences under context parallelism. `all_to_all`: ranks swap parts
    of the sequence for heads; any attention mask. `ring`: TorchTitan's, with its keys
    context_parallel_load_balancer and context_parallel_rotate_method; accelerators only."""

    routing: Literal["", "typed", "free"] = ""
    """How a router chooses among mixers. `typed`: at least one that mixes tokens and one that mixes
    channels. `free`: the likeliest. Empty = what the flavour says."""

    top_k: int = 0
    """Experts that a router chooses for each sample. 0 = what the flavour says."""

    router_noise: float = -1.0
    """Noise of routers in training. Of mixers relative, of what a router sees; of diffusers that of
    its logits, in joint training. -1 = what the flavour says."""

    tower_lr: Numbers = field(default_factory=dict)
    """Learning rate of towers by name, e.g. { text = 1e-4, image = 3e-3 }; `shared` means the
    parameters that all towers share. What is not named has optimizer.lr. The schedule scales all
    alike."""

    tower_weight_decay: Numbers = field(default_factory=dict)
    """Weight decay of towers by name, as `tower_lr`. What is not named has
    optimizer.weight_decay."""

    frozen_towers: list[str] = field(default_factory=list)
    """Towers, or `shared`, whose parameters keep their initial or loaded values."""

    def __post_init__(self) -> None:
        check_section("mixture", self)
        if self.top_k < 0:
            raise ValueError(
                f"mixture.top_k = {self.top_k}: must be 1 or more (0: as the flavour says)."
            )
        if self.router_noise != -1 and not 0 <= self.router_noise < math.inf:
            raise ValueError(
                f"mixture.router_noise = {self.router_noise}: must be a finite number >= 0 (-1: as "
                "the flavour says)."
            )
        for key in ("tower_lr", "tower_weight_decay"):
            for tower, value in getattr(self, key).items():
                if not 0 <= value < math.inf:
                    raise ValueError(
                        f"mixture.{key} = {getattr(self, key)}: that of {tower!r} must be a finite "
                        "number >= 0."
                    )
        parts = self.untie.split("+") if self.untie not in ("", "none") else []
        if unknown := sorted(set(parts) - {"attention", "ffn", "norm"}):
            raise ValueError(
                f'mixture.untie = "{self.untie}": {unknown[0]!r} is not one of attention, ffn, '
                'norm; join several with "+", or write "none".'
            )


@dataclass
class Objective:
    """What a model of images learns to predict, from how much noise, and the losses beside it."""

    kind: Literal["ddpm", "flow"] = "ddpm"
    """`ddpm`: the noise of a discrete process (DiT's recipe). `flow`: the velocity of rectified
    flow (SD3's)."""

    noise_steps: int = 1000
    """For `ddpm`: number of noise levels."""

    noise_schedule: Literal["linear", "squared_cosine"] = "linear"
    """For `ddpm`: how noise grows."""

    learned_variance: bool = True
    """For `ddpm`: predict the variance of each reverse step too; the model has twice the
    channels."""

    time_density: Literal["uniform", "logit_normal", "mode", "cosmap"] = "uniform"
    """For `flow`: density from which training times are drawn (arXiv 2403.03206, 3.1)."""

    logit_mean: float = 0.0
    """For `logit_normal`: mean of the normal distribution."""

    logit_std: float = 1.0
    """For `logit_normal`: its standard deviation."""

    mode_scale: float = 1.29
    """For `mode`: from -1 to 2 / (pi - 2); above 0 the middle is drawn more often."""

    time_shift: float = 1.0
    """For `flow`: shift of times towards noise, for large images 3; also while sampling."""

    class_dropout: float = 0.1
    """Share of training samples that lose their class, which guidance needs."""

    prompt_dropout: float = 0.1
    """Share of training samples that lose what one encoder says of their prompt, independently for
    each encoder (0.464 with three: a tenth loses all). Guidance needs it."""

    balance_weight: float = 0.01
    """Weight of the loss that balances a router's load, for models that have one."""

    z_weight: float = 0.0
    """Weight of the squared logarithm of a router's partition function."""

    validation_levels: int = 8
    """Validate at so many fixed noise levels, spread evenly."""

    def __post_init__(self) -> None:
        check_section("objective", self)
        rules = {
            "noise_steps": (self.noise_steps >= 2, "2 or more"),
            "logit_std": (0 < self.logit_std < math.inf, "a finite number > 0"),
            "logit_mean": (abs(self.logit_mean) < math.inf, "a finite number"),
            "mode_scale": (-1 <= self.mode_scale <= 2 / (math.pi - 2), "from -1 to 1.75"),
            "time_shift": (0 < self.time_shift < math.inf, "a finite number > 0"),
            "class_dropout": (0 <= self.class_dropout < 1, "at least 0 and below 1"),
            "prompt_dropout": (0 <= self.prompt_dropout < 1, "at least 0 and below 1"),
            "balance_weight": (0 <= self.balance_weight < math.inf, "a finite number >= 0"),
            "z_weight": (0 <= self.z_weight < math.inf, "a finite number >= 0"),
            "validation_levels": (self.validation_levels >= 1, "1 or more"),
        }
        check_rules("objective", self, rules)


@dataclass
class EMA:
    """An exponential moving average of the parameters, kept in checkpoints.

    Validation and sampling use it instead of the parameters.
    """

    decay: float = 0.0
    """Share of the average that a step keeps, 0.9999 for long runs. 0 = no average."""

    def __post_init__(self) -> None:
        check_section("ema", self)
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay = {self.decay}: must be at least 0 and below 1.")


@dataclass
class Sampling(SamplingSettings, DenoisingSettings):
    """Samples drawn while training goes on, written to TensorBoard or Weights & Biases.

    The seed is the same at every interval, so that only the model changes.
    """

    interval: int = 0
    """Draw samples every so many steps. 0 = never."""

    prompts: list[str] = field(default_factory=list)
    """Texts to continue, for models over tokens, or to draw, for models of prompted images. Empty
    = for the latter on `emoji` a few of their names."""

    into: list[Literal["text", "image", "speech"]] = field(default_factory=lambda: ["image"])
    """What to generate after each prompt, one after the other in one document."""

    class_labels: list[int] = field(default_factory=list)
    """Classes to draw, for models of images with classes. Empty = the first eight."""

    vae: str = ""
    """Folder of the VAE that makes pictures of latents that were encoded before; with
    `multimodal.vae` that one does."""

    num_samples: int = 2
    """Samples of each prompt or class."""

    def __post_init__(self) -> None:
        check_section("sampling", self)
        check_values(self, "sampling.")
        check_denoising(self, "sampling.")
        if self.interval < 0:
            raise ValueError(f"sampling.interval = {self.interval}: must be 0 (never) or more.")
        if self.num_samples < 1:
            raise ValueError(f"sampling.num_samples = {self.num_samples}: must be 1 or more.")


@dataclass
class JobConfig:
    """The sections of this plugin; TorchTitan merges them into its own `JobConfig`."""

    multimodal: Multimodal = field(default_factory=Multimodal)
    mixture: Mixture = field(default_factory=Mixture)
    objective: Objective = field(default_factory=Objective)
    diffusers: Diffusers = field(default_factory=Diffusers)
    classification: Classification = field(default_factory=Classification)
    nested: Nested = field(default_factory=Nested)
    ema: EMA = field(default_factory=EMA)
    sampling: Sampling = field(default_factory=Sampling)


class MixtureJobConfig(HostJobConfig):
    """What a job's configuration is once merged, for annotations; never instantiated."""

    multimodal: Multimodal
    mixture: Mixture
    objective: Objective
    diffusers: Diffusers
    classification: Classification
    nested: Nested
    ema: EMA
    sampling: Sampling
