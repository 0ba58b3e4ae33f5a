"""What a scaling study trains, as its TOML says, checked before anything runs.

A study is a list of entries. An entry names a configuration and flavours of it that make one line
of the chart; entries of the same label make one line together. Each flavour is trained once for
each seed. Everything else about a run is in the configuration and in overrides, written as on the
command line of `torchtitan_mixtures.train`.
"""

# No `from __future__ import annotations` here: keys are checked against the real types of fields.

import contextlib
import dataclasses
import io
import re
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures.config_values import check_table
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.objectives.classification import lengthen_to_same_flops
from torchtitan_mixtures.planning.world import world_size_in_environment
from torchtitan_mixtures.train import parse_job

OWN_KEYS = (
    "config",
    "job.config_file",
    "job.dump_folder",
    "model.flavor",
    "debug.seed",
    "multimodal.seed",
)
"""What a study sets itself, so that no override may."""


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


@dataclass(frozen=True)
class Facts:
    """What a model holds and costs, before it is trained."""

    stored: int
    """Parameters of the model."""

    active: int | None
    """Those that a token passes through; None where the family does not count them."""

    non_embedding: int
    """Those of `active`, or else of `stored`, that are not looked up in an `nn.Embedding`."""

    flops_per_token: int
    """Of a training step, as the family counts them; `mone` counts images."""


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: Of its folder; no other run of the study has it.
        label: Line of the chart.
        flavor: Size.
        seed: Seed.
        arguments: Of `torchtitan_mixtures.train`, but for the folder.
        steps: The step it ends with.
        facts: Of its model.
        job: The whole configuration, without `[job]`.
    """

    name: str
    label: str
    flavor: str
    seed: int
    arguments: list[str]
    steps: int
    facts: Facts
    job: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """What may not change while a study goes on."""
        settings = dataclasses.asdict(self)
        # Paths: the configuration is in `job`, and where it was read from does not matter.
        del settings["arguments"], settings["name"]
        return settings


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
    with _named(path):
        # Lists of tables are beyond check_table.
        entries = table.get("runs")
        if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
            raise ValueError("runs: one or more [[runs]] with label, config and flavors must be.")
        check_table(Study, {key: value for key, value in table.items() if key != "runs"})
        for number, entry in enumerate(entries):
            check_table(Entry, entry, f"runs[{number}].")
            _require_keys(Entry, entry, f"runs[{number}].")
        _require_keys(Study, table, "")
        _require_keys(Metric, table["metric"], "metric.")
        table["metric"] = Metric(**table["metric"])
        table["runs"] = [Entry(**entry) for entry in entries]
        study = Study(**table)
        _check_values(study)
    return study


@contextlib.contextmanager
def _named(where: object) -> Iterator[None]:
    """Say of errors where they are."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _require_keys(of: type, table: dict[str, Any], prefix: str) -> None:
    for key in dataclasses.fields(of):
        needed = key.default is key.default_factory is dataclasses.MISSING
        if needed and key.name not in table:
            raise ValueError(f"{prefix}{key.name}: is missing; set it.")


def _check_values(study: Study) -> None:
    if not re.fullmatch(r"[\w.-]+", study.name):
        raise ValueError(f"name = {study.name!r}: must be letters, digits, '_', '.' or '-'.")
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
        if not entry.label or not entry.flavors:
            raise ValueError(
                f"runs[{number}]: label = {entry.label!r}, flavors = {entry.flavors}: neither may "
                "be empty."
            )
        _check_overrides(f"runs[{number}].overrides", entry.overrides)


def _check_overrides(key: str, overrides: Sequence[str]) -> None:
    for override in overrides:
        name = override.partition("=")[0].removeprefix("--").replace("-", "_")
        if override.startswith("--") and name in OWN_KEYS:
            raise ValueError(
                f"{key}: {override!r}: the study sets {name} itself, of config, flavors, seeds "
                "and out; remove it."
            )


# --- the runs -------------------------------------------------------------------------------------


def plan_runs(path: Path, study: Study) -> list[Run]:
    """Make the runs of a study, each checked as the training would, and in the order of the file.

    Args:
        path: The study's file.
        study: What it says.

    Raises:
        ValueError: Names the file, the entry, the flavour, and what is wrong.
    """
    runs: dict[str, Run] = {}
    for number, entry in enumerate(study.runs):
        for flavor in entry.flavors:
            for seed in study.seeds:
                where = f"{path}: runs[{number}] ({entry.label!r}), flavor {flavor!r}"
                with _named(where):
                    run = _plan_run(path, study, entry, flavor, seed)
                    if run.name in runs:
                        raise ValueError(
                            f"there is a run {run.name!r} already; give one of them another label."
                        )
                runs[run.name] = run
    return list(runs.values())


