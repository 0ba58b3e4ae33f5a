"""Whether the images that a model draws are what its prompts ask for, by the embedded drawings.

*Concepts*: an image is drawn to the name of an emoji in the words of a style, as "a red fox, drawn
in the style of noto". It is right if a drawing of this emoji, in any style, is nearer to it than
those of nine others of the same split, drawn at random: chance is 10 %, since an image that was
drawn to nothing has no reason to be near the one that was asked for.

*Relations*: an image is drawn to the caption of a scene, as "a bell left of two foxes". It is right
if it is nearer to a scene that the caption is true of than to one of the same things with both
sides swapped: chance is 50 %. Captions say neither styles nor where along its half a thing is, so
what counts is the nearest of all such scenes.

Nearness is the mean squared error of pixels after box averages to 8 x 8: an image with the right
colours in the right places is near, whatever its outlines are. As a control the same questions are
asked about images that were drawn to another one of the prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchtitan_mixtures.data.captions import with_article
from torchtitan_mixtures.data.emoji import (
    CANVAS_SIZE,
    CELL_SIZE,
    RELATIONS,
    STYLE_WORDS,
    Concept,
    Drawing,
    EmojiCorpus,
    Scene,
)
from torchtitan_mixtures.evaluation.items import choose_drawings
from torchtitan_mixtures.evaluation.rates import Rate

Pictures = NDArray[np.uint8]
"""`(images, height, width, 3)`, square."""

Blurred = NDArray[np.float64]
"""`(images, height, width, 3)` in [0, 1]."""

Draw = Callable[[Sequence[str]], Pictures]
"""Draws one image to each prompt."""

SPLITS = ("train", "unseen_concept")
"""What is asked about if nothing else is said."""

GRID = 8
"""Images are compared as so many rows and columns of means."""

POOL = 10
"""Concepts among which the right one is to be the nearest."""

_STEP = 8
"""Pixels of a scene's canvas between the places that are tried for one thing in its half."""


def blur(pictures: Pictures, rows: int = GRID, columns: int = GRID) -> Blurred:
    """Average blocks of pixels, `(images, rows, columns, 3)`."""
    return _average(pictures, rows, columns) / 255


