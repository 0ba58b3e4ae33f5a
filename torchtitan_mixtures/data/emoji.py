"""The embedded emoji corpus: drawings in three styles, captions, scenes and spoken names.

Reads only the files of `corpora/emoji/`, which `corpora/build_emoji.py` makes. No network, nothing
but numpy and Pillow: a plain install trains on real data offline.
"""

import functools
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from torchtitan_mixtures.data.captions import describe, is_countable, join_names, pluralize
from torchtitan_mixtures.data.spoken import SPEECH_FILE, UNSEEN_VOICE, VOICES, SpokenNames

STYLES = ("noto", "noto_v1", "fluent")
SPLITS = ("train", "unseen_concept", "unseen_style")
"""Splits of the drawings. `unseen_voice` is one more for models that hear: see `UNSEEN_VOICE`."""

SIZES = (16, 32, 64)
CELL_SIZE = 64
"""Height and width in pixels of a stored drawing; the other sizes are box averages of it."""

STYLE_WORDS = {"noto": "noto", "noto_v1": "blob", "fluent": "fluent"}
"""What captions call a style. "Blob" is the common name of the drawings of Noto version 1."""

EMBEDDED_FOLDER = Path(__file__).parent / "corpora" / "emoji"
REBUILD_COMMAND = "python scripts/prepare_data.py emoji"
SPEECH_COMMAND = "python scripts/prepare_data.py speech"
MANIFEST = "manifest.json"
FORMAT_VERSION = 1

CANVAS_SIZE = 2 * CELL_SIZE
"""Scenes are composed at twice the stored resolution, so that each emoji keeps all its pixels."""

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Concept:
    """One emoji, whatever its drawings look like."""

    slug: str
    emoji: str
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    family: str  # near-duplicates ("man running", "woman running facing right") share one
    split: str  # "train" or "unseen_concept"; the split of one drawing is `Drawing.split`
    styles: tuple[str, ...]
    withheld_style: str | None = None  # of a train concept: the style kept for `unseen_style`


@dataclass(frozen=True)
class Drawing:
    """One picture: a concept in a style."""

    concept: Concept
    style: str

    @property
    def split(self) -> str:
        """The one split this drawing belongs to."""
        return "unseen_style" if self.style == self.concept.withheld_style else self.concept.split


