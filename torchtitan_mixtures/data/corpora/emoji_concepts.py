"""Which emoji the corpus holds: their names, drawings, families of near-duplicates, and splits."""

import importlib
import io
import json
import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from torchtitan_mixtures.data.emoji import CELL_SIZE, STYLES, Concept

RESVG_VERSION = "0.5.0"  # the rasteriser, a build-time tool


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class IconSet:
    """The icons of one style: SVG bodies by name, and names by code points."""

    icons: dict[str, Any]
    aliases: dict[str, Any]
    names_by_codes: dict[str, str]
    side: int

    @staticmethod
    def read(folder: Path) -> "IconSet":
        """Read an unpacked icon package."""
        icons = read_json(folder / "icons.json")
        return IconSet(
            icons["icons"],
            icons.get("aliases", {}),
            read_json(folder / "chars.json"),
            icons["width"],
        )

    def find(self, emoji: str, names: Iterable[str]) -> str | None:
        """The icon of an emoji: by code points where the set lists them, else by name."""
        codes = [f"{ord(char):x}" for char in emoji]
        candidates = [
            self.names_by_codes.get("-".join(codes)),
            self.names_by_codes.get("-".join(code for code in codes if code != "fe0f")),
            *(slugify(name) for name in names),
        ]
        return next(
            (name for name in candidates if name in self.icons or name in self.aliases), None
        )

    def source(self, name: str) -> tuple[str, bool] | str:
        """The icon that this one is an alias of; a mirror image differs from its original."""
        alias = self.aliases.get(name, {})
        parent = alias.get("parent", name)
        return (parent, True) if alias.get("hFlip") else parent

    def svg(self, name: str) -> str:
        """A standalone SVG of an icon, centred on a square."""
        alias = self.aliases.get(name, {})
        icon = self.icons[alias.get("parent", name)]
        width, height = icon.get("width", self.side), icon.get("height", self.side)
        body = icon["body"]
        if alias.get("hFlip"):
            body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{CELL_SIZE}" height="{CELL_SIZE}" viewBox="0 0 {width} {height}">{body}</svg>'
        )


