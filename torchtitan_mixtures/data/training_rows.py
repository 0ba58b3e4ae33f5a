"""Rows that codebooks are trained on: read from files, and sampled evenly in bounded memory."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_MIN_SEEN = 100  # files before the share of bad ones may stop the training early
_MAX_NAMED = 5  # bad files that the summary names
_MAX_LOGGED = 100  # bad files that are named one by one

Rows = NDArray[np.uint8]
"""Patches of an image or stretches of a sound, `(rows, dim)`."""


def find_files(path: str, suffixes: Sequence[str]) -> list[Path]:
    """Files of a folder and all folders in it by their endings, or those of a pattern; sorted.

    Raises:
        ValueError: There are none.
    """
    folder = Path(path).expanduser()
    found = (
        folder.rglob("*") if folder.is_dir() else map(Path, glob.iglob(str(folder), recursive=True))
    )
    files = sorted(file for file in found if file.suffix.lower() in suffixes and file.is_file())
    if not files:
        raise ValueError(
            f"--path {path} has no files; expected a folder or a pattern of {' '.join(suffixes)}"
        )
    return files


class RowSample:
    """An even sample of rows that come one after the other, as many as there are to begin with.

    Args:
        limit: Rows that are kept.
        seed: Of the draws.
    """

    def __init__(self, limit: int, seed: int) -> None:
        self._limit = limit
        self._rng = np.random.default_rng(seed)
        self._rows: list[Rows] = []
        self._keys: list[NDArray[np.float64]] = []
        self._count = 0
        self._largest = 1.0  # key of a row that may still be among those kept

    def add(self, rows: Rows) -> None:
        """Offer rows: each gets a random key, and those with the smallest ones stay."""
        keys = self._rng.random(len(rows))
        is_small = keys < self._largest
        self._rows.append(rows[is_small])
        self._keys.append(keys[is_small])
        self._count += int(is_small.sum())
        if self._count >= 2 * self._limit:
            self._shrink()

    def rows(self, dim: int) -> Rows:
        """The sample, `(rows, dim)`."""
        if self._count > self._limit:
            self._shrink()
        return np.concatenate([np.zeros((0, dim), np.uint8), *self._rows])

    def _shrink(self) -> None:
        keys = np.concatenate(self._keys)
        kept = np.sort(np.argsort(keys, kind="stable")[: self._limit])
        self._rows, self._keys = [np.concatenate(self._rows)[kept]], [keys[kept]]
        self._count, self._largest = len(kept), float(keys[kept].max())


class RowReader:
    """Reads files; broken ones are skipped, named and counted once.

    Args:
        read: Makes rows of a file; a `ValueError` or `OSError` says that it is broken.
        max_bad_fraction: Share of broken files above which to stop.
        what: What messages call what a file holds.
        where: What messages call where they come from.
        log: Called with a line for each broken file.
    """

    def __init__(
        self,
        read: Callable[[Path], Rows],
        max_bad_fraction: float,
        what: str,
        where: str,
        log: Callable[[str], None],
    ) -> None:
        self._read = read
        self._limit = max_bad_fraction
        self._what = what
        self._where = where
        self._log = log
        self._seen: set[Path] = set()
        self._bad: dict[Path, Exception] = {}

    def read(self, paths: Sequence[Path]) -> Iterator[Rows]:
        """The rows of each file that is not broken.

        Raises:
            ValueError: Too many are, of those seen so far.
        """
        for path in paths:
            if path in self._bad:
                continue
            self._seen.add(path)
            try:
                rows = self._read(path)
            except (ValueError, OSError) as error:
                self._bad[path] = error
                if len(self._bad) <= _MAX_LOGGED:
                    self._log(f"Skipped bad {self._what} {path}: {error}")
                if len(self._seen) >= _MIN_SEEN:
                    self.judge()
            else:
                yield rows

    def judge(self) -> None:
        """Stop if too many were broken.

        Raises:
            ValueError: They were.
        """
        seen, bad = len(self._seen), len(self._bad)
        if bad > self._limit * seen or bad == seen:
            names = "; ".join(str(path) for path in list(self._bad)[:_MAX_NAMED])
            last = list(self._bad.values())[-1]
            raise ValueError(
                f"{bad} of {seen} {self._what}s ({bad / seen:.2%}) of {self._where} are bad; "
                f"--max-bad-fraction = {self._limit} allows {int(self._limit * seen)} of so many. "
                f"Among them: {names}. The last one's reason: {last}. Repair the data, or raise "
                "the limit."
            )
