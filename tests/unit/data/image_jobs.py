"""Folders of images, a tiny VAE, and jobs over them, for tests of what models of images read."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchtitan.config import JobConfig

from torchtitan_mixtures.classifier_config import Classification
from torchtitan_mixtures.job_config import Multimodal

PATCH_SIZE = 2


def make_job(
    local_batch_size: int = 3,
    num_workers: int = 0,
    classification: dict[str, Any] | None = None,
    **multimodal: Any,
) -> Any:
    """The sections that image data reads; the model is a fake of `use_fake_model`."""
    host = JobConfig()
    host.training.local_batch_size = local_batch_size
    host.training.dataloader.num_workers = num_workers
    host.validation.local_batch_size = local_batch_size
    host.validation.dataloader.num_workers = num_workers
    host.validation.steps = -1
    host.validation.enable = True
    model = SimpleNamespace(name="fake", flavor="debugmodel")
    return SimpleNamespace(
        multimodal=Multimodal(**multimodal),
        classification=Classification(**(classification or {})),
        training=host.training,
        validation=host.validation,
        model=model,
    )


def use_fake_model(monkeypatch: Any, is_classifier: bool = False) -> None:
    """Let the loaders find a model of patches of `PATCH_SIZE`."""
    args = SimpleNamespace(patch_size=PATCH_SIZE, is_classifier=is_classifier)
    spec = SimpleNamespace(model_args={"debugmodel": args})
    monkeypatch.setattr("torchtitan_mixtures.data.model_flavor.get_train_spec", lambda name: spec)


def write_picture(path: Path, seed: int, width: int = 20, height: int = 16) -> None:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_folder(root: Path, count: int = 10, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Pictures in `root/<class>/`, every second one in a folder of its own there."""
    for label, name in enumerate(classes):
        for number in range(count):
            inner = "more/" if number % 2 else ""
            write_picture(root / name / f"{inner}{number}.png", label * count + number)
    return root


def save_tiny_vae(folder: Path) -> Path:
    """An `AutoencoderKL` of factor 2 with 4 channels, saved by `diffusers`."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    vae.save_pretrained(folder)
    return folder


# A worker process that is forked has the model that `use_fake_model` put in place; one that is
# started anew (the default of macOS and Windows) imports the real one, and its batches are others.
needs_fork = pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork", reason="workers would not see the patched model"
)
