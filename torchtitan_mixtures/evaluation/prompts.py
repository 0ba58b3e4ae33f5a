"""What `scripts/evaluate.py --prompts` reports about a model of prompted images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchtitan_mixtures.checkpoint_loading import LoadedModel
from torchtitan_mixtures.data.emoji import SPLITS as CORPUS_SPLITS
from torchtitan_mixtures.data.vae import load_vae
from torchtitan_mixtures.evaluation.prompt_retrieval import SPLITS, Draw, Pictures, measure_split
from torchtitan_mixtures.evaluation.report import format_rate
from torchtitan_mixtures.objectives.denoising import build_process
from torchtitan_mixtures.sampling.conditions import is_prompted
from torchtitan_mixtures.sampling.images import (
    ImageSettings,
    check_image_settings,
    condition_dropout,
    draw_images,
    in_batches,
)
from torchtitan_mixtures.sampling.prompt_encoding import PromptEncoder, choose_text_encoders

BATCH = 50
"""Images that are drawn together."""

TITLES = {
    "concepts": "the concept among 10",
    "relations": "the relation or its reverse",
}


def settings_of(loaded: LoadedModel, seed: int, **changes: Any) -> ImageSettings:
    """How images are drawn: as the run's `[sampling]` says, without its negative prompt.

    Args:
        loaded: The model and the configuration of its run.
        seed: Of the noise.
        changes: Other values of `num_steps` and `guidance`; None: as in the run.

    Raises:
        ValueError: Names the option, its value and what is allowed.
    """
    config, args = loaded.job_config, loaded.model_args
    given = {key: value for key, value in changes.items() if value is not None}
    wanted = dataclasses.replace(config.sampling, **given, negative_prompt="", seed=seed)
    process = build_process(config.objective, args.in_channels)
    dropout = condition_dropout(config.objective, args)
    return check_image_settings(wanted, process, args, dropout, "--")


def make_draw(
    loaded: LoadedModel, settings: ImageSettings, text_encoders: Sequence[str] = ()
) -> Draw:
    """Make what draws an image to each of some prompts.

    Args:
        loaded: A model of prompted images.
        settings: See `settings_of`.
        text_encoders: Folders of frozen encoders, see `choose_text_encoders`.

    Raises:
        ValueError: The VAE or the encoders are not there; names the option.
    """
    config, args = loaded.job_config, loaded.model_args
    device = next(loaded.model.parameters()).device
    process = build_process(config.objective, args.in_channels)
    folders = choose_text_encoders(config, args.prompts, text_encoders, "--text-encoders")
    encoder = PromptEncoder(config, args.prompts, device, folders)
    folder = config.multimodal.vae or config.sampling.vae
    if not folder and args.in_channels != 3:
        raise ValueError(
            f"--prompts: {loaded.path} draws latents, and its configuration names no VAE "
            "(multimodal.vae or sampling.vae) that would make pictures of them."
        )
    vae = load_vae(folder, device) if folder else None

    def draw(prompts: Sequence[str]) -> Pictures:
        encoded = encoder.encode(prompts)

        def draw_batch(rows: Sequence[int], numbers: Sequence[int]) -> Tensor:
            condition = encoded.condition(rows, device)
            images = draw_images(
                loaded.model, args, process, condition, numbers, settings, device, vae
            )
            if not bool(images.isfinite().all()):
                raise ValueError("the model's images are not finite (did the run diverge?).")
            return images

        return in_batches(draw_batch, range(len(prompts)), BATCH)

    return draw


@torch.no_grad()
def evaluate_prompts(
    loaded: LoadedModel,
    splits: Sequence[str] = (),
    *,
    num_items: int = 100,
    seed: int = 0,
    num_steps: int | None = None,
    guidance: float | None = None,
    text_encoders: Sequence[str] = (),
    progress: Callable[[str], None] = lambda message: None,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measure whether a model draws what prompts ask for; see `prompt_retrieval`.

    Args:
        loaded: The model and the configuration of its run.
        splits: Of the embedded corpus; none: `SPLITS`.
        num_items: Prompts of either kind for each split, at most.
        seed: Of prompts, comparisons and noise.
        num_steps: Steps to an image; None: as in the run's `[sampling]`.
        guidance: Likewise.
        text_encoders: See `make_draw`.
        progress: Told what is about to be done.
        keep: Given the report after each split, as far as it goes.

    Returns:
        Plain JSON: what was evaluated, and for each of `splits` what `measure_split` says.

    Raises:
        ValueError: The model has no prompts, or of other data; or names what does not fit.
    """
    config = loaded.job_config
    if not is_prompted(loaded.model_args):
        raise ValueError(f"--prompts: {loaded.path} is no model of prompted images; leave it out.")
    if config.multimodal.source != "emoji":
        raise ValueError(
            f"--prompts: {loaded.path} was trained on multimodal.source = "
            f"{config.multimodal.source!r}; the prompts are names of the emoji corpus."
        )
    if unknown := sorted(set(splits) - set(CORPUS_SPLITS)):
        raise ValueError(
            f"--splits: the emoji corpus has no split {unknown[0]!r}; its splits are "
            f"{', '.join(CORPUS_SPLITS)}."
        )
    settings = settings_of(loaded, seed, num_steps=num_steps, guidance=guidance)
    draw = make_draw(loaded, settings, text_encoders)
    report: dict[str, Any] = {
        "checkpoint": str(loaded.path),
        "family": config.model.name,
        "flavor": config.model.flavor,
        "step": loaded.step,
        "averaged": loaded.is_averaged,
        "num_items": num_items,
        "settings": dataclasses.asdict(settings),
        "splits": {},
    }
    for split in splits or SPLITS:
        progress(f"{split}: images to prompts")
        report["splits"][split] = measure_split(draw, split, num_items, seed)
        keep(report)
    return report


def format_prompts(report: dict[str, Any]) -> str:
    """Write a report as a Markdown table."""
    averaged = ", averaged" if report["averaged"] else ""
    settings = report["settings"]
    lines = [
        f"{report['family']}/{report['flavor']}, step {report['step']}{averaged} "
        f"({report['checkpoint']}); {settings['num_steps']} steps, guidance "
        f"{settings['guidance']:g}",
        "",
        "| split | question | prompts | right (95 % interval) | chance | images of other prompts |",
        "|---|---|---|---|---|---|",
    ]
    for split, found in report["splits"].items():
        for name, title in TITLES.items():
            row = found[name]
            lines.append(
                f"| {split} | {title} | {row['prompts']} | {format_rate(row['right'])} | "
                f"{row['right']['chance']:.0%} | {format_rate(row['other_prompts'])} |"
            )
    return "\n".join(lines)
