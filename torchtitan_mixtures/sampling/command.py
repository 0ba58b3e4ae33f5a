"""What `scripts/sample.py` does."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from textwrap import shorten
from typing import Any

# First: it points TorchTitan at the CPU if need be, and registers the families.
import torchtitan_mixtures  # noqa: F401  # isort: skip

from torchtitan_mixtures import checkpoint_config
from torchtitan_mixtures.checkpoint_loading import (
    LoadedCheckpoint,
    find_checkpoint,
    load_checkpoint,
    rebuild,
)
from torchtitan_mixtures.data.audio import read_wav
from torchtitan_mixtures.data.codecs import Codecs
from torchtitan_mixtures.data.images import decode_image
from torchtitan_mixtures.data.sources import Segment
from torchtitan_mixtures.models import FAMILIES
from torchtitan_mixtures.sampling import canvas_command, image_command, prompt_command
from torchtitan_mixtures.sampling.command_line import (
    MAX_SAMPLES,
    ProgressBar,
    check_numbers,
    choose_device,
    choose_folder,
    reports_writing,
    say,
)
from torchtitan_mixtures.sampling.conditions import is_prompted
from torchtitan_mixtures.sampling.generate import Prompt, Sample, encode_prompts, generate
from torchtitan_mixtures.sampling.results import Result, write_sample, write_sheet, write_table
from torchtitan_mixtures.sampling.settings import SamplingSettings
from torchtitan_mixtures.user_errors import one_message

MODALITIES = ("text", "image", "speech")


@dataclass(frozen=True)
class Request:
    """A prompt, what it is called in the results, and what is to follow it."""

    label: str
    prompt: Prompt
    into: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample as the command line says.

    What is wrong with it, or with a file it names, is printed as one line, with exit code 2.
    """
    options = _parser().parse_args(arguments)
    with one_message():
        path = find_checkpoint(options.checkpoint)
        saved = checkpoint_config.read(path)
        kind = _kind_of(path, saved)
        _refuse_others(options, path, saved["family"], kind)
        _check_flavor(options, path, saved["flavor"])
        if kind == "tokens":
            run(options)
        elif options.canvas is not None:
            canvas_command.run(options)
        elif kind == "prompts":
            prompt_command.run(options, read_prompts(options, "draw"))
        else:
            image_command.run(options)


KINDS = {
    "tokens": "tokens",
    "classes": "images of classes",
    "prompts": "images of prompts",
}
"""Kinds of models, and what a model of such a kind is of."""

OPTIONS_OF = {
    **dict.fromkeys(("prompt", "prompt_file"), ("tokens", "prompts")),
    **dict.fromkeys(("image", "speech", "into", "top_k", "top_p"), ("tokens",)),
    "class_labels": ("classes",),
    **dict.fromkeys(
        ("sampler", "vae", "guided_channels", "eta", "shift", "canvas"), ("classes", "prompts")
    ),
    **dict.fromkeys(("negative_prompt", "aspect_ratio", "text_encoders", "speak"), ("prompts",)),
}
"""Which kinds of models have a use for an option; for those that are not here all have."""


def _kind_of(path: Path, saved: dict[str, Any]) -> str:
    """Tell the kind of a checkpoint's model by its `config.json`."""
    if "modality_names" in saved["model_args"]:
        return "tokens"
    if saved["family"] not in FAMILIES:  # which is said when it is loaded
        return "classes"
    _, model_args = rebuild(path, saved)
    return "prompts" if is_prompted(model_args) else "classes"


def _refuse_others(options: argparse.Namespace, path: Path, family: str, kind: str) -> None:
    """Refuse options that the family of a checkpoint has no use for."""
    defaults = _parser().parse_args(["--checkpoint", ""])
    for name, kinds in OPTIONS_OF.items():
        if kind not in kinds and getattr(options, name) != getattr(defaults, name):
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag}: {path} is a model of {KINDS[kind]} ({family}); leave it out."
            )


def _check_flavor(options: argparse.Namespace, path: Path, flavor: str) -> None:
    if options.model and options.model != flavor:
        raise ValueError(f"--model {options.model}: {path} is a checkpoint of {flavor}.")


def run(options: argparse.Namespace) -> None:
    """Load the checkpoint of a model over tokens, generate, write and print.

    Raises:
        ValueError: Names the option or file, what is wrong and what would be right.
    """
    options.guidance = 1.0 if options.guidance is None else options.guidance
    settings = SamplingSettings(
        **{field.name: getattr(options, field.name) for field in fields(SamplingSettings)}
    )
    options.num_samples = 1 if options.num_samples is None else options.num_samples
    check_numbers(options.num_samples, options.batch_size)
    texts = read_prompts(options)
    with choose_folder(options.out) as folder:
        _run_in(folder, options, texts, settings)


