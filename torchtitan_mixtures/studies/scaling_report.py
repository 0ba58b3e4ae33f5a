"""What a scaling study found: tables of all scalars and runs, fitted laws, and a chart."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from PIL import Image

from torchtitan_mixtures.studies import scaling_fit
from torchtitan_mixtures.studies.chart import Line, Panel, Point, Span, draw_chart
from torchtitan_mixtures.studies.comparison import Summary, markdown
from torchtitan_mixtures.studies.pieces import SETTINGS_NAME, write_json
from torchtitan_mixtures.studies.scaling_file import Metric
from torchtitan_mixtures.studies.scaling_fit import PowerLaw, PowerLawWithFloor, Sample
from torchtitan_mixtures.studies.scaling_runs import failure_of, folder_of, is_done
from torchtitan_mixtures.studies.scaling_scalars import (
    read_scalars,
    summarise_run,
    write_scalars,
    write_summary,
)

Row = Mapping[str, Any]


class Axis(NamedTuple):
    """What losses are laid out over."""

    key: str
    title: str
    label: str


AXES = (
    Axis("parameters", "parameters", "active parameters"),
    Axis("non_embedding_parameters", "outside embeddings", "active parameters outside embeddings"),
    Axis("training_flops", "compute", "FLOPs of the training"),
    Axis("seconds", "time", "seconds of training"),
)


class Fitted(NamedTuple):
    """The laws of a line over an axis.

    Attributes:
        law: The power law, or why there is none.
        floored: That which ends at a floor, or why there is none.
    """

    law: PowerLaw | str
    floored: PowerLawWithFloor | str


Fits = Mapping[str, Mapping[str, Fitted]]
"""By key of the axis and by label."""


def write_report(out: Path) -> str:
    """Write the tables, the chart and the fits of what a study has so far.

    Args:
        out: The study's folder; `scalars.csv`, `runs.csv`, `report.json`, `report.md` and, once a
            run is done, `chart.png` are written into it.

    Returns:
        The Markdown.

    Raises:
        ValueError: The folder holds no study.
    """
    path = out / SETTINGS_NAME
    if not path.exists():
        raise ValueError(f"{out}: holds no scaling study; begin it, without --report.")
    settings = json.loads(path.read_text())
    metric = Metric(**settings["metric"])
    found = []
    for run, of_run in settings["runs"].items():
        scalars = read_scalars(folder_of(out, run))
        complete = is_done(out, run, of_run["steps"], metric)
        found.append((summarise_run(run, of_run, scalars, metric, complete), scalars))
    rows = [row for row, _ in found]
    write_scalars(out / "scalars.csv", found)
    write_summary(out / "runs.csv", rows)
    done = [row for row in rows if row["done"]]
    fits = fit_all(done)
    reasons = {row["run"]: failure_of(out, row["run"]) for row in rows if not row["done"]}
    failed = {run: reason for run, reason in reasons.items() if reason is not None}
    write_json(out / "report.json", _strict(_as_json(settings, rows, fits, failed)))
    if drawn := panels(done, fits):
        Image.fromarray(draw_chart(drawn, "", metric.tag)).save(out / "chart.png")
    text = as_markdown(settings, rows, fits, failed)
    (out / "report.md").write_text(text + "\n", encoding="utf-8")
    return text


def parameters_of(row: Row) -> int:
    """Active parameters; all of a family that does not count them."""
    active = row["active_parameters"]
    return row["stored_parameters"] if active is None else active


def by_label(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each line, in their order."""
    return {
        label: [row for row in rows if row["label"] == label]
        for label in dict.fromkeys(row["label"] for row in rows)
    }


def samples_of(rows: Sequence[Row], axis: Axis) -> list[Sample]:
    """Runs as points over an axis."""
    return [
        Sample(
            row["flavor"],
            parameters_of(row) if axis.key == "parameters" else row[axis.key],
            row["metric"],
        )
        for row in rows
    ]


def fit_all(done: Sequence[Row]) -> dict[str, dict[str, Fitted]]:
    """Fit laws to the runs of each label that are done."""

    def fit(samples: Sequence[Sample]) -> Fitted:
        few = scaling_fit.obstacle(samples, scaling_fit.MIN_SIZES_WITH_FLOOR)
        try:
            return Fitted(
                scaling_fit.obstacle(samples) or scaling_fit.fit_power_law(samples),
                few or scaling_fit.fit_with_floor(samples),
            )
        except OverflowError:  # so steep a law that its scale is no number
            close = "sizes lie too close together on the axis"
            return Fitted(close, few or close)

    return {
        axis.key: {label: fit(samples_of(rows, axis)) for label, rows in by_label(done).items()}
        for axis in AXES
    }


