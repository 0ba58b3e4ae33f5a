"""The subcommand `tokenize` of `prepare_data.py`."""

import argparse
from pathlib import Path


def add_tokenize(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The subcommand `tokenize`."""
    parser = subcommands.add_parser(
        "tokenize",
        help="turn a source of a configuration into shards, for sources of kind shards",
        description="Tokenise a source with the tokenizers of the configuration, once, so that "
        "training reads codes. A run that was ended goes on where it was if it is repeated. Which "
        "of a caption and its image comes first, and whether the caption is dropped, is decided in "
        "training, except in the emoji corpus, whose documents are composed.",
        epilog="Any key of the configuration may follow, as in training: "
        "--multimodal.max_bad_fraction 0.02",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="TOML of a training run on the source")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--source",
        default="",
        help="name of one of multimodal.sources or multimodal.validation_sources (default: the "
        "only one)",
    )
    parser.add_argument(
        "--num-workers",
        type=int,
        default=0,
        help="processes that tokenise (default: %(default)s, this one)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=1 << 26,
        help="tokens that a file should hold, about (default: %(default)s)",
    )
    parser.add_argument(
        "--parts",
        type=int,
        default=0,
        help="files to write (default: as many as --shard-tokens makes of the source)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=1,
        help="passes over the source; several are shuffled and draw captions and scenes anew "
        "(default: %(default)s)",
    )
    parser.set_defaults(run=tokenize, takes_overrides=True)


def tokenize(arguments: argparse.Namespace) -> None:
    """Tokenise the source."""
    from torchtitan_mixtures.data.tokenize_job import job_recipe
    from torchtitan_mixtures.data.tokenize_source import Tokenizing
    from torchtitan_mixtures.data.tokenize_source import tokenize as tokenize_source
    from torchtitan_mixtures.train import quiet_the_host

    quiet_the_host()
    job = ["--config", arguments.config, *arguments.overrides]
    recipe = job_recipe(job, arguments.source, arguments.epochs)
    names = ("out", "num_workers", "shard_tokens", "parts")
    tokenizing = Tokenizing(**{name: getattr(arguments, name) for name in names})
    manifest = tokenize_source(recipe, tokenizing, lambda line: print(line, flush=True))
    counts = ", ".join(f"{m.codes} of {m.name}" for m in manifest.modalities if m.segments)
    print(
        f"{manifest.documents} documents in {len(manifest.files)} files in {arguments.out}, codes: "
        f"{counts}; {manifest.bad_samples} of {manifest.samples} samples were bad and left out. "
        f'Train with kind = "shards" and path = "{arguments.out}" in [[multimodal.sources]].'
    )
