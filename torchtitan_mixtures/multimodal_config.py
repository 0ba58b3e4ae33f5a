"""The TOML section about data, part of `job_config.py`."""

# No `from __future__ import annotations` here: TorchTitan merges the real types of the fields.

from dataclasses import dataclass, field
from typing import Literal

from torchtitan_mixtures.config_values import Numbers, Tables, check_section

ClassOf = Literal["group", "concept", "style", "style+group"]
"""What may be a class of the embedded corpus."""


@dataclass
class Multimodal:
    """Where documents and images come from, how they become tokens, and what their tokens weigh."""

    source: Literal["emoji", "datasets", "folder", "mixture"] = "emoji"
    """`emoji`: the embedded corpus. `datasets`: anything that `datasets.load_dataset` opens.
    `mixture`: for models over tokens, one or more `sources`.
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

    sources: Tables = field(default_factory=list)
    """For `mixture`: what to train on, one [[multimodal.sources]] each; see `source_entries.py`."""

    validation_sources: Tables = field(default_factory=list)
    """For `mixture`: what `validation_splits` names, one [[multimodal.validation_sources]] each."""

    train_split: str = "train"
    """Split to train on."""

    validation_splits: list[str] = field(default_factory=lambda: ["unseen_concept", "unseen_style"])
    """Splits to validate on, each reported under its own name. Models with speech can have
    `unseen_voice` of the embedded corpus too. For `mixture`: names of `validation_sources`."""

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

    caption_first: float = 0.5
    """For models over tokens: share of pairs whose caption comes before what it is about."""

    condition_dropout: float = 0.0
    """For models over tokens: share of pairs with the caption first that lose it in training."""

    packing: Literal["best_fit", "greedy"] = "best_fit"
    """How documents fill sequences. `best_fit`: out of a small buffer those that leave the least
    room. `greedy`: in order, until one does not fit."""

    long_documents: Literal["split", "drop"] = "split"
    """What happens to documents longer than a sequence: `split` between segments (inside a text
    only if that alone is too long, never inside an image), or `drop`. Both are counted."""

    text_tokenizer: str = "emoji"
    """`emoji`: the embedded vocabulary of 2,048. Else a `tokenizer.json` of any kind or its folder;
    sentinels that it has no token for get ids after its own."""

    image_tokenizer: str = "emoji_32px"
    """`emoji_32px` (64 codes an image), `emoji_64px` (256 codes), a codebook file (of
    `prepare_data.py train-image-tokenizer`), or a folder with `config.json` and safetensors of a
    VQ model: `VQModel` of diffusers, `ChameleonVQVAE` or `JanusVQVAE` of transformers."""

    speech_tokenizer: str = "emoji_25hz"
    """`emoji_25hz` (25 units of 512 codes a second), the only one the embedded corpus has units of,
    or a codebook file (of `prepare_data.py train-speech-tokenizer`). Read if the model has
    speech."""

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

    class_of: ClassOf = "group"
    """For models of images on `emoji`: what is a class, Unicode's groups (animals, food, ...),
    every single concept, the style (noto, noto_v1, fluent), or each group in each style."""

    domains: str = ""
    """For models of images: what divides them into domains (`data/domains.py`). `style`: of
    `emoji`. `class`: the class of an image. Else a JSON file, of `scripts/prepare_data.py cluster`
    or your own. Empty = nothing. Scenes of prompted emoji are then of one style each."""

    domain_column: str = ""
    """For models of images on `datasets`: column that names the domain (a number or a string)."""

    train_domains: list[str] = field(default_factory=list)
    """Train and validate on images of these domains only. Empty = all."""

    domain_shares: Numbers = field(default_factory=dict)
    """Share of the training samples of each domain, e.g. { noto = 0.3, sketch = 0.7 }; they add up
    to 1. Each epoch takes the next images of a domain in turn. Empty = as many as there are."""

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
        for key in ("max_bad_fraction", "scene_fraction", "caption_first", "condition_dropout"):
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