def panels(done: Sequence[Row], fits: Fits) -> list[Panel]:
    """Lay the runs out, a dot each, with their laws and the intervals of those.

    What is not above 0, or no number, has no place on a logarithmic axis and is left out.
    """
    result = []
    for axis in AXES:
        lines = []
        for label, rows in by_label(done).items():
            samples = [
                s for s in samples_of(rows, axis) if math.isfinite(s.y) and min(s.x, s.y) > 0
            ]
            dots = [Point(sample.x, sample.y) for sample in sorted(samples, key=lambda s: s.x)]
            if dots:
                lines.append(Line(label, dots, is_joined=False))
            law = fits[axis.key][label].law
            if isinstance(law, PowerLaw):
                band = [Span(*span) for span in law.band]
                fitted = [Point(span.x, law.at(span.x)) for span in band]
                lines.append(Line(label, fitted, has_dots=False, band=band))
        if lines:
            result.append(Panel(axis.title, lines, is_logarithmic=True, x_label=axis.label))
    return result


def as_markdown(
    settings: Mapping[str, Any], rows: Sequence[Row], fits: Fits, failed: Mapping[str, str]
) -> str:
    """What was found, as tables.

    Args:
        settings: Of the study.
        rows: Of its runs.
        fits: Laws through those that are done.
        failed: Why runs failed, by their names.
    """
    done, left = ([row for row in rows if row["done"] is state] for state in (True, False))
    tag, last = settings["metric"]["tag"], settings["metric"]["last"]
    of_last = f", mean of the last {last} logged" if last > 1 else ""
    parts = [
        f"# {settings['name']}",
        f"{len(done)} of {len(rows)} runs are done. Compared: `{tag}`{of_last}; mean and standard "
        "deviation over seeds. Seconds are those of training steps, without start-up and "
        "validation; runs side by side slow each other down.",
        _sizes_table(done),
        "Power laws, loss = a x^-b, by least squares in logarithms:",
        _laws_table(fits),
    ]
    floors = _floors_table(fits)
    if floors:
        parts += ["Power laws that end at a floor, loss = e + a x^-b:", floors]
    for row in left:
        if row["run"] in failed:
            parts.append(f"Failed (last logged step: {row['step']}): {failed[row['run']]}")
    names = [f"{row['run']} (step {row['step']})" for row in left if row["run"] not in failed]
    if names:
        parts.append(f"Not done: {', '.join(names)}.")
    return "\n\n".join(parts)


def _sizes_table(done: Sequence[Row]) -> str:
    columns = [
        "line", "flavour", "seeds", "parameters", "active", "outside embeddings",
        "FLOPs per token", "tokens", "training FLOPs", "seconds", "loss",
    ]  # fmt: skip
    table = []
    for label, rows in by_label(done).items():
        for flavor in dict.fromkeys(row["flavor"] for row in rows):
            same = [row for row in rows if row["flavor"] == flavor]
            one = same[0]
            active = one["active_parameters"]
            table.append([
                label, flavor, len(same), f"{one['stored_parameters']:,}",
                "not counted" if active is None else f"{active:,}",
                f"{one['non_embedding_parameters']:,}", f"{one['flops_per_token']:,}",
                f"{one['tokens']:,}", f"{fmean(row['training_flops'] for row in same):.3g}",
                f"{fmean(row['seconds'] for row in same):.1f}",
                Summary.of({row["seed"]: row["metric"] for row in same}),
            ])  # fmt: skip
    return markdown(columns, table)


def _laws_table(fits: Fits) -> str:
    table: list[list[object]] = []
    for axis in AXES:
        for label, (law, _) in fits[axis.key].items():
            if isinstance(law, str):
                table.append([axis.label, label, "-", "-", f"no fit: {law}", "-"])
            else:
                interval = f"{law.low:.4f} to {law.high:.4f} ({law.method})"
                numbers = f"{law.scale:.4g}", f"{law.exponent:.4f}"
                table.append([axis.label, label, *numbers, interval, law.num_sizes])
    return markdown(["over", "line", "a", "b", "95 % interval of b", "sizes"], table)


def _floors_table(fits: Fits) -> str:
    """Of laws with a floor; empty where there are none."""
    table = [
        [axis.label, label, f"{law.floor:.4f}", f"{law.scale:.4g}", f"{law.exponent:.4f}"]
        for axis in AXES
        for label, (_, law) in fits[axis.key].items()
        if isinstance(law, PowerLawWithFloor)
    ]
    return markdown(["over", "line", "e", "a", "b"], table) if table else ""


def _strict(content: Any) -> Any:
    """Put null in the place of numbers that JSON does not have."""
    if isinstance(content, dict):
        return {key: _strict(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_strict(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _as_json(
    settings: Mapping[str, Any], rows: Sequence[Row], fits: Fits, failed: Mapping[str, str]
) -> dict[str, Any]:
    def laws(fitted: Fitted) -> dict[str, Any]:
        law, floored = fitted
        return {
            "power law": law if isinstance(law, str) else asdict(law),
            "with floor": floored if isinstance(floored, str) else floored._asdict(),
        }

    return {
        "name": settings["name"],
        "metric": settings["metric"],
        "runs": list(rows),
        "failed": dict(failed),
        "fits": {
            key: {label: laws(fitted) for label, fitted in of_axis.items()}
            for key, of_axis in fits.items()
        },
    }
