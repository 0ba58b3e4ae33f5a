"""Prepares data sets: `python scripts/prepare_data.py emoji` rebuilds the embedded corpus."""

import argparse
import sys
import tempfile
from pathlib import Path


def add_emoji(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The subcommand `emoji`."""
    parser = subcommands.add_parser(
        "emoji", help="rebuild the embedded emoji corpus from npm packages"
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write (default: the one in the package)"
    )
    parser.add_argument(
        "--work", type=Path, help="folder that keeps the downloads (default: a temporary one)"
    )
    parser.set_defaults(run=prepare_emoji)


def prepare_emoji(arguments: argparse.Namespace) -> None:
    """Build the emoji corpus and load it once as a check."""
    from torchtitan_mixtures.data.corpora.build_emoji import build
    from torchtitan_mixtures.data.emoji import EMBEDDED_FOLDER, EmojiCorpus

    out = arguments.out or EMBEDDED_FOLDER
    with tempfile.TemporaryDirectory() as scratch:
        build(out, arguments.work or Path(scratch))
    print(f"{len(EmojiCorpus.load(out).concepts)} concepts in {out}")


def main() -> None:
    """Read the command line and run one subcommand."""
    parser = argparse.ArgumentParser(description=__doc__)
    subcommands = parser.add_subparsers(required=True)
    add_emoji(subcommands)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except ValueError as error:
        sys.exit(f"prepare_data.py: {error}")


if __name__ == "__main__":
    main()
