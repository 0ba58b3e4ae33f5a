"""What the study of Mixture of Diffusers measures of a trained model.

The protocol is that of `scripts/study_mixdiff.py`. Trainings are in `runs/`, what was measured of
each in `results/`: JSON, and beside it the losses of images and what was drawn, as NumPy arrays.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchtitan.distributed import ParallelDims

from torchtitan_mixtures.checkpoint_loading import LoadedModel, load_model
from torchtitan_mixtures.data.emoji import STYLES, EmojiCorpus
from torchtitan_mixtures.data.image_data import image_spec
from torchtitan_mixtures.data.image_loader import build_image_validation_dataloader
from torchtitan_mixtures.evaluation import quality
from torchtitan_mixtures.objectives.denoising import (
    build_denoising_loss,
    build_process,
    is_mixture_of_diffusers,
)
from torchtitan_mixtures.sampling.images import ImageSettings, draw_images, in_batches
from torchtitan_mixtures.studies.mixdiff_data import NAMES, class_name
from torchtitan_mixtures.studies.pieces import write_json

REFERENCES = "references"
"""Name of the files about pictures that no model drew."""

SPLITS = ("unseen_concept", "unseen_style")
MEASURES = ("losses", "weights", "entropy", "right")
"""What there is of an image at each level of noise."""

ORACLE = "true domain"
PLAIN = ""
"""How a model without a router is asked."""

ASKED: Mapping[str, tuple[str, ...]] = {
    "decentralised": ("top 1", "top 2", "top 3", ORACLE),
    "joint": ("top 2",),
    "decentralised, replay": ("top 1", "top 2"),
}
"""How the mixtures of a training are asked, at first as an image is in training."""

DRAWN: Mapping[str, tuple[str, ...]] = {
    "dit": (PLAIN,),
    "dit wide": (PLAIN,),
    "decentralised": ("top 1", "top 2"),
    "joint": ("top 2",),
}
"""What images are drawn of, and how."""

BATCH = 100
"""Images that are drawn together."""

ONE_PROCESS = dict(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)


def measure_references(out: Path, num_images: int, progress: Callable[[str], None]) -> None:
    """Train the classifier, and measure what drawn images are to be compared with.

    Args:
        out: The study's folder.
        num_images: Training drawings to keep out of the reference.
        progress: Told of the classifier's training.
    """
    classifier = quality.load_or_train(out / "classifier", progress=progress)
    reference = quality.make_reference(classifier, num_images)
    np.save(out / f"{REFERENCES}.npy", reference.kept_out.pictures)
    rows = quality.reference_rows(classifier, reference)
    told = quality.accuracy(classifier, reference.kept_out)
    write_json(out / f"{REFERENCES}.json", {"rows": rows, "accuracy": told})


def measure_run(
    out: Path, name: str, seed: int, num_images: int, sampling_steps: int, max_batches: int
) -> None:
    """Measure a trained model.

    Args:
        out: The study's folder; has the classifier.
        name: Of the training.
        seed: Its seed.
        num_images: Images to draw; 0: none.
        sampling_steps: DDPM steps to draw them with.
        max_batches: Batches of each split to score; -1: all.
    """
    loaded = load_model(out / "runs" / f"{name}-{seed}")
    results = out / "results"
    results.mkdir(exist_ok=True)
    args: Any = loaded.model_args
    count = getattr(args, "total_macs_per_image", args.macs_per_image)
    content: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "step": loaded.step,
        "averaged": loaded.is_averaged,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "asked": {},
    }
    arrays: dict[str, NDArray[Any]] = {}
    for ask in ASKED.get(name, (PLAIN,)):
        _choose(loaded, ask)
        found = content["asked"][ask] = {"macs_per_image": count(), "splits": {}}
        for split in SPLITS:
            scores = score(loaded, split, ask == ORACLE, max_batches)
            found["splits"][split] = _summary(scores)
            arrays |= {f"{ask}/{split}/{key}": value for key, value in scores.items()}
        if num_images and ask in DRAWN.get(name, ()):
            pictures, styles, numbers = _draw(out, loaded, num_images, sampling_steps)
            found |= numbers
            arrays[f"{ask}/pictures"] = pictures
            arrays[f"{ask}/styles"] = styles
    with (results / f"{name}-{seed}.npz").open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    write_json(results / f"{name}-{seed}.json", content)


def _choose(loaded: LoadedModel, ask: str) -> None:
    """Set how many experts a mixture takes; the model looks at the same arguments."""
    if ask.startswith("top "):
        loaded.model_args.top_k = int(ask.removeprefix("top "))
    elif ask == ORACLE:
        loaded.model_args.top_k = 1


@torch.no_grad()
def score(
    loaded: LoadedModel, split: str, is_oracle: bool, max_batches: int
) -> dict[str, NDArray[Any]]:
    """Score the images of a split at every noise level, as validation does.

    Args:
        loaded: The model and the configuration of its run.
        split: Name of the split.
        is_oracle: Let the expert of the true domain predict, whatever the router says.
        max_batches: See `measure_run`.

    Returns:
        `images` and `domains`, `(images,)`: numbers in the split and in `NAMES`; `losses`,
        `(images, levels)` float64, of a router alone its cross-entropy. Of mixtures the `weights`
        of experts, `(images, levels, experts)`; the `entropy` of the router's probabilities, 1 if
        they are even, `(images, levels)`; and, if experts have domains, whether it is `right`.
    """
    config = loaded.job_config
    data = dataclasses.replace(config.multimodal, domain_shares={})
    if not is_mixture_of_diffusers(loaded.model_args):
        data.train_domains = []  # all that there are
    validation = dataclasses.replace(config.validation, steps=max_batches, local_batch_size=64)
    config = copy.copy(config)
    config.validation, config.multimodal = validation, data
    loss_fn, dims = build_denoising_loss(config), ParallelDims(**ONE_PROCESS)
    names = data.train_domains or NAMES
    numbers = torch.tensor([NAMES.index(name) for name in NAMES if name in names])
    has_domains = config.diffusers.training != "joint"
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in ("images", "domains", *MEASURES)}
    for batch, labels in build_image_validation_dataloader(1, 0, config, split):
        is_image = (labels == 0).all(1)
        domains, encoded = batch["domain_labels"], loss_fn.encode(batch)
        levels: dict[str, list[torch.Tensor]] = {name: [] for name in MEASURES}
        for level in range(config.objective.validation_levels):
            inputs, targets, extra, _ = loss_fn.prepare(
                loaded.model, None, encoded, labels, dims, config, level=level
            )
            if is_oracle:
                extra["domain_labels"] = domains
            output = loaded.model(inputs, **extra)
            levels["losses"].append(loss_fn.score(output, targets).double().mean(1))
            if output.router_logits is not None:
                levels["weights"].append(output.gates)
                levels["entropy"].append(_entropy(output.router_logits))
                if has_domains:
                    levels["right"].append(output.router_logits.argmax(1) == domains)
        rows["images"].append(batch["sample_index"][is_image])
        rows["domains"].append(numbers[domains[is_image]])
        for key, values in levels.items():
            if values:
                rows[key].append(torch.stack(values, 1)[is_image])
    return {key: torch.cat(values).numpy() for key, values in rows.items() if values}


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of a router's probabilities to that of even ones, `(batch,)`."""
    return torch.special.entr(logits.double().softmax(1)).sum(1) / math.log(logits.shape[1])


