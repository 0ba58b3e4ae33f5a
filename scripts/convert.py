"""Turns checkpoints into others.

    python scripts/convert.py resize --checkpoint outputs/mom/debugmodel --image-size 64 --out DIR

makes one for images of another size; training goes on from it with
`--checkpoint.initial_load_path DIR --multimodal.image_size 64`.
"""

import argparse
from pathlib import Path

# First: it points TorchTitan at the CPU if need be.
import torchtitan_mixtures  # noqa: F401  # isort: skip

from torchtitan_mixtures.resize_checkpoint import resize_checkpoint
from torchtitan_mixtures.user_errors import one_message


def main(arguments: list[str] | None = None) -> None:
    """Convert as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    resize = commands.add_parser("resize", help="the same model for images of another size")
    add = resize.add_argument
    add("--checkpoint", type=Path, required=True, help="a run's dump folder, or one checkpoint")
    add("--image-size", type=int, required=True, help="new height and width, as in the TOML")
    add("--out", type=Path, required=True, help="a new or empty folder")
    add("--no-ema", action="store_true", help="take the parameters, not their average")
    options = parser.parse_args(arguments)
    with one_message():
        out = resize_checkpoint(
            options.checkpoint, options.image_size, options.out, averaged=not options.no_ema
        )
        print(
            f"{out}: go on with --checkpoint.initial_load_path {out} --multimodal.image_size "
            f"{options.image_size}"
        )


if __name__ == "__main__":
    main()
