"""What a scaling study trains, as its TOML says.

A study is a list of entries. An entry names a configuration and flavours of it that make one line
of the chart; entries of the same label make one line together. Each flavour is trained once for
each seed. Everything else about a run is in the configuration and in overrides, written as on the
command line of `torchtitan_mixtures.train`.
"""

# No `from __future__ import annotations` here: keys are checked against the real types of fields.

import contextlib
import dataclasses
import difflib
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchtitan_mixtures.config_values import check_table

OWN_KEYS = (
    "config",
    "job.config_file",
    "job.dump_folder",
    "model.flavor",
    "debug.seed",
    "multimodal.seed",
)
"""What a study sets itself, so that no override may."""

_NO_TRAINING = re.compile(r"(-h|--help|--tyro-.*)")
"""What lets the command line's parser print something and end."""


@dataclass(frozen=True)
class Metric:
    """The scalar that runs are compared by."""

    tag: str
    """As in TensorBoard: "validation/unseen_concept/loss", "loss_metrics/global_avg_loss"."""

    last: int = 1
    """The mean of so many last logged values is taken."""


@dataclass(frozen=True)
class Entry:
    """Flavours of a configuration."""

    label: str
    """The line of the chart."""

    config: str
    """TOML of the training, relative to the study's file."""

    flavors: list[str]
    """The sizes."""

    overrides: list[str] = field(default_factory=list)
    """As on the command line: ["--optimizer.lr=1e-3"]. They win over those of the study."""

    overrides_of: dict[str, list[str]] = field(default_factory=dict)
    """Of single flavours, by name; they win over those of the entry."""


@dataclass(frozen=True)
class Study:
    """A study's file."""

    name: str
    """Of the study."""

    metric: Metric
    """What is compared."""

    seeds: list[int]
    """Of the weights, the data and the noise; each trains every flavour."""

    runs: list[Entry]
    """What is trained."""

    out: str = ""
    """Folder of the study, from where the command is given; empty: outputs/studies/NAME."""

    nproc_per_node: int = 1
    """Processes of each run."""

    threads: int = 1
    """Threads of each process."""

    overrides: list[str] = field(default_factory=list)
    """Of all runs."""

    @property
    def folder(self) -> Path:
        """Where the study's files are, unless the command line says otherwise."""
        return Path(self.out or f"outputs/studies/{self.name}")


# --- the file -------------------------------------------------------------------------------------


def read_study(path: Path) -> Study:
    """Read a study's file and check its keys and values, but not yet what it trains.

    Raises:
        ValueError: Names the file, the key, its value and what is allowed.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    with named(path):
        # Lists of tables are beyond check_table.
        entries = table.get("runs")
        if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
            raise ValueError("runs: one or more [[runs]] with label, config and flavors must be.")
        _check_keys(Study, table, "")
        check_table(Study, {key: value for key, value in table.items() if key != "runs"})
        _check_keys(Metric, table["metric"], "metric.")
        for number, entry in enumerate(entries):
            _check_keys(Entry, entry, f"runs[{number}].")
            check_table(Entry, entry, f"runs[{number}].")
        table["metric"] = Metric(**table["metric"])
        table["runs"] = [Entry(**entry) for entry in entries]
        study = Study(**table)
        _check_values(study)
    return study


@contextlib.contextmanager
def named(where: object) -> Iterator[None]:
    """Say of errors where they are."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_keys(of: type, table: dict[str, Any], prefix: str) -> None:
    """Raise ValueError for the first key that is unknown, or else missing."""
    keys = {key.name: key for key in dataclasses.fields(of)}
    for name in table:
        if name not in keys:
            near = difflib.get_close_matches(name, keys, n=3, cutoff=0.5) or sorted(keys)
            raise ValueError(
                f"{prefix}{name}: unknown key; did you mean {', '.join(prefix + n for n in near)}?"
            )
    for name, key in keys.items():
        needed = key.default is key.default_factory is dataclasses.MISSING
        if needed and name not in table:
            raise ValueError(f"{prefix}{name}: is missing; set it.")


def _check_values(study: Study) -> None:
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", study.name):
        raise ValueError(
            f"name = {study.name!r}: must be letters, digits, '_', '.' or '-', and not dots or "
            "dashes alone, as a folder is named so."
        )
    seeds = study.seeds
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds = {seeds}: must be one or more different numbers of at least 0.")
    for key, value in (
        ("nproc_per_node", study.nproc_per_node),
        ("threads", study.threads),
        ("metric.last", study.metric.last),
    ):
        if value < 1:
            raise ValueError(f"{key} = {value}: must be 1 or more.")
    if not study.runs:
        raise ValueError("runs = []: nothing to train; add an entry, [[runs]].")
    _check_overrides("overrides", study.overrides)
    for number, entry in enumerate(study.runs):
        _check_entry(f"runs[{number}]", entry)


def _check_entry(key: str, entry: Entry) -> None:
    flavors = entry.flavors
    if not entry.label or not flavors:
        raise ValueError(
            f"{key}: label = {entry.label!r}, flavors = {flavors}: neither may be empty."
        )
    if len(set(flavors)) < len(flavors):
        raise ValueError(f"{key} ({entry.label!r}): flavors = {flavors}: must differ.")
    _check_overrides(f"{key}.overrides", entry.overrides)
    for flavor, overrides in entry.overrides_of.items():
        if flavor not in flavors:
            raise ValueError(
                f"{key} ({entry.label!r}): overrides_of.{flavor}: is no flavour of this entry, "
                f"flavors = {flavors}; add it there, or remove it."
            )
        _check_overrides(f"{key}.overrides_of.{flavor}", overrides)


def _check_overrides(key: str, overrides: Sequence[str]) -> None:
    for override in overrides:
        option = override.partition("=")[0].replace("_", "-")
        name = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and name in OWN_KEYS:
            raise ValueError(
                f"{key}: {override!r}: the study sets {name} itself, of config, flavors, seeds "
                "and out; remove it."
            )
        if _NO_TRAINING.fullmatch(option):
            raise ValueError(f"{key}: {override!r}: would train nothing; remove it.")