def _average(images: NDArray[Any], rows: int, columns: int) -> NDArray[np.float64]:
    count, height, width, channels = images.shape
    blocks = images.reshape(count, rows, height // rows, columns, width // columns, channels)
    return blocks.mean((2, 4))


def other_order(count: int, rng: random.Random) -> NDArray[np.int64]:
    """A random order in which nothing is at its own place; of two or more."""
    ring = rng.sample(range(count), count)
    order = np.empty(count, np.int64)
    order[ring] = ring[1:] + ring[:1]
    return order


# --- concepts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConceptQuestion:
    """A prompt that asks for a concept, and what the image is compared with."""

    prompt: str
    drawing: Drawing
    """What is asked for."""

    pool: tuple[Concept, ...]
    """The concept and others, in this order."""


def ask_concepts(split: str, count: int, seed: int) -> list[ConceptQuestion]:
    """Make questions about the concepts of a split, of different families.

    Args:
        split: Of the corpus.
        count: How many, at most.
        seed: Of what is drawn.
    """
    rng = random.Random(f"concepts/{seed}")
    drawings = EmojiCorpus.load().drawings(split)
    known = choose_drawings(drawings, len(drawings), seed)
    questions = []
    for drawing in known[:count]:
        others = rng.sample([other.concept for other in known if other is not drawing], POOL - 1)
        style = STYLE_WORDS[drawing.style]
        prompt = f"{with_article(drawing.concept.name)}, drawn in the style of {style}"
        questions.append(ConceptQuestion(prompt, drawing, (drawing.concept, *others)))
    return questions


def score_concepts(questions: Sequence[ConceptQuestion], pictures: Pictures) -> Rate:
    """How often the nearest of the pool is what was asked for; a tie is a miss.

    Args:
        questions: Made by `ask_concepts`.
        pictures: The image of each, of a size that the corpus has.
    """
    size, found = pictures.shape[1], blur(pictures)
    targets: dict[str, Blurred] = {}
    hits = 0
    for question, image in zip(questions, found, strict=True):
        distances = []
        for concept in question.pool:
            if concept.slug not in targets:
                targets[concept.slug] = _drawings_of(concept, size)
            distances.append(((targets[concept.slug] - image) ** 2).mean((1, 2, 3)).min())
        hits += int(distances[0] < min(distances[1:]))
    return Rate(hits, len(questions), 1 / POOL)


def _drawings_of(concept: Concept, size: int) -> Blurred:
    """A concept in all its styles."""
    drawings = [Drawing(concept, style) for style in concept.styles]
    return blur(EmojiCorpus.load().images(drawings, size))


# --- relations ------------------------------------------------------------------------------------


def ask_relations(split: str, count: int, seed: int) -> list[Scene]:
    """Compose the scenes whose captions are the prompts, about as many of each relation."""
    corpus, rng = EmojiCorpus.load(), random.Random(f"relations/{seed}")
    missing = dict.fromkeys(RELATIONS, -(-count // len(RELATIONS)))
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = corpus.compose_scene(rng, split)
        if missing[scene.relation]:
            missing[scene.relation] -= 1
            scenes.append(scene)
    return scenes


def score_relations(scenes: Sequence[Scene], pictures: Pictures) -> Rate:
    """How often sides are nearer to where they were asked for than swapped; a tie is a miss.

    Args:
        scenes: Made by `ask_relations`.
        pictures: The image drawn to the caption of each.
    """
    hits = 0
    for scene, image in zip(scenes, blur(pictures), strict=True):
        relation = RELATIONS[scene.relation]
        axis, place = relation.subject_side
        halves = np.split(image, 2, axis=1 - axis)  # left and right, or top and bottom
        subject = _distances(scene.drawings[: scene.num_subjects], halves, axis)
        other = _distances(scene.drawings[scene.num_subjects :], halves, axis)
        hits += int(subject[place] + other[1 - place] < subject[1 - place] + other[place])
    return Rate(hits, len(scenes), 1 / 2)


def _distances(side: Sequence[Drawing], halves: Sequence[Blurred], axis: int) -> list[float]:
    """Squared error of the nearest way to place one side of a scene in each half.

    Args:
        side: One thing, somewhere along a half, or two, end to end.
        halves: Of an image: each `(height, width, 3)`.
        axis: 0: they are left and right, and higher than wide.
    """
    placed = [_placements(drawing, axis, len(side) == 1) for drawing in side]
    distances = []
    for half in halves:
        parts = np.split(half, len(side), axis=axis)
        errors = [((p - part) ** 2).sum((1, 2, 3)) for p, part in zip(placed, parts, strict=True)]
        distances.append(float(sum(error.min() for error in errors)))
    return distances


def _placements(drawing: Drawing, axis: int, is_alone: bool) -> Blurred:
    """A thing in all its styles, wherever it may be; `(placements, height, width, 3)`."""
    styles = [Drawing(drawing.concept, style) for style in drawing.concept.styles]
    cells = EmojiCorpus.load().images(styles, CELL_SIZE)
    if not is_alone:
        return blur(cells, GRID // 2, GRID // 2)
    side = CELL_SIZE // _STEP
    steps = blur(cells, side, side)  # as fine as the places are
    room = (CANVAS_SIZE - CELL_SIZE) // _STEP
    placed = []
    for before in range(room + 1):
        margins = [(0, 0)] * 4
        margins[1 + axis] = (before, room - before)
        placed.append(np.pad(steps, margins, constant_values=1.0))  # white
    shape = (GRID, GRID // 2) if axis == 0 else (GRID // 2, GRID)
    return _average(np.concatenate(placed), *shape)


# --- all of it ------------------------------------------------------------------------------------


def measure_split(draw: Draw, split: str, count: int, seed: int) -> dict[str, Any]:
    """Ask about the concepts and the relations of a split, and of images of other prompts.

    Args:
        draw: The model; the same prompts must give the same images.
        split: Of the corpus.
        count: Prompts of either kind, at most.
        seed: Of the prompts and of what they are compared with.

    Returns:
        Plain JSON: for "concepts" and "relations" the number of `prompts`, and of `right` answers
        and of those to `other_prompts` what `Rate.as_json` says.
    """
    questions = ask_concepts(split, count, seed)
    scenes = ask_relations(split, count, seed)
    rng = random.Random(f"control/{seed}")
    found = {}
    for name, prompts, score in (
        (
            "concepts",
            [question.prompt for question in questions],
            partial(score_concepts, questions),
        ),
        ("relations", [scene.caption for scene in scenes], partial(score_relations, scenes)),
    ):
        pictures = draw(prompts)
        found[name] = {
            "prompts": len(prompts),
            "right": score(pictures).as_json(),
            "other_prompts": score(pictures[other_order(len(prompts), rng)]).as_json(),
        }
    return found
