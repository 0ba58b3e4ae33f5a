"""Folders of experts of a mixture of diffusers: `python scripts/experts.py export|assemble|...`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

# First: it points TorchTitan at the CPU if need be, and registers the families.
import torchtitan_mixtures  # noqa: F401  # isort: skip

from torchtitan_mixtures import expert_folder_edits as edits
from torchtitan_mixtures.expert_folder import Mixture, read_mixture
from torchtitan_mixtures.user_errors import one_message

NOT_USED = (
    "{} is not used until a job has taught the router: diffusers.start = {!r} with "
    "diffusers.training = 'router' or 'decentralised'."
)


def export(options: argparse.Namespace) -> None:
    """Make a folder of a run."""
    _show(edits.export(options.checkpoint, options.out, not options.no_ema))


def assemble(options: argparse.Namespace) -> None:
    """Make a folder of runs of experts and a run of a router."""
    averaged = not options.no_ema
    pairs = [edits.parse_expert(text) for text in options.expert]
    sources = [edits.read_source(name, folder, averaged) for name, folder in pairs]
    _show(edits.assemble(options.out, sources, options.router, averaged))
    if options.router is None:
        print(
            "The router is new and gives all experts alike; teach one: diffusers.start = "
            f"{str(options.out)!r} with diffusers.training = 'router', or all at once."
        )


def add(options: argparse.Namespace) -> None:
    """Add an expert to a folder."""
    name, folder = edits.parse_expert(options.expert)
    _show(edits.add(options.mixture, edits.read_source(name, folder, not options.no_ema)))
    print(NOT_USED.format(name, str(options.mixture)))


def replace(options: argparse.Namespace) -> None:
    """Exchange an expert of a folder."""
    name, folder = edits.parse_expert(options.expert)
    _show(edits.replace(options.mixture, edits.read_source(name, folder, not options.no_ema)))


def remove(options: argparse.Namespace) -> None:
    """Remove an expert of a folder."""
    before = edits.read_mixture_without(options.mixture, options.name).model_args.top_k
    after = edits.remove(options.mixture, options.name)
    _show(after)
    if after.model_args.top_k < before:
        print(f"top_k was {before} and is {after.model_args.top_k} now: there are no more experts.")


def show(options: argparse.Namespace) -> None:
    """Print what a folder holds."""
    _show(read_mixture(options.mixture))


def _show(mixture: Mixture) -> None:
    print(f"{mixture.path}:\n{edits.describe(mixture)}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function: object, text: str) -> argparse.ArgumentParser:
        name = getattr(function, "__name__", "")
        found = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        found.set_defaults(function=function)
        return found

    one = {"required": True, "metavar": "NAME=FOLDER"}
    no_ema = {"action": "store_true", "help": "parameters, not their average"}
    made = command(export, "make a folder of experts of a run of a mixture")
    made.add_argument("--checkpoint", required=True, help="a run, or one of its checkpoints")
    joined = command(assemble, "make a folder of experts that were trained in jobs of their own")
    joined.add_argument(
        "--expert", action="append", help="a run, or an expert's folder; for each", **one
    )
    joined.add_argument("--router", help="run with diffusers.training = 'router', or a folder")
    for each in (made, joined):
        each.add_argument("--out", type=Path, required=True, help="new folder")
    added = command(add, "add an expert")
    replaced = command(replace, "put another model in the place of an expert")
    for each in (added, replaced):
        each.add_argument("--expert", help="a run, or an expert's folder", **one)
    for each in (made, joined, added, replaced):
        each.add_argument("--no-ema", **no_ema)
    removed = command(remove, "remove an expert")
    removed.add_argument("--name", required=True)
    for each in (added, replaced, removed, command(show, "say what a folder holds")):
        each.add_argument("--mixture", type=Path, required=True, help="folder of experts")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    options = parse(arguments)
    with one_message():
        options.function(options)


if __name__ == "__main__":
    main()
