"""Prepares and shows data sets.

`python scripts/prepare_data.py emoji` rebuilds the embedded corpus, `speech` its spoken names
alone; `show CONFIG.toml --out page.html` shows the sequences that a configuration trains on;
`encode-latents --path IMAGES --vae DIR --out LATENTS` encodes images for training, those of a
folder of classes or, with `--caption-column`, of a data set with captions;
`encode-text --path DATA --encoders DIR ... --out EMBEDDINGS` embeds the captions of a data set;
`cluster --config CONFIG.toml --clusters K --out domains.json` divides images into domains;
`train-image-tokenizer` and `train-speech-tokenizer` make codebooks of your images and sounds;
`tokenize --config CONFIG.toml --out SHARDS` turns a source into shards that training reads.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from prepare_data_tokenize import add_tokenize  # pyrefly: ignore [missing-import]  # beside this
from prepare_data_tokenizers import (  # pyrefly: ignore [missing-import]
    add_train_image_tokenizer,
    add_train_speech_tokenizer,
)


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


def add_speech(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The subcommand `speech`."""
    parser = subcommands.add_parser(
        "speech", help="speak the names of an emoji corpus again, with espeak-ng"
    )
    parser.add_argument(
        "--corpus", type=Path, help="folder of the corpus (default: the one in the package)"
    )
    parser.set_defaults(run=prepare_speech)


def prepare_speech(arguments: argparse.Namespace) -> None:
    """Build the speech of a corpus and check the folder."""
    from torchtitan_mixtures.data.corpora.build_speech import build_speech
    from torchtitan_mixtures.data.emoji import EMBEDDED_FOLDER, EmojiCorpus, check_files

    folder = arguments.corpus or EMBEDDED_FOLDER
    corpus = EmojiCorpus.load(folder)
    build_speech(folder, corpus)
    check_files(folder)
    print(f"{len(corpus.concepts)} spoken names in {folder}")


def add_show(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The subcommand `show`."""
    parser = subcommands.add_parser(
        "show",
        help="write an HTML page of packed sequences: pictures, text, masks, loss, statistics",
        epilog="Any key of the configuration may follow, as in training: --training.seq_len 512",
        allow_abbrev=False,
    )
    parser.add_argument("config", help="TOML of a training run (see train_configs/)")
    parser.add_argument("--out", type=Path, required=True, help="page to write")
    parser.add_argument(
        "--sequences", type=int, default=8, help="sequences to show (default: %(default)s)"
    )
    parser.add_argument("--split", help="split to show (default: the one that is trained on)")
    parser.set_defaults(run=show, takes_overrides=True)


def show(arguments: argparse.Namespace) -> None:
    """Write the page."""
    from torchtitan_mixtures.checks import check_data
    from torchtitan_mixtures.data.show import write_page
    from torchtitan_mixtures.train import parse_job, quiet_the_host

    quiet_the_host()
    job_config = parse_job(["--config", arguments.config, *arguments.overrides], check_data)
    write_page(job_config, arguments.out, arguments.sequences, arguments.split)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB")


def add_encode_latents(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The subcommand `encode-latents`."""
    parser = subcommands.add_parser(
        "encode-latents",
        help="encode images into latents of a VAE, to train on with source = folder",
        description="Encode all splits of a folder with one folder of images per class (or train/ "
        "and val/ of such), or with --caption-column splits of a data set with captions. A run "
        "that was ended goes on where it was if it is repeated.",
        allow_abbrev=False,
    )
    parser.add_argument("--path", required=True, help="folder of images, or the data set")
    parser.add_argument("--vae", required=True, help="local folder of a diffusers AutoencoderKL")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--size", type=int, default=256, help="of the pictures, in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, help="pictures at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--num-workers", type=int, default=0, help="processes that decode (default: %(default)s)"
    )
    parser.add_argument("--flip", action="store_true", help="encode mirrored pictures too")
    parser.add_argument("--half", action="store_true", help="store float16 instead of float32")
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.01,
        help="share of broken images above which to stop (default: %(default)s)",
    )
    captioned = parser.add_argument_group("of a data set with captions")
    captioned.add_argument(
        "--caption-column", default="", help="column of strings or lists of strings"
    )
    captioned.add_argument(
        "--image-column", default="image", help="column of images (default: %(default)s)"
    )
    captioned.add_argument("--name", default="", help="its configuration, as in multimodal.name")
    captioned.add_argument(
        "--data-files", nargs="+", default=[], help="its files, if --path is a format"
    )
    captioned.add_argument(
        "--splits", nargs="+", default=["train"], help="splits to encode (default: train)"
    )
    captioned.add_argument(
        "--aspect-ratios",
        nargs="+",
        default=[],
        help="shapes to crop to, as in multimodal.aspect_ratios (default: square)",
    )
    captioned.add_argument(
        "--patch-size",
        type=int,
        default=2,
        help="of the model; sides of latents are multiples of it (default: %(default)s)",
    )
    parser.set_defaults(run=encode_latents)


def encode_latents(arguments: argparse.Namespace) -> None:
    """Encode the images."""
    from torchtitan_mixtures.data.encode_latents import Encoding, encode

    names = ("path", "vae", "out", "size", "batch_size", "num_workers", "flip", "half")
    names += ("max_bad_fraction", "caption_column", "image_column", "name", "patch_size")
    values: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    for name in ("data_files", "splits", "aspect_ratios"):
        values[name] = tuple(dict.fromkeys(getattr(arguments, name)))
    encoding = Encoding(**values)
    index = encode(encoding, lambda line: print(line, flush=True))
    images = sum(shard.images for shards in index.splits.values() for shard in shards)
    what = "with captions" if index.is_captioned else f"of {len(index.class_names)} classes"
    shapes = ",".join(encoding.aspect_ratios)
    print(
        f"{images} images {what} in {arguments.out}; train with "
        f"--multimodal.source folder --multimodal.path {arguments.out} "
        f"--multimodal.image_size {index.size}"
        + (f" --multimodal.aspect_ratios {shapes}" if shapes else "")
    )


