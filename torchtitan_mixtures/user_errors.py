"""Errors in what was asked for, told from faults of the program.

Checks of this package raise `ValueError` with a message that is complete: what is wrong, and the
remedy. Commands print that alone. Any other error, a `ValueError` of a library among them, is a
fault that nobody foresaw and keeps its traceback.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

_CAUGHT = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal ")
_TRACEBACK = "Traceback (most recent call last):\n"
_FRAMES = re.compile(r"(?:  .*\n)+")  # their lines are indented, what follows them is not
_FILE = re.compile(r'^  File "(.*)", line \d+', re.MULTILINE)


@contextmanager
def one_message(leave: Callable[[int], Any] = sys.exit) -> Iterator[None]:
    """Print an error in what was asked for as one line on stderr and leave with code 2.

    Args:
        leave: Called with the exit code.
    """
    try:
        yield
    except (ValueError, CheckpointException) as error:
        message = user_error(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        leave(2)


def is_ours(error: BaseException) -> bool:
    """Say whether code of this package raised an error, and not a library under it."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and _is_in_package(frame.tb_frame.f_code.co_filename)


def user_error(error: BaseException) -> str | None:
    """Message for whoever launched the job, if the error is about what was asked for."""
    if isinstance(error, CheckpointException):
        # DCP wraps what a rank raised while it loaded its state.
        causes = [failure[0] for failure in error.failures.values()]
        return user_error(causes[0]) if causes else None
    if isinstance(error, ValueError) and is_ours(error):
        return str(error)
    if isinstance(error, ValueError) and _CAUGHT.match(str(error)):
        return _worker_message(str(error))
    return None


def _worker_message(described: str) -> str | None:
    """What a worker of a `DataLoader` raised, without its traceback, if it was ours.

    Args:
        described: What PyTorch makes of it in this process.
    """
    last = described.rpartition(_TRACEBACK)[2]  # those of its causes come first
    frames = _FRAMES.match(last)
    files = _FILE.findall(frames[0]) if frames else []
    if frames is None or not files or not _is_in_package(files[-1]):
        return None
    return last[frames.end() :].partition(": ")[2].rstrip("\n")


def _is_in_package(file: str) -> bool:
    return Path(__file__).parent in Path(file).parents
