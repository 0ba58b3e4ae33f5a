"""The report of the study of MoNE at several capacities: tables, numbers and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from torchtitan_mixtures.studies import comparison
from torchtitan_mixtures.studies.chart import Line, Panel, Point, draw_chart
from torchtitan_mixtures.studies.comparison import Summary
from torchtitan_mixtures.studies.mone_capacities import (
    ADAPTIVE,
    DENSE,
    FIXED,
    RANDOM,
    SAME_FLOPS,
    SPLITS,
    TIMES,
    VARIANTS,
    Variant,
)
from torchtitan_mixtures.studies.pieces import write_json

PICTURE = "capacities.png"

METRICS = (*SPLITS, *(f"{split} loss" for split in SPLITS))
"""What is compared: of each split the share of right answers in percent, and the loss."""


class Question(NamedTuple):
    """A model, and how it was asked.

    Attributes:
        variant: Its name.
        capacity: What was asked for.
        is_random: Whether its router was replaced by chance.
    """

    variant: str
    capacity: float
    is_random: bool = False

    def __str__(self) -> str:
        if self.variant == DENSE.name:
            return self.variant
        routing = ", random routing" if self.is_random else ""
        return f"{self.variant} at {self.capacity:g}{routing}"


class Results:
    """What was measured.

    Args:
        results: Of all trainings of the study.

    Attributes:
        measured: `METRICS`, by seed, of each question.
        facts: What the evaluation says of a question beside, of some seed.
    """

    def __init__(self, results: Sequence[dict[str, Any]]) -> None:
        self.results = results
        self.measured: dict[str, dict[int, dict[str, float]]] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        for variant in self.variants:
            for one in self.results:
                if one["variant"] == variant.name:
                    self._add(one)

    def _add(self, one: dict[str, Any]) -> None:
        for is_random, splits in ((False, one["splits"]), (True, one["random"] or {})):
            for split, rows in splits.items():
                for row in rows:
                    question = str(Question(one["variant"], row["capacity"], is_random))
                    found = self.measured.setdefault(question, {}).setdefault(one["seed"], {})
                    found[split] = 100 * row["accuracy"]["share"]
                    found[f"{split} loss"] = row["loss"]
                    dense = one["dense_macs_per_image"]
                    self.facts[question] = {**row, "dense_macs_per_image": dense}

    @property
    def variants(self) -> list[Variant]:
        """Models that there are numbers of."""
        names = {one["variant"] for one in self.results}
        return [variant for variant in VARIANTS if variant.name in names]

    @property
    def own(self) -> list[str]:
        """Every model at the capacities that it was made for."""
        questions = [str(Question(v.name, c)) for v in self.variants for c in v.own]
        return [question for question in questions if question in self.measured]

    @property
    def capacities(self) -> list[float]:
        """Capacities that nested models were asked at."""
        rows = [
            row
            for one in self.results
            if one["variant"] != DENSE.name
            for row in one["splits"][SPLITS[0]]
        ]
        return sorted({row["capacity"] for row in rows})

    def summary(self, question: Question, metric: str) -> Summary | None:
        """A number over seeds; None if there is none."""
        seeds = self.measured.get(str(question))
        if seeds is None:
            return None
        return Summary.of({seed: found[metric] for seed, found in seeds.items()})

    def gaps(self, pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, Summary]]:
        """How far the first of each pair of questions is from the second, of equal seeds."""
        found = {}
        for question, baseline in pairs:
            two = {name: self.measured[name] for name in (question, baseline)}
            gap = comparison.differences(two, METRICS, baseline).get(question)
            if gap is not None:
                found[f"{question} - {baseline}"] = gap
        return found

    @property
    def gaps_to_dense(self) -> dict[str, dict[str, Summary]]:
        """How far models are from the dense one."""
        if DENSE.name not in self.measured:
            return {}
        return self.gaps([(q, DENSE.name) for q in self.own if q != DENSE.name])

    @property
    def gaps_of_routing(self) -> dict[str, dict[str, Summary]]:
        """What learned routing is worth: against models trained without, and without it later."""
        return self.gaps([pair for pair in self._routing_pairs() if set(pair) <= {*self.measured}])

    def _routing_pairs(self) -> Iterator[tuple[str, str]]:
        for variant in RANDOM:
            capacity = variant.own[0]
            learned = Question(f"fixed {capacity:g}", capacity)
            yield str(learned), str(Question(variant.name, capacity))
        for variant in (*FIXED, SAME_FLOPS, ADAPTIVE):
            for capacity in variant.own:
                asked = Question(variant.name, capacity)
                yield str(asked), str(asked._replace(is_random=True))


# --- writing --------------------------------------------------------------------------------------


def write_report(out: Path) -> str:
    """Write `report.json`, `report.md` and the picture of what is measured so far.

    Returns:
        The Markdown.

    Raises:
        ValueError: Nothing is measured yet.
    """
    results = [json.loads(path.read_text()) for path in sorted(out.glob("results/*.json"))]
    if not results:
        raise ValueError(f"{out} holds no finished training of a study; begin one with `run`.")
    path = out / f"{TIMES}.json"
    times = json.loads(path.read_text()) if path.exists() else None
    found = Results(results)
    write_json(out / "report.json", _as_json(found) | {"times": times, "results": results})
    text = "\n\n".join(_sections(found, times))
    (out / "report.md").write_text(text + "\n", encoding="utf-8")
    chart = draw_chart(make_panels(found), "M multiply-adds an image", "top-1, %")
    Image.fromarray(chart).save(out / PICTURE)
    return text


def _as_json(found: Results) -> dict[str, Any]:
    return {
        "models": comparison.as_json(comparison.summarise(found.measured, METRICS)),
        "differences to dense": comparison.as_json(found.gaps_to_dense),
        "learned minus random routing": comparison.as_json(found.gaps_of_routing),
    }


def _sections(found: Results, times: dict[str, Any] | None) -> Iterator[str]:
    yield "Mean and standard deviation over seeds; each model at what it was trained for:"
    yield _main_table(found, times)
    trained = {v.name: Summary.of(_train_accuracies(found, v.name)) for v in found.variants}
    shown = ", ".join(f"{name} {_percent(summary)}" for name, summary in trained.items())
    yield f"Top-1 in % on training images as they are (adaptive: at capacity 0.5): {shown}."
    if gaps := found.gaps_to_dense:
        yield "Differences of equal seeds to the dense model, percentage points of top-1:"
        yield _gap_table(gaps)
    for split in SPLITS:
        yield f"Top-1 in % on {_words(split)} at other capacities than the own (bold):"
        yield _matrix(found, split)
    if gaps := found.gaps_of_routing:
        yield "What the router is worth, percentage points of top-1, of equal seeds:"
        yield _gap_table(gaps)
    if times:
        settings = times["settings"]
        yield (
            f"Time forward, {settings['batch']} images at once, {settings['threads']} thread(s), "
            f"{settings['rounds']} interleaved rounds, fp32:"
        )
        yield _time_table(found, times)


def _main_table(found: Results, times: dict[str, Any] | None) -> str:
    columns = ["model", "realised e_c", "M multiply-adds", "of dense", "time of dense", "seeds"]
    for split in SPLITS:
        columns += [f"top-1, {_words(split)}, %", f"loss, {_words(split)}"]
    summaries = comparison.summarise(found.measured, METRICS)
    rows = []
    for question in found.own:
        fact = found.facts[question]
        macs, dense = fact["macs_per_image"], fact["dense_macs_per_image"]
        timed = "dense" if question == DENSE.name else f"{fact['capacity']:g}"
        ratio = times["forward"].get(timed) if times else None
        row = [question, f"{fact['effective_capacity']:.3f}", f"{macs / 1e6:.1f}"]
        row += [f"{macs / dense:.2f}", f"{ratio['ratio'][1]:.2f}" if ratio else "-"]
        row.append(str(len(found.measured[question])))
        for split in SPLITS:
            loss = summaries[question][f"{split} loss"]
            row += [_percent(summaries[question][split]), _number(loss, 3)]
        rows.append(row)
    return comparison.markdown(columns, rows)


def _train_accuracies(found: Results, variant: str) -> dict[int, float]:
    return {
        one["seed"]: 100 * one["train"]["accuracy"]["share"]
        for one in found.results
        if one["variant"] == variant
    }


def _gap_table(gaps: dict[str, dict[str, Summary]]) -> str:
    columns = ["models"]
    for split in SPLITS:
        columns += [f"{_words(split)}", "of each seed"]
    rows = []
    for name, gap in gaps.items():
        row = [name]
        for split in SPLITS:
            values = ", ".join(f"{value:+.1f}" for value in gap[split].values.values())
            row += [_percent(gap[split], sign="+"), values]
        rows.append(row)
    return comparison.markdown(columns, rows)


def _matrix(found: Results, split: str) -> str:
    """Accuracy on a split by model and capacity."""
    rows = []
    for variant in found.variants:
        row = [variant.name]
        for capacity in found.capacities if variant.is_nested else ():
            summary = found.summary(Question(variant.name, capacity), split)
            shown = "-" if summary is None else _percent(summary)
            is_own = capacity in variant.own and variant is not ADAPTIVE
            row.append(f"**{shown}**" if is_own else shown)
        if variant.is_nested:
            rows.append(row)
    return comparison.markdown(["model", *(f"{c:g}" for c in found.capacities)], rows)


def _time_table(found: Results, times: dict[str, Any]) -> str:
    macs = {f"{f['capacity']:g}": f for q, f in found.facts.items() if q != DENSE.name}
    rows = []
    for name, row in times["forward"].items():
        low, median, high = row["ratio"]
        fact = macs.get(name)
        spent = fact["macs_per_image"] / fact["dense_macs_per_image"] if fact else 1.0
        ms = f"{row['milliseconds_per_image']:.3f}"
        rows.append([name, ms, f"{median:.3f} [{low:.3f}, {high:.3f}]", f"{spent:.3f}"])
    columns = ["e_c", "ms an image", "time to dense [quartiles]", "multiply-adds to dense"]
    return comparison.markdown(columns, rows)


def make_panels(found: Results) -> list[Panel]:
    """Accuracy over multiply-adds, a panel for each split."""
    groups = {
        "dense": [Question(DENSE.name, 1.0)],
        "trained at each capacity": [Question(v.name, v.own[0]) for v in FIXED],
        "adaptive, one model": [Question(ADAPTIVE.name, c) for c in ADAPTIVE.own],
        "the same, random routing": [Question(ADAPTIVE.name, c, True) for c in ADAPTIVE.own],
        "trained with random routing": [Question(v.name, v.own[0]) for v in RANDOM],
        "trained for as many FLOPs as dense": [Question(v.name, v.own[0]) for v in (SAME_FLOPS,)],
    }
    panels = []
    for split in SPLITS:
        lines = []
        for label, questions in groups.items():
            points = [
                Point(found.facts[str(q)]["macs_per_image"] / 1e6, s.mean, s.deviation or 0.0)
                for q in questions
                if (s := found.summary(q, split)) is not None
            ]
            if points:
                lines.append(Line(label, points, is_level=label == "dense"))
        panels.append(Panel(_words(split), lines))
    return panels


def _words(split: str) -> str:
    return split.replace("_", " ")


def _percent(summary: Summary, sign: str = "") -> str:
    return _number(summary, 1, sign)


def _number(summary: Summary, digits: int, sign: str = "") -> str:
    """A mean and its standard deviation, in so many digits."""
    spread = "" if summary.deviation is None else f" +- {summary.deviation:.{digits}f}"
    return f"{summary.mean:{sign}.{digits}f}{spread}"
