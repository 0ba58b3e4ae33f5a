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
from torchtitan_mixtures.studies.chart import Line, Panel, Point, draw_chart
from torchtitan_mixtures.studies.comparison import Summary
from torchtitan_mixtures.studies.mixdiff_data import NAMES, SCENE
from torchtitan_mixtures.studies.mixdiff_measures import DRAWN, PLAIN, REFERENCES, SPLITS
from torchtitan_mixtures.studies.mixdiff_results import (
    BASELINE,
    PHASE_1,
    PHASE_2,
    Gap,
    Results,
    asks,
    models,
)
from torchtitan_mixtures.studies.pieces import SETTINGS_NAME, write_json

ROUTERS = {"decentralised": "class, image and time", "router": "image and time"}
"""Trainings whose routers learn domains, and what they read."""

PICTURE = "mixture.png"
CHART = "router.png"
SHOWN = 4
"""Images of each style on the picture."""


def write_report(out: Path) -> str:
    """Write `report.json`, `report.md` and the pictures of what is measured so far.

    Returns:
        The Markdown.

    Raises:
        ValueError: Nothing is measured yet.
    """
    found = Results(out)
    text = "\n\n".join(_sections(found))
    (out / "report.md").write_text(text + "\n", encoding="utf-8")
    results = {name: {s: found.one(name, s) for s in found.seeds(name)} for name in found.names}
    gaps = {
        label: {split: _as_json(found.gap_to_baseline(name, ask, split)) for split in SPLITS}
        for name, ask, label in models(found, PHASE_1)
    }
    forgot = {
        label: {
            split: {
                style: _as_json(found.forgetting(name, ask, split, [style])) for style in STYLES
            }
            | {"all": _as_json(found.forgetting(name, ask, split))}
            for split in SPLITS
        }
        for name, ask, label in models(found, tuple(PHASE_2))
    }
    content = {"differences to dit": gaps, "forgetting": forgot, "results": results}
    write_json(out / "report.json", content)
    drawn = list(_drawn(found))
    if drawn:
        Image.fromarray(draw_sheet(found, drawn)).save(out / PICTURE)
    panels = make_panels(found)
    if panels:
        chart = draw_chart(panels, "noise, from 0 (none) to 1", "right, %")
        Image.fromarray(chart).save(out / CHART)
    return text


def _as_json(gap: Gap | None) -> dict[str, Any] | None:
    return None if gap is None else {**gap.summary._asdict(), "interval_95": gap.interval}


def _sections(found: Results) -> Iterator[str]:
    yield (
        "Mean and standard deviation over seeds. Phase 1, denoising loss by domain; multiply-adds "
        f"of an image when drawn, and of the whole training, to those of `dit`{_cost(found)}:"
    )
    yield _losses_table(found)
    yield (
        "Differences to `dit` of equal seeds (below 0 is better), and the 95 % interval of a "
        "paired bootstrap over seeds and emoji, not corrected for the number of comparisons:"
    )
    rows = []
    for name, ask, label in models(found, PHASE_1):
        if name != BASELINE:
            gaps = [found.gap_to_baseline(name, ask, split) for split in SPLITS]
            rows.append([label, *(_gap_cell(gap) for gap in gaps)])
    yield comparison.markdown(["model", *(_words(split) for split in SPLITS)], rows)
    yield "How often the router's likeliest expert is that of the domain, in %, by level of noise:"
    yield _router_table(found)
    yield (
        "Entropy of the router (1: all experts are as likely), and weights of the experts, in %, "
        f"on {_words(SPLITS[0])}: of the one with the least and of the one with the most; and of "
        "all in each domain, of the first seed:"
    )
    yield _load_table(found)
    yield "Images: Frechet distance (less is better), and how often emoji-cnn sees the style asked:"
    yield _images_table(found)
    yield (
        f"Phase 2, scenes are added: loss on {_words(SPLITS[0])} of old domains before and after, "
        "how much it grew (with its interval as above) and that of each, and loss of scenes:"
    )
    yield _forgetting_table(found)


def _losses_table(found: Results) -> str:
    rows = []
    base = found.summary(BASELINE, PLAIN, "macs_per_image")
    for name, ask, label in models(found, PHASE_1):
        macs = found.summary(name, ask, "macs_per_image")
        trained = found.summary(name, asks(name)[0], "macs_per_image")
        shares = [m.mean / base.mean if m and base else float("nan") for m in (macs, trained)]
        parameters = found.one(name, found.seeds(name)[0])["parameters"] / 1e6
        row: list[object] = [label, f"{parameters:.2f}", *(f"{share:.2f}" for share in shares)]
        row.append(len(found.seeds(name)))
        for style in STYLES:
            row.append(found.summary(name, ask, "splits", SPLITS[0], "domains", style, "loss"))
        row += [found.summary(name, ask, "splits", split, "styles") for split in SPLITS]
        rows.append(row)
    columns = ["model", "M parameters", "of an image", "of training", "seeds"]
    columns += [f"{style}, {_words(SPLITS[0])}" for style in STYLES]
    return comparison.markdown([*columns, *(_words(split) for split in SPLITS)], rows)


