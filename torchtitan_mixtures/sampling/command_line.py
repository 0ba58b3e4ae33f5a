"""What the sampling commands of all families share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TextIO

import torch

from torchtitan_mixtures.device import has_accelerator

DEFAULT_OUT = Path("outputs/samples")


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


def choose_folder(out: Path | None) -> Path:
    """The folder to write to, which holds nothing yet: `out`, or the next in `DEFAULT_OUT`."""
    if out is None:
        numbers = [int(path.name) for path in DEFAULT_OUT.glob("*") if path.name.isdigit()]
        return DEFAULT_OUT / f"{max(numbers, default=0) + 1:03}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not an empty folder; name another one.")
    return out


def choose_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if has_accelerator() else None
    return found or torch.device("cpu")


def check_numbers(num_samples: int, batch_size: int) -> None:
    """Refuse to draw nothing.

    Raises:
        ValueError: Names the option and its value.
    """
    for flag, value in (("num-samples", num_samples), ("batch-size", batch_size)):
        if value < 1:
            raise ValueError(f"--{flag} {value}: must be at least 1.")