def add_encode_text(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The subcommand `encode-text`."""
    parser = subcommands.add_parser(
        "encode-text",
        help="embed the captions of a data set with frozen encoders, for text_embeddings",
        description="Embed all captions of splits of a data set with encoders of transformers, "
        "joined as in Stable Diffusion 3. A run that was ended goes on where it was if it is "
        "repeated.",
        allow_abbrev=False,
    )
    parser.add_argument("--path", required=True, help="the data set, as in multimodal.path")
    parser.add_argument("--name", default="", help="its configuration, as in multimodal.name")
    parser.add_argument(
        "--data-files", nargs="+", default=[], help="its files, if --path is a format"
    )
    parser.add_argument(
        "--splits", nargs="+", default=["train"], help="splits to encode (default: train)"
    )
    parser.add_argument(
        "--caption-column",
        default="caption",
        help="column of strings or lists of strings (default: %(default)s)",
    )
    parser.add_argument(
        "--encoders",
        nargs="+",
        required=True,
        help="local folders of encoders of transformers, in the order they are joined in",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--half",
        nargs="?",
        choices=("float16", "bfloat16"),
        const="float16",
        default="float32",
        help="store float16 (or bfloat16) instead of float32",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="what the encoders compute in, as in multimodal.text_encoder_dtype (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, help="captions at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--long-prompts",
        choices=("truncate", "refuse"),
        default="truncate",
        help="what happens to captions longer than an encoder's window (default: %(default)s)",
    )
    parser.set_defaults(run=encode_text)


def encode_text(arguments: argparse.Namespace) -> None:
    """Embed the captions."""
    from torchtitan_mixtures.data.encode_text import TextEncoding, encode

    encoding = TextEncoding(
        path=arguments.path,
        encoders=tuple(arguments.encoders),
        out=arguments.out,
        name=arguments.name,
        data_files=tuple(arguments.data_files),
        splits=tuple(dict.fromkeys(arguments.splits)),
        caption_column=arguments.caption_column,
        dtype=arguments.half,
        compute_dtype=arguments.dtype,
        long_prompts=arguments.long_prompts,
        batch_size=arguments.batch_size,
    )
    index = encode(encoding, lambda line: print(line, flush=True))
    captions = sum(split.captions for split in index.splits.values())
    print(
        f"{captions} captions as {index.spec.length} x {index.spec.dim} in {arguments.out}; train "
        f"with --multimodal.text_embeddings {arguments.out}"
    )


def add_cluster(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The subcommand `cluster`."""
    parser = subcommands.add_parser(
        "cluster",
        help="divide the images of a configuration into domains by k-means, for multimodal.domains",
        description="Cluster the images of all splits that a configuration can read: as they are, "
        "averaged to 8 x 8 (their 32 main directions), or by features of your own. Clusters are "
        "those of the training split; images of other splits belong to the nearest.",
        epilog="Any key of the configuration may follow, as in training: --multimodal.path DIR",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="TOML of a training run on the images")
    parser.add_argument("--clusters", type=int, required=True, help="how many")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of domains to write")
    parser.add_argument(
        "--features",
        type=Path,
        help="safetensors with a tensor (images, dim) for each split, rows in the split's order",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the starts of k-means (default: %(default)s)"
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=8,
        help="starts, of which the best is taken (default: %(default)s)",
    )
    parser.set_defaults(run=cluster, takes_overrides=True)


def cluster(arguments: argparse.Namespace) -> None:
    """Cluster the images."""
    from torchtitan_mixtures.data.cluster_images import Clustering, cluster_images
    from torchtitan_mixtures.train import parse_job, quiet_the_host

    quiet_the_host()
    # Nothing is checked but what is read: the domains that a configuration asks for may be what is
    # to be made here.
    job_config = parse_job(["--config", arguments.config, *arguments.overrides], lambda job: None)
    names = ("clusters", "out", "features", "seed", "restarts")
    clustering = Clustering(**{name: getattr(arguments, name) for name in names})
    cluster_images(job_config, clustering, lambda line: print(line, flush=True))
    print(
        f"{arguments.out}: domains cluster0 to cluster{arguments.clusters - 1}, which you may "
        f"rename in it; train with --multimodal.domains {arguments.out}"
    )


def main() -> None:
    """Read the command line and run one subcommand."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(takes_overrides=False)
    subcommands = parser.add_subparsers(required=True)
    add_emoji(subcommands)
    add_speech(subcommands)
    add_show(subcommands)
    add_encode_latents(subcommands)
    add_encode_text(subcommands)
    add_cluster(subcommands)
    add_train_image_tokenizer(subcommands)
    add_train_speech_tokenizer(subcommands)
    add_tokenize(subcommands)
    arguments, arguments.overrides = parser.parse_known_args()
    if arguments.overrides and not arguments.takes_overrides:
        parser.error(f"unrecognized arguments: {' '.join(arguments.overrides)}")
    # Imported late: PyTorch, which it imports, takes seconds.
    from torchtitan_mixtures.user_errors import one_message

    with one_message():
        arguments.run(arguments)


if __name__ == "__main__":
    main()
