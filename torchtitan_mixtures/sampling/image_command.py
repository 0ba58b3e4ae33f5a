"""What `scripts/sample.py` does with a checkpoint of a denoising model: images of classes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from torchtitan_mixtures import checkpoint_config
from torchtitan_mixtures.checkpoint_loading import LoadedModel, find_checkpoint, load_model
from torchtitan_mixtures.data.image_data import image_spec
from torchtitan_mixtures.data.vae import load_vae
from torchtitan_mixtures.objectives.denoising import build_process
from torchtitan_mixtures.sampling.command_line import (
    ProgressBar,
    check_numbers,
    choose_device,
    choose_folder,
    reports_writing,
    say,
)
from torchtitan_mixtures.sampling.images import (
    check_classes,
    check_image_settings,
    draw_images,
    in_batches,
)
from torchtitan_mixtures.sampling.pictures import SheetRow, contact_sheet
from torchtitan_mixtures.sampling.settings import check_denoising, check_values

GRID_NAME = "grid.png"
TABLE_NAME = "samples.json"


def run(options: argparse.Namespace) -> None:
    """Load the checkpoint, draw, write and print.

    Raises:
        ValueError: Names the option or file, what is wrong and what would be right.
    """
    saved = checkpoint_config.read(find_checkpoint(options.checkpoint))["job_config"]
    for name in ("sampler", "num_steps", "eta", "guidance", "guided_channels"):
        if getattr(options, name) is None:
            setattr(options, name, saved["sampling"][name])
    check_values(options, "--")
    check_denoising(options, "--")
    options.num_samples = 4 if options.num_samples is None else options.num_samples
    check_numbers(options.num_samples, options.batch_size)
    with choose_folder(options.out) as folder:
        _run_in(folder, options)


def _run_in(folder: Path, options: argparse.Namespace) -> None:
    """Load, draw, write and print; images are written as their batches are done."""
    device = choose_device()
    loaded = load_model(options.checkpoint, device, averaged=not options.no_ema)
    config, args = loaded.job_config, loaded.model_args
    if config.ema.decay > 0 and not loaded.is_averaged and not options.no_ema:
        say(f"{loaded.path} has no average (ema.decay = {config.ema.decay}): drawn from weights.")
    process = build_process(config.objective, args.in_channels)
    settings = check_image_settings(options, process, args, config.objective.class_dropout, "--")
    vae_folder = options.vae or config.multimodal.vae or config.sampling.vae
    if not vae_folder and args.in_channels != 3:
        raise ValueError(
            f"--vae: {loaded.path} draws latents of {args.in_channels} channels; name the folder "
            "of the VAE that made them."
        )
    classes = options.class_labels or list(range(min(8, args.num_classes)))
    check_classes(classes, args.num_classes, "--class-labels")
    vae = load_vae(vae_folder, device) if vae_folder else None
    start = time.perf_counter()
    labels = [label for label in classes for _ in range(options.num_samples)]
    progress = ProgressBar(f"{len(labels)} images", sys.stderr)
    draw = partial(
        draw_images,
        loaded.model,
        args,
        process,
        settings=settings,
        device=device,
        vae=vae,
        progress=progress,
    )

    def draw_finite(labels: Sequence[int], numbers: Sequence[int]) -> Tensor:
        images = draw(labels, numbers)
        if not bool(images.isfinite().all()):
            raise ValueError("the model's images are not finite (did the run diverge?).")
        return images

    def keep(number: int, picture: NDArray[np.uint8]) -> None:
        with reports_writing(folder):
            Image.fromarray(picture).save(folder / file_name(number, labels[number]))

    pictures = in_batches(draw_finite, labels, options.batch_size, keep)
    seconds = time.perf_counter() - start
    names = class_names(loaded)
    facts = {
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "averaged": loaded.is_averaged,
        "settings": asdict(settings),
    }
    with reports_writing(folder):
        write_overview(folder, pictures, labels, names, options.num_samples, facts)
    say(f"{len(labels)} images in {seconds:.1f} s: {folder}")


def class_names(loaded: LoadedModel) -> Sequence[str]:
    """Names of the classes, where the data of the run is still there to say them."""
    try:
        return image_spec(loaded.job_config).class_names
    except ValueError:  # moved or deleted since: numbers must do
        return [str(label) for label in range(loaded.model_args.num_classes)]


def file_name(number: int, label: int) -> str:
    """Name of the file of an image."""
    return f"image{number:04}_class{label:04}.png"


def write_overview(
    folder: Path,
    pictures: NDArray[np.uint8],
    labels: Sequence[int],
    names: Sequence[str],
    columns: int,
    facts: dict[str, Any],
) -> None:
    """Write a grid with a row for each class, and `samples.json`.

    Args:
        folder: That of the images.
        pictures: `(images, height, width, 3)` uint8, `columns` of each class in turn.
        labels: Class of each.
        names: Name of each class.
        columns: Images of each class.
        facts: What `samples.json` says beside the images; must be JSON.
    """
    table = [
        {"number": n, "class": label, "name": names[label], "file": file_name(n, label)}
        for n, label in enumerate(labels)
    ]
    rows = [
        SheetRow(f"{labels[first]} {names[labels[first]]}", list(pictures[first : first + columns]))
        for first in range(0, len(labels), columns)
    ]
    Image.fromarray(contact_sheet(rows)).save(folder / GRID_NAME)
    text = json.dumps({**facts, "samples": table}, indent=1, ensure_ascii=False) + "\n"
    (folder / TABLE_NAME).write_text(text, encoding="utf-8", errors="replace")
