"""Clusters of a job's images, written as a file of domains (`scripts/prepare_data.py cluster`).

What is clustered are the images themselves, averaged to 8 x 8 and projected on their main
directions, or features of the user's. Clusters are those of the training split; images of other
splits belong to the nearest. Their centres, and the directions, are written beside the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torchtitan.config import JobConfig

from torchtitan_mixtures.data.cluster import (
    Clusters,
    MainDirections,
    TooFewError,
    find_clusters,
    find_mutual_information,
    find_nearest,
    find_purity,
)
from torchtitan_mixtures.data.domain_file import write_domain_file
from torchtitan_mixtures.data.emoji import STYLES, EmojiCorpus
from torchtitan_mixtures.data.image_data import list_splits, open_images, picture_size
from torchtitan_mixtures.data.image_files import BrokenImageError
from torchtitan_mixtures.data.image_sets import EmojiImages, to_tensor
from torchtitan_mixtures.data.latents import CaptionedLatents
from torchtitan_mixtures.data.loader import multimodal_section
from torchtitan_mixtures.data.model_flavor import model_flavor
from torchtitan_mixtures.data.prompt_loader import list_prompt_splits, prompted_image_spec

SIDE = 8
"""Height and width that images are averaged to."""

MAX_DIM = 32
"""Principal components that are kept."""


@dataclass(frozen=True)
class Clustering:
    """What is to be clustered, and how.

    Attributes:
        clusters: How many.
        out: File of domains to write.
        features: Safetensors with the features of each split, `(images, dim)`; None: of images.
        seed: Of the starts of k-means.
        restarts: How many starts.
    """

    clusters: int
    out: Path
    features: Path | None = None
    seed: int = 0
    restarts: int = 8


class _Images(Protocol):
    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def relative_key(self, index: int) -> str: ...


class _Split(NamedTuple):
    """The images of a split, without classes and prompts."""

    images: _Images
    read: Callable[[int], Tensor]  # `(channels, height, width)`
    labels: dict[str, Tensor]  # what is known of them, `(images,)` int64 each


def cluster_images(
    job_config: JobConfig, clustering: Clustering, report: Callable[[str], object]
) -> Clusters:
    """Cluster the images of all splits of a job, and write the file of domains.

    Args:
        job_config: The whole configuration; what it says of domains is not read.
        clustering: What is to be done.
        report: Is told, line by line, what was found.

    Raises:
        ValueError: Names the option or key that does not fit, its value and the remedy.
    """
    if clustering.clusters < 2:
        raise ValueError(f"--clusters {clustering.clusters}: must be 2 or more.")
    if clustering.restarts < 1:
        raise ValueError(f"--restarts {clustering.restarts}: must be 1 or more.")
    if clustering.out.suffix == ".safetensors":
        raise ValueError(f"--out {clustering.out}: must be a JSON file; its centres go beside it.")
    splits = open_splits(job_config)
    extras: dict[str, Tensor] = {}
    try:
        if clustering.features is None:
            features, directions = _project({n: _read_pixels(s, report) for n, s in splits.items()})
            extras = {"mean": directions.mean, "projection": directions.projection}
        else:
            features = _read_features(clustering.features, splits)
        train = next(iter(features))
        usable = features[train][features[train].isfinite().all(1)]
        found = find_clusters(usable, clustering.clusters, clustering.seed, clustering.restarts)
    except TooFewError as error:
        raise ValueError(f"--clusters {clustering.clusters}: {error}.") from None
    entries = {}
    for name, split in splits.items():
        # What could not be read is as far from all as the mean of what could.
        labels = find_nearest(features[name].nan_to_num(nan=0.0), found.centres)[0]
        keys = [split.images.relative_key(index) for index in range(len(split.images))]
        entries[name] = dict(zip(keys, labels.tolist(), strict=True))
        _report_split(name, labels, split.labels, clustering.clusters, report)
    clustering.out.parent.mkdir(parents=True, exist_ok=True)
    names = [f"cluster{number}" for number in range(clustering.clusters)]
    write_domain_file(clustering.out, names, entries)
    tensors = {"centres": found.centres, **extras}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        clustering.out.with_suffix(".safetensors"),
    )
    return found


def open_splits(job_config: JobConfig) -> dict[str, _Split]:
    """Open all splits of a job's images, that of training first.

    Raises:
        ValueError: Names the key that does not fit.
    """
    config = multimodal_section(job_config)
    is_prompted = _is_prompted(job_config)
    names = list_prompt_splits(job_config) if is_prompted else list_splits(job_config)
    if config.train_split not in names:
        raise ValueError(
            f'multimodal.train_split: there is no split "{config.train_split}"; the splits are '
            f"{', '.join(names)}."
        )
    if not is_prompted:
        return {name: _open_class_images(job_config, name) for name in names}
    return {name: _open_prompted_images(job_config, name) for name in names}


def _is_prompted(job_config: JobConfig) -> bool:
    model = job_config.model
    try:
        model_args = model_flavor(job_config)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"model.name = {model.name!r}, model.flavor = {model.flavor!r}: {error.args[0]}"
        ) from None
    if hasattr(model_args, "modality_names"):
        raise ValueError(
            f"model.name = {model.name!r}: reads documents of tokens; name the TOML of a model of "
            "images."
        )
    return getattr(model_args, "is_prompted", False)


def _open_class_images(job_config: JobConfig, name: str) -> _Split:
    config = multimodal_section(job_config)
    images = open_images(job_config, "multimodal.train_split", name)
    labels = _emoji_labels(name) if config.source == "emoji" else {}
    if not labels and images.max_labels == 1:
        labels = {"class": torch.tensor(images.labels())}
    return _Split(images, lambda index: images.read(index).image, labels)


def _open_prompted_images(job_config: JobConfig, name: str) -> _Split:
    config = multimodal_section(job_config)
    if config.source == "emoji":
        drawings = EmojiImages(name, "group", picture_size(config))
        return _Split(drawings, lambda index: drawings.read(index).image, _emoji_labels(name))
    if config.source == "folder":
        latents = CaptionedLatents(Path(config.path).expanduser(), name)
        return _Split(latents, lambda index: latents.moments(index)[0], {})
    # Imported late: `datasets` takes a second, which other jobs need not pay.
    from torchtitan_mixtures.data.prompt_datasets import CaptionedPictures

    buckets = prompted_image_spec(job_config).buckets
    pictures = CaptionedPictures(config, "multimodal.train_split", name, buckets)
    return _Split(pictures, lambda index: to_tensor(pictures.read(index)[0]), {})


def _emoji_labels(split: str) -> dict[str, Tensor]:
    corpus = EmojiCorpus.load()
    drawings = corpus.drawings(split)
    return {
        "style": torch.tensor([STYLES.index(drawing.style) for drawing in drawings]),
        "group": torch.tensor([corpus.groups.index(d.concept.group) for d in drawings]),
    }


# --- features -------------------------------------------------------------------------------------


def _read_pixels(split: _Split, report: Callable[[str], object]) -> Tensor:
    """Images averaged to `SIDE` x `SIDE`, `(images, features)`; NaN where one cannot be read."""
    rows: list[Tensor | None] = []
    for index in range(len(split.images)):
        try:
            rows.append(adaptive_avg_pool2d(split.read(index)[None], SIDE).flatten())
        except BrokenImageError as error:
            report(f"cannot be read: {split.images.key(index)}: {error}")
            rows.append(None)
    size = next((len(row) for row in rows if row is not None), 1)
    nothing = torch.full((size,), torch.nan)
    return torch.stack([nothing if row is None else row for row in rows])


def _project(pixels: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], MainDirections]:
    """Project the features of all splits on the main directions of the first, of training."""
    train = next(iter(pixels.values()))
    usable = train[train.isfinite().all(1)]
    if not len(usable):
        raise ValueError("multimodal.train_split: none of its images can be read.")
    directions = MainDirections.of(usable, MAX_DIM)
    return {name: directions.apply(each) for name, each in pixels.items()}, directions


def _read_features(path: Path, splits: Mapping[str, _Split]) -> dict[str, Tensor]:
    """The user's features of each split, `(images, dim)` float64, as they are."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--features {path}: cannot be read as safetensors: {error}.") from None
    features = {}
    for name, split in splits.items():
        count = len(split.images)
        if name not in tensors:
            raise ValueError(
                f'--features {path}: has no tensor "{name}" for the {count} images of that split; '
                f"it has {', '.join(sorted(tensors))}."
            )
        each = tensors[name]
        if each.ndim != 2 or len(each) != count or not each.is_floating_point():
            raise ValueError(
                f'--features {path}: "{name}" is {tuple(each.shape)} {each.dtype}; it must be '
                f"({count}, dim) floats, a row for each image in the order of the split."
            )
        if not each.isfinite().all():
            raise ValueError(f'--features {path}: "{name}" has values that are not finite.')
        features[name] = each.to(torch.float64)
    if len({each.shape[1] for each in features.values()}) > 1:
        widths = ", ".join(f"{name} {each.shape[1]}" for name, each in features.items())
        raise ValueError(f"--features {path}: splits differ in dim ({widths}).")
    return features


def _report_split(
    name: str,
    labels: Tensor,
    known: Mapping[str, Tensor],
    num_clusters: int,
    report: Callable[[str], object],
) -> None:
    sizes = np.bincount(labels.numpy(), minlength=num_clusters).tolist()
    report(f"{name}: {len(labels)} images, {', '.join(map(str, sizes))} in each cluster")
    for what, truth in known.items():
        purity, shared = find_purity(labels, truth), find_mutual_information(labels, truth)
        report(f"  compared with {what}: purity {purity:.3f}, mutual information {shared:.3f}")
