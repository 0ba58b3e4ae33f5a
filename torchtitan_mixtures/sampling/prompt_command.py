"""What `scripts/sample.py` does with a checkpoint of a model of prompted images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from torchtitan_mixtures.checkpoint_loading import LoadedModel
from torchtitan_mixtures.data.aspect_ratios import find_bucket, make_buckets
from torchtitan_mixtures.sampling.command_line import choose_folder, say
from torchtitan_mixtures.sampling.conditions import Condition
from torchtitan_mixtures.sampling.image_command import (
    Subject,
    complete_options,
    draw_and_write,
    load_painter,
)
from torchtitan_mixtures.sampling.prompt_encoding import PromptEncoder, choose_text_encoders

SQUARE = "1:1"


def run(options: argparse.Namespace, texts: Sequence[str]) -> None:
    """Load the checkpoint, draw, write and print.

    Args:
        options: The command line.
        texts: The prompts.

    Raises:
        ValueError: Names the option or file, what is wrong and what would be right.
    """
    complete_options(options)
    with choose_folder(options.out) as folder:
        painter = load_painter(options)
        loaded, device = painter.loaded, painter.device
        specs = loaded.model_args.prompts
        size = choose_size(loaded, options.aspect_ratio)
        if options.speak and all(spec.name != "speech" for spec in specs):
            raise ValueError(
                "--speak: the model does not hear prompts, it reads them; leave it out."
            )
        folders = choose_text_encoders(
            loaded.job_config, specs, options.text_encoders, "--text-encoders"
        )
        encoder = PromptEncoder(
            loaded.job_config, specs, device, folders, speaks=options.speak, warn=say
        )
        prompts = encoder.encode(texts)
        if options.speak and not any(prompts.is_spoken):
            raise ValueError(
                f"--speak: no prompt is the name of an emoji and nothing more (as 'fox'), first "
                f"{texts[0]!r}; such names alone are spoken."
            )
        negative = encoder.encode([options.negative_prompt]) if options.negative_prompt else None
        del encoder  # frozen encoders may be larger than the model

        def condition_of(rows: Sequence[int]) -> Condition:
            return prompts.condition(rows, device, negative)

        subjects = [
            Subject(text, f"prompt{row:03}", _entry(text, options.speak, prompts.is_spoken[row]))
            for row, text in enumerate(texts)
        ]
        facts = {"negative_prompt": options.negative_prompt, "aspect_ratio": options.aspect_ratio}
        draw_and_write(folder, painter, subjects, condition_of, options, size, facts)


def _entry(text: str, speaks: bool, is_spoken: bool) -> dict[str, Any]:
    return {"prompt": text, "spoken": is_spoken} if speaks else {"prompt": text}


def choose_size(loaded: LoadedModel, name: str) -> tuple[int, int]:
    """Height and width, of what the model sees, of images of an aspect ratio.

    Raises:
        ValueError: The model was not trained with it.
    """
    args = loaded.model_args
    ratios = loaded.job_config.multimodal.aspect_ratios
    if name == SQUARE and (not ratios or SQUARE in ratios):
        return args.image_size, args.image_size
    bucket = find_bucket(make_buckets(ratios, args.image_size, args.patch_size), name)
    return bucket.height, bucket.width
