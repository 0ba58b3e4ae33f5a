"""What `scripts/sample.py --canvas` does: one image of regions that a file describes."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from torchtitan_mixtures.objectives.denoising import is_mixture_of_diffusers
from torchtitan_mixtures.sampling.canvas import Canvas
from torchtitan_mixtures.sampling.canvas_drawing import (
    ConditionOf,
    RegionTrace,
    draw_canvas,
    predict_with,
)
from torchtitan_mixtures.sampling.canvas_file import (
    SETTINGS,
    CanvasFile,
    build_canvas,
    read_canvas_file,
)
from torchtitan_mixtures.sampling.canvas_frame import DEFAULT_KERNEL, Frame
from torchtitan_mixtures.sampling.canvas_report import describe, draw_places
from torchtitan_mixtures.sampling.command_line import (
    ProgressBar,
    choose_folder,
    reports_writing,
    say,
)
from torchtitan_mixtures.sampling.conditions import Condition, class_condition, is_prompted
from torchtitan_mixtures.sampling.image_command import (
    Painter,
    class_names,
    complete_options,
    load_painter,
)
from torchtitan_mixtures.sampling.images import (
    check_image_settings,
    condition_dropout,
    to_pixels,
)
from torchtitan_mixtures.sampling.prompt_command import SQUARE
from torchtitan_mixtures.sampling.prompt_encoding import PromptEncoder, choose_text_encoders
from torchtitan_mixtures.sampling.routing import summarize, write_trace

PICTURE_NAME = "canvas.png"
PLACES_NAME = "regions.png"
TABLE_NAME = "canvas.json"

NOT_WITH_CANVAS = {
    "prompt": [],
    "prompt_file": None,
    "class_labels": None,
    "aspect_ratio": SQUARE,
    "speak": False,
}
"""Options that the file takes the place of, and what they are if they are not given."""


def run(options: argparse.Namespace) -> None:
    """Load the checkpoint, draw the canvas of `--canvas`, write and print.

    Raises:
        ValueError: Names the option, or the file and key, what is wrong and what would be right.
    """
    _refuse_others(options)
    file = read_canvas_file(options.canvas)
    # The command line goes before the file, and that before the run.
    unsaid = {key for key in SETTINGS if getattr(options, key) is None}
    if not options.seed:  # 0 is what the option is if it is not given
        unsaid.add("seed")
    complete_options(options)
    chosen = {key: value for key, value in file.settings.items() if key in unsaid}
    with choose_folder(options.out) as folder:
        painter, frame = _load(options, file, chosen)
        canvas = build_canvas(file, frame)
        _check_guidance(canvas, painter, file)
        condition_of = _encode(canvas, painter, options)
        _draw_and_write(folder, painter, canvas, frame.cell, condition_of, options)


def _refuse_others(options: argparse.Namespace) -> None:
    for name, default in NOT_WITH_CANVAS.items():
        if getattr(options, name) != default:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: the file of --canvas says what is drawn; leave it out.")
    if options.num_samples not in (None, 1):
        raise ValueError(
            f"--num-samples {options.num_samples}: there is one canvas; leave it out, and use "
            "--seed for others."
        )


def _load(
    options: argparse.Namespace, file: CanvasFile, chosen: Mapping[str, Any]
) -> tuple[Painter, Frame]:
    """Load the model, and say what it asks of regions.

    Args:
        options: See `complete_options`.
        file: The canvas file.
        chosen: Its settings that the command line does not say.
    """
    # Each region has its own guidance, which is checked there.
    neutral = {"guidance": 1.0, "negative_prompt": ""}
    painter = load_painter(argparse.Namespace(**{**vars(options), **neutral}))
    values = argparse.Namespace(**{**vars(options), **chosen})
    args, config = painter.loaded.model_args, painter.loaded.job_config
    settings = check_image_settings(
        argparse.Namespace(**{**vars(values), **neutral}),
        painter.process,
        args,
        condition_dropout(config.objective, args),
        f"{file.path}: ",
    )
    cell = 1 if painter.vae is None else painter.vae.factor
    frame = Frame(
        side=args.image_size * cell,
        cell=cell,
        multiple=side_multiple(args) * cell,
        class_names=None if is_prompted(args) else class_names(painter.loaded),
        guidance=values.guidance,
        negative_prompt=values.negative_prompt,
        kernel=DEFAULT_KERNEL,
    )
    return replace(painter, settings=replace(settings, guidance=values.guidance)), frame


def side_multiple(args: Any) -> int:
    """What the sides of images that a model can take are multiples of, by its arguments.

    0: it takes squares of one size only. Models of prompts have positions for any shape; of a
    mixture of diffusers the experts, and a router that reads latents, may have other patches.
    """
    if not is_prompted(args):
        return 0
    sides = [args.patch_size]
    if is_mixture_of_diffusers(args):
        sides += [expert.patch_size for expert in args.expert_args]
        if args.router == "transformer" and "latent" in args.router_inputs:
            sides.append(args.router_patch_size)
    return math.lcm(*sides)


def _check_guidance(canvas: Canvas, painter: Painter, file: CanvasFile) -> None:
    """Check guidance and negative prompt of each region against the model."""
    args = painter.loaded.model_args
    dropout = condition_dropout(painter.loaded.job_config.objective, args)
    for region in canvas.regions:
        own = {"guidance": region.guidance, "negative_prompt": region.negative_prompt}
        values = argparse.Namespace(**{**asdict(painter.settings), **own})
        prefix = f"{file.path}: {region.name}."
        check_image_settings(values, painter.process, args, dropout, prefix)


def _encode(canvas: Canvas, painter: Painter, options: argparse.Namespace) -> ConditionOf:
    """Make what the model takes of the subjects of the regions."""
    regions, device, loaded = canvas.regions, painter.device, painter.loaded
    args = loaded.model_args
    if not is_prompted(args):
        labels = torch.tensor([region.subject for region in regions])
        return lambda rows: class_condition(labels[list(rows)], args.num_classes, device)
    negative = [region.negative_prompt or str(region.subject) for region in regions]
    texts = list(dict.fromkeys([*(str(region.subject) for region in regions), *negative]))
    numbers = {text: number for number, text in enumerate(texts)}
    folders = choose_text_encoders(
        loaded.job_config, args.prompts, options.text_encoders, "--text-encoders"
    )
    encoder = PromptEncoder(loaded.job_config, args.prompts, device, folders, warn=say)
    prompts = encoder.encode(texts)
    is_negative = torch.tensor([bool(region.negative_prompt) for region in regions])

    def condition_of(rows: Sequence[int]) -> Condition:
        subjects = [numbers[str(regions[row].subject)] for row in rows]
        given = prompts.condition(subjects, device).given
        without = prompts.condition([numbers[negative[row]] for row in rows], device).given
        kept = without["kept"] & is_negative[list(rows), None].to(device)
        return Condition(given, {**without, "kept": kept})

    return condition_of


def _draw_and_write(
    folder: Path,
    painter: Painter,
    canvas: Canvas,
    cell: int,
    condition_of: ConditionOf,
    options: argparse.Namespace,
) -> None:
    start, args = time.perf_counter(), painter.loaded.model_args
    trace = RegionTrace() if is_mixture_of_diffusers(args) else None
    image = draw_canvas(
        predict_with(painter.loaded.model, trace),
        args,
        painter.process,
        canvas,
        condition_of,
        painter.settings,
        painter.device,
        painter.vae,
        options.batch_size,
        ProgressBar(f"{len(canvas.regions)} regions", sys.stderr),
    )
    if not bool(image.isfinite().all()):
        raise ValueError("the model's images are not finite (did the run diverge?).")
    picture = to_pixels(image)[0]
    facts = {
        "checkpoint": str(painter.loaded.path),
        "step": painter.loaded.step,
        "averaged": painter.loaded.is_averaged,
        "settings": asdict(painter.settings),
        "canvas": str(options.canvas),
        **describe(canvas, cell, image[0].clamp(-1, 1)),
    }
    with reports_writing(folder):
        Image.fromarray(picture).save(folder / PICTURE_NAME)
        if trace is not None:
            rows, weights = trace.table()
            labels = [f"{canvas.regions[row].name} {canvas.regions[row].subject}" for row in rows]
            write_trace(folder, args.names, trace.times, weights, labels, 1)
            say(summarize(args.names, weights))
        Image.fromarray(draw_places(picture, canvas)).save(folder / PLACES_NAME)
        text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
        (folder / TABLE_NAME).write_text(text, encoding="utf-8", errors="replace")
    seconds = time.perf_counter() - start
    say(f"a canvas of {len(canvas.regions)} regions in {seconds:.1f} s: {folder}")
