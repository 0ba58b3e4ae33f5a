"""Turns checkpoints into others.

    python scripts/convert.py resize --checkpoint outputs/mom/debugmodel --image-size 64 --out DIR

makes one for images of another size; training goes on from it with
`--checkpoint.initial_load_path DIR --multimodal.image_size 64`.

    python scripts/convert.py import-vit --from FOLDER --config FILE.toml --out DIR

makes one that a nested model begins with, out of a dense ViT of transformers or timm (safetensors).
Keys of the TOML can follow, as for training: `--model.flavor B/16-cls`.

    python scripts/convert.py export-vit --checkpoint outputs/mone/B --format timm --out DIR

writes what a nested model does with all tokens at one expert as a dense ViT.

    python scripts/convert.py import-sd3 --from FOLDER --config FILE.toml --out DIR
    python scripts/convert.py export-sd3 --checkpoint outputs/mmdit/d24 --out DIR

do the same for an MMDiT and the transformer of Stable Diffusion 3 of diffusers (safetensors).
"""

import argparse
import logging
import shlex
from pathlib import Path

# First: it points TorchTitan at the CPU if need be.
import torchtitan_mixtures  # noqa: F401  # isort: skip

from torchtitan_mixtures import convert_sd3, convert_vit
from torchtitan_mixtures.resize_checkpoint import resize_checkpoint
from torchtitan_mixtures.train import quiet_the_host
from torchtitan_mixtures.user_errors import one_message


def main(arguments: list[str] | None = None) -> None:
    """Convert as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_resize(commands)
    add_import(commands)
    add_export(commands)
    add_import_sd3(commands)
    add_export_sd3(commands)
    options, overrides = parser.parse_known_args(arguments)
    if overrides and options.run not in (import_vit, import_sd3):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    options.overrides = overrides
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_the_host()
    with one_message():
        options.run(options)


def add_resize(commands: argparse._SubParsersAction) -> None:
    """Describe `resize`."""
    parser = commands.add_parser("resize", help="the same model for images of another size")
    add_checkpoint(parser)
    add = parser.add_argument
    add("--image-size", type=int, required=True, help="new height and width, as in the TOML")
    parser.set_defaults(run=resize)


def add_import(commands: argparse._SubParsersAction) -> None:
    """Describe `import-vit`."""
    parser = commands.add_parser(
        "import-vit",
        help="a nested model out of a dense ViT; keys of the TOML can follow",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--from", type=Path, required=True, dest="source", help="its folder, or safetensors file")
    add("--config", required=True, help="TOML of the training that is to begin with it")
    add("--out", type=Path, required=True, help="a new or empty folder")
    add("--image-size", type=int, help="interpolate positions for images of this size")
    add("--new-head", action="store_true", help="leave its head out, initialise another")
    parser.set_defaults(run=import_vit)


def add_export(commands: argparse._SubParsersAction) -> None:
    """Describe `export-vit`."""
    parser = commands.add_parser("export-vit", help="an expert of a nested model as a dense ViT")
    add_checkpoint(parser)
    add = parser.add_argument
    add("--format", choices=("huggingface", "timm"), required=True, help="whose names to give")
    add("--expert", type=int, help="from 0, the smallest (default: the largest)")
    parser.set_defaults(run=export_vit)


def add_import_sd3(commands: argparse._SubParsersAction) -> None:
    """Describe `import-sd3`."""
    parser = commands.add_parser(
        "import-sd3",
        help="an MMDiT out of Stable Diffusion 3; keys of the TOML can follow",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--from", type=Path, required=True, dest="source", help="folder of transformer or pipeline")
    add("--config", required=True, help="TOML of the training that is to begin with it")
    add("--out", type=Path, required=True, help="a new or empty folder")
    add("--other-positions", action="store_true", help="take weights that were trained with other "
        "places of patches than the model has, with a warning")  # fmt: skip
    parser.set_defaults(run=import_sd3)


def add_export_sd3(commands: argparse._SubParsersAction) -> None:
    """Describe `export-sd3`."""
    parser = commands.add_parser("export-sd3", help="an MMDiT as Stable Diffusion 3 transformer")
    add_checkpoint(parser)
    parser.set_defaults(run=export_sd3)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Describe what all have in common that start from a checkpoint of ours."""
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a run's dump folder, or one checkpoint")
    add("--out", type=Path, required=True, help="a new or empty folder")
    add("--no-ema", action="store_true", help="take the parameters, not their average")


def resize(options: argparse.Namespace) -> None:
    """Make a checkpoint for images of another size."""
    out = resize_checkpoint(
        options.checkpoint, options.image_size, options.out, averaged=not options.no_ema
    )
    print(
        f"{out}: go on with --checkpoint.initial_load_path {out} --multimodal.image_size "
        f"{options.image_size}"
    )


def import_vit(options: argparse.Namespace) -> None:
    """Make a checkpoint out of a dense ViT."""
    convert_vit.import_vit(
        options.source,
        ["--config", options.config, *options.overrides],
        options.out,
        image_size=options.image_size,
        new_head=options.new_head,
    )
    keys = [*options.overrides, "--checkpoint.initial_load_path", str(options.out)]
    if options.image_size is not None:
        keys += ["--multimodal.image_size", str(options.image_size)]
    print(f"{options.out}: train with\n  bash scripts/train.sh {options.config} {shlex.join(keys)}")


def export_vit(options: argparse.Namespace) -> None:
    """Write an expert as a dense ViT."""
    expert = convert_vit.export_vit(
        options.checkpoint,
        options.format,
        options.out,
        expert=options.expert,
        averaged=not options.no_ema,
    )
    print(f"{options.out}: expert {expert} as a dense ViT; it takes pixels in [-1, 1]")


def import_sd3(options: argparse.Namespace) -> None:
    """Make a checkpoint out of Stable Diffusion 3."""
    arguments = ["--config", options.config, *options.overrides]
    convert_sd3.import_sd3(
        options.source, arguments, options.out, other_positions=options.other_positions
    )
    keys = [*options.overrides, "--checkpoint.initial_load_path", str(options.out)]
    print(f"{options.out}: train with\n  bash scripts/train.sh {options.config} {shlex.join(keys)}")


def export_sd3(options: argparse.Namespace) -> None:
    """Write an MMDiT as Stable Diffusion 3."""
    convert_sd3.export_sd3(options.checkpoint, options.out, averaged=not options.no_ema)
    print(f"{options.out}: SD3Transformer2DModel.from_pretrained of diffusers loads it")


if __name__ == "__main__":
    main()
