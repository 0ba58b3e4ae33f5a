"""Work in pieces, several at a time, that can be stopped at any moment and gone on with later.

A piece is a row of commands. Each leaves a file when it has done all it should, and is not run
again where that file is. A command that was stopped is run again as it was, so it must be one that
goes on where it stopped (a training with checkpoints) or is short.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOCK_NAME = "lock"
SETTINGS_NAME = "protocol.json"
_NAMED = 5


@dataclass(frozen=True)
class Command:
    """A command of a piece.

    Attributes:
        arguments: Of the process.
        done: The file that is there when the command has done its work, and not before.
        environment: Variables beside those of this process.
    """

    arguments: Sequence[str]
    done: Path
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """Commands that are to run in turn."""

    name: str
    commands: Sequence[Command]

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return all(command.done.exists() for command in self.commands)


class Processes:
    """Runs commands as processes of their own that end with this one.

    Args:
        logs: Folder of a file for each piece, with what its commands print.
        inherited: File descriptors that processes hold too.

    Attributes:
        is_stopped: Whether `stop` was called.
    """

    def __init__(self, logs: Path, inherited: Sequence[int] = ()) -> None:
        self._logs = logs
        self._inherited = tuple(inherited)
        self._running: set[subprocess.Popen[bytes]] = set()
        self.is_stopped = False

    def log_of(self, name: str) -> Path:
        """File with what the commands of a piece print, by its name."""
        return self._logs / f"{name}.txt"

    def run(self, piece: Piece, command: Command) -> None:
        """Run a command to its end.

        Raises:
            ValueError: It failed; names its log.
        """
        if self.is_stopped:
            raise ValueError(f"{piece.name}: stopped.")
        self._logs.mkdir(parents=True, exist_ok=True)
        path = self.log_of(piece.name)
        with path.open("ab") as log:
            process = subprocess.Popen(
                command.arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(command.environment),
                pass_fds=self._inherited,
            )
            self._running.add(process)
            if self.is_stopped:  # since it was asked above
                process.terminate()
            try:
                code = process.wait()
            finally:
                self._running.discard(process)
        if code:
            raise ValueError(f"{piece.name}: a command ended with code {code}; see {path}.")

    def stop(self) -> None:
        """End what is running, and begin nothing any more."""
        self.is_stopped = True
        for process in list(self._running):
            process.terminate()


def run_pieces(
    pieces: Sequence[Piece],
    jobs: int,
    processes: Processes,
    progress: Callable[[str], None] = lambda message: None,
) -> None:
    """Do what is left of some pieces, in their order, `jobs` of them at a time.

    When one fails no other is begun, and those that have begun are finished.

    Raises:
        ValueError: Of the piece that failed.
    """
    left = [piece for piece in pieces if not piece.is_done]
    progress(f"{len(pieces) - len(left)} of {len(pieces)} pieces are done")

    has_failed = threading.Event()

    def work(piece: Piece) -> None:
        if has_failed.is_set():
            return
        progress(f"{piece.name}: begins")
        try:
            _run_commands(piece, processes)
        except BaseException:
            has_failed.set()
            raise
        progress(f"{piece.name}: is done")

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work, piece) for piece in left]
        try:
            wait(futures)
        except BaseException:  # the user's interrupt, or a signal
            has_failed.set()
            processes.stop()
            raise
    for future in futures:
        future.result()


def _run_commands(piece: Piece, processes: Processes) -> None:
    for command in piece.commands:
        if command.done.exists():
            continue
        processes.run(piece, command)
        if not command.done.exists():
            raise ValueError(f"{piece.name}: {command.arguments} left no {command.done}.")


@contextmanager
def only_one(folder: Path) -> Iterator[int]:
    """Make sure that nothing else works in a folder; yields the lock for processes to inherit.

    A process that outlives a killed study holds the lock on, so that its work is not done twice at
    the same time.

    Raises:
        ValueError: Something does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another study works in it, or a process that one left; wait for its "
                "end, or name another folder."
            ) from None
        yield file.fileno()


def note_settings(folder: Path, settings: dict[str, Any], changeable: Sequence[str] = ()) -> None:
    """Write what a study was begun with into its folder.

    Args:
        folder: Of the study.
        settings: Of the study.
        changeable: Keys of settings that trained nothing, and may be others than before.

    Raises:
        ValueError: The folder holds a study of other settings; names those that differ.
    """
    path = folder / SETTINGS_NAME
    settings = json.loads(json.dumps(settings))  # as it would be read
    theirs = json.loads(path.read_text()) if path.exists() else settings
    theirs = theirs | {key: settings[key] for key in changeable}
    if theirs != settings:
        theirs, ours = _flatten(theirs), _flatten(settings)
        keys = [key for key in {**theirs, **ours} if theirs.get(key, ...) != ours.get(key, ...)]
        more = f" and {len(keys) - _NAMED} more settings" if len(keys) > _NAMED else ""
        theirs, ours = ({k: v[k] for k in keys[:_NAMED] if k in v} for v in (theirs, ours))
        raise ValueError(
            f"{folder} holds a study of {theirs}, not of {ours}{more}; name another folder."
        )
    write_json(path, settings)


def _flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Name values of nested tables by their paths, joined by dots."""
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings}
    prefix = prefix and f"{prefix}."
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}")
    return flat


def leave_on_sigterm() -> None:
    """Let a SIGTERM raise SystemExit, so that what is running is ended too."""
    signal.signal(signal.SIGTERM, lambda *unused: sys.exit(128 + signal.SIGTERM))


def write_json(path: Path, content: Any) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
