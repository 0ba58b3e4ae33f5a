"""How far drawn emoji are from real ones: a Frechet distance over features that are trained here.

The measure is that of Heusel et al. 2017 (arXiv 1706.08500), whose network knows photographs. Ours
is **emoji-cnn**, small enough to be trained where it is needed and to leave so few features that
some hundred images give a stable covariance:

- Input: 32 x 32 pixels, 3 channels, in [-1, 1].
- Five 3 x 3 convolutions of 32, 32, 64, 64 and 64 channels, the second and fourth of stride 2, each
  with batch normalisation and ReLU; the mean over the 8 x 8 positions that are left is the 64
  features. One linear layer on them tells the group (8), another the style (3); 0.10 M parameters.
- Data: the drawings of the split `train`, each shifted by up to 2 pixels either way on white.
- Training: 600 steps of 128 drawings in an order of its own for each epoch, the sum of both cross
  entropies, AdamW with a peak learning rate of 3e-3 that falls along a cosine, weight decay 0.01,
  seed 0. About a minute on one core. The same bits on one machine with the same number of threads.

A distance says something beside others only: beside that of real drawings that were left out of
the reference (as good as it gets) and of noise. It grows as samples become fewer, so what is
compared should have about the same number of them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchtitan_mixtures.data.emoji import STYLES, Drawing, EmojiCorpus

SIZE = 32
FEATURES = 64
FILE_NAME = "emoji-cnn.safetensors"

Pictures = NDArray[np.uint8]
"""`(images, 32, 32, 3)`."""


@dataclass(frozen=True)
class Recipe:
    """How the classifier is trained; part of its file, which another recipe does not use."""

    steps: int = 600
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    max_shift: int = 2
    seed: int = 0


class EmojiClassifier(nn.Module):
    """emoji-cnn; see the module's docstring."""

    def __init__(self, num_groups: int, num_styles: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, stride in ((32, 1), (32, 2), (64, 1), (64, 2), (FEATURES, 1)):
            layers += [
                nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels = width
        self.layers = nn.Sequential(*layers)
        self.group = nn.Linear(FEATURES, num_groups)
        self.style = nn.Linear(FEATURES, num_styles)

    def features(self, images: Tensor) -> Tensor:
        """Features `(batch, 64)` of images `(batch, 3, 32, 32)` in [-1, 1]."""
        return self.layers(images).mean((2, 3))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of groups `(batch, groups)` and styles `(batch, styles)`."""
        features = self.features(images)
        return self.group(features), self.style(features)


class LabelledPictures(NamedTuple):
    """Drawings, and what the classifier is to tell of them; labels are `(images,)` int64."""

    pictures: Pictures
    groups: Tensor
    styles: Tensor


def real_pictures(drawings: Sequence[Drawing]) -> LabelledPictures:
    """Read drawings of the embedded corpus."""
    corpus = EmojiCorpus.load()
    return LabelledPictures(
        corpus.images(drawings, SIZE),
        torch.tensor([corpus.groups.index(drawing.concept.group) for drawing in drawings]),
        torch.tensor([STYLES.index(drawing.style) for drawing in drawings]),
    )


def to_images(pictures: Pictures) -> Tensor:
    """Scale pictures to `(images, 3, 32, 32)` float32 in [-1, 1]."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- training -------------------------------------------------------------------------------------


def load_or_train(
    folder: Path,
    recipe: Recipe | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> EmojiClassifier:
    """Read the classifier from a folder, or train it and leave it there for the next time.

    Args:
        folder: Where its file is to be.
        recipe: How to train it; None: as the module's docstring says. A file made by another is
            written over.
        progress: Told of the training.

    Returns:
        The classifier in evaluation mode, on the CPU.
    """
    recipe = recipe or Recipe()
    path, stamp = folder / FILE_NAME, json.dumps(asdict(recipe))
    model = EmojiClassifier(len(EmojiCorpus.load().groups), len(STYLES)).eval()
    if path.is_file():
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("recipe") == stamp:
                    model.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
                    return model
        except SafetensorError:
            progress(f"{path} cannot be read and is made anew")
    train(model, real_pictures(EmojiCorpus.load().drawings("train")), recipe, progress)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{FILE_NAME}.{os.getpid()}.partial")
    save_file(model.state_dict(), unfinished, {"recipe": stamp})
    unfinished.replace(path)
    return model


def train(
    model: EmojiClassifier,
    data: LabelledPictures,
    recipe: Recipe,
    progress: Callable[[str], None] = lambda message: None,
) -> None:
    """Train a classifier from new weights; it is left in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()
    rng = torch.Generator().manual_seed(recipe.seed)
    images = to_images(data.pictures)
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    model.train()
    order = torch.empty(0, dtype=torch.int64)
    for step in range(recipe.steps):
        if len(order) < recipe.batch_size:
            order = torch.cat([order, torch.randperm(len(images), generator=rng)])
        chosen, order = order[: recipe.batch_size], order[recipe.batch_size :]
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        logits = model(shift(images[chosen], recipe.max_shift, rng))
        labels = data.groups[chosen], data.styles[chosen]
        loss = sum(F.cross_entropy(*pair) for pair in zip(logits, labels, strict=True))
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            progress(f"emoji-cnn: step {step + 1}/{recipe.steps}, loss {loss.item():.3f}")
    model.eval()


def shift(images: Tensor, most: int, rng: torch.Generator) -> Tensor:
    """Move each image by up to `most` pixels either way; what comes in is white."""
    batch, _, height, width = images.shape
    padded = F.pad(images, [most] * 4, value=1.0)
    corners = torch.randint(0, 2 * most + 1, (batch, 2), generator=rng).tolist()
    moved = [
        image[:, top : top + height, left : left + width]
        for image, (top, left) in zip(padded, corners, strict=True)
    ]
    return torch.stack(moved)


@torch.no_grad()
def accuracy(model: EmojiClassifier, data: LabelledPictures) -> dict[str, float]:
    """Share of drawings whose `group` and `style` the classifier tells."""
    logits = [model(images) for images in to_images(data.pictures).split(256)]
    group, style = (torch.cat(parts).argmax(1) for parts in zip(*logits, strict=True))
    return {
        "group": (group == data.groups).double().mean().item(),
        "style": (style == data.styles).double().mean().item(),
    }


# --- the distance ---------------------------------------------------------------------------------


@torch.no_grad()
def features_of(model: EmojiClassifier, pictures: Pictures) -> Tensor:
    """Features of pictures, `(images, 64)` float64."""
    parts = [model.features(images) for images in to_images(pictures).split(256)]
    return torch.cat(parts).double()


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Distance between the Gaussians that have the mean and covariance of two sets of features.

    Args:
        first: `(images, features)` float64; at least two images.
        second: Other images; how many does not matter.
    """
    return gaussian_distance(first.mean(0), first.T.cov(), second.mean(0), second.T.cov())


def gaussian_distance(mean: Tensor, cov: Tensor, other_mean: Tensor, other_cov: Tensor) -> float:
    """Frechet distance of two Gaussians, `|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))`.

    The product of two covariances is not symmetric; `C^(1/2) C' C^(1/2)` is and has its
    eigenvalues, whose roots sum to the trace.

    Args:
        mean: `(features,)` float64.
        cov: `(features, features)` float64.
        other_mean: As `mean`.
        other_cov: As `cov`.
    """
    values, vectors = torch.linalg.eigh(cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ other_cov @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    trace = cov.trace() + other_cov.trace() - 2 * eigenvalues.clamp(min=0).sqrt().sum()
    return float((mean - other_mean).square().sum() + trace)


# --- what to compare with -------------------------------------------------------------------------


class Reference(NamedTuple):
    """What samples are compared with.

    Attributes:
        features: Of the training drawings that are not kept out, `(images, 64)` float64.
        kept_out: Drawings, whose classes samples are to have.
    """

    features: Tensor
    kept_out: LabelledPictures


def make_reference(model: EmojiClassifier, count: int, seed: int = 0) -> Reference:
    """Keep `count` of the training drawings out, chosen by `seed`, and describe the others."""
    drawings = EmojiCorpus.load().drawings("train")
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(drawings), generator=rng).tolist()
    others = real_pictures([drawings[number] for number in sorted(order[count:])])
    kept_out = real_pictures([drawings[number] for number in order[:count]])
    return Reference(features_of(model, others.pictures), kept_out)


def reference_rows(
    model: EmojiClassifier, reference: Reference, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Distances of what is as good and as bad as it gets: `frechet` and number of `images`."""
    kept_out = reference.kept_out.pictures
    rng = np.random.default_rng(seed)
    pixels = kept_out.reshape(len(kept_out), SIZE * SIZE, 3)
    shuffled = np.stack([rng.permutation(picture) for picture in pixels]).reshape(kept_out.shape)
    rows = {
        "training drawings, kept out": kept_out,
        "drawings of unseen concepts": real_pictures(
            EmojiCorpus.load().drawings("unseen_concept")
        ).pictures,
        "shuffled pixels": shuffled,
        "uniform noise": rng.integers(0, 256, kept_out.shape, np.uint8),
    }
    return {
        name: {
            "frechet": frechet_distance(features_of(model, pictures), reference.features),
            "images": len(pictures),
        }
        for name, pictures in rows.items()
    }
