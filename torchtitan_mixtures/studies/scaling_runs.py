"""The runs of a scaling study: one after another, each going on where it stopped."""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan_mixtures.studies.leash import leashed
from torchtitan_mixtures.studies.pieces import Command, Piece, Processes, write_json
from torchtitan_mixtures.studies.scaling_file import Metric, Study
from torchtitan_mixtures.studies.scaling_plan import Run
from torchtitan_mixtures.studies.scaling_scalars import metric_of, read_scalars

TAIL = 12
"""Lines of a failed run's log that are shown."""

FAILURE_NAME = "failure.json"
"""File in the folder of a run that failed, until it is tried again."""

_COLORS = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(
    r"(?:\[rank\d+\]:\s?)?((?:\w+\.)*\w*(?:Error|Exception): .*)|\s*traceback : (Signal \d.*)"
)
"""Last line of a traceback, or torchrun's of a process that was killed."""

_OF_LAUNCHER = "ChildFailedError"


@dataclass(frozen=True)
class Failure:
    """A run that failed.

    Attributes:
        run: Its name.
        message: What is wrong, in one line.
        log: What it printed.
        begin: Where in the log, in bytes; what is before is of earlier tries.
        lacks_metric: Whether it came to its end and logged nothing of the metric.
    """

    run: str
    message: str
    log: Path
    begin: int = 0
    lacks_metric: bool = False

    def tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(self._lines()[-TAIL:])

    def reason(self) -> str:
        """What is wrong, and the run's own last word on it where the log has one."""
        lines = self._lines()
        words = [line for line in lines if line.startswith("error: ")]
        if not words:  # torchrun has the last word on exceptions that nobody foresaw
            found = [match[1] or match[2] for line in lines if (match := _RAISED.match(line))]
            words = [word for word in found if _OF_LAUNCHER not in word]
        return " ".join([self.message, *words[-1:]])

    def _lines(self) -> list[str]:
        if not self.log.exists():
            return []
        with self.log.open("rb") as file:
            file.seek(self.begin)
            text = file.read().decode(errors="replace")
        return [_COLORS.sub("", line) for line in text.splitlines()]


class _NotLoggedError(ValueError):
    """A run came to its end and logged nothing of the metric."""


def folder_of(out: Path, run: str) -> Path:
    """Folder of a run, by its name."""
    return out / "runs" / run


def failure_of(out: Path, run: str) -> str | None:
    """Say why a run failed, by its name; None if it did not, or is under way again."""
    path = folder_of(out, run) / FAILURE_NAME
    return json.loads(path.read_text(encoding="utf-8"))["reason"] if path.exists() else None


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
    """Say whether a run is complete: its last checkpoint is, and its metric is a finite number.

    Args:
        out: The study's folder.
        run: Name of the run.
        steps: The step it ends with.
        metric: What is compared.
    """
    folder = folder_of(out, run)
    is_saved = (_last_checkpoint(folder, steps) / ".metadata").exists()
    if not is_saved:
        return False
    found = metric_of(read_scalars(folder), metric, steps)
    return found is not None and math.isfinite(found)


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

    After a run that fails the others go on; after one that ends without the metric none begins.

    Args:
        out: The study's folder.
        runs: All of them, in the order in which they are to run.
        metric: What is compared.
        commands: Of each run.
        processes: Runs commands.
        jobs: Runs at a time.
        say: Told what begins and ends.

    Returns:
        Runs that failed, in their order; they are tried again with the next call.
    """
    left = [run for run in runs if not is_done(out, run.name, run.steps, metric)]
    say(f"{len(runs) - len(left)} of {len(runs)} runs are done")
    failures: list[Failure] = []
    is_in_vain = threading.Event()

    def work(run: Run) -> None:
        if is_in_vain.is_set():
            return
        say(f"{run.name}: begins")
        failure = _attempt(out, run, metric, commands[run.name], processes)
        if failure is None:
            say(f"{run.name}: is done")
        elif not processes.is_stopped:
            failures.append(failure)
            say(f"{run.name}: FAILED. {failure.message}\n{failure.tail()}")
            if failure.lacks_metric:
                is_in_vain.set()
                say("no other run begins: they would end like this")

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
    names = [run.name for run in runs]
    return sorted(failures, key=lambda failure: names.index(failure.run))


def _attempt(
    out: Path, run: Run, metric: Metric, command: Command, processes: Processes
) -> Failure | None:
    """Run a run to its end; if it fails, say how, and leave that in its folder for reports."""
    folder, log = folder_of(out, run.name), processes.log_of(run.name)
    begin = log.stat().st_size if log.exists() else 0
    (folder / FAILURE_NAME).unlink(missing_ok=True)
    _drop_unmeasured(folder, run.steps)
    try:
        processes.run(Piece(run.name, [command]), command)
        _require_done(out, run, metric)
    except ValueError as error:
        lacks_metric = isinstance(error, _NotLoggedError)
        failure = Failure(run.name, str(error), log, begin, lacks_metric)
        if not processes.is_stopped:  # what was stopped did not fail
            write_json(folder / FAILURE_NAME, {"reason": failure.reason()})
        return failure
    return None


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
    if metric.tag not in scalars:
        raise _NotLoggedError(
            f"{run.name}: metric.tag = {metric.tag!r}: was not logged; there are "
            f"{', '.join(scalars) or 'none at all'}. Set one of them and give the same command: "
            "what was trained is kept."
        )
    found = metric_of(scalars, metric, run.steps)
    if found is not None and not math.isfinite(found):
        raise ValueError(
            f"{run.name}: its {metric.tag} is {found} at step {run.steps}: it has diverged; give "
            "it a smaller optimizer.lr or more lr_scheduler.warmup_steps, or look for broken data."
        )
    raise ValueError(
        f"{run.name}: its last {metric.tag} is of step {max(scalars[metric.tag])} and not of "
        f"training.steps = {run.steps}, or its last checkpoint is not complete; look into its log."
    )
