"""Scalars that the runs of a scaling study logged, and what a run was in one row."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchtitan_mixtures.studies.scaling_file import Metric

Scalars = Mapping[str, Mapping[int, float]]
"""Values by tag and step."""

SECONDS = "time_metrics/end_to_end(s)"
TOKENS = "n_tokens_seen"

SUMMARY_COLUMNS = (
    "run", "label", "flavor", "seed", "done", "step", "stored_parameters", "active_parameters",
    "non_embedding_parameters", "flops_per_token", "tokens", "training_flops", "seconds", "metric",
)  # fmt: skip


def read_scalars(folder: Path) -> Scalars:
    """Read the event files of a run.

    A run that was stopped and went on has a file of each time; steps that were trained twice are in
    two of them, and count as they were trained the last time.

    Args:
        folder: The run's, which need not exist yet.
    """
    files = []
    for path in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        tags: Any = events.Tags()  # the annotation of its values is that of other kinds too
        found = {tag: events.Scalars(tag) for tag in tags["scalars"]}
        if found:
            files.append((min(rows[0].wall_time for rows in found.values()), found))
    merged: dict[str, dict[int, float]] = {}
    for _, found in sorted(files, key=lambda file: file[0]):
        for tag, rows in found.items():
            merged.setdefault(tag, {}).update({row.step: row.value for row in rows})
    return {tag: dict(sorted(values.items())) for tag, values in sorted(merged.items())}


def metric_of(scalars: Scalars, metric: Metric, steps: int) -> float | None:
    """Value that a run is compared by; None while that of its last step is missing.

    Args:
        scalars: Of the run.
        metric: What is compared.
        steps: The last step.
    """
    values = scalars.get(metric.tag, {})
    if steps not in values:
        return None
    last = [value for step, value in values.items() if step <= steps][-metric.last :]
    return sum(last) / len(last)


def training_seconds(scalars: Scalars) -> float:
    """Seconds of all steps, without start-up and validation.

    What is logged is the mean of the steps since the last logged one (after a validation or the
    start of a process: of those since then). Each stands for all steps since the last logged one,
    so that a step counts once however often a run was stopped, and trained it again.
    """
    total, before = 0.0, 0
    for step, seconds in scalars.get(SECONDS, {}).items():
        total += seconds * (step - before)
        before = step
    return total


def summarise_run(
    run: str, settings: Mapping[str, Any], scalars: Scalars, metric: Metric, is_done: bool
) -> dict[str, Any]:
    """Make the row of a run; see `SUMMARY_COLUMNS`.

    Args:
        run: Its name.
        settings: Of the run, as the study's folder remembers them.
        scalars: What it logged.
        metric: What is compared.
        is_done: Whether it is complete; the metric of others is None.
    """
    facts = settings["facts"]
    seen = scalars.get(TOKENS, {})
    tokens = round(seen[max(seen)]) if seen else 0
    values = (
        run, settings["label"], settings["flavor"], settings["seed"], is_done,
        max(scalars.get(SECONDS, {0: 0})), facts["stored"], facts["active"],
        facts["non_embedding"], facts["flops_per_token"], tokens,
        tokens * facts["flops_per_token"], training_seconds(scalars),
        metric_of(scalars, metric, settings["steps"]) if is_done else None,
    )  # fmt: skip
    return dict(zip(SUMMARY_COLUMNS, values, strict=True))


def write_scalars(path: Path, runs: Iterable[tuple[Mapping[str, Any], Scalars]]) -> None:
    """Write a table of all scalars, a row each.

    Args:
        path: The CSV file.
        runs: Row of the run, and what it logged.
    """
    rows = (
        [run["run"], run["label"], run["flavor"], run["seed"], step, tag, value]
        for run, scalars in runs
        for tag, values in scalars.items()
        for step, value in values.items()
    )
    _write(path, ["run", "label", "flavor", "seed", "step", "tag", "value"], rows)


def write_summary(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Write a table of the runs, a row each."""
    _write(path, SUMMARY_COLUMNS, ([run[key] for key in SUMMARY_COLUMNS] for run in runs))


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
