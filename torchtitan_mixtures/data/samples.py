"""Samples of a data set made into documents; bad ones are skipped, counted and logged.

Images are decoded here and not inside `datasets`, so that one broken file does not end the run.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.images import decode_image
from torchtitan_mixtures.data.sources import Document, PairOrder, caption_and_image, document_rng

if TYPE_CHECKING:
    from torchtitan_mixtures.job_config import Multimodal

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
        return (
            f"{bad} of {seen} samples ({bad / max(seen, 1):.2%}) of {self._name} are bad; "
            f"multimodal.max_bad_fraction = {self._limit} allows {int(self._limit * seen)} of so "
            f"many. Among them: {'; '.join(keys)}. The last one's reason: {self._last_reason}. "
            "Repair the data, or raise the limit."
        )


class SampleReader:
    """Turns the samples of one shard into documents and counts those it cannot read.

    Args:
        config: The `[multimodal]` section.
        split: Name of the split, for messages.
        image_size: Size that images are brought to.
        order: Of captions and images.
        judge: Of all shards of this process. The counts are in the checkpoint by shard, so that
            processes with other shares of the shards add up what is theirs.
    """

    def __init__(
        self,
        config: Multimodal,
        split: str,
        image_size: int,
        order: PairOrder,
        judge: SampleJudge,
    ) -> None:
        self._config = config
        self._split = split
        self._image_size = image_size
        self._judge = judge
        self._counts = judge.new_counts()
        self._order = order
        named = Path(config.data_files[0] if config.data_files else config.path)
        self._folder = named if named.is_dir() else named.parent

    def read(self, sample: dict[str, Any], epoch: int, number: int | str) -> Document | None:
        """The document of a sample, or None if the sample is bad.

        Args:
            sample: One row, its image not decoded.
            epoch: Number of the pass, for the random choices.
            number: What tells the sample from others of the epoch.
        """
        self._counts.seen += 1
        rng = document_rng(self._config.seed, epoch, number)
        key = self._key(sample, number)
        try:
            caption = choose_caption(sample.get(self._config.caption_column), rng.random())
            value = self._resolve(sample.get(self._config.image_column))
            image = decode_image(value, self._image_size)
        except (ValueError, OSError) as error:  # the latter of paths no file system can have
            self._judge.count_bad(self._counts, key, error)
            return None
        self._counts.good_in_epoch += 1
        return Document(caption_and_image(rng, caption, image, self._order), key, is_pair=True)

    def end_epoch(self) -> None:
        """Tell the judge that the shard has ended an epoch."""
        self._judge.end_epoch(self._counts)

    def reject(self, document: Document, error: ValueError) -> None:
        """Count a document that was read as a bad one; see `Shard.reject`."""
        self._counts.good_in_epoch -= 1
        self._judge.count_bad(self._counts, document.key, error)

    def progress(self) -> dict[str, float]:
        """How many samples were seen, and how many bad ones among them."""
        return {"samples": self._counts.seen, "bad": self._counts.bad}

    def state_dict(self) -> dict[str, Any]:
        """The counts of this shard, as plain JSON."""
        return asdict(self._counts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting from a state."""
        counts = self._counts
        counts.seen, counts.bad = state["seen"], state["bad"]
        counts.good_in_epoch, counts.bad_in_epoch = state["good_in_epoch"], state["bad_in_epoch"]
        counts.bad_keys = list(state["bad_keys"])

    def _resolve(self, image: Any) -> Any:
        """Find a relative path of an image beside the data that names it.

        Raises:
            ValueError: It is the address of a page, or of something else than a file.
        """
        path = image.get("path") if isinstance(image, dict) and not image.get("bytes") else image
        if not isinstance(path, str):
            return image
        if path.startswith(("http://", "https://")):  # not "zip://...::https://..." of a stream
            raise ValueError(f"{path} is an address and not a path; download the image first")
        if not Path(path).exists() and (self._folder / path).is_file():
            return str(self._folder / path)
        if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
            raise ValueError(f"{path} is no file")
        return image

    def _key(self, sample: dict[str, Any], number: int | str) -> str:
        image = sample.get(self._config.image_column)
        path = image.get("path") if isinstance(image, dict) else image
        name = sample.get("__key__") or (path if isinstance(path, str) else None)
        where = f"{self._config.path or self._config.data_files}:{self._split}[{number}]"
        return f"{where} ({name})" if name else where


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
        kind = "empty" if isinstance(value, (str, list, tuple)) else type(value).__name__
        raise ValueError(f"the caption is {kind}")
    return usable[int(draw * len(usable))]