def _summary(scores: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Means of what `score` returned: by domain, and of the router by level too."""
    domains, losses = scores["domains"], scores["losses"].mean(1)
    of_styles = losses[domains < len(STYLES)]
    found: dict[str, Any] = {"images": len(domains), "styles": float(of_styles.mean())}
    found["domains"] = {}
    for number, name in enumerate(NAMES):
        own = domains == number
        if own.any():
            found["domains"][name] = {"loss": float(losses[own].mean()), "images": int(own.sum())}
            if "weights" in scores:
                found["domains"][name]["weights"] = scores["weights"][own].mean((0, 1)).tolist()
    if "weights" in scores:
        found["entropy"] = float(scores["entropy"].mean())
        found["load"] = scores["weights"].mean((0, 1)).tolist()
    if "right" in scores:
        found["right"] = float(scores["right"].mean())
        found["right by level"] = scores["right"].mean(0).tolist()
    return found


def _draw(
    out: Path, loaded: LoadedModel, num_images: int, num_steps: int
) -> tuple[quality.Pictures, NDArray[np.int64], dict[str, float]]:
    """Draw images by DDPM steps without guidance, of the classes of drawings that were kept out.

    Returns:
        The images; the styles that were asked for, `(images,)`; the images' Frechet distance, and
        how often emoji-cnn sees the style and the group that were asked for.
    """
    classifier = quality.load_or_train(out / "classifier")
    reference = quality.make_reference(classifier, num_images)
    asked, names = reference.kept_out, list(image_spec(loaded.job_config).class_names)
    groups = EmojiCorpus.load().groups
    pairs = zip(asked.styles.tolist(), asked.groups.tolist(), strict=True)
    classes = [names.index(class_name(STYLES[style], groups[group])) for style, group in pairs]
    settings = ImageSettings("ddpm", num_steps, eta=0.0, guidance=1.0, guided_channels=0, seed=0)
    args: Any = loaded.model_args
    process = build_process(loaded.job_config.objective, args.in_channels)
    draw = partial(draw_images, loaded.model, args, process, settings=settings, device="cpu")
    pictures = in_batches(draw, classes, BATCH)
    told = quality.accuracy(classifier, asked._replace(pictures=pictures))
    distance = quality.frechet_distance(
        quality.features_of(classifier, pictures), reference.features
    )
    numbers = {"frechet": distance, "style": told["style"], "group": told["group"]}
    return pictures, asked.styles.numpy(), numbers
