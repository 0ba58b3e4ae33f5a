"""The runs of a scaling study, each checked as its training would before any begins."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.objectives.classification import lengthen_to_same_flops
from torchtitan_mixtures.planning.world import world_size_in_environment
from torchtitan_mixtures.studies.scaling_file import Entry, Metric, Study, named
from torchtitan_mixtures.studies.scaling_tags import check_tag
from torchtitan_mixtures.train import parse_job


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
                with named(where):
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
        *entry.overrides_of.get(flavor, []),
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
    """Check what a study needs of a run: that it can go on, and that its last step is compared."""
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
    for holds, found, allowed in rules:
        if not holds:
            raise ValueError(f"{found}: must be {allowed}.")
    check_tag(metric, job)


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