def rasterize(svg: str) -> NDArray[np.uint8]:
    """`(64, 64, 3)` uint8 picture of an SVG on white."""
    try:
        resvg_py = importlib.import_module("resvg_py")
    except ImportError:
        resvg_py = None
    found = getattr(resvg_py, "__version__", None)
    if resvg_py is None or found != RESVG_VERSION:
        raise ValueError(
            f"rebuilding the corpus needs the rasteriser resvg-py {RESVG_VERSION}, found {found}: "
            f"pip install resvg-py=={RESVG_VERSION}"
        )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=CELL_SIZE, skip_system_fonts=True))
    rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), np.uint32)
    alpha = rgba[..., 3:]
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def slugify(name: str) -> str:
    """Lower-case ASCII words joined by hyphens, the form of icon names."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name.replace("'", "")).strip("-")


@dataclass
class Entry:
    """A concept before families and splits are known, and its icon name in each style."""

    slug: str
    emoji: str
    name: str
    keywords: list[str]
    group: str
    subgroup: str
    icons: dict[str, str]


def read_entries(folders: Mapping[str, Path], icon_sets: Mapping[str, IconSet]) -> list[Entry]:
    """All drawn emoji but flags and skin tones, in Unicode order."""
    annotations = read_json(folders["cldr"] / "annotations/en/annotations.json")["annotations"][
        "annotations"
    ]
    subgroup_names = read_json(folders["emojibase"] / "meta/groups.json")["subgroups"]
    subgroups = {
        item["emoji"].replace("\ufe0f", ""): subgroup_names[str(item["subgroup"])]
        for item in read_json(folders["emojibase"] / "en/data.json")
        if "subgroup" in item
    }
    entries = []
    for emoji, data in read_json(folders["unicode"] / "data-by-emoji.json").items():
        if data["group"] == "Flags":
            continue
        names = (data["name"], data["slug"])
        found = {style: icon_sets[style].find(emoji, names) for style in STYLES}
        icons = {style: icon for style, icon in found.items() if icon is not None}
        plain = emoji.replace("\ufe0f", "")
        # Joined sequences ("woman running") have no annotation: they take that of their base.
        base = annotations.get(plain) or annotations.get(plain.split("\u200d")[0], {})
        official = annotations.get(plain, {}).get("tts", [data["name"]])[0]
        name = tidy_name(official)
        keywords = [word for word in base.get("default", []) if word != name]
        if icons:
            subgroup = subgroups.get(plain, slugify(data["group"]))
            entries.append(
                Entry(data["slug"], emoji, name, keywords, data["group"], subgroup, icons)
            )
    drop_borrowed_icons(entries, icon_sets)
    return [entry for entry in entries if entry.icons]


def drop_borrowed_icons(entries: Sequence[Entry], icon_sets: Mapping[str, IconSet]) -> None:
    """Remove drawings that a name took from another emoji (the game of cricket for the insect)."""
    for style, icon_set in icon_sets.items():
        drawn_by = defaultdict(list)
        for entry in entries:
            if style in entry.icons:
                drawn_by[icon_set.source(entry.icons[style])].append(entry)
        for icon, sharing in drawn_by.items():
            owners = [entry for entry in sharing if entry.icons[style] == icon]
            for entry in sharing if len(sharing) > 1 else ():
                if owners != [entry]:
                    del entry.icons[style]


def tidy_name(name: str) -> str:
    """Turn "man: red hair" into "man with red hair": captions are phrases."""
    match = re.fullmatch(
        r"(man|woman|person):? (red hair|curly hair|white hair|blond hair|beard|bald)", name
    )
    if match is None:
        return re.sub(r"^(family|kiss|couple with heart) (?=\w+, )", r"\1: ", name)
    who, what = match.groups()
    if what == "bald":
        return f"bald {who}"
    return f"{who} with {'a beard' if what == 'beard' else what}"


# --- families and splits --------------------------------------------------------------------------

_VARIANT_WORDS = """
man woman person men women people boy girl boys girls child children adult older old baby
red orange yellow green blue purple brown black white grey pink light-blue dark light
large small medium medium-small big
left right up down facing right-facing left-facing leftwards rightwards upwards downwards
up-left up-right down-left down-right up-down left-right tilted pointing upper lower
clockwise counterclockwise
hair curly blond bald beard with a the and
"""
_VARIANT_SET = frozenset(_VARIANT_WORDS.split())
_SAME = {
    "princess": "prince",
    "crown": "prince",
    "mermaid": "merman",
    "merperson": "merman",
    "mrs. claus": "santa claus",
    "mx claus": "santa claus",
    "mx. claus": "santa claus",
}


def family_key(entry: Entry) -> str:
    """A name with everything removed that only makes a variant of the same drawing."""
    name = entry.name.lower().split(":")[0]
    if entry.subgroup in ("time", "sky-weather"):
        if re.search(r"o.clock|-thirty", name):
            return "clock face"
        if "moon" in name:
            return "moon"
    if entry.subgroup in ("keycap", "geometric", "arrow", "heart", "zodiac", "family"):
        return entry.subgroup
    if name.startswith("japanese “"):
        return "japanese button"
    if name.startswith("globe showing"):
        return "globe"
    words = [word for word in name.split() if word not in _VARIANT_SET]
    if entry.group == "Animals & Nature" and words[-1:] == ["face"]:
        words = words[:-1]
    key = " ".join(words)
    return _SAME.get(key, key) or ("person" if entry.group == "People & Body" else name)


def merge_lookalikes(
    keys: list[str], pixels: list[dict[str, NDArray[np.uint8]]], limit: float
) -> list[str]:
    """Join families two of whose drawings of one style are almost the same picture.

    Args:
        keys: Family of each concept.
        pixels: `(64, 64, 3)` uint8 drawing of each concept, by style.
        limit: Largest root mean square difference of the 16 px views.

    Returns:
        Family of each concept; a joined family is called by its first one in the fixed order.
    """
    parent = {key: key for key in keys}
    order = {key: index for index, key in reversed(list(enumerate(keys)))}

    def root(key: str) -> str:
        while parent[key] != key:
            key = parent[key]
        return key

    for first, second in lookalikes(pixels, limit):
        a, b = sorted((root(keys[first]), root(keys[second])), key=order.__getitem__)
        parent[b] = a
    return [root(key) for key in keys]


def lookalikes(pixels: list[dict[str, NDArray[np.uint8]]], limit: float) -> list[tuple[int, int]]:
    """Pairs of concepts that look alike in one style."""
    pairs = []
    for style in STYLES:
        having = [index for index, drawings in enumerate(pixels) if style in drawings]
        views = np.stack([pixels[index][style] for index in having]).reshape(-1, 16, 4, 16, 4, 3)
        # Sums of 16 pixels rather than means: integers, which float64 multiplies exactly.
        flat = views.sum(axis=(2, 4)).reshape(len(having), -1).astype(np.float64)
        norms = (flat * flat).sum(1)
        squared = norms[:, None] + norms - 2 * flat @ flat.T
        close = np.triu(squared < (16 * limit) ** 2 * flat.shape[1], 1)
        pairs += [(having[i], having[j]) for i, j in zip(*np.nonzero(close), strict=True)]
    return pairs


def build_concepts(
    entries: Sequence[Entry], families: Sequence[str], held_out: float, seed: int
) -> list[Concept]:
    """Give every concept its split.

    Families are drawn within each Unicode group, so that every split sees every group:

    - `held_out` of the families are `unseen_concept`.
    - Of the others, families are drawn until `held_out` of the concepts with two styles is met;
      one style of each is withheld from training, from every concept of the family, and only where
      each of them has another style. No near-duplicate of a withheld drawing is left in its style.

    Args:
        entries: The concepts, in Unicode order.
        families: Family of each.
        held_out: Share to hold out, each time.
        seed: Of the draw.
    """
    members: dict[str, list[Entry]] = defaultdict(list)
    for entry, family in zip(entries, families, strict=True):
        members[family].append(entry)
    by_group: dict[str, list[str]] = defaultdict(list)
    for family, found in members.items():
        by_group[found[0].group].append(family)
    unseen: set[str] = set()
    withheld: dict[str, str] = {}
    for group, names in by_group.items():
        rng = random.Random(f"{seed} {group}")
        rng.shuffle(names)
        count = round(held_out * len(names))
        unseen.update(names[:count])
        withheld.update(_withhold_styles(rng, names[count:], members, held_out))
    concepts = []
    for entry, family in zip(entries, families, strict=True):
        styles = tuple(style for style in STYLES if style in entry.icons)
        style = withheld.get(family)
        concepts.append(
            Concept(
                slug=entry.slug,
                emoji=entry.emoji,
                name=entry.name,
                keywords=tuple(entry.keywords),
                group=entry.group,
                subgroup=entry.subgroup,
                family=slugify(family) or family,
                split="unseen_concept" if family in unseen else "train",
                styles=styles,
                withheld_style=style if style in styles else None,
            )
        )
    return concepts


def _withhold_styles(
    rng: random.Random,
    names: Sequence[str],
    members: Mapping[str, Sequence[Entry]],
    held_out: float,
) -> dict[str, str]:
    """Families of one group, and the style that is withheld from each."""
    eligible = sum(len(entry.icons) > 1 for name in names for entry in members[name])
    chosen: dict[str, str] = {}
    total = 0
    for name in names:
        counts = {
            style: sum(style in entry.icons for entry in members[name])
            for style in STYLES
            if all(len(entry.icons) > 1 for entry in members[name] if style in entry.icons)
        }
        styles = [
            style
            for style, count in counts.items()
            if 0 < count <= held_out * eligible - total + 0.5
        ]
        if styles:
            chosen[name] = rng.choice(styles)
            total += counts[chosen[name]]
    return chosen
