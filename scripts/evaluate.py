"""Evaluates a checkpoint: `python scripts/evaluate.py --checkpoint DIR`.

On every split of the data. Of a model over tokens: bits per token of each modality, retrieval by
likelihood between all pairs of modalities among 20 and 100, and the groups of images. Of a
denoising model: the loss at each fixed noise level; with `--prompts`, for one that draws to
prompts, whether it draws what they ask for. Of a classifier: accuracy, at any capacities.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# First: it points TorchTitan at the CPU if need be.
import torchtitan_mixtures  # noqa: F401  # isort: skip

import torch

from torchtitan_mixtures import checkpoint_config
from torchtitan_mixtures.checkpoint_loading import find_checkpoint, load_checkpoint, load_model
from torchtitan_mixtures.evaluation.classification import (
    evaluate_classification,
    format_classification,
    refuse_nested_options,
)
from torchtitan_mixtures.evaluation.denoising import evaluate_denoising, format_denoising
from torchtitan_mixtures.evaluation.prompts import evaluate_prompts, format_prompts
from torchtitan_mixtures.evaluation.report import evaluate, format_report
from torchtitan_mixtures.sampling.command_line import ProgressBar
from torchtitan_mixtures.user_errors import one_message


def _capacities(text: str) -> list[float]:
    """Read numbers with commas between."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be numbers with commas between") from None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run's job.dump_folder, or one of its checkpoints")
    add("--splits", nargs="+", default=[], help="default: all of the data")
    add(
        "--items",
        type=int,
        default=100,
        help="of a model over tokens: things to retrieve among; with --prompts: prompts to draw to "
        "(default: %(default)s)",
    )
    add(
        "--max-batches",
        type=int,
        default=32,
        help="batches of each split for bits per token or losses, -1 for all "
        "(default: %(default)s)",
    )
    add(
        "--capacities",
        type=_capacities,
        default=[],
        help="of a nested classifier: effective capacities, as 0.2,0.4 (default: the run's)",
    )
    add(
        "--routing",
        choices=("expert_preferred", "argmax", "random"),
        default="",
        help="of a nested classifier: another routing than it was trained with",
    )
    add(
        "--prompts",
        action="store_true",
        help="of a model of prompted images: draw to prompts and see whether they are answered",
    )
    add("--num-steps", type=int, help="with --prompts: of an image (default: the run's [sampling])")
    add("--guidance", type=float, help="with --prompts: by them (default: the run's [sampling])")
    add(
        "--text-encoders",
        nargs="+",
        default=[],
        help="with --prompts: folders of the frozen encoders, where the run does not say them",
    )
    add("--seed", type=int, default=0, help="of the things that are drawn (default: %(default)s)")
    add("--device", help="default: the accelerator if there is one, else the CPU")
    add("--json", type=Path, help="file to write all numbers to")
    options = parser.parse_args(arguments)
    if options.items < 2:
        parser.error(f"--items {options.items}: must be at least 2")
    if options.max_batches < 1 and options.max_batches != -1:
        parser.error(f"--max-batches {options.max_batches}: must be at least 1, or -1 for all")
    for name in ("num_steps", "guidance", "text_encoders"):
        if not options.prompts and getattr(options, name) not in (None, []):
            parser.error(f"--{name.replace('_', '-')}: has no meaning without --prompts")
    if options.json is not None:
        if not options.json.parent.is_dir():
            parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
        if options.json.exists():
            parser.error(f"--json {options.json}: exists; name another file")
    try:
        default = torch.accelerator.current_accelerator() or torch.device("cpu")
        options.device = torch.device(options.device or default)
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    return options


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report, whole or not at all."""
    if path is not None:
        unfinished = path.with_name(path.name + ".partial")
        unfinished.write_text(json.dumps(report, indent=1) + "\n")
        unfinished.replace(path)


def run(path: Path, options: argparse.Namespace, progress: Callable[[str], None]) -> str:
    """Evaluate a checkpoint in the way of its family; return the tables."""
    keep = partial(write_json, options.json)
    if options.prompts:
        report = evaluate_prompts(
            load_model(path, options.device),
            options.splits,
            num_items=options.items,
            seed=options.seed,
            num_steps=options.num_steps,
            guidance=options.guidance,
            text_encoders=options.text_encoders,
            progress=progress,
            keep=keep,
        )
        return format_prompts(report)
    nested = {"capacities": options.capacities, "routing": options.routing}
    if "modality_names" in checkpoint_config.read(path)["model_args"]:
        refuse_nested_options(**nested)
        report = evaluate(
            load_checkpoint(path, options.device),
            options.splits,
            num_items=options.items,
            max_batches=options.max_batches,
            seed=options.seed,
            progress=progress,
            make_steps=lambda: ProgressBar("          ", sys.stderr),
            keep=keep,
        )
        return format_report(report)
    loaded = load_model(path, options.device)
    shared: dict[str, Any] = {
        "max_batches": options.max_batches,
        "progress": progress,
        "keep": keep,
    }
    if getattr(loaded.model_args, "is_classifier", False):
        return format_classification(
            evaluate_classification(loaded, options.splits, **nested, **shared)
        )
    refuse_nested_options(**nested)
    return format_denoising(evaluate_denoising(loaded, options.splits, **shared))


def main(arguments: list[str] | None = None) -> None:
    """Evaluate as the command line says; the table goes to stdout, progress to stderr."""
    options = parse(arguments)
    start = time.perf_counter()

    def progress(message: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {message}", file=sys.stderr, flush=True)

    with one_message():
        print(run(find_checkpoint(options.checkpoint), options, progress))


if __name__ == "__main__":
    main()
