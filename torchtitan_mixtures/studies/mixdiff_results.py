"""What the study of Mixture of Diffusers measured, by training, and how far models are apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchtitan_mixtures.data.emoji import STYLES
from torchtitan_mixtures.studies.bootstrap import paired_interval
from torchtitan_mixtures.studies.comparison import Summary
from torchtitan_mixtures.studies.mixdiff_data import FOLDER, NAMES, list_emoji
from torchtitan_mixtures.studies.mixdiff_measures import ASKED, PLAIN

BASELINE = "dit"
PHASE_1 = ("dit", "dit wide", "decentralised", "joint")
PHASE_2: Mapping[str, str] = {
    "decentralised, replay": "decentralised",
    "dit, replay": "dit",
    "dit, scenes alone": "dit",
}
"""Trainings of the second phase, and those they go on from."""


class Gap(NamedTuple):
    """How far what was measured of images is from something else that was, of equal seeds.

    Attributes:
        summary: Of the means of each seed.
        interval: 95 % interval of their mean over seeds and emoji, see `paired_interval`.
    """

    summary: Summary
    interval: tuple[float, float]


class Results:
    """What is measured so far."""

    def __init__(self, out: Path) -> None:
        """Read a study's folder.

        Raises:
            ValueError: Nothing is measured yet.
        """
        self.out = out
        found = [json.loads(path.read_text()) for path in sorted(out.glob("results/*.json"))]
        if not found:
            raise ValueError(f"{out} holds no finished piece of a study; begin one with `run`.")
        self._by_name: dict[str, dict[int, dict[str, Any]]] = {}
        for one in found:
            self._by_name.setdefault(one["name"], {})[one["seed"]] = one
        self._arrays: dict[tuple[str, int], Any] = {}

    @property
    def names(self) -> list[str]:
        """Trainings that are done, of some seed."""
        return list(self._by_name)

    def seeds(self, name: str) -> list[int]:
        """Seeds of a training that are done."""
        return sorted(self._by_name.get(name, {}))

    def one(self, name: str, seed: int) -> dict[str, Any]:
        """What was measured of a training."""
        return self._by_name[name][seed]

    def array(self, name: str, seed: int, key: str) -> NDArray[Any]:
        """An array of a training."""
        if (name, seed) not in self._arrays:
            with np.load(self.out / "results" / f"{name}-{seed}.npz") as file:
                self._arrays[name, seed] = dict(file)
        return self._arrays[name, seed][key]

    def summary(self, name: str, ask: str, *path: str) -> Summary | None:
        """A number of a training over its seeds; None if it was not measured."""
        values = {}
        for seed in self.seeds(name):
            found: Any = self.one(name, seed)["asked"].get(ask, {})
            for key in path:
                found = found.get(key) if isinstance(found, dict) else None
            if found is not None:
                values[seed] = found
        return Summary.of(values) if values else None

    def losses(
        self, name: str, seed: int, ask: str, split: str, domains: Sequence[str]
    ) -> dict[int, float]:
        """Loss of each image of some domains, mean over levels, by its number."""
        images, numbers, losses = (
            self.array(name, seed, f"{ask}/{split}/{key}")
            for key in ("images", "domains", "losses")
        )
        own = np.isin(numbers, [NAMES.index(domain) for domain in domains])
        return dict(zip(images[own].tolist(), losses[own].mean(1).tolist(), strict=True))

    def gap(
        self,
        one: tuple[str, str],
        other: tuple[str, str],
        split: str,
        domains: Sequence[str] = STYLES,
    ) -> Gap | None:
        """How much larger the loss of some domains is than another.

        Args:
            one: Name of a training, and how it is asked.
            other: Of what it is compared with.
            split: What both are tested on.
            domains: Names of the domains.

        Returns:
            None if they share no seed.
        """
        seeds = sorted(set(self.seeds(one[0])) & set(self.seeds(other[0])))
        if not seeds:
            return None
        pairs = [
            [self.losses(name, seed, ask, split, domains) for name, ask in (one, other)]
            for seed in seeds
        ]
        images = sorted(set.intersection(*(set(found) for pair in pairs for found in pair)))
        rows = np.array([[a[image] - b[image] for image in images] for a, b in pairs])
        means = dict(zip(seeds, rows.mean(1).tolist(), strict=True))
        emoji = list_emoji(self.out / FOLDER, split)
        return Gap(Summary.of(means), paired_interval(rows, [emoji[image] for image in images]))

    def gap_to_baseline(self, name: str, ask: str, split: str) -> Gap | None:
        """How much larger a loss of all styles is than the baseline's."""
        return self.gap((name, ask), (BASELINE, PLAIN), split)

    def forgetting(
        self, name: str, ask: str, split: str, domains: Sequence[str] = STYLES
    ) -> Gap | None:
        """How much the loss of old domains grew in a training of phase 2."""
        return self.gap((name, ask), (PHASE_2[name], ask), split, domains)


def models(found: Results, names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Name, question and label of everything that was measured of some trainings."""
    for name in names:
        for ask in asks(name):
            if found.seeds(name):
                yield name, ask, f"{name}, {ask}" if ask else name


def asks(name: str) -> tuple[str, ...]:
    """How a training's model is asked, at first as it was trained."""
    return ASKED.get(name, (PLAIN,))
