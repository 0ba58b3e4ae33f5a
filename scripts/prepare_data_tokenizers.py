"""The subcommands of `prepare_data.py` that train tokenizers of images and of sounds."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchtitan_mixtures.data.train_tokenizer import Training


def add_train_image_tokenizer(
    subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """The subcommand `train-image-tokenizer`."""
    parser = subcommands.add_parser(
        "train-image-tokenizer",
        help="train a codebook of image patches, for multimodal.image_tokenizer",
        description="Cluster patches of images by k-means, and say how well they serve images "
        "that were held out.",
        allow_abbrev=False,
    )
    _add_training(parser, "images", 1024)
    parser.add_argument("--max-images", type=int, help="images used (default: all)")
    parser.add_argument(
        "--size", type=int, default=64, help="of the pictures, in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--patch-size", type=int, default=4, help="in pixels (default: %(default)s)"
    )
    parser.set_defaults(run=train_image)


def train_image(arguments: argparse.Namespace) -> None:
    """Train the codebook."""
    from torchtitan_mixtures.data.train_tokenizer import train_image_tokenizer

    training = _training(arguments, arguments.max_images)
    train_image_tokenizer(training, arguments.size, arguments.patch_size, _say)
    codes = (arguments.size // arguments.patch_size) ** 2
    _say(
        f"{arguments.out}: {codes} codes an image; train with --multimodal.image_tokenizer "
        f"{arguments.out}"
    )


def add_train_speech_tokenizer(
    subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """The subcommand `train-speech-tokenizer`."""
    parser = subcommands.add_parser(
        "train-speech-tokenizer",
        help="train a codebook of log-mel spectra, for multimodal.speech_tokenizer",
        description="Cluster stretches of sounds by k-means, and say how well they serve sounds "
        "that were held out.",
        allow_abbrev=False,
    )
    _add_training(parser, "sounds", 512)
    parser.add_argument("--max-sounds", type=int, help="sounds used (default: all)")
    parser.add_argument(
        "--bands", type=int, default=40, help="of the mel scale (default: %(default)s)"
    )
    parser.add_argument(
        "--sample-rate",
        type=int,
        default=16_000,
        help="that sounds are brought to, a multiple of 100 (default: %(default)s)",
    )
    parser.add_argument(
        "--frames-per-unit",
        type=int,
        default=2,
        help="spectra of 20 ms that a unit stands for (default: %(default)s)",
    )
    parser.set_defaults(run=train_speech)


def train_speech(arguments: argparse.Namespace) -> None:
    """Train the codebook."""
    from torchtitan_mixtures.data.speech import FRAMES_PER_SECOND
    from torchtitan_mixtures.data.train_tokenizer import train_speech_tokenizer

    training = _training(arguments, arguments.max_sounds)
    names = ("bands", "sample_rate", "frames_per_unit")
    values = {name: getattr(arguments, name) for name in names}
    train_speech_tokenizer(training, **values, log=_say)
    rate = FRAMES_PER_SECOND / arguments.frames_per_unit
    _say(
        f"{arguments.out}: {rate:g} units a second; train with --multimodal.speech_tokenizer "
        f"{arguments.out}"
    )


def _add_training(parser: argparse.ArgumentParser, what: str, codes: int) -> None:
    parser.add_argument(
        "--path", required=True, help=f"folder of {what}, searched with all in it, or a pattern"
    )
    parser.add_argument("--out", type=Path, required=True, help="codebook file to write")
    parser.add_argument(
        "--codes", type=int, default=codes, help="centres of k-means (default: %(default)s)"
    )
    parser.add_argument(
        "--holdout",
        type=float,
        default=0.05,
        help=f"share of the {what} that is not trained on (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)"
    )
    parser.add_argument(
        "--iterations", type=int, default=25, help="rounds of k-means (default: %(default)s)"
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.01,
        help=f"share of broken {what} above which to stop (default: %(default)s)",
    )


def _training(arguments: argparse.Namespace, max_files: int | None) -> "Training":
    from torchtitan_mixtures.data.train_tokenizer import Training

    names = ("path", "out", "codes", "holdout", "seed", "iterations", "max_bad_fraction")
    values = {name: getattr(arguments, name) for name in names}
    return Training(max_files=max_files, **values)


def _say(line: str) -> None:
    print(line, flush=True)
