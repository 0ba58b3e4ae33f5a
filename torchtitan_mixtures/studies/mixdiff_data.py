"""Images of the study of Mixture of Diffusers: emoji in three styles, and scenes, in a folder."""

from __future__ import annotations

import random
import re
from pathlib import Path

from PIL import Image

from torchtitan_mixtures.data.domain_file import read_domain_file, write_domain_file
from torchtitan_mixtures.data.emoji import SPLITS, STYLES, EmojiCorpus

FOLDER = "data"
DOMAINS = "domains.json"
SCENE = "scene"
NAMES = (*STYLES, SCENE)
"""The domains."""

SIZE = 32
TEST_SCENES = 200
"""Scenes of each split that is tested on."""


def class_name(style: str, group: str) -> str:
    """What the class of a group in a style is called."""
    return f"{style}-{re.sub('[^a-z]+', '_', group.lower())}"


def write_data(folder: Path) -> None:
    """Write the images, a folder for each class in one for each split, and then their domains.

    Args:
        folder: Where to; what is there is written over.
    """
    corpus = EmojiCorpus.load()
    domains: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        domains[split] = entries = {}
        drawings = corpus.drawings(split)
        for drawing in drawings:
            name = class_name(drawing.style, drawing.concept.group)
            key = f"{name}/{drawing.concept.slug}.png"
            _write(folder / split / key, corpus.image(drawing, SIZE))
            entries[key] = STYLES.index(drawing.style)
        count = len(drawings) // len(STYLES) if split == "train" else TEST_SCENES
        rng = random.Random(split)
        for number in range(count):
            key = f"{SCENE}/{number:04}.png"
            _write(folder / split / key, corpus.compose_scene(rng, split, SIZE).image)
            entries[key] = NAMES.index(SCENE)
    write_domain_file(folder / DOMAINS, list(NAMES), domains)


def list_emoji(folder: Path, split: str) -> list[str]:
    """Say of each image of a split which emoji it shows (of a scene: its number), in their order.

    Args:
        folder: What `write_data` wrote.
        split: One of its splits.
    """
    keys = read_domain_file(str(folder / DOMAINS)).splits[split]
    # By class and then by name, as a folder of images is read.
    return [Path(key).stem for key in sorted(keys, key=lambda key: key.split("/"))]


def _write(path: Path, pixels: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)  # pyrefly: ignore [bad-argument-type] (an array)