@dataclass(frozen=True)
class Box:
    """Where a drawing sits in a scene, as fractions of the canvas; top-left origin."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Scene:
    """Two to four emoji on one canvas and a caption that is true of it."""

    image: Images  # (size, size, 3)
    caption: str
    drawings: tuple[Drawing, ...]  # in the order the caption names them
    boxes: tuple[Box, ...]  # one for each drawing
    relation: str  # a key of RELATIONS: how the first `num_subjects` drawings lie to the others
    num_subjects: int


@dataclass(frozen=True)
class Sheet:
    """All drawings of one style as palette indices.

    `cells` is `(drawings, 64, 64)` uint8 and `palette` is `(256, 3)` uint8.
    """

    cells: Images
    palette: Images


class EmojiCorpus:
    """The emoji drawings, their names and their splits.

    Use `EmojiCorpus.load()`; the constructor is for the builder.

    Args:
        concepts: All concepts, in the fixed order that `drawings` follows.
        sheets: One `Sheet` per style. Cell `i` of one is the `i`-th concept that has its style.
        spoken: The names of the concepts, in the same order; None before they are spoken.
    """

    def __init__(
        self,
        concepts: Sequence[Concept],
        sheets: Mapping[str, Sheet],
        spoken: SpokenNames | None = None,
    ) -> None:
        self.concepts = tuple(concepts)
        self._spoken = spoken
        self._number = {concept.slug: number for number, concept in enumerate(concepts)}
        self.groups = tuple(dict.fromkeys(concept.group for concept in concepts))
        self._sheets = dict(sheets)
        self._cell: dict[Drawing, int] = {}
        by_split: dict[str, list[Drawing]] = {split: [] for split in SPLITS}
        for style in STYLES:
            having = [Drawing(concept, style) for concept in concepts if style in concept.styles]
            self._cell.update({drawing: cell for cell, drawing in enumerate(having)})
            for drawing in having:
                by_split[drawing.split].append(drawing)
        self._drawings = {split: tuple(drawings) for split, drawings in by_split.items()}
        self._drawings[UNSEEN_VOICE] = self._drawings["train"]

    @staticmethod
    def load(folder: Path | None = None) -> "EmojiCorpus":
        """Read and verify a corpus folder; one object per folder and process.

        Args:
            folder: Folder that `build_emoji.py` wrote. Default: the one inside the package.

        Raises:
            ValueError: A file is missing or differs from the manifest.
        """
        return _load(EMBEDDED_FOLDER if folder is None else Path(folder))

    def drawings(self, split: str) -> tuple[Drawing, ...]:
        """All drawings of a split, by style and then by Unicode order."""
        if split not in self._drawings:
            raise ValueError(f"split = {split!r} is unknown; allowed: {', '.join(self._drawings)}")
        return self._drawings[split]

    @property
    def longest_speech(self) -> int:
        """Units of the longest spoken name; 0 if names are not spoken."""
        return 0 if self._spoken is None else int(self._spoken.lengths.max())

    def spoken(self, concept: Concept, voice: str) -> NDArray[np.int64]:
        """The name of a concept as one voice speaks it.

        Args:
            concept: One of `concepts`.
            voice: One of `VOICES`; which of them speak in a split is what `voices_of` says.

        Returns:
            `(units,)` int64, units of the speech tokenizer "emoji_25hz".

        Raises:
            ValueError: The corpus was built without speech, or there is no such voice.
        """
        if self._spoken is None:
            raise ValueError(f"this corpus has no {SPEECH_FILE}; add it with `{SPEECH_COMMAND}`")
        if voice not in VOICES:
            raise ValueError(f"voice = {voice!r} is unknown; allowed: {', '.join(VOICES)}")
        return self._spoken.find(self._number[concept.slug], VOICES.index(voice))

    def image(self, drawing: Drawing, size: int = 32) -> Images:
        """The `(size, size, 3)` uint8 picture of one drawing."""
        return self.images([drawing], size)[0]

    def images(self, drawings: Sequence[Drawing], size: int = 32) -> Images:
        """Pictures of many drawings.

        Args:
            drawings: What to show, in this order.
            size: Height and width: 16, 32 or 64.

        Returns:
            `(drawings, size, size, 3)` uint8, RGB on pure white.
        """
        _check_size(size)
        out = np.empty((len(drawings), size, size, 3), np.uint8)
        for position, drawing in enumerate(drawings):
            sheet = self._sheets[drawing.style]
            # One at a time: the 64 px RGB of the whole corpus would not fit a CPU's cache.
            out[position] = box_average(sheet.palette[sheet.cells[self._cell[drawing]]], size)
        return out

    def caption(self, drawing: Drawing, rng: random.Random) -> str:
        """A caption of one drawing, such as "a red fox, drawn in the style of noto: animal, face".

        Args:
            drawing: What to describe.
            rng: The only source of variety: equal states give equal captions.
        """
        concept = drawing.concept
        return describe(concept.name, concept.keywords, STYLE_WORDS[drawing.style], rng)

    def compose_scene(
        self, rng: random.Random, split: str, size: int = 32, pool: Sequence[Drawing] = ()
    ) -> Scene:
        """Place two to four emoji on one canvas and say how they lie to each other.

        Args:
            rng: The only source of variety: equal states give equal scenes.
            split: Every drawing of the scene is from this split.
            size: Height and width of the image: 16, 32 or 64.
            pool: Its drawings are some of these of the split; none: of all.
        """
        _check_size(size)
        relation = rng.choice(tuple(RELATIONS))
        pool = pool or self.drawings(split)
        subjects = _draw_side(rng, pool, ())
        objects = _draw_side(rng, pool, subjects)
        boxes = (
            *_place_side(rng, len(subjects), RELATIONS[relation].subject_side),
            *_place_side(rng, len(objects), RELATIONS[relation].object_side),
        )
        canvas = np.full((CANVAS_SIZE, CANVAS_SIZE, 3), 255, np.uint8)
        for drawing, (left, top) in zip(subjects + objects, boxes, strict=True):
            canvas[top : top + CELL_SIZE, left : left + CELL_SIZE] = self.image(drawing, CELL_SIZE)
        frame = rng.choice(RELATIONS[relation].frames)
        return Scene(
            image=box_average(canvas, size),
            caption=frame.format(_side_phrase(subjects), _side_phrase(objects)),
            drawings=subjects + objects,
            boxes=tuple(_to_fractions(left, top) for left, top in boxes),
            relation=relation,
            num_subjects=len(subjects),
        )


def box_average(image: Images, size: int) -> Images:
    """Shrink a square picture by the exact mean of each block, rounded half up.

    Args:
        image: `(side, side, 3)` uint8; `side` is a multiple of `size`.
        size: New height and width.

    Returns:
        `(size, size, 3)` uint8. Integer arithmetic, so the same on every machine.
    """
    factor = image.shape[0] // size
    if factor == 1:
        return image
    blocks = image.reshape(size, factor, size, factor, 3).sum(axis=(1, 3), dtype=np.uint32)
    area = factor * factor
    return ((blocks + area // 2) // area).astype(np.uint8)


# --- scenes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relation:
    """A spatial relation: which half of the canvas each side takes, and how to say it.

    A half is (axis, index): axis 0 is horizontal, index 0 is left or top.
    """

    subject_side: tuple[int, int]
    object_side: tuple[int, int]
    frames: tuple[str, ...]


RELATIONS = {
    "left": Relation(
        (0, 0), (0, 1), ("{} left of {}", "{} to the left of {}", "on the left {}, on the right {}")
    ),
    "right": Relation(
        (0, 1),
        (0, 0),
        ("{} right of {}", "{} to the right of {}", "on the right {}, on the left {}"),
    ),
    "above": Relation(
        (1, 0), (1, 1), ("{} above {}", "{} over {}", "at the top {}, at the bottom {}")
    ),
    "below": Relation(
        (1, 1), (1, 0), ("{} below {}", "{} under {}", "at the bottom {}, at the top {}")
    ),
}


def _draw_side(
    rng: random.Random, pool: Sequence[Drawing], used: Sequence[Drawing]
) -> tuple[Drawing, ...]:
    """One drawing, twice the same one or two different ones; none shares a name with `used`."""
    taken = {drawing.concept.name for drawing in used}
    first = rng.choice(pool)
    while first.concept.name in taken:
        first = rng.choice(pool)
    if rng.random() < 0.5:
        return (first,)
    if rng.random() < 0.6 and is_countable(first.concept.name):
        return first, first
    taken.add(first.concept.name)
    second = rng.choice(pool)
    while second.concept.name in taken:
        second = rng.choice(pool)
    return first, second


def _place_side(
    rng: random.Random, count: int, half: tuple[int, int]
) -> tuple[tuple[int, int], ...]:
    """Top-left corners in canvas pixels: along the half, one of them anywhere, two end to end."""
    axis, index = half
    along = (0, CELL_SIZE) if count == 2 else (rng.randint(0, CELL_SIZE),)
    across = index * CELL_SIZE
    return tuple((across, offset) if axis == 0 else (offset, across) for offset in along)


def _to_fractions(left: int, top: int) -> Box:
    right, bottom = left + CELL_SIZE, top + CELL_SIZE
    return Box(left / CANVAS_SIZE, top / CANVAS_SIZE, right / CANVAS_SIZE, bottom / CANVAS_SIZE)


def _side_phrase(drawings: Sequence[Drawing]) -> str:
    names = [drawing.concept.name for drawing in drawings]
    if len(names) == 2 and names[0] == names[1]:
        return f"two {pluralize(names[0])}"
    return join_names(names)


def _check_size(size: int) -> None:
    if size not in SIZES:
        raise ValueError(f"size = {size} is not available; allowed: {', '.join(map(str, SIZES))}")


# --- files ----------------------------------------------------------------------------------------


@functools.cache
def _load(folder: Path) -> EmojiCorpus:
    check_files(folder)
    concepts = tuple(
        Concept(keywords=tuple(entry.pop("keywords")), styles=tuple(entry.pop("styles")), **entry)
        for entry in json.loads((folder / "concepts.json").read_text(encoding="utf-8"))["concepts"]
    )
    sheets = {style: read_sheet(folder / f"{style}.png") for style in STYLES}
    speech = folder / SPEECH_FILE  # missing where it is not in the manifest either
    return EmojiCorpus(concepts, sheets, SpokenNames.read(speech) if speech.is_file() else None)


def read_sheet(path: Path) -> Sheet:
    """Read a palette PNG of 64 px cells, in rows from the top left."""
    with Image.open(path) as image:
        colours = image.getpalette("RGB") or []
        pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // CELL_SIZE, pixels.shape[1] // CELL_SIZE
    cells = pixels.reshape(rows, CELL_SIZE, columns, CELL_SIZE).transpose(0, 2, 1, 3)
    palette = np.array(colours, np.uint8).reshape(-1, 3)
    return Sheet(np.ascontiguousarray(cells.reshape(-1, CELL_SIZE, CELL_SIZE)), palette)


def check_files(folder: Path) -> None:
    """Compare every file of a corpus folder with its manifest.

    Raises:
        ValueError: Names the first missing or corrupt file, and the command that rebuilds it.
    """
    manifest_path = folder / MANIFEST
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        version, files = manifest["format_version"], manifest["files"]
    except FileNotFoundError:
        raise _file_error(manifest_path, "missing") from None
    except (ValueError, KeyError, TypeError):
        raise _file_error(manifest_path, "corrupt") from None
    if version != FORMAT_VERSION:
        raise _file_error(manifest_path, f"of format version {version}, not {FORMAT_VERSION}")
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise _file_error(path, "missing")
        if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            raise _file_error(path, "corrupt")


def _file_error(path: Path, problem: str) -> ValueError:
    return ValueError(
        f"corpus file {path} is {problem}; rebuild the corpus with `{REBUILD_COMMAND}`"
    )
