"""What `scripts/sample.py` does with a checkpoint of a denoising model: images of classes.

Images of prompts are drawn and written by the same functions, see `prompt_command.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from torchtitan_mixtures import checkpoint_config
from torchtitan_mixtures.checkpoint_loading import LoadedModel, find_checkpoint, load_model
from torchtitan_mixtures.data.image_data import image_spec
from torchtitan_mixtures.data.vae import Vae, load_vae
from torchtitan_mixtures.job_config import Sampling
from torchtitan_mixtures.objectives.denoising import build_process, is_mixture_of_diffusers
from torchtitan_mixtures.objectives.process import Process
from torchtitan_mixtures.sampling.command_line import (
    ProgressBar,
    check_numbers,
    choose_device,
    choose_folder,
    reports_writing,
    say,
)
from torchtitan_mixtures.sampling.conditions import Condition, class_condition
from torchtitan_mixtures.sampling.images import (
    ImageSettings,
    check_classes,
    check_image_settings,
    condition_dropout,
    draw_images,
    in_batches,
)
from torchtitan_mixtures.sampling.pictures import SheetRow, contact_sheet
from torchtitan_mixtures.sampling.routing import RoutingTrace, summarize, write_trace
from torchtitan_mixtures.sampling.settings import check_denoising, check_values

GRID_NAME = "grid.png"
TABLE_NAME = "samples.json"

FROM_RUN = (
    "sampler",
    "num_steps",
    "eta",
    "guidance",
    "guided_channels",
    "shift",
    "routing",
    "negative_prompt",
)
"""Options that are those of the run's `[sampling]` if they are not given."""


def run(options: argparse.Namespace) -> None:
    """Load the checkpoint, draw, write and print.

    Raises:
        ValueError: Names the option or file, what is wrong and what would be right.
    """
    complete_options(options)
    with choose_folder(options.out) as folder:
        painter = load_painter(options)
        args = painter.loaded.model_args
        classes = options.class_labels or list(range(min(8, args.num_classes)))
        check_classes(classes, args.num_classes, "--class-labels")
        names = class_names(painter.loaded)
        subjects = [
            Subject(f"{c} {names[c]}", f"class{c:04}", {"class": c, "name": names[c]})
            for c in classes
        ]

        def condition_of(rows: Sequence[int]) -> Condition:
            return class_condition([classes[row] for row in rows], args.num_classes, painter.device)

        draw_and_write(folder, painter, subjects, condition_of, options)


def complete_options(options: argparse.Namespace) -> None:
    """Fill in what was not said, and check what can be before the model is there.

    Raises:
        ValueError: Names the option, its value and what is allowed.
    """
    saved = checkpoint_config.read(find_checkpoint(options.checkpoint))["job_config"]
    defaults = {**vars(Sampling()), **saved["sampling"]}  # earlier versions had less to say
    for name in FROM_RUN:
        if getattr(options, name) is None:
            setattr(options, name, defaults[name])
    check_values(options, "--")
    check_denoising(options, "--")
    options.num_samples = 4 if options.num_samples is None else options.num_samples
    check_numbers(options.num_samples, options.batch_size)


@dataclass(frozen=True)
class Painter:
    """A denoising model, and how images are drawn with it."""

    loaded: LoadedModel
    process: Process
    settings: ImageSettings
    vae: Vae | None
    device: torch.device


@dataclass(frozen=True)
class Subject:
    """What several images are to be of.

    Attributes:
        label: Goes in front of its row of the grid.
        file: Ends the names of its files.
        entry: What `samples.json` says of it; must be JSON.
    """

    label: str
    file: str
    entry: Mapping[str, Any]


def load_painter(options: argparse.Namespace) -> Painter:
    """Load a checkpoint and the VAE that goes with it.

    Args:
        options: See `complete_options`.

    Raises:
        ValueError: Names the option or file, what is wrong and what would be right.
    """
    device = choose_device()
    loaded = load_model(options.checkpoint, device, averaged=not options.no_ema)
    config, args = loaded.job_config, loaded.model_args
    if getattr(args, "router_only", False):
        raise ValueError(
            f"{loaded.path}: is a router without experts; put them together with `python "
            "scripts/experts.py assemble`."
        )
    if config.ema.decay > 0 and not loaded.is_averaged and not options.no_ema:
        say(f"{loaded.path} has no average (ema.decay = {config.ema.decay}): drawn from weights.")
    process = build_process(config.objective, args.in_channels)
    dropout = condition_dropout(config.objective, args)
    settings = check_image_settings(options, process, args, dropout, "--")
    vae_folder = options.vae or config.multimodal.vae or config.sampling.vae
    if not vae_folder and args.in_channels != 3:
        raise ValueError(
            f"--vae: {loaded.path} draws latents of {args.in_channels} channels; name the folder "
            "of the VAE that made them."
        )
    vae = load_vae(vae_folder, device) if vae_folder else None
    if vae is not None and vae.channels != args.in_channels:
        raise ValueError(
            f"--vae {vae_folder}: its latents have {vae.channels} channels, the images of "
            f"{loaded.path} have {args.in_channels}; name the VAE that made them, or none."
        )
    return Painter(loaded, process, settings, vae, device)


