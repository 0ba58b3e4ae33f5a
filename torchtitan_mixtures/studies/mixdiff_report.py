"""The report of the study of Mixture of Diffusers: tables, numbers and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from torchtitan_mixtures.data.emoji import STYLES
from torchtitan_mixtures.sampling.pictures import SheetRow, contact_sheet
from torchtitan_mixtures.studies import comparison
from torchtitan_mixtures.studies.bootstrap import paired_interval
from torchtitan_mixtures.studies.comparison import Summary
from torchtitan_mixtures.studies.mixdiff_data import SCENE
from torchtitan_mixtures.studies.mixdiff_measures import ASKED, DRAWN, PLAIN, REFERENCES, SPLITS
from torchtitan_mixtures.studies.pieces import write_json

BASELINE = "dit"
PHASE_1 = ("dit", "dit wide", "decentralised", "joint")
PHASE_2 = {
    "decentralised, replay": "decentralised",
    "dit, replay": "dit",
    "dit, scenes alone": "dit",
}
"""Trainings of the second phase, and those they go on from."""

PICTURE = "mixture.png"
SHOWN = 4
"""Images of each style on the picture."""


class Results:
    """What is measured so far."""

    def __init__(self, out: Path) -> None:
        """Read a study's folder.

        Raises:
            ValueError: Nothing is measured yet.
        """
        self.out = out
        found = [json.loads(path.read_text()) for path in sorted(out.glob("results/*.json"))]
        if not found:
            raise ValueError(f"{out} holds no finished piece of a study; begin one with `run`.")
        self._by_name: dict[str, dict[int, dict[str, Any]]] = {}
        for one in found:
            self._by_name.setdefault(one["name"], {})[one["seed"]] = one
        self._arrays: dict[tuple[str, int], Any] = {}

    def seeds(self, name: str) -> list[int]:
        """Seeds of a training that are done."""
        return sorted(self._by_name.get(name, {}))

    def one(self, name: str, seed: int) -> dict[str, Any]:
        """What was measured of a training."""
        return self._by_name[name][seed]

    def array(self, name: str, seed: int, key: str) -> NDArray[Any]:
        """An array of a training."""
        if (name, seed) not in self._arrays:
            with np.load(self.out / "results" / f"{name}-{seed}.npz") as file:
                self._arrays[name, seed] = dict(file)
        return self._arrays[name, seed][key]

    def summary(self, name: str, ask: str, *path: str) -> Summary | None:
        """A number of a training over its seeds; None if it was not measured."""
        values = {}
        for seed in self.seeds(name):
            found: Any = self.one(name, seed)["asked"].get(ask, {})
            for key in path:
                found = found.get(key) if isinstance(found, dict) else None
            if found is not None:
                values[seed] = found
        return Summary.of(values) if values else None

    def losses(self, name: str, seed: int, ask: str, split: str) -> dict[int, float]:
        """Loss of each image of the styles, mean over levels, by its number."""
        images, domains, losses = (
            self.array(name, seed, f"{ask}/{split}/{key}")
            for key in ("images", "domains", "losses")
        )
        own = domains < len(STYLES)
        return dict(zip(images[own].tolist(), losses[own].mean(1).tolist(), strict=True))

    def gap(self, name: str, ask: str, split: str) -> tuple[Summary, tuple[float, float]] | None:
        """Difference to the baseline of equal seeds, and its interval."""
        seeds = [seed for seed in self.seeds(name) if seed in self.seeds(BASELINE)]
        if not seeds:
            return None
        pairs = [
            (self.losses(name, seed, ask, split), self.losses(BASELINE, seed, PLAIN, split))
            for seed in seeds
        ]
        images = sorted(set.intersection(*(one.keys() & base.keys() for one, base in pairs)))
        rows = np.array([[one[image] - base[image] for image in images] for one, base in pairs])
        means = dict(zip(seeds, rows.mean(1).tolist(), strict=True))
        return Summary.of(means), paired_interval(rows, range(rows.shape[1]))


def models(found: Results, names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Name, question and label of everything that was measured of some trainings."""
    for name in names:
        for ask in ASKED.get(name, (PLAIN,)):
            if found.seeds(name):
                yield name, ask, f"{name}, {ask}" if ask else name


def write_report(out: Path) -> str:
    """Write `report.json`, `report.md` and the picture of what is measured so far.

    Returns:
        The Markdown.

    Raises:
        ValueError: Nothing is measured yet.
    """
    found = Results(out)
    text = "\n\n".join(_sections(found))
    (out / "report.md").write_text(text + "\n", encoding="utf-8")
    results = {name: {s: found.one(name, s) for s in found.seeds(name)} for name in found._by_name}
    gaps = {
        label: {split: _as_json(found.gap(name, ask, split)) for split in SPLITS}
        for name, ask, label in models(found, PHASE_1)
    }
    write_json(out / "report.json", {"differences to dit": gaps, "results": results})
    if (out / f"{REFERENCES}.npy").exists():
        Image.fromarray(draw_sheet(found)).save(out / PICTURE)
    return text


def _as_json(gap: tuple[Summary, tuple[float, float]] | None) -> dict[str, Any] | None:
    return None if gap is None else {**gap[0]._asdict(), "interval_95": gap[1]}


