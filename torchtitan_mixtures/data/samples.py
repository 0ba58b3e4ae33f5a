"""Samples of data sets: the bad ones among them counted, logged and judged; captions drawn."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass, field
from typing import Any

from torchtitan.tools.logging import logger

MIN_SAMPLES = 100
"""Samples seen before the share of bad ones may stop a run; an epoch's end may stop it earlier."""

_PATIENCE = 1000
"""Bad samples running, in a process, that stop a run whatever the limit: there are no others."""

_MAX_KEYS = 5  # bad samples that the summary names
_MAX_LOGGED = 100  # bad samples logged one by one; after that every hundredth is


@dataclass
class SampleCounts:
    """Samples of one shard."""

    seen: int = 0
    bad: int = 0
    good_in_epoch: int = 0
    bad_in_epoch: int = 0
    bad_keys: list[str] = field(default_factory=list)


class SampleJudge:
    """Stops the run when too many samples are bad, counting over all shards of a process.

    That is a `ValueError` if more than `multimodal.max_bad_fraction` of the samples are bad. It is
    judged whenever the shards have ended an epoch each on average: a shard alone may be too small
    to tell. If none of those epochs had a good sample, that stops the run whatever the limit, and
    so do `_PATIENCE` bad ones running.
    Before, once `MIN_SAMPLES` were seen, so many must be bad that it is no accident of the first
    samples: four standard deviations more than the limit allows. The same goes for the end of an
    epoch of which other processes read the rest.

    Args:
        max_bad_fraction: The limit.
        name: What messages call what the samples are of.
        is_alone: Whether this process reads all there is.
    """

    def __init__(self, max_bad_fraction: float, name: str, is_alone: bool = True) -> None:
        self._limit = max_bad_fraction
        self._name = name
        self._is_alone = is_alone
        self._counts: list[SampleCounts] = []  # of each shard
        self._num_ended = 0  # epochs of shards since the last judgement
        self._num_good = 0  # samples in those
        self._num_bad = 0
        self._last_reason = "unknown"
        self._good_before = 0  # samples, when the latest bad one came
        self._bad_in_a_row = 0

    def new_counts(self) -> SampleCounts:
        """The counts of one more shard."""
        self._counts.append(SampleCounts())
        return self._counts[-1]

    def count_bad(self, counts: SampleCounts, key: str, error: Exception) -> None:
        """Count, log and judge a bad sample."""
        counts.bad += 1
        counts.bad_in_epoch += 1
        self._last_reason = str(error)
        if len(counts.bad_keys) < _MAX_KEYS and key not in counts.bad_keys:
            counts.bad_keys.append(key)
        seen, bad = self._totals()
        self._bad_in_a_row = self._bad_in_a_row + 1 if seen - bad == self._good_before else 1
        self._good_before = seen - bad
        if bad <= _MAX_LOGGED or bad % 100 == 0:
            logger.warning(
                f"Skipped bad sample {key}: {self._last_reason} ({bad} of {seen} samples so far)"
            )
        is_hopeless = self._bad_in_a_row >= _PATIENCE
        if is_hopeless or (seen >= MIN_SAMPLES and bad > self._surely_too_many(seen)):
            raise ValueError(self._summary()) from error

    def end_epoch(self, counts: SampleCounts) -> None:
        """Count the end of a shard's epoch; judge when that makes one for every shard."""
        self._num_ended += 1
        self._num_good += counts.good_in_epoch
        self._num_bad += counts.bad_in_epoch
        counts.good_in_epoch = counts.bad_in_epoch = 0
        if self._num_ended < len(self._counts):
            return
        seen, bad = self._totals()
        allowed = self._limit * seen if self._is_alone else self._surely_too_many(seen)
        # Shards may find no samples at all in an epoch, if those are in few blocks.
        if bad > allowed or (self._num_bad and not self._num_good and self._is_alone):
            raise ValueError(self._summary())
        self._num_ended = self._num_good = self._num_bad = 0

    def _surely_too_many(self, seen: int) -> float:
        """How many bad ones of so many samples are no accident."""
        allowed = self._limit * seen
        return allowed + 4 * math.sqrt(allowed)

    def _totals(self) -> tuple[int, int]:
        return sum(c.seen for c in self._counts), sum(c.bad for c in self._counts)

    def _summary(self) -> str:
        seen, bad = self._totals()
        keys = [key for counts in self._counts for key in counts.bad_keys][:_MAX_KEYS]
        reason = self._last_reason.rstrip(".")
        return (
            f"{bad} of {seen} samples ({bad / max(seen, 1):.2%}) of {self._name} are bad; "
            f"multimodal.max_bad_fraction = {self._limit} allows {int(self._limit * seen)} of so "
            f"many. Among them: {'; '.join(keys)}. The last one's reason: {reason}. "
            "Repair the data, or raise the limit."
        )


def usable_captions(value: Any) -> list[str]:
    """The captions of an image in their order: what has anything but white space in it.

    Args:
        value: Of the column of captions: a string, or a list of them.
    """
    candidates = value if isinstance(value, (list, tuple)) else [value]
    return [text for text in candidates if isinstance(text, str) and text.strip()]


def choose_caption(value: Any, draw: float) -> str:
    """The caption of a sample.

    Args:
        value: A string, or a list of which one usable string is drawn.
        draw: What decides, in [0, 1).

    Raises:
        ValueError: There is no string with anything but white space in it.
    """
    usable = usable_captions(value)
    if not usable:
        is_text = isinstance(value, (str, list, tuple))
        what = "empty" if is_text else f"no text but {type(value).__name__} {reprlib.repr(value)}"
        raise ValueError(f"the caption is {what}")
    return usable[int(draw * len(usable))]
