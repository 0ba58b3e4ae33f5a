"""Samples of a data set made into documents; bad ones are skipped, counted and logged.

Images are decoded here and not inside `datasets`, so that one broken file does not end the run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.images import decode_image
from torchtitan_mixtures.data.sources import Document, caption_and_image, document_rng

if TYPE_CHECKING:
    from torchtitan_mixtures.job_config import Multimodal

MIN_SAMPLES = 100
"""Samples seen before the share of bad ones may stop a run; an epoch's end may stop it earlier."""

_MAX_KEYS = 5  # bad samples that the summary names
_MAX_LOGGED = 100  # bad samples logged one by one; after that every hundredth is


class SampleReader:
    """Turns samples into documents and keeps count of those it cannot read.

    The run stops with a `ValueError` if more than `multimodal.max_bad_fraction` of the samples are
    bad. This is judged at every bad sample once `MIN_SAMPLES` were seen, and at the end of every
    epoch. An epoch without one good sample stops the run whatever the limit. Each worker process
    counts the samples of its own shard; the counts are in the checkpoint.
    """

    def __init__(self, config: Multimodal, split: str, image_size: int) -> None:
        self._config = config
        self._split = split
        self._image_size = image_size
        self._seen = 0
        self._bad = 0
        self._good_in_epoch = 0
        self._bad_keys: list[str] = []
        self._last_reason = "unknown"
        named = Path(config.data_files[0] if config.data_files else config.path)
        self._folder = named if named.is_dir() else named.parent

    def read(self, sample: dict[str, Any], epoch: int, number: int | str) -> Document | None:
        """The document of a sample, or None if the sample is bad.

        Args:
            sample: One row, its image not decoded.
            epoch: Number of the pass, for the random choices.
            number: What tells the sample from others of the epoch.
        """
        self._seen += 1
        rng = document_rng(self._config.seed, epoch, number)
        key = self._key(sample, number)
        try:
            caption = choose_caption(sample.get(self._config.caption_column), rng.random())
            value = self._resolve(sample.get(self._config.image_column))
            image = decode_image(value, self._image_size)
        except MemoryError:
            raise
        except Exception as error:  # what Pillow raises on broken files has no common base
            self._count_bad(key, error)
            return None
        self._good_in_epoch += 1
        return Document(caption_and_image(rng, caption, image), key)

    def end_epoch(self) -> None:
        """Judge the share of bad samples whatever their number."""
        if self._bad > self._config.max_bad_fraction * self._seen or not self._good_in_epoch:
            raise ValueError(self._summary())
        self._good_in_epoch = 0

    def state_dict(self) -> dict[str, Any]:
        """The counts, as plain JSON."""
        return {
            "seen": self._seen,
            "bad": self._bad,
            "good_in_epoch": self._good_in_epoch,
            "bad_keys": list(self._bad_keys),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting from a state."""
        self._seen, self._bad = state["seen"], state["bad"]
        self._good_in_epoch, self._bad_keys = state["good_in_epoch"], list(state["bad_keys"])

    def _resolve(self, image: Any) -> Any:
        """Find a relative path of an image beside the data that names it."""
        path = image.get("path") if isinstance(image, dict) and not image.get("bytes") else image
        if isinstance(path, str) and not Path(path).exists() and (self._folder / path).is_file():
            return str(self._folder / path)
        return image

    def _key(self, sample: dict[str, Any], number: int | str) -> str:
        image = sample.get(self._config.image_column)
        path = image.get("path") if isinstance(image, dict) else image
        name = sample.get("__key__") or (path if isinstance(path, str) else None)
        where = f"{self._config.path or self._config.data_files}:{self._split}[{number}]"
        return f"{where} ({name})" if name else where

    def _count_bad(self, key: str, error: Exception) -> None:
        self._bad += 1
        # Without the addresses of objects, which say nothing and differ from run to run.
        reason = f"{type(error).__name__}: {error}"
        self._last_reason = re.sub(r"<\S+ object at 0x\w+>", "it", reason)
        if len(self._bad_keys) < _MAX_KEYS:
            self._bad_keys.append(key)
        if self._bad <= _MAX_LOGGED or self._bad % 100 == 0:
            logger.warning(
                f"Skipped bad sample {key}: {self._last_reason} "
                f"({self._bad} of {self._seen} samples so far)"
            )
        limit = self._config.max_bad_fraction
        if self._seen >= MIN_SAMPLES and self._bad > limit * self._seen:
            raise ValueError(self._summary()) from error

    def _summary(self) -> str:
        return (
            f"{self._bad} of {self._seen} samples ({self._bad / self._seen:.1%}) of split "
            f'"{self._split}" are bad; multimodal.max_bad_fraction = '
            f"{self._config.max_bad_fraction} allows {self._config.max_bad_fraction:.1%}. "
            f"Among them: {'; '.join(self._bad_keys)}. The last one's reason: "
            f"{self._last_reason}. Repair the data, or raise the limit."
        )


def choose_caption(value: Any, draw: float) -> str:
    """The caption of a sample.

    Args:
        value: A string, or a list of which one usable string is drawn.
        draw: What decides, in [0, 1).

    Raises:
        ValueError: There is no string with anything but white space in it.
    """
    candidates = value if isinstance(value, (list, tuple)) else [value]
    usable = [text for text in candidates if isinstance(text, str) and text.strip()]
    if not usable:
        kind = "empty" if isinstance(value, (str, list, tuple)) else type(value).__name__
        raise ValueError(f"the caption is {kind}")
    return usable[int(draw * len(usable))]