def _plan_run(path: Path, study: Study, entry: Entry, flavor: str, seed: int) -> Run:
    config = (path.parent / entry.config).resolve()
    arguments = [
        f"--config={config}",
        *study.overrides,
        *entry.overrides,
        f"--model.flavor={flavor}",
        f"--debug.seed={seed}",
        f"--multimodal.seed={seed}",
    ]
    job = _parse(arguments, study.nproc_per_node)
    _check_job(job, study.metric)
    settings = job.to_dict()
    del settings["job"]
    return Run(
        re.sub(r"[^\w.]+", "-", f"{entry.label}-{flavor}-{seed}"),
        entry.label,
        flavor,
        seed,
        arguments,
        job.training.steps,
        _facts(job),
        settings,
    )


def _parse(arguments: Sequence[str], num_processes: int) -> MixtureJobConfig:
    """Parse and check a training's arguments for so many processes."""
    printed = io.StringIO()
    try:
        # An empty folder: what a run goes on from is its own to check. Warnings are in its log.
        with (
            world_size_in_environment(num_processes),
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stderr(printed),
        ):
            job = parse_job([*arguments, f"--job.dump_folder={folder}"])
    except SystemExit:  # how the command line's parser refuses what it does not know
        raise ValueError(_refusal(printed.getvalue())) from None
    if job.nested.same_flops:
        lengthen_to_same_flops(job)
    return job


def _refusal(printed: str) -> str:
    """Make one line of the box that the command line's parser prints, in whichever characters.

    It has a title, and then parts between rules: what is wrong, and what may have been meant.
    """
    lines = [re.sub(r"[^\x20-\x7e]", "", line).strip(" |") for line in printed.splitlines()[1:]]
    text = "\n".join(line if line.strip("-") else "" for line in lines)
    wrong, *parts = text.strip("\n").split("\n\n")
    hints = [part for part in parts if part.startswith("Perhaps")]
    near = ", ".join(re.findall(r"^(--\S+)", "\n".join(hints), re.M))
    remedy = f"; did you mean {near}?" if near else "; mend it."
    return f"overrides: {' '.join(wrong.split())}{remedy}"


def _check_job(job: MixtureJobConfig, metric: Metric) -> None:
    """Check what a study needs of a run: that it can go on, and that its last step is logged."""
    steps, log_freq = job.training.steps, job.metrics.log_freq
    rules = [
        (job.checkpoint.enable, "checkpoint.enable = false", "true, to go on where it stopped"),
        (
            job.checkpoint.folder == "checkpoint",
            f"checkpoint.folder = {job.checkpoint.folder!r}",
            "'checkpoint', where the study looks for what is done",
        ),
        (job.metrics.enable_tensorboard, "metrics.enable_tensorboard = false", "true"),
        (not job.metrics.save_for_all_ranks, "metrics.save_for_all_ranks = true", "false"),
        (
            steps % log_freq == 0,
            f"metrics.log_freq = {log_freq}",
            f"a divisor of training.steps = {steps}, so that the last step is logged",
        ),
    ]
    if metric.tag.startswith("validation/"):
        freq, (_, split, *_) = job.validation.freq, metric.tag.split("/")
        splits = job.multimodal.validation_splits
        rules += [
            (job.validation.enable, "validation.enable = false", f"true, for {metric.tag!r}"),
            (
                steps % freq == 0,
                f"validation.freq = {freq}",
                f"a divisor of training.steps = {steps}, so that the last step is validated",
            ),
            (
                split in splits,
                f"metric.tag = {metric.tag!r}",
                f"of a split in multimodal.validation_splits = {splits}",
            ),
        ]
    for holds, found, allowed in rules:
        if not holds:
            raise ValueError(f"{found}: must be {allowed}.")


def _facts(job: MixtureJobConfig) -> Facts:
    spec = get_train_spec(job.model.name)
    args: Any = spec.model_args[job.model.flavor]
    args.update_from_config(job)
    with torch.device("meta"):
        model = spec.model_cls(args)
    stored, flops = args.get_nparams_and_flops(model, job.training.seq_len)
    active = getattr(args, "num_active_parameters", None)
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    looked_up = sum(table.weight.numel() for table in tables)
    return Facts(stored, active, (stored if active is None else active) - looked_up, flops)