def _cost(found: Results) -> str:
    """What an image and the training cost the baseline: a step three times as much as forward."""
    macs = found.summary(BASELINE, PLAIN, "macs_per_image")
    if macs is None:
        return ""
    protocol = json.loads((found.out / SETTINGS_NAME).read_text())
    images = protocol["steps"] * protocol["batch_size"]
    return f" ({macs.mean / 1e6:.1f} M and {3 * macs.mean * images / 1e12:.1f} T)"


def _gap_cell(gap: Gap | None) -> str:
    if gap is None:
        return "-"
    summary, (low, high) = gap
    spread = "" if summary.deviation is None else f" +- {summary.deviation:.4f}"
    return f"{summary.mean:+.4f}{spread} [{low:+.4f}, {high:+.4f}]"


def _router_table(found: Results) -> str:
    rows: list[list[object]] = []
    levels: Sequence[float] = ()
    for name, label in ROUTERS.items():
        for split in SPLITS:
            levels, right = _right_by_level(found, name, split)
            whole = found.summary(name, asks(name)[0], "splits", split, "right")
            if whole is not None:
                shown = [whole.mean, *(summary.mean for summary in right)]
                rows.append([label, _words(split), *(f"{100 * mean:.1f}" for mean in shown)])
    columns = ["router reads", "images", "all", *(f"{level:.4g}" for level in levels)]
    return comparison.markdown(columns, rows)


def _right_by_level(found: Results, name: str, split: str) -> tuple[list[float], list[Summary]]:
    """Middles of levels of noise, and how often a router is right there; none if not measured."""
    by_seed = {
        seed: found.one(name, seed)["asked"][asks(name)[0]]["splits"][split]["right by level"]
        for seed in found.seeds(name)
    }
    columns = list(zip(*by_seed.values(), strict=True))
    middles = [(level + 0.5) / len(columns) for level in range(len(columns))]
    return middles, [Summary.of(dict(zip(by_seed, column, strict=True))) for column in columns]


def make_panels(found: Results) -> list[Panel]:
    """How often routers are right over levels of noise, a panel for each split."""
    panels = []
    for split in SPLITS:
        lines = []
        for name, label in ROUTERS.items():
            levels, right = _right_by_level(found, name, split)
            points = [
                Point(level, 100 * summary.mean, 100 * (summary.deviation or 0.0))
                for level, summary in zip(levels, right, strict=True)
            ]
            if points:
                lines.append(Line(f"router reads {label}", points))
        if lines:
            panels.append(Panel(_words(split), lines))
    return panels


def _load_table(found: Results) -> str:
    rows = []
    for name, ask, label in models(found, (*PHASE_1, "router", *PHASE_2)):
        entropy = found.summary(name, ask, "splits", SPLITS[0], "entropy")
        if entropy is None:
            continue
        splits = {
            s: found.one(name, s)["asked"][ask]["splits"][SPLITS[0]] for s in found.seeds(name)
        }
        shares = [
            Summary.of({seed: pick(one["load"]) for seed, one in splits.items()}).mean
            for pick in (min, max)
        ]
        first = next(iter(splits.values()))["domains"]
        by_domain = [
            " ".join(f"{100 * w:.0f}" for w in first[name]["weights"]) if name in first else "-"
            for name in NAMES
        ]
        rows.append([label, entropy, *(f"{100 * share:.1f}" for share in shares), *by_domain])
    return comparison.markdown(["model", "entropy", "least", "most", *NAMES], rows)


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
    split = SPLITS[0]
    for name, ask, label in models(found, tuple(PHASE_2)):
        both = (found.summary(n, ask, "splits", split, "styles") for n in (PHASE_2[name], name))
        row = [label, *both, _gap_cell(found.forgetting(name, ask, split))]
        for style in STYLES:
            gap = found.forgetting(name, ask, split, [style])
            row.append("-" if gap is None else f"{gap.summary.mean:+.4f}")
        row.append(found.summary(name, ask, "splits", split, "domains", SCENE, "loss"))
        rows.append(row)
    columns = ["training", "old domains before", "after", "forgetting", *STYLES, "scenes after"]
    return comparison.markdown(columns, rows)


def _drawn(found: Results) -> Iterator[tuple[str, str, str]]:
    """Those of `models` that images were drawn of."""
    for name, ask, label in models(found, PHASE_1):
        if ask in DRAWN[name]:
            yield name, ask, label


def draw_sheet(found: Results, drawn: Sequence[tuple[str, str, str]]) -> NDArray[np.uint8]:
    """A sheet of real drawings, style by style, and of what models drew of the same classes."""
    name, ask, _ = drawn[0]
    styles = found.array(name, found.seeds(name)[0], f"{ask}/styles")
    columns = np.concatenate(
        [np.flatnonzero(styles == number)[:SHOWN] for number in range(len(STYLES))]
    )
    real = np.load(found.out / f"{REFERENCES}.npy")
    rows = [SheetRow(f"real drawings: {', '.join(STYLES)}", list(real[columns]))]
    for name, ask, label in drawn:
        seed = found.seeds(name)[0]
        pictures = found.array(name, seed, f"{ask}/pictures")
        rows.append(SheetRow(f"{label}, seed {seed}", list(pictures[columns])))
    return contact_sheet(rows)


def _words(split: str) -> str:
    return split.replace("_", " ")