def draw_and_write(
    folder: Path,
    painter: Painter,
    subjects: Sequence[Subject],
    condition_of: Callable[[Sequence[int]], Condition],
    options: argparse.Namespace,
    size: tuple[int, int] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Draw, write and print; images are written as their batches are done.

    Args:
        folder: Where to.
        painter: The model.
        subjects: What to draw, `num_samples` times each.
        condition_of: Makes the condition of a batch, given the number of each image's subject.
        options: The command line.
        size: See `draw_images`.
        facts: What `samples.json` says beside what it always does.

    Raises:
        ValueError: The images are not finite, or cannot be written.
    """
    start = time.perf_counter()
    rows = [row for row in range(len(subjects)) for _ in range(options.num_samples)]
    progress = ProgressBar(f"{len(rows)} images", sys.stderr)
    model, args = painter.loaded.model, painter.loaded.model_args
    trace = RoutingTrace(args.names) if is_mixture_of_diffusers(args) else None
    batches: list[int] = []

    def draw(rows: Sequence[int], numbers: Sequence[int]) -> Tensor:
        batches.append(len(rows))
        images = draw_images(
            model,
            args,
            painter.process,
            condition_of(rows),
            numbers,
            settings=painter.settings,
            device=painter.device,
            vae=painter.vae,
            progress=progress,
            size=size,
            trace=trace,
        )
        if not bool(images.isfinite().all()):
            raise ValueError("the model's images are not finite (did the run diverge?).")
        return images

    def keep(number: int, picture: NDArray[np.uint8]) -> None:
        with reports_writing(folder):
            Image.fromarray(picture).save(folder / file_name(number, subjects[rows[number]]))

    pictures = in_batches(draw, rows, options.batch_size, keep)
    seconds = time.perf_counter() - start
    facts = {
        "checkpoint": str(painter.loaded.path),
        "step": painter.loaded.step,
        "averaged": painter.loaded.is_averaged,
        "settings": asdict(painter.settings),
        **(facts or {}),
    }
    with reports_writing(folder):
        write_overview(folder, pictures, subjects, options.num_samples, facts)
        if trace is not None:
            labels = [subject.label for subject in subjects]
            times, weights = trace.table(batches)
            write_trace(folder, args.names, times, weights, labels, options.num_samples)
            say(summarize(args.names, weights))
    say(f"{len(rows)} images in {seconds:.1f} s: {folder}")


def class_names(loaded: LoadedModel) -> Sequence[str]:
    """Names of the classes, where the data of the run is still there to say them."""
    try:
        return image_spec(loaded.job_config).class_names
    except ValueError:  # moved or deleted since: numbers must do
        return [str(label) for label in range(loaded.model_args.num_classes)]


def file_name(number: int, subject: Subject) -> str:
    """Name of the file of an image."""
    return f"image{number:04}_{subject.file}.png"


def write_overview(
    folder: Path,
    pictures: NDArray[np.uint8],
    subjects: Sequence[Subject],
    columns: int,
    facts: Mapping[str, Any],
) -> None:
    """Write a grid with a row for each subject, and `samples.json`.

    Args:
        folder: That of the images.
        pictures: `(images, height, width, 3)` uint8, `columns` of each subject in turn.
        subjects: What they are of.
        columns: Images of each.
        facts: What `samples.json` says beside the images; must be JSON.
    """
    table = [
        {"number": n, **subject.entry, "file": file_name(n, subject)}
        for n, subject in enumerate(s for s in subjects for _ in range(columns))
    ]
    rows = [
        SheetRow(subject.label, list(pictures[row * columns : (row + 1) * columns]))
        for row, subject in enumerate(subjects)
    ]
    Image.fromarray(contact_sheet(rows)).save(folder / GRID_NAME)
    text = json.dumps({**facts, "samples": table}, indent=1, ensure_ascii=False) + "\n"
    (folder / TABLE_NAME).write_text(text, encoding="utf-8", errors="replace")
