"""Loss over sizes: `python scripts/scaling_study.py STUDY.toml [--out DIR]`.

Trains what the study's file says, one run after another, each through torchrun, and reports: all
scalars (`scalars.csv`), a row for each run (`runs.csv`), power laws with their 95 % intervals
(`report.md`, `report.json`), and a chart over parameters, compute and time (`chart.png`).

Every run is checked before the first begins, and that it logs the metric as far as that is known;
the first run that ends without it lets no other begin. A study can be stopped at any moment, which
ends its runs too, and goes on with the same command. A run that fails or diverges is reported and
the rest goes on; the exit code is then 1, and the same command tries it again.
`studies/mot_ladder.toml` is an example.

- `--dry-run` says what would run, and what it holds and costs.
- `--report` reports what is done so far, also while the study is under way.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

# First: it points TorchTitan at the CPU if need be.
import torchtitan_mixtures  # noqa: F401  # isort: skip

from torchtitan_mixtures.studies.comparison import markdown
from torchtitan_mixtures.studies.pieces import Processes, leave_on_sigterm, note_settings, only_one
from torchtitan_mixtures.studies.scaling_file import Study, read_study
from torchtitan_mixtures.studies.scaling_plan import Run, plan_runs
from torchtitan_mixtures.studies.scaling_report import write_report
from torchtitan_mixtures.studies.scaling_runs import (
    command_of,
    run_all,
    settings_of,
    train_command,
)
from torchtitan_mixtures.user_errors import one_message

LAUNCHER = (sys.executable, str(Path(__file__).parent / "launch.py"))
"""torchrun, whose output ends with the message of an error in what was asked for."""


def dry_run(out: Path, study: Study, runs: Sequence[Run]) -> None:
    """Print what would run."""
    columns = ["run", "parameters", "active", "outside embeddings", "FLOPs per token", "steps"]
    table = [
        [
            run.name,
            f"{run.facts.stored:,}",
            "not counted" if run.facts.active is None else f"{run.facts.active:,}",
            f"{run.facts.non_embedding:,}",
            f"{run.facts.flops_per_token:,}",
            run.steps,
        ]
        for run in runs
    ]
    print(markdown(columns, table))
    for run in runs:
        print()
        print(shlex.join(train_command(out, run, study, LAUNCHER)))


def run(out: Path, study: Study, runs: Sequence[Run], jobs: int) -> int:
    """Do what is left of a study and report; return the exit code."""
    say = partial(print, flush=True)
    leave_on_sigterm()
    with only_one(out) as lock:
        note_settings(out, settings_of(study, runs), changeable=["metric"])
        processes = Processes(out / "logs", [lock])
        commands = {one.name: command_of(out, one, study, LAUNCHER) for one in runs}
        failures = run_all(out, runs, study.metric, commands, processes, jobs, say)
        for failure in failures:
            print(f"FAILED: {failure.reason()}", file=sys.stderr, flush=True)
        print(write_report(out))
    return 1 if failures else 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="TOML of the study")
    parser.add_argument("--out", type=Path, help="folder of the study, other than its file says")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print what would run")
    what.add_argument("--report", action="store_true", help="report what is done so far")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    options = parse(arguments)
    with one_message():
        study = read_study(options.study)
        out = options.out or study.folder
        if options.report:
            print(write_report(out))
            return 0
        runs = plan_runs(options.study, study)
        if options.dry_run:
            dry_run(out, study, runs)
            return 0
        return run(out, study, runs, options.jobs)
    return 2


if __name__ == "__main__":
    sys.exit(main())
