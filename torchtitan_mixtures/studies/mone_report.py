"""The report of the study of MoNE at several capacities: tables, numbers and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from torchtitan_mixtures.studies import comparison
from torchtitan_mixtures.studies.chart import Line, Panel, Point, draw_chart
from torchtitan_mixtures.studies.comparison import Summary
from torchtitan_mixtures.studies.mone_capacities import (
    ADAPTIVE,
    ALPHA,
    DENSE,
    DRAWS,
    FIXED,
    METRICS,
    NARROW,
    RANDOM,
    SAME_FLOPS,
    SPLITS,
    TIMES,
)
from torchtitan_mixtures.studies.mone_results import Gap, Gaps, Question, Results
from torchtitan_mixtures.studies.pieces import write_json

PICTURE = "capacities.png"


def write_report(out: Path) -> str:
    """Write `report.json`, `report.md` and the picture of what is measured so far.

    Returns:
        The Markdown.

    Raises:
        ValueError: Nothing is measured yet.
    """
    found = Results.read(out)
    path = out / f"{TIMES}.json"
    times = json.loads(path.read_text()) if path.exists() else None
    write_json(out / "report.json", _as_json(found) | {"times": times, "results": found.results})
    text = "\n\n".join(_sections(found, times))
    (out / "report.md").write_text(text + "\n", encoding="utf-8")
    charts = [draw_chart(make_panels(found), "M multiply-adds an image", "top-1, %")]
    if times is not None:
        by_time = make_panels(found, times)
        charts.append(draw_chart(by_time, "time forward, 1 = dense", "top-1, %"))
    chart = np.concatenate(charts)
    Image.fromarray(chart).save(out / PICTURE)
    return text


def _as_json(found: Results) -> dict[str, Any]:
    return {
        "primary metric": METRICS[0],
        "models": comparison.as_json(comparison.summarise(found.measured, METRICS)),
        "differences to dense": _gaps_as_json(found.gaps_to_dense),
        "differences to dense of about the same cost": _gaps_as_json(found.gaps_to_narrow),
        "own minus other routing": _gaps_as_json(found.gaps_of_routing),
    }


def _gaps_as_json(gaps: Gaps) -> dict[str, Any]:
    def plain(gap: Gap) -> dict[str, Any]:
        return gap.summary._asdict() | {"interval_95": gap.interval}

    return {
        pair: {metric: plain(gap) for metric, gap in found.items()} for pair, found in gaps.items()
    }


def _sections(found: Results, times: dict[str, Any] | None) -> Iterator[str]:
    yield (
        "Mean and standard deviation over seeds; each model at what it was trained for. The "
        f"primary metric is the loss on {_words(SPLITS[0])}:"
    )
    yield _main_table(found, times)
    shown = ", ".join(
        f"{v.name} {_number(Summary.of({s: 100 * r['train_accuracy'] for s, r in rs.items()}), 1)}"
        for v, rs in ((variant, found.of(variant)) for variant in found.variants)
    )
    yield f"Top-1 in % on training images as they are (adaptive: at capacity 0.5): {shown}."
    if gaps := found.gaps_to_dense:
        yield "Differences to the dense model. " + _ABOUT_GAPS
        yield _gap_table(gaps)
    if gaps := found.gaps_to_narrow:
        yield "Differences to narrower dense models that cost about as much, in the same way:"
        yield _gap_table(gaps)
    for split in SPLITS:
        yield f"Top-1 in % on {_words(split)} at other capacities than the own (bold):"
        yield _matrix(found, split)
    if gaps := found.gaps_of_routing:
        yield _ABOUT_ROUTING
        yield _gap_table(gaps)
    if any(one["router"] for one in found.results):
        yield (
            "Routers after training: alpha, mean entropy of a patch's probabilities (four alike: "
            f"{math.log(4):.3f} nats), and cosine between their weights then and at first:"
        )
        yield _router_table(found)
    if times:
        settings = times["settings"]
        yield (
            f"Time forward, {settings['batch']} images at once, {settings['threads']} thread(s), "
            f"{settings['rounds']} interleaved rounds, fp32:"
        )
        yield _time_table(found, times)


_ABOUT_GAPS = (
    "Of equal seeds: mean and standard deviation over seeds, and the 95 % interval of a paired "
    "bootstrap over seeds and emoji (all drawings of an emoji together), not corrected for the "
    "number of comparisons. Less loss is better; top-1 is in percentage points:"
)

_ABOUT_ROUTING = (
    "Own routing against other routing, in the same way. First the same model with its router's "
    f"initial weights put back, then with random routing (mean of {DRAWS} draws). Both take from "
    "the blocks the routing that they were trained with: what is lost need not be what the router "
    "learned, and random routing is not even consistent from one image to the next. Last, models "
    "that were trained with random routing, whose blocks are used to it:"
)


def _main_table(found: Results, times: dict[str, Any] | None) -> str:
    columns = ["model", "realised e_c", "M multiply-adds", "of dense", "time of dense", "seeds"]
    for split in SPLITS:
        columns += [f"loss, {_words(split)}", f"top-1, {_words(split)}, %"]
    summaries = comparison.summarise(found.measured, METRICS)
    rows = []
    for question in found.own:
        fact, name = found.facts[str(question)], str(question)
        ratio = times["forward"].get(_timed(question)) if times else None
        macs = fact["macs_per_image"]
        row = [name, f"{fact['effective_capacity']:.3f}", f"{macs / 1e6:.1f}"]
        row.append(f"{macs / found.dense_macs:.2f}" if found.dense_macs else "-")
        row += [f"{ratio['ratio'][1]:.2f}" if ratio else "-", str(len(found.measured[name]))]
        row += [_number(summaries[name][metric], _digits(metric)) for metric in METRICS]
        rows.append(row)
    return comparison.markdown(columns, rows)


def _gap_table(gaps: Gaps) -> str:
    columns = ["models"]
    for metric in METRICS:
        name = metric.removesuffix(" loss")
        columns += [f"{'loss' if name != metric else 'top-1'}, {_words(name)}", "95 %"]
    columns.insert(2, "of each seed")
    rows = []
    for name, gap in gaps.items():
        row = [name]
        for metric in METRICS:
            digits, (low, high) = _digits(metric), gap[metric].interval
            row.append(_number(gap[metric].summary, digits, sign="+"))
            row.append(f"[{low:+.{digits}f}, {high:+.{digits}f}]")
        values = gap[METRICS[0]].summary.values.values()
        row.insert(2, ", ".join(f"{value:+.{_digits(METRICS[0])}f}" for value in values))
        rows.append(row)
    return comparison.markdown(columns, rows)


def _matrix(found: Results, split: str) -> str:
    """Accuracy on a split by model and capacity."""
    rows = []
    for variant in found.variants:
        row = [variant.name]
        for capacity in found.capacities if variant.is_nested else ():
            summary = found.summary(Question(variant, capacity), split)
            shown = "-" if summary is None else _number(summary, 1)
            is_own = capacity in variant.own and not variant.is_adaptive
            row.append(f"**{shown}**" if is_own else shown)
        if variant.is_nested:
            rows.append(row)
    return comparison.markdown(["model", *(f"{c:g}" for c in found.capacities)], rows)


def _router_table(found: Results) -> str:
    keys, rows = ("alpha", "entropy", "cosine"), []
    for variant in found.variants:
        if variant.is_nested:
            routers = {seed: one["router"] for seed, one in found.of(variant).items()}
            numbers = [Summary.of({s: r[key] for s, r in routers.items()}) for key in keys]
            rows.append([variant.name, *(_number(number, 3) for number in numbers)])
    return comparison.markdown(["model", *keys], rows)


def _time_table(found: Results, times: dict[str, Any]) -> str:
    macs = {_timed(q): found.facts[str(q)]["macs_per_image"] for q in found.own}
    rows = []
    for name, row in times["forward"].items():
        low, median, high = row["ratio"]
        spent = macs.get(name.removesuffix(" again"))
        shown = f"{spent / found.dense_macs:.3f}" if spent and found.dense_macs else "-"
        ms = f"{row['milliseconds_per_image']:.3f}"
        rows.append([name, ms, f"{median:.3f} [{low:.3f}, {high:.3f}]", shown])
    columns = ["e_c or model", "ms an image", "time to dense [quartiles]", "multiply-adds to dense"]
    return comparison.markdown(columns, rows)


def _timed(question: Question) -> str:
    """What the measurement of time calls a question: it is the same for all nested models."""
    variant = question.variant
    return f"{question.capacity:g}" if variant.is_nested else variant.name


def make_panels(found: Results, times: dict[str, Any] | None = None) -> list[Panel]:
    """Accuracy over multiply-adds, or over times if they are given, a panel for each split."""
    late = next(variant for variant in ALPHA if variant.is_adaptive)
    groups = {
        "dense": [Question(DENSE, 1.0)],
        "dense, narrower": [Question(v, 1.0) for v in NARROW],
        "trained at each capacity": [Question(v, v.own[0]) for v in FIXED],
        "one for all (adaptive)": [Question(ADAPTIVE, c) for c in ADAPTIVE.own],
        "one for all, alpha from 0.1": [Question(late, c) for c in late.own],
        "trained with random routing": [Question(v, v.own[0]) for v in RANDOM],
        "trained for as many FLOPs as dense": [Question(SAME_FLOPS, SAME_FLOPS.own[0])],
    }
    panels = []
    for split in SPLITS:
        lines = []
        for label, questions in groups.items():
            points = [
                Point(_cost(found, q, times), s.mean, s.deviation or 0.0)
                for q in questions
                if (s := found.summary(q, split)) is not None
                and (times is None or _timed(q) in times["forward"])
            ]
            if points:
                lines.append(Line(label, points, is_level=label == "dense"))
        panels.append(Panel(_words(split), lines))
    return panels


def _cost(found: Results, question: Question, times: dict[str, Any] | None) -> float:
    """Multiply-adds of an image in millions, or the time to that of the dense model."""
    if times is None:
        return found.facts[str(question)]["macs_per_image"] / 1e6
    return times["forward"][_timed(question)]["ratio"][1]


def _words(split: str) -> str:
    return split.replace("_", " ")


def _digits(metric: str) -> int:
    return 3 if metric.endswith(" loss") else 1


def _number(summary: Summary, digits: int, sign: str = "") -> str:
    """A mean and its standard deviation, in so many digits."""
    spread = "" if summary.deviation is None else f" +- {summary.deviation:.{digits}f}"
    return f"{summary.mean:{sign}.{digits}f}{spread}"
