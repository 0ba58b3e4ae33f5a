"""MoM beside DiT: what is measured of a trained model, and how it is reported.

The protocol is that of `scripts/study_mom.py`. Everything is in the study's folder: trainings in
`runs/`, what was measured of each in `results/`, as JSON and with the images that were drawn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from torchtitan_mixtures.checkpoint_loading import LoadedModel, load_model
from torchtitan_mixtures.data.emoji import SPLITS, EmojiCorpus
from torchtitan_mixtures.evaluation import quality
from torchtitan_mixtures.evaluation.denoising import level_losses, summarise
from torchtitan_mixtures.objectives.denoising import build_process
from torchtitan_mixtures.sampling.images import ImageSettings, draw_images, in_batches
from torchtitan_mixtures.sampling.pictures import SheetRow, contact_sheet
from torchtitan_mixtures.studies import comparison
from torchtitan_mixtures.studies.pieces import write_json

BASELINE = "debugmodel_dit"
FLAVORS = (BASELINE, "debugmodel_matched", "debugmodel")
METRICS = {
    "unseen_style": "loss, unseen style",
    "unseen_concept": "loss, unseen concept",
    "train": "loss, train",
    "frechet": "Frechet distance",
}

REFERENCES = "references"
"""Name of the files about pictures that no model drew."""

BATCH = 100
"""Images that are drawn together."""


# --- measuring ------------------------------------------------------------------------------------


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
    corpus = EmojiCorpus.load()
    content = {
        "classes": reference.kept_out.groups.tolist(),
        "accuracy": {
            split: quality.accuracy(classifier, quality.real_pictures(corpus.drawings(split)))
            for split in SPLITS
        },
        "rows": quality.reference_rows(classifier, reference),
    }
    write_json(out / f"{REFERENCES}.json", content)


def measure_run(
    out: Path, name: str, num_images: int, sampling_steps: int, max_batches: int
) -> None:
    """Measure a trained model.

    Args:
        out: The study's folder; has the classifier.
        name: Of the training.
        num_images: Images to draw.
        sampling_steps: DDPM steps to draw them with.
        max_batches: Batches of each split to score.
    """
    classifier = quality.load_or_train(out / "classifier")
    reference = quality.make_reference(classifier, num_images)
    loaded = load_model(out / "runs" / name)
    found = {split: summarise(level_losses(loaded, split, max_batches)) for split in SPLITS}
    pictures = draw(loaded, reference.kept_out.groups.tolist(), sampling_steps)
    results = out / "results"
    results.mkdir(exist_ok=True)
    np.save(results / f"{name}.npy", pictures)
    features = quality.features_of(classifier, pictures)
    args = loaded.model_args
    content = {
        "flavor": loaded.job_config.model.flavor,
        "seed": loaded.job_config.debug.seed,
        "step": loaded.step,
        "averaged": loaded.is_averaged,
        "macs_per_image": args.total_macs_per_image(),
        "parameters": args.num_total_parameters,
        "active_parameters": args.num_active_parameters,
        "splits": found,
        "frechet": quality.frechet_distance(features, reference.features),
    }
    write_json(results / f"{name}.json", content)


def draw(loaded: LoadedModel, classes: Sequence[int], num_steps: int) -> quality.Pictures:
    """Draw an image of each class, by DDPM steps without guidance."""
    settings = ImageSettings("ddpm", num_steps, eta=0.0, guidance=1.0, guided_channels=0, seed=0)
    args = loaded.model_args
    process = build_process(loaded.job_config.objective, args.in_channels)
    images = partial(draw_images, loaded.model, args, process, settings=settings, device="cpu")
    return in_batches(images, classes, BATCH)


# --- reporting ------------------------------------------------------------------------------------


def write_report(out: Path) -> str:
    """Write `report.json`, `report.md` and `samples.png` of what is measured so far.

    Returns:
        The Markdown.

    Raises:
        ValueError: Nothing is measured yet.
    """
    results = [json.loads(path.read_text()) for path in sorted(out.glob("results/*.json"))]
    if not results or not (out / f"{REFERENCES}.json").exists():
        raise ValueError(f"{out} holds no finished piece of a study; begin one with `run`.")
    references = json.loads((out / f"{REFERENCES}.json").read_text())
    write_json(out / "report.json", as_json(results, references))
    text = as_markdown(results, references)
    (out / "report.md").write_text(text + "\n", encoding="utf-8")
    Image.fromarray(draw_sheet(out, results, references["classes"])).save(out / "samples.png")
    return text


def metrics_of(results: Sequence[dict[str, Any]]) -> comparison.Measured:
    """Metrics by flavour and seed, flavours in the order of `FLAVORS`."""
    return {
        flavor: {
            one["seed"]: {
                metric: one["frechet"] if metric == "frechet" else one["splits"][metric]["loss"]
                for metric in METRICS
            }
            for one in results
            if one["flavor"] == flavor
        }
        for flavor in FLAVORS
        if any(one["flavor"] == flavor for one in results)
    }


def as_json(results: Sequence[dict[str, Any]], references: dict[str, Any]) -> dict[str, Any]:
    """All numbers, as plain JSON."""
    measured = metrics_of(results)
    gaps = comparison.differences(measured, list(METRICS), BASELINE)
    return {
        "models": comparison.as_json(comparison.summarise(measured, list(METRICS))),
        f"differences to {BASELINE}": comparison.as_json(gaps),
        "references": references["rows"],
        "accuracy of emoji-cnn": references["accuracy"],
        "results": list(results),
    }


def as_markdown(results: Sequence[dict[str, Any]], references: dict[str, Any]) -> str:
    """The comparison as tables."""
    measured = metrics_of(results)
    summaries = comparison.summarise(measured, list(METRICS))
    facts = {one["flavor"]: one for one in results}
    models = []
    for flavor, seeds in measured.items():
        total, active = (facts[flavor][key] / 1e6 for key in ("parameters", "active_parameters"))
        macs = f"{facts[flavor]['macs_per_image'] / 1e6:.1f}"
        row = [flavor, macs, f"{total:.2f} ({active:.2f})", len(seeds)]
        models.append([*row, *summaries[flavor].values()])
    gaps = [
        [flavor, METRICS[metric], gap, ", ".join(f"{v:+.4f}" for v in gap.values.values())]
        for flavor, found in comparison.differences(measured, list(METRICS), BASELINE).items()
        for metric, gap in found.items()
    ]
    others = [
        [name, row["images"], f"{row['frechet']:.3f}"] for name, row in references["rows"].items()
    ]
    told = references["accuracy"]["unseen_concept"]
    columns = ["model", "M multiply-adds an image", "M parameters (active)", "seeds"]
    return "\n\n".join(
        [
            "Mean and standard deviation over seeds:",
            comparison.markdown([*columns, *METRICS.values()], models),
            f"Differences to {BASELINE} of equal seeds; below 0 is better than it:",
            comparison.markdown(["model", "metric", "mean", "of each seed"], gaps),
            "Frechet distance of other pictures; of unseen concepts, emoji-cnn tells the group of "
            f"{told['group']:.0%} of the drawings and the style of {told['style']:.0%}:",
            comparison.markdown(["pictures", "images", "Frechet distance"], others),
            "Loss on unseen concepts by noise level, from 0 (none) to 1:",
            comparison.markdown(["level", *measured], _level_rows(results, list(measured))),
        ]
    )


def _level_rows(results: Sequence[dict[str, Any]], flavors: Sequence[str]) -> list[list[object]]:
    def losses(flavor: str, level: str) -> dict[int, float]:
        return {
            one["seed"]: one["splits"]["unseen_concept"]["levels"][level]["loss"]
            for one in results
            if one["flavor"] == flavor
        }

    levels = results[0]["splits"]["unseen_concept"]["levels"]
    return [
        [level, *(comparison.Summary.of(losses(flavor, level)) for flavor in flavors)]
        for level in levels
    ]


def draw_sheet(
    out: Path, results: Sequence[dict[str, Any]], classes: Sequence[int]
) -> quality.Pictures:
    """A sheet of an image of each class: real ones, then those of each model's first seed."""
    columns = [classes.index(label) for label in sorted(set(classes))]
    rows = [SheetRow("real drawings", list(np.load(out / f"{REFERENCES}.npy")[columns]))]
    for flavor, seeds in metrics_of(results).items():
        images = np.load(out / "results" / f"{flavor}-{min(seeds)}.npy")
        rows.append(SheetRow(f"{flavor}, seed {min(seeds)}", list(images[columns])))
    return contact_sheet(rows)