def _run_in(
    folder: Path, options: argparse.Namespace, texts: Sequence[str], settings: SamplingSettings
) -> None:
    """Load, generate, write and print; samples are written as their batches are done."""
    loaded = load_checkpoint(options.checkpoint, choose_device())
    codecs = loaded.codecs
    requests = build_requests(options, texts, codecs)
    for request in requests:  # before any is answered
        try:
            encode_prompts(loaded.model_args, [request.prompt], request.into, settings, codecs)
        except ValueError as error:
            raise ValueError(f"{shorten(request.label, 60)!r}: {error}") from error
    facts = {
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "settings": asdict(settings),
    }
    table: dict[tuple[int, int], dict[str, Any]] = {}

    def keep(request: int, sample: Sample) -> None:
        index = sample.number % options.num_samples
        name = f"prompt{request:03}_sample{index:03}"
        with reports_writing(folder):
            table[request, index] = write_sample(
                folder, name, requests[request].label, sample, codecs
            )

    start = time.perf_counter()
    try:
        results = _generate_all(requests, loaded, codecs, settings, options, keep)
    finally:
        if table:  # also what was done before an error, or Ctrl-C
            with reports_writing(folder):
                write_table(folder, (table[key] for key in sorted(table)), facts)
    seconds = time.perf_counter() - start
    with reports_writing(folder):
        write_sheet(folder, results, codecs)
    for result in results:
        for sample in result.samples:
            for segment in sample.segments:
                if isinstance(segment.payload, str):
                    say(f"{result.prompt!r} -> {segment.payload!r}")
    count = sum(len(result.samples) for result in results)
    say(f"{count} samples in {seconds:.1f} s: {folder}")


def read_prompts(options: argparse.Namespace, purpose: str = "continue") -> list[str]:
    """Text prompts: those of the command line, then the lines of `--prompt-file`.

    Args:
        options: The command line.
        purpose: What the model is to do, for the message.

    Raises:
        ValueError: A prompt is blank or no text, the file cannot be read, or there is no prompt of
            any modality.
    """
    texts = list(options.prompt)
    for text in texts:
        if not text.strip():
            raise ValueError(
                f"--prompt {text!r}: is blank (a shell variable that is not set?); leave it out, "
                "or write a text."
            )
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # bytes that Python kept
            raise ValueError(f"--prompt {text!a}: is not UTF-8.")
    if options.prompt_file is not None:
        try:
            lines = options.prompt_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise ValueError(
                f"--prompt-file {options.prompt_file}: cannot be read as text ({reason})."
            ) from error
        texts += [line.strip() for line in lines if line.strip()]
    if not (texts or options.image or options.speech):
        others = ", --image or --speech" if purpose == "continue" else ""
        raise ValueError(f"nothing to {purpose}: pass --prompt TEXT, --prompt-file{others}.")
    return texts


def build_requests(
    options: argparse.Namespace, texts: Sequence[str], codecs: Codecs
) -> list[Request]:
    """Turn prompts of all modalities into segments.

    Raises:
        ValueError: A file cannot be read, or the model has no speech.
    """
    requests = [
        Request(text, (Segment("text", text),), tuple(options.into or ("image",))) for text in texts
    ]
    into = tuple(options.into or ("text",))
    for path in options.image:
        requests.append(Request(path.name, (_read_image(path, codecs),), into))
    for path in options.speech:
        if codecs.speech is None:
            names = ", ".join(codecs.modalities.names)
            raise ValueError(f"--speech {path}: the model has no speech; it has {names}.")
        units = codecs.speech.encode(read_wav(path, codecs.speech.sample_rate))
        requests.append(Request(path.name, (Segment("speech", units),), into))
    return requests


