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

from torchtitan_mixtures.config_values import check_section
from torchtitan_mixtures.sampling.settings import SamplingSettings, check_values


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
    """Where documents come from, how they become tokens, and what their tokens weigh."""

    source: Literal["emoji", "datasets"] = "emoji"
    """`emoji`: the embedded corpus. `datasets`: anything that `datasets.load_dataset` opens."""

    path: str = ""
    """For `datasets`: hub name, local folder or file, or a folder written by `save_to_disk`."""

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
    """For `datasets`: read without downloading first. Shuffles in a buffer, not globally."""

    image_column: str = "image"
    """For `datasets`: column with the image (an image, its bytes, or a path)."""

    caption_column: str = "caption"
    """For `datasets`: column with the caption (a string, or a list of which one is drawn)."""

    max_bad_fraction: float = 0.01
    """Share of undecodable samples above which the run stops. All are counted and logged."""

    scene_fraction: float = 0.25
    """For `emoji`: share of groups that are a composed scene of two to four drawings and its
    caption."""

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
        if self.max_pairs < 1:
            raise ValueError(f"multimodal.max_pairs = {self.max_pairs}: must be at least 1.")
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
class Sampling(SamplingSettings):
    """Samples drawn while training goes on, written to TensorBoard or Weights & Biases.

    The seed is the same at every interval, so that only the model changes.
    """

    interval: int = 0
    """Draw samples every so many steps. 0 = never."""

    prompts: list[str] = field(default_factory=list)
    """Texts to continue."""

    into: list[Literal["text", "image", "speech"]] = field(default_factory=lambda: ["image"])
    """What to generate after each prompt, one after the other in one document."""

    num_samples: int = 2
    """Samples of each prompt."""

    def __post_init__(self) -> None:
        check_section("sampling", self)
        check_values(self, "sampling.")
        if self.interval < 0:
            raise ValueError(f"sampling.interval = {self.interval}: must be 0 (never) or more.")
        if self.num_samples < 1:
            raise ValueError(f"sampling.num_samples = {self.num_samples}: must be 1 or more.")


@dataclass
class JobConfig:
    """The sections of this plugin; TorchTitan merges them into its own `JobConfig`."""

    multimodal: Multimodal = field(default_factory=Multimodal)
    mixture: Mixture = field(default_factory=Mixture)
    sampling: Sampling = field(default_factory=Sampling)


class MixtureJobConfig(HostJobConfig):
    """What a job's configuration is once merged, for annotations; never instantiated."""

    multimodal: Multimodal
    mixture: Mixture
    sampling: Sampling
