"""The names of all concepts in several voices, as units of the embedded speech tokenizer."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

SPEECH_FILE = "speech.safetensors"

VOICES = (
    "en-us+f2",
    "en-us+m3",
    "en-gb-x-rp+f4",
    "en-gb-scotland+m7",
    "en-029+f3",
    "en-gb-x-gbclan+m1",
)
"""Accent and speaker of each voice, as espeak-ng calls them: three female, three male."""

UNSEEN_VOICE = "unseen_voice"
"""The split of train drawings whose names the last voice speaks; it speaks in no other split."""


def voices_of(split: str) -> tuple[str, ...]:
    """The voices that speak in a split."""
    return VOICES[-1:] if split == UNSEEN_VOICE else VOICES[:-1]


@dataclass(frozen=True)
class SpokenNames:
    """Units of every concept in every voice, concept by concept.

    Attributes:
        units: `(units,)` uint16, all of them one after the other.
        lengths: `(concepts, voices)` uint16, how many there are of each.
    """

    units: NDArray[np.uint16]
    lengths: NDArray[np.uint16]

    @staticmethod
    def read(path: Path) -> "SpokenNames":
        """Read the file that `write` wrote."""
        tensors = load_file(path)
        return SpokenNames(tensors["units"], tensors["lengths"])

    def write(self, path: Path) -> None:
        """Write a safetensors file."""
        path.write_bytes(save({"lengths": self.lengths, "units": self.units}))

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.lengths, dtype=np.int64).reshape(self.lengths.shape)

    def find(self, concept: int, voice: int) -> NDArray[np.int64]:
        """The `(units,)` int64 of the name of one concept in one voice, both by number."""
        end = self._ends[concept, voice]
        return self.units[end - self.lengths[concept, voice] : end].astype(np.int64)
