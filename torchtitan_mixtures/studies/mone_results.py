"""What the study of MoNE measured, arranged by question, and what is compared with what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchtitan_mixtures.data.emoji import EmojiCorpus
from torchtitan_mixtures.studies import comparison
from torchtitan_mixtures.studies.bootstrap import paired_interval
from torchtitan_mixtures.studies.comparison import Summary
from torchtitan_mixtures.studies.mone_capacities import (
    DENSE,
    METRICS,
    NARROW,
    OWN,
    RANDOM,
    RANDOMLY,
    SPLITS,
    UNTRAINED,
    VARIANTS,
    Variant,
    numbers_of,
)

_ROUTED = {OWN: "", UNTRAINED: ", untrained router", RANDOMLY: ", random routing"}
_OF_ONE_COST = dict(zip(NARROW, (0.2, 0.6), strict=True))
"""Capacity at which nested models cost about as much as each narrow one."""


class Question(NamedTuple):
    """A model, and how it was asked.

    Attributes:
        variant: The model.
        capacity: What was asked for; 1 of a dense one.
        routing: Who routed.
    """

    variant: Variant
    capacity: float
    routing: str = OWN

    def __str__(self) -> str:
        if not self.variant.is_nested:
            return self.variant.name
        return f"{self.variant.name} at {self.capacity:g}{_ROUTED[self.routing]}"


class Gap(NamedTuple):
    """How far a model is from another one, in one metric.

    Attributes:
        summary: Of the differences of equal seeds.
        interval: 95 % interval of their mean over images and seeds, see `paired_interval`.
    """

    summary: Summary
    interval: tuple[float, float]


Gaps = Mapping[str, Mapping[str, Gap]]
"""By metric, of each pair of models."""


class Results:
    """What was measured.

    Args:
        results: Of all trainings of the study.
        images: Of the same trainings, what was measured of each image.

    Attributes:
        measured: `METRICS`, by seed, of each question.
        facts: What else is known of a question, of some seed.
    """

    def __init__(
        self,
        results: Sequence[dict[str, Any]],
        images: Sequence[Mapping[str, NDArray[Any]]],
    ) -> None:
        self.results = results
        self.measured: dict[str, dict[int, dict[str, float]]] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        # The order of images is that of no seed and no model.
        self._concepts = {
            split: _concepts_of(split, images[0][numbers_of(split)]) for split in SPLITS
        }
        self._images: dict[str, dict[int, dict[str, NDArray[np.float32]]]] = {}
        for variant in self.variants:
            for one, arrays in zip(results, images, strict=True):
                if one["variant"] == variant.name:
                    self._add(variant, one, arrays)

    @classmethod
    def read(cls, out: Path) -> Results:
        """Read what is in a study's folder.

        Raises:
            ValueError: Nothing is measured yet.
        """
        paths = sorted(out.glob("results/*.json"))
        if not paths:
            raise ValueError(f"{out} holds no finished training of a study; begin one with `run`.")
        results = [json.loads(path.read_text()) for path in paths]
        images = []
        for path in paths:
            with np.load(path.with_suffix(".npz")) as arrays:
                images.append(dict(arrays))
        return cls(results, images)

    def _add(
        self, variant: Variant, one: dict[str, Any], arrays: Mapping[str, NDArray[Any]]
    ) -> None:
        for routing, splits in one["asked"].items():
            for split, rows in splits.items():
                for row in rows:
                    question = str(Question(variant, row["capacity"], routing))
                    found = self.measured.setdefault(question, {}).setdefault(one["seed"], {})
                    found[split] = 100 * row["accuracy"]
                    found[f"{split} loss"] = row["loss"]
                    self.facts[question] = row
                    key = f"{routing}/{row['capacity']:g}/{split}"
                    images = self._images.setdefault(question, {}).setdefault(one["seed"], {})
                    images[split] = 100 * arrays[key]
                    images[f"{split} loss"] = arrays[f"{key} loss"]

    @property
    def variants(self) -> list[Variant]:
        """Models that there are numbers of."""
        names = {one["variant"] for one in self.results}
        return [variant for variant in VARIANTS if variant.name in names]

    def of(self, variant: Variant) -> dict[int, dict[str, Any]]:
        """All that was measured of a model, by seed."""
        return {one["seed"]: one for one in self.results if one["variant"] == variant.name}

    @property
    def own(self) -> list[Question]:
        """Every model at the capacities that it was made for."""
        questions = [Question(variant, c) for variant in self.variants for c in variant.own]
        return [question for question in questions if str(question) in self.measured]

    @property
    def capacities(self) -> list[float]:
        """Capacities that nested models were asked at."""
        nested = [one for v in self.variants if v.is_nested for one in self.of(v).values()]
        return sorted({row["capacity"] for one in nested for row in one["asked"][OWN][SPLITS[0]]})

    @property
    def dense_macs(self) -> int | None:
        """Multiply-adds of an image in the dense model of the nested ones' width, if known."""
        wide = (one for v in self.variants if v not in NARROW for one in self.of(v).values())
        return next((one["dense_macs_per_image"] for one in wide), None)

    def summary(self, question: Question, metric: str) -> Summary | None:
        """A number over seeds; None if there is none."""
        seeds = self.measured.get(str(question))
        if seeds is None:
            return None
        return Summary.of({seed: found[metric] for seed, found in seeds.items()})

    # --- what is compared -------------------------------------------------------------------------

    @property
    def gaps_to_dense(self) -> Gaps:
        """How far models are from the dense one."""
        dense = Question(DENSE, 1.0)
        return self._gaps((question, dense) for question in self.own if question != dense)

    @property
    def gaps_to_narrow(self) -> Gaps:
        """How far nested models are from dense ones that cost about as much."""
        return self._gaps(
            (question, Question(narrow, 1.0))
            for narrow, capacity in _OF_ONE_COST.items()
            for question in self.own
            if question.variant.is_nested and question.capacity == capacity
        )

    @property
    def gaps_of_routing(self) -> Gaps:
        """How far models are from the same with other routing, and from those trained without."""
        return self._gaps(self._routing_pairs())

    def _routing_pairs(self) -> Iterator[tuple[Question, Question]]:
        for other in (UNTRAINED, RANDOMLY):
            for variant in self.variants:
                for capacity in variant.controlled:
                    yield Question(variant, capacity), Question(variant, capacity, other)
        for by_chance in RANDOM:
            capacity = by_chance.own[0]
            for variant in self.variants:
                if variant.controlled == (capacity,):
                    yield Question(variant, capacity), Question(by_chance, capacity)

    def _gaps(self, pairs: Iterator[tuple[Question, Question]]) -> Gaps:
        """How far the first of each pair is from the second, of equal seeds."""
        found: dict[str, dict[str, Gap]] = {}
        for pair in pairs:
            question, baseline = (str(one) for one in pair)
            if not {question, baseline} <= self.measured.keys():
                continue
            two = {name: self.measured[name] for name in (question, baseline)}
            summaries = comparison.differences(two, METRICS, baseline).get(question, {})
            found[f"{question} - {baseline}"] = {
                metric: Gap(summary, self._interval(question, baseline, metric))
                for metric, summary in summaries.items()
            }
        return {name: gap for name, gap in found.items() if gap}

    def _interval(self, question: str, baseline: str, metric: str) -> tuple[float, float]:
        ours, theirs = self._images[question], self._images[baseline]
        seeds = sorted(ours.keys() & theirs.keys())
        differences = np.stack([ours[seed][metric] - theirs[seed][metric] for seed in seeds])
        return paired_interval(differences, self._concepts[metric.removesuffix(" loss")])


def _concepts_of(split: str, numbers: NDArray[np.int64]) -> list[str]:
    """The emoji of images by their numbers in a split."""
    drawings = EmojiCorpus.load().drawings(split)
    return [drawings[number].concept.slug for number in numbers.tolist()]
