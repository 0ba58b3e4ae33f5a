"""The runs of a scaling study: one after another, each going on where it stopped."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan_mixtures.studies.leash import leashed
from torchtitan_mixtures.studies.pieces import Command, Piece, Processes
from torchtitan_mixtures.studies.scaling_file import Metric, Run, Study
from torchtitan_mixtures.studies.scaling_scalars import metric_of, read_scalars

TAIL = 12
"""Lines of a failed run's log that are shown."""

_COLORS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Failure:
    """A run that failed.

    Attributes:
        run: Its name.
        message: What is wrong, in one line.
        log: What it printed.
    """

    run: str
    message: str
    log: Path

    def tail(self) -> str:
        """The last lines of the log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(_COLORS.sub("", line) for line in text.splitlines()[-TAIL:])

    def reason(self) -> str:
        """What is wrong, and the run's own last word on it where the log has one."""
        words = [line for line in self.tail().splitlines() if line.startswith("error: ")]
        return " ".join([self.message, *words[-1:]])


def folder_of(out: Path, run: str) -> Path:
    """Folder of a run, by its name."""
    return out / "runs" / run


def settings_of(study: Study, runs: Sequence[Run]) -> dict[str, Any]:
    """What a study's folder remembers of it."""
    return {
        "name": study.name,
        "metric": {"tag": study.metric.tag, "last": study.metric.last},
        "nproc_per_node": study.nproc_per_node,
        "threads": study.threads,
        "runs": {run.name: run.settings() for run in runs},
    }


def is_done(out: Path, run: str, steps: int, metric: Metric) -> bool:
    """Say whether a run is complete: its last checkpoint is, and the metric of its last step.

    Args:
        out: The study's folder.
        run: Name of the run.
        steps: The step it ends with.
        metric: What is compared.
    """
    folder = folder_of(out, run)
    is_saved = (_last_checkpoint(folder, steps) / ".metadata").exists()
    return is_saved and metric_of(read_scalars(folder), metric, steps) is not None


def train_command(out: Path, run: Run, study: Study, launcher: Sequence[str]) -> list[str]:
    """Say how a run is launched.

    Args:
        out: The study's folder.
        run: What to train.
        study: Says how many processes and threads.
        launcher: torchrun.
    """
    processes = ["--standalone", f"--nproc_per_node={study.nproc_per_node}"]
    dump = f"--job.dump_folder={folder_of(out, run.name)}"
    return [*launcher, *processes, "-m", "torchtitan_mixtures.train", *run.arguments, dump]


def command_of(out: Path, run: Run, study: Study, launcher: Sequence[str]) -> Command:
    """Make the command of a run, which ends with this process; arguments as `train_command`."""
    done = _last_checkpoint(folder_of(out, run.name), run.steps) / ".metadata"
    arguments = leashed(train_command(out, run, study, launcher))
    return Command(arguments, done, {"OMP_NUM_THREADS": str(study.threads)})


def run_all(
    out: Path,
    runs: Sequence[Run],
    metric: Metric,
    commands: Mapping[str, Command],
    processes: Processes,
    jobs: int = 1,
    say: Callable[[str], None] = lambda message: None,
) -> list[Failure]:
    """Do what is left of a study.

    Args:
        out: The study's folder.
        runs: All of them, in the order in which they are to run.
        metric: What is compared.
        commands: Of each run.
        processes: Runs commands.
        jobs: Runs at a time.
        say: Told what begins and ends.

    Returns:
        Runs that failed; the others are done. They are tried again with the next call.
    """
    left = [run for run in runs if not is_done(out, run.name, run.steps, metric)]
    say(f"{len(runs) - len(left)} of {len(runs)} runs are done")
    failures: list[Failure] = []

    def work(run: Run) -> None:
        say(f"{run.name}: begins")
        _drop_unmeasured(folder_of(out, run.name), run.steps)
        try:
            processes.run(Piece(run.name, [commands[run.name]]), commands[run.name])
            _require_done(out, run, metric)
        except ValueError as error:
            if processes.is_stopped:
                return
            failure = Failure(run.name, str(error), processes.log_of(run.name))
            failures.append(failure)
            say(f"{run.name}: FAILED. {error}\n{failure.tail()}")
            return
        say(f"{run.name}: is done")

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work, run) for run in left]
        try:
            wait(futures)
        except BaseException:  # the user's interrupt, or a signal
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    for future in futures:
        future.result()
    return sorted(failures, key=lambda failure: [run.name for run in runs].index(failure.run))


def _last_checkpoint(folder: Path, steps: int) -> Path:
    return folder / "checkpoint" / f"step-{steps}"


def _drop_unmeasured(folder: Path, steps: int) -> None:
    """Let a run that was stopped between its last checkpoint and its end train its last steps anew.

    Validation comes after the checkpoint of a step, and is not made up for by a run that finds
    nothing to train.
    """
    shutil.rmtree(_last_checkpoint(folder, steps), ignore_errors=True)


def _require_done(out: Path, run: Run, metric: Metric) -> None:
    """Raise ValueError if a run that ended well did not leave what was wanted."""
    if is_done(out, run.name, run.steps, metric):
        return
    scalars = read_scalars(folder_of(out, run.name))
    if metric.tag in scalars:
        last = max(scalars[metric.tag])
        raise ValueError(
            f"{run.name}: its last {metric.tag} is of step {last} and not of training.steps = "
            f"{run.steps}, or its last checkpoint is not complete; look into its log."
        )
    raise ValueError(
        f"{run.name}: metric.tag = {metric.tag!r}: was not logged; there are {', '.join(scalars)}."
    )
