"""Images, texts and sounds in TensorBoard and Weights & Biases, beside TorchTitan's numbers."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchtitan.components.metrics import BaseLogger, TensorBoardLogger, WandBLogger


@dataclass(frozen=True)
class Media:
    """Things to look at or listen to, by the name each is logged under."""

    images: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    """`(height, width, 3)` uint8 each."""

    texts: Mapping[str, str] = field(default_factory=dict)
    """Markdown."""

    sounds: Mapping[str, tuple[NDArray[np.float32], int]] = field(default_factory=dict)
    """`(samples,)` float32 in [-1, 1], and the sample rate."""


def write_pictures(folder: Path, media: Media, step: int) -> None:
    """Write images as `samples/images-step-00050.png`, if that is their name, below a folder.

    Args:
        folder: The run's.
        media: What to write.
        step: The training step.
    """
    for name, image in media.images.items():
        path = folder / f"{name}-step-{step:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def _write_to_tensorboard(target: TensorBoardLogger, media: Media, step: int) -> None:
    writer, prefix = target.writer, "" if target.tag is None else f"{target.tag}/"
    for name, image in media.images.items():
        writer.add_image(prefix + name, image, step, dataformats="HWC")
    for name, text in media.texts.items():
        writer.add_text(prefix + name, text, step)
    for name, (waveform, sample_rate) in media.sounds.items():
        writer.add_audio(prefix + name, torch.from_numpy(waveform)[None], step, sample_rate)
    writer.flush()


def _write_to_wandb(target: WandBLogger, media: Media, step: int) -> None:
    wandb, prefix = target.wandb, "" if target.tag is None else f"{target.tag}/"
    entries: dict[str, Any] = {name: wandb.Image(image) for name, image in media.images.items()}
    entries |= {
        name: wandb.Html(f"<pre>{html.escape(text)}</pre>") for name, text in media.texts.items()
    }
    entries |= {
        name: wandb.Audio(waveform, sample_rate=sample_rate)
        for name, (waveform, sample_rate) in media.sounds.items()
    }
    wandb.log({prefix + name: entry for name, entry in entries.items()}, step=step)


def write_media(target: BaseLogger, media: Media, step: int) -> None:
    """Write to one of TorchTitan's loggers; others than its two take no media.

    Args:
        target: Where scalars are written.
        media: What to write.
        step: The training step.
    """
    if isinstance(target, TensorBoardLogger):
        _write_to_tensorboard(target, media, step)
    elif isinstance(target, WandBLogger):
        _write_to_wandb(target, media, step)