def _sections(found: Results) -> Iterator[str]:
    yield "Mean and standard deviation over seeds. Phase 1, denoising loss by domain:"
    yield _losses_table(found)
    yield (
        "Differences to `dit` of equal seeds (below 0 is better), and the 95 % interval of a "
        "paired bootstrap over seeds and images, not corrected for the number of comparisons:"
    )
    rows = []
    for name, ask, label in models(found, PHASE_1):
        if name != BASELINE:
            gaps = [found.gap(name, ask, split) for split in SPLITS]
            rows.append([label, *(_gap_cell(gap) for gap in gaps)])
    yield comparison.markdown(["model", *(_words(split) for split in SPLITS)], rows)
    yield "How often the router's likeliest expert is that of the domain, in %, by level of noise:"
    yield _router_table(found)
    yield "Images: Frechet distance (less is better), and how often emoji-cnn sees the style asked:"
    yield _images_table(found)
    yield (
        "Phase 2, scenes are added: loss on unseen concept of old domains before and after, and "
        "of scenes:"
    )
    yield _forgetting_table(found)


def _losses_table(found: Results) -> str:
    rows = []
    base = found.summary(BASELINE, PLAIN, "macs_per_image")
    for name, ask, label in models(found, PHASE_1):
        macs = found.summary(name, ask, "macs_per_image")
        share = macs.mean / base.mean if macs and base else float("nan")
        parameters = found.one(name, found.seeds(name)[0])["parameters"] / 1e6
        row: list[object] = [label, f"{parameters:.2f}", f"{share:.2f}", len(found.seeds(name))]
        for style in STYLES:
            row.append(found.summary(name, ask, "splits", SPLITS[0], "domains", style, "loss"))
        row += [found.summary(name, ask, "splits", split, "styles") for split in SPLITS]
        rows.append(row)
    columns = ["model", "M parameters", "multiply-adds to dit", "seeds"]
    columns += [f"{style}, {_words(SPLITS[0])}" for style in STYLES]
    return comparison.markdown([*columns, *(_words(split) for split in SPLITS)], rows)


def _gap_cell(gap: tuple[Summary, tuple[float, float]] | None) -> str:
    if gap is None:
        return "-"
    summary, (low, high) = gap
    spread = "" if summary.deviation is None else f" +- {summary.deviation:.4f}"
    return f"{summary.mean:+.4f}{spread} [{low:+.4f}, {high:+.4f}]"


def _router_table(found: Results) -> str:
    rows: list[list[object]] = []
    levels = 0
    for name, label in (("decentralised", "class, image and time"), ("router", "image and time")):
        ask = ASKED.get(name, (PLAIN,))[0]
        for split in SPLITS:
            right = [found.one(n, s)["asked"][ask]["splits"][split]["right by level"]
                     for n, s in ((name, seed) for seed in found.seeds(name))]  # fmt: skip
            if right:
                means = np.mean(right, 0)
                levels = len(means)
                whole = found.summary(name, ask, "splits", split, "right")
                shown = "-" if whole is None else f"{100 * whole.mean:.1f}"
                rows.append([label, _words(split), shown, *(f"{100 * m:.1f}" for m in means)])
    middles = [f"{(level + 0.5) / levels:.4g}" for level in range(levels)]
    return comparison.markdown(["router reads", "images", "all", *middles], rows)


def _images_table(found: Results) -> str:
    rows = []
    path = found.out / f"{REFERENCES}.json"
    if path.exists():
        references = json.loads(path.read_text())
        for name, row in references["rows"].items():
            rows.append([name, f"{row['frechet']:.3f}", "-"])
        rows[0][2] = f"{100 * references['accuracy']['style']:.1f}"
    for name, ask, label in models(found, PHASE_1):
        if ask in DRAWN.get(name, ()):
            style = found.summary(name, ask, "style")
            shown = "-" if style is None else f"{100 * style.mean:.1f}"
            rows.append([label, found.summary(name, ask, "frechet"), shown])
    return comparison.markdown(["images of", "Frechet distance", "style, %"], rows)


def _forgetting_table(found: Results) -> str:
    rows = []
    for name, before in PHASE_2.items():
        for ask in ASKED.get(name, (PLAIN,)):
            path = "splits", SPLITS[0], "domains"
            changes, cells = {}, []
            for seed in found.seeds(name):
                olds = [found.one(n, seed)["asked"][ask]["splits"][SPLITS[0]]["domains"]
                        for n in (before, name)]  # fmt: skip
                losses = [np.mean([old[style]["loss"] for style in STYLES]) for old in olds]
                changes[seed] = float(losses[1] - losses[0])
            if not changes:
                continue
            change = Summary.of(changes)
            for one in (before, name):
                styles = [found.summary(one, ask, *path, style, "loss") for style in STYLES]
                cells.append(f"{np.mean([s.mean for s in styles if s]):.4f}")
            scenes = found.summary(name, ask, *path, SCENE, "loss")
            label = f"{name}, {ask}" if ask else name
            spread = "" if change.deviation is None else f" +- {change.deviation:.4f}"
            rows.append([label, *cells, f"{change.mean:+.4f}{spread}", scenes])
    columns = ["training", "old domains before", "after", "forgetting", "scenes after"]
    return comparison.markdown(columns, rows)


def draw_sheet(found: Results) -> NDArray[np.uint8]:
    """A sheet of real drawings, and of what each model drew of the same classes."""
    real = np.load(found.out / f"{REFERENCES}.npy")
    columns = range(min(3 * SHOWN, len(real)))
    rows = [SheetRow("real drawings", list(real[list(columns)]))]
    for name, ask, label in models(found, PHASE_1):
        if ask in DRAWN.get(name, ()):
            pictures = found.array(name, found.seeds(name)[0], f"{ask}/pictures")
            rows.append(SheetRow(f"{label}, seed {found.seeds(name)[0]}", list(pictures[columns])))
    return contact_sheet(rows)


def _words(split: str) -> str:
    return split.replace("_", " ")
