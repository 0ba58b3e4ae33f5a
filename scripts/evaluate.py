"""Evaluates a checkpoint of a model over tokens: `python scripts/evaluate.py --checkpoint DIR`.

On every split of the data: bits per token of each modality, retrieval by likelihood between all
pairs of modalities among 20 and 100, and the groups of images.
"""

import argparse
import json
import sys
from pathlib import Path

# First: it points TorchTitan at the CPU if need be.
import torchtitan_mixtures  # noqa: F401  # isort: skip

import torch

from torchtitan_mixtures.checkpoint_loading import load_checkpoint
from torchtitan_mixtures.evaluation.report import evaluate, format_report
from torchtitan_mixtures.train import user_error


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run's job.dump_folder, or one of its checkpoints")
    add("--splits", nargs="+", default=[], help="default: all of the data")
    add("--items", type=int, default=100, help="things to retrieve among (default: %(default)s)")
    add(
        "--max-batches",
        type=int,
        default=32,
        help="batches of each split for bits per token, -1 for all (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of the things that are drawn (default: %(default)s)")
    add("--device", help="default: the accelerator if there is one, else the CPU")
    add("--json", type=Path, help="file to write all numbers to")
    options = parser.parse_args(arguments)
    if options.items < 2:
        parser.error(f"--items {options.items}: must be at least 2")
    if options.max_batches < 1 and options.max_batches != -1:
        parser.error(f"--max-batches {options.max_batches}: must be at least 1, or -1 for all")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Evaluate as the command line says; the table goes to stdout, progress to stderr."""
    options = parse(arguments)
    device = options.device or torch.accelerator.current_accelerator() or "cpu"
    try:
        report = evaluate(
            load_checkpoint(options.checkpoint, device),
            options.splits,
            num_items=options.items,
            max_batches=options.max_batches,
            seed=options.seed,
            progress=lambda message: print(message, file=sys.stderr, flush=True),
        )
    except ValueError as error:
        message = user_error(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    print(format_report(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