def _read_image(path: Path, codecs: Codecs) -> Segment:
    try:
        pixels = decode_image(path.read_bytes(), codecs.image.image_size)
    except OSError as error:
        raise ValueError(f"--image {path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ValueError(f"--image {path}: cannot be read as an image ({error}).") from error
    return Segment("image", pixels)


def _generate_all(
    requests: Sequence[Request],
    loaded: LoadedCheckpoint,
    codecs: Codecs,
    settings: SamplingSettings,
    options: argparse.Namespace,
    keep: Callable[[int, Sample], None],
) -> list[Result]:
    """Generate, those together that go into the same modalities.

    Args:
        requests: What to answer.
        loaded: The model.
        codecs: Its codecs.
        settings: How to draw.
        options: The command line: samples of each, and at a time.
        keep: Given the number of the request with each sample, as soon as that is done.

    Returns:
        Results in order of requests.
    """
    samples: dict[int, list[Sample]] = {}
    for into in dict.fromkeys(request.into for request in requests):
        numbers = [i for i, request in enumerate(requests) if request.into == into]
        progress = ProgressBar(f"into {', '.join(into)}", sys.stderr)
        found = generate(
            loaded.model,
            [requests[i].prompt for i in numbers],
            into,
            settings,
            codecs,
            num_samples=options.num_samples,
            batch_size=options.batch_size,
            progress=progress,
            keep=lambda sample, numbers=numbers: keep(numbers[sample.prompt], sample),
        )
        for sample in found:
            samples.setdefault(numbers[sample.prompt], []).append(sample)
    return [Result(request.label, samples[i]) for i, request in enumerate(requests)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Draw from a trained model: continue text, images or speech (PNG, text, WAV), "
        "or images of classes or of prompts (PNG)."
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        "--ckpt",
        required=True,
        help="a run's dump folder, or one checkpoint of it",
    )
    add("--model", help="flavour that the checkpoint must be of")
    add("--num-samples", type=int, help="of each prompt or class (default 4; of models over tokens "
        f"1); at most {MAX_SAMPLES:,}")  # fmt: skip
    add("--batch-size", type=int, default=16, help="samples drawn together")
    add("--guidance", "--cfg-scale", type=float, help="by prompt or class; 1: none (default; of "
        "models of images as in the run's [sampling])")  # fmt: skip
    add("--seed", type=int, default=0)
    add(
        "--out",
        type=Path,
        help="a new or empty folder; default: the next of outputs/samples/001, ...",
    )
    _add_token_options(parser)
    _add_image_options(parser)
    return parser


def _add_token_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("models over tokens, or of images of prompts").add_argument
    add("--prompt", action="append", default=[], help="text to continue or to draw, not blank; may "
        "be repeated")  # fmt: skip
    add("--prompt-file", type=Path, help="file with one text prompt per line")
    add = parser.add_argument_group("models over tokens").add_argument
    several = {"type": Path, "nargs": "+", "action": "extend", "default": []}
    add("--image", help="image files; may be repeated", **several)
    add("--speech", help="WAV files; may be repeated", **several)
    add("--into", nargs="+", choices=MODALITIES, help="what to generate, one after the other in "
        "one document; default: image after a text, text after anything else")  # fmt: skip
    add("--temperature", type=float, default=1.0, help="0: always the likeliest token")
    add("--top-k", type=int, default=0, help="choose among so many tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="choose among tokens of this probability")
    add("--max-text-tokens", type=int, default=64)
    add("--max-speech-seconds", type=float, default=4.0)


def _add_image_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "models of images of classes or prompts", "defaults are those of the run's [sampling]"
    )
    add = group.add_argument
    add("--sampler", choices=("ddpm", "ddim", "euler"), help="euler for models of flow")
    add("--num-steps", "--num-sampling-steps", type=int, help="steps to an image")
    add("--eta", type=float, help="noise of ddim; 1: as much as ddpm")
    add("--shift", type=float, help="of models of flow: of times towards noise; 0: as trained")
    add("--guided-channels", type=int, help="guide the first so many; 0: all")
    add("--routing", choices=("step", "once"), help="of mixtures of diffusers: weigh the experts "
        "at each step, or at the first for all")  # fmt: skip
    add("--vae", help="folder of the VAE that makes pictures of latents")
    add("--canvas", type=Path, help="file of regions to draw as one large image, each with a "
        "subject of its own: TOML or JSON, see sampling/canvas_file.py")  # fmt: skip
    add("--no-ema", action="store_true", help="the parameters, not their average")
    add = parser.add_argument_group("models of images of classes").add_argument
    add("--class-labels", type=int, nargs="+", help="classes to draw; default: the first eight")
    add = parser.add_argument_group("models of images of prompts").add_argument
    add("--negative-prompt", help="guide away from this text; default: the run's [sampling]")
    add("--aspect-ratio", default=prompt_command.SQUARE, help="one of the run's, as 4:3 (width to "
        "height); default: %(default)s")  # fmt: skip
    add("--text-encoders", nargs="+", default=[], help="folders of the frozen encoders that it was "
        "trained with, where the run does not say them")  # fmt: skip
    add("--speak", action="store_true", help="also speak prompts that are the name of an emoji, to "
        "models that hear")  # fmt: skip
