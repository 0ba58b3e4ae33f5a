"""What the sampling commands of all families share."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import torch

from torchtitan_mixtures.device import has_accelerator

DEFAULT_OUT = Path("outputs/samples")

MAX_SAMPLES = 10_000
"""Of one prompt or class: more are a slip of the keyboard."""


class ProgressBar:
    """One line on a terminal that is written over; nothing elsewhere."""

    WIDTH = 40

    def __init__(self, title: str, stream: TextIO) -> None:
        self._title, self._stream = title, stream
        self._start = time.perf_counter()
        self._drawn = ""

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` steps are made."""
        if not self._stream.isatty():
            return
        bar = "#" * (self.WIDTH * done // total)
        seconds = time.perf_counter() - self._start
        line = f"\r{self._title} [{bar:{self.WIDTH}}] {done}/{total} steps {seconds:.0f} s"
        if line != self._drawn:
            self._stream.write(line + ("\n" if done == total else ""))
            self._stream.flush()
            self._drawn = line


@contextmanager
def choose_folder(out: Path | None) -> Iterator[Path]:
    """Make the folder to write to, before the work whose results it is for.

    Args:
        out: A new or empty folder; None for the next in `DEFAULT_OUT`.

    Yields:
        The folder, which holds nothing yet. If nothing is written because of an error, what was
        made is removed.

    Raises:
        ValueError: It holds something, or cannot be made or written to.
    """
    with reports_writing(out or DEFAULT_OUT):
        if out is None:
            numbers = [int(path.name) for path in DEFAULT_OUT.glob("*") if path.name.isdigit()]
            folder = DEFAULT_OUT / f"{max(numbers, default=0) + 1:03}"
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out {out}: exists and is not an empty folder; name another one.")
        else:
            folder = out
        made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with reports_writing(folder):
            # Another command may have taken the number since.
            folder.mkdir(parents=True, exist_ok=out is not None)
            tempfile.TemporaryFile(dir=folder).close()
        yield folder
    except BaseException:
        for path in made:
            with suppress(OSError):  # not empty, or never made
                path.rmdir()
        raise


@contextmanager
def reports_writing(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into messages about `--out`.

    Raises:
        ValueError: Names the folder and what is wrong.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"--out {folder}: cannot be written to ({reason}).") from error


def say(line: str) -> None:
    """Print, whatever letters the terminal lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))


def choose_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if has_accelerator() else None
    return found or torch.device("cpu")


def check_numbers(num_samples: int, batch_size: int) -> None:
    """Refuse to draw nothing, or more than anyone wants.

    Raises:
        ValueError: Names the option and its value.
    """
    for flag, value in (("num-samples", num_samples), ("batch-size", batch_size)):
        if value < 1:
            raise ValueError(f"--{flag} {value}: must be at least 1.")
    if num_samples > MAX_SAMPLES:
        raise ValueError(f"--num-samples {num_samples}: must be at most {MAX_SAMPLES:,}.")
