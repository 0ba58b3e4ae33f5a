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
from typing import Annotated, Literal

from torchtitan.config import JobConfig as HostJobConfig
from tyro.constructors import PrimitiveConstructorSpec

from torchtitan_mixtures.classifier_config import Classification, Nested
from torchtitan_mixtures.config_values import check_rules, check_section
from torchtitan_mixtures.sampling.settings import (
    DenoisingSettings,
    SamplingSettings,
    check_denoising,
    check_values,
)


def _parse_numbers(text: str) -> dict[str, float]:
    """Read `name=number` pairs, joined by commas, from the command line."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    return {name.strip(): float(number) for name, _, number in pairs}


# A TOML writes { text = 1e-4, image = 3e-3 }. By itself tyro would take this key on the command
# line in another form when the TOML has the table than when it does not, and 0.5 not for a 1.
Numbers = Annotated[
    dict[str, float],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME=NUMBER,...",
        instance_from_str=lambda words: _parse_numbers(words[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [",".join(f"{k}={v}" for k, v in value.items())],
    ),
]
"""A table from names to numbers; on the command line `name=number,name=number`."""


@dataclass
class Multimodal:
    """Where documents and images come from, how they become tokens, and what their tokens weigh."""

    source: Literal["emoji", "datasets", "folder"] = "emoji"
    """`emoji`: the embedded corpus. `datasets`: anything that `datasets.load_dataset` opens.
    `folder`: for models of images, a folder with one folder of images per class, or the latents
    that `scripts/prepare_data.py encode-latents` wrote; for those with prompts, latents with
    captions."""

    path: str = ""
    """For `datasets`: hub name, local folder or file, or a folder written by `save_to_disk`. For
    `folder`: the folder."""

    name: str = ""
    """For `datasets`: name of the dataset's configuration, if it has several."""

    data_files: list[str] = field(default_factory=list)
    """For `datasets`: files to read when `path` is a format (`parquet`, `json`, `webdataset`)."""

    train_split: str = "train"
    """Split to train on."""

    validation_splits: list[str] = field(default_factory=lambda: ["unseen_concept", "unseen_style"])
    """Splits to validate on, each reported under its own name. Models with speech can have
    `unseen_voice` of the embedded corpus too."""

    streaming: bool = False
    """For `datasets`: read without downloading first. Shuffles in a buffer, not globally. Not for
    models of images."""

    image_column: str = "image"
    """For `datasets`: column with the image (an image, its bytes, or a path)."""

    caption_column: str = "caption"
    """For models over tokens or with prompts on `datasets`: column with the caption (a string, or
    a list of which one is drawn)."""

    label_column: str = "label"
    """For models of images on `datasets`: column with the class (a number or a string), or with a
    list of classes if `classification.multi_label` says so."""

    max_bad_fraction: float = 0.01
    """Share of undecodable samples above which the run stops. All are counted and logged."""

    scene_fraction: float = 0.25
    """For `emoji`: share of groups, or of prompted images, that are a composed scene of two to four
    drawings and its caption."""

    max_pairs: int = 3
    """For `emoji`: the most pairs of a caption and an image in one document; fewer are likelier.
    For a model with speech, a pair is a group of two or all three modalities of one concept."""

    text_tokenizer: str = "emoji"
    """`emoji`: the embedded vocabulary of 2,048. Else a folder with a `tokenizer.json`."""

    image_tokenizer: str = "emoji_32px"
    """`emoji_32px` (64 codes an image), `emoji_64px` (256 codes), or a codebook file."""

    speech_tokenizer: str = "emoji_25hz"
    """`emoji_25hz` (25 units of 512 codes a second), the only one the embedded corpus has units of,
    or a codebook file. Read if the model has speech."""

    shards: int = 0
    """Streams into which the training data is dealt; data-parallel ranks times
    `training.dataloader.num_workers` must divide it, also in a run that resumes. 0 = as in the
    checkpoint; in a new run the least multiple of 48 that they divide or, for `streaming`, one
    per reader, since every shard may read all files."""

    reset_positions: bool = False
    """Count rotary positions from 0 in every document instead of along the packed sequence."""

    image_size: int = 32
    """For models of images: height and width of what the model sees. Without `vae` that is pixels;
    with it latents, of pictures that are larger by the factor of the VAE (mostly 8)."""

    class_of: Literal["group", "concept"] = "group"
    """For models of images on `emoji`: what is a class, Unicode's groups (animals, food, ...) or
    every single concept."""

    random_flip: bool = False
    """For models of images on a `folder` of pictures or on `datasets`: mirror half of the training
    images. Never where it would lie, as with the arrows and letters of `emoji`, which refuses
    it."""

    vae: str = ""
    """For models of images: local folder of a VAE in the format of `diffusers` (an extra:
    pip install "torchtitan_mixtures[vae]"), which encodes pictures during training."""

    prompt_length: int = 0
    """For models of prompted images: tokens of a text, for the encoder that is part of the model.
    0 = as the flavour says."""

    long_prompts: Literal["truncate", "refuse"] = "truncate"
    """For models of prompted images: what happens to a text that is longer than an encoder's
    window. Those that are cut are counted and logged."""

    text_encoders: list[str] = field(default_factory=list)
    """For models of prompted images: local folders of frozen text encoders (CLIP, T5 or others) in
    the format of `transformers` (an extra: pip install "torchtitan_mixtures[text]"), joined as in
    Stable Diffusion 3. Empty = the model learns an encoder of its own."""

    text_encoder_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What `text_encoders` compute in and are held in memory in; their embeddings are float32."""

    text_embeddings: str = ""
    """For models of prompted images: folder that `scripts/prepare_data.py encode-text` wrote, in
    place of `text_encoders`."""

    aspect_ratios: list[str] = field(default_factory=list)
    """For models of prompted images: shapes of about `image_size`**2 pixels to crop images to, the
    nearest for each: "1:1", "4:3", "3:4". Empty = square."""

    text_weight: float = 1.0
    """Loss weight of text and sentinel targets. 0 = not supervised."""

    image_weight: float = 1.0
    """Loss weight of image targets. 0 = not supervised."""

    speech_weight: float = 1.0
    """Loss weight of speech targets. 0 = not supervised."""

    seed: int = 0
    """Seed of the order of documents and of what is drawn inside them."""

    check_batches: bool = False
    """Check every batch against the contract of `data/batch.py`; for debugging, costs some time."""

    def __post_init__(self) -> None:
        check_section("multimodal", self)
        for key in ("max_bad_fraction", "scene_fraction"):
            value = getattr(self, key)
            if not 0 <= value <= 1:
                raise ValueError(f"multimodal.{key} = {value}: must be between 0 and 1.")
        if self.image_size < 1:
            raise ValueError(f"multimodal.image_size = {self.image_size}: must be at least 1.")
        if self.max_pairs < 1:
            raise ValueError(f"multimodal.max_pairs = {self.max_pairs}: must be at least 1.")
        if self.prompt_length != 0 and self.prompt_length < 3:
            raise ValueError(
                f"multimodal.prompt_length = {self.prompt_length}: must be 0 (as the flavour says) "
                "or 3 or more, two of which frame the text."
            )
        if self.text_encoder_dtype != "float32" and not self.text_encoders:
            raise ValueError(
                f"multimodal.text_encoder_dtype = {self.text_encoder_dtype!r}: there are no "
                "multimodal.text_encoders that it is about; remove it."
            )
        if self.text_encoders and self.text_embeddings:
            raise ValueError(
                f"multimodal.text_embeddings = {self.text_embeddings!r}: embeddings that are there "
                "need no multimodal.text_encoders; remove one of them."
            )
        if self.shards < 0:
            raise ValueError(f"multimodal.shards = {self.shards}: must be 0 (automatic) or more.")
        for key in ("text_weight", "image_weight", "speech_weight"):
            value = getattr(self, key)
            if not 0 <= value < float("inf"):
                raise ValueError(f"multimodal.{key} = {value}: must be a finite number >= 0.")


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
    """Relative noise of what a router sees in training. -1 = what the flavour says."""

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
    classification: Classification = field(default_factory=Classification)
    nested: Nested = field(default_factory=Nested)
    ema: EMA = field(default_factory=EMA)
    sampling: Sampling = field(default_factory=Sampling)


class MixtureJobConfig(HostJobConfig):
    """What a job's configuration is once merged, for annotations; never instantiated."""

    multimodal: Multimodal
    mixture: Mixture
    objective: Objective
    classification: Classification
    nested: Nested
    ema: EMA
    sampling: Sampling
