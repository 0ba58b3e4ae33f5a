"""The embedded corpus: integrity, splits, pictures, captions and scenes."""

import hashlib
import json
import random
import re
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from torchtitan_mixtures.data.captions import is_countable, pluralize, with_article
from torchtitan_mixtures.data.emoji import (
    EMBEDDED_FOLDER,
    SIZES,
    SPLITS,
    STYLES,
    EmojiCorpus,
    Scene,
    check_files,
)

REBUILD = "python scripts/prepare_data.py emoji"


@pytest.fixture(scope="module")
def corpus() -> EmojiCorpus:
    return EmojiCorpus.load()


@pytest.fixture
def copied_folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED_FOLDER, tmp_path / "emoji"))


# --- files ----------------------------------------------------------------------------------------


def test_folder_is_below_five_megabytes_and_wholly_in_the_manifest():
    paths = [path for path in EMBEDDED_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in paths) < 5_000_000
    files = json.loads((EMBEDDED_FOLDER / "manifest.json").read_text())["files"]
    names = {path.relative_to(EMBEDDED_FOLDER).as_posix() for path in paths}
    assert names == {*files, "manifest.json"}
    for name, entry in files.items():
        content = (EMBEDDED_FOLDER / name).read_bytes()
        assert len(content) == entry["bytes"]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]


@pytest.mark.parametrize(
    ("name", "phrases"),
    [
        ("NOTICE", ["Noto Emoji, Google", "Microsoft Corporation", "Unicode, Inc."]),
        ("licences/Apache-2.0.txt", ["Apache License", "END OF TERMS AND CONDITIONS"]),
        ("licences/MIT-Fluent-Emoji.txt", ["MIT License", "Copyright (c) Microsoft Corporation"]),
        ("licences/Unicode-3.0.txt", ["UNICODE LICENSE V3", "SPDX-License-Identifier"]),
        ("licences/MIT-unicode-emoji-json.txt", ["The MIT License", "Mu-An Chiou"]),
        ("licences/MIT-emojibase.txt", ["MIT License", "Miles Johnson"]),
        ("README.md", [REBUILD, "unseen_style"]),
    ],
)
def test_licences_and_notices_are_present(name: str, phrases: list[str]):
    text = (EMBEDDED_FOLDER / name).read_text(encoding="utf-8")
    assert all(phrase in text for phrase in phrases)


def test_every_flipped_byte_is_reported_as_corrupt(copied_folder: Path):
    for name in json.loads((copied_folder / "manifest.json").read_text())["files"]:
        path = copied_folder / name
        original = path.read_bytes()
        path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(ValueError, match="corrupt") as error:
            check_files(copied_folder)
        assert str(path) in str(error.value) and REBUILD in str(error.value)
        path.write_bytes(original)
    check_files(copied_folder)


@pytest.mark.parametrize("name", ["noto_v1.png", "concepts.json", "manifest.json"])
def test_a_missing_file_is_reported_with_the_remedy(copied_folder: Path, name: str):
    (copied_folder / name).unlink()
    with pytest.raises(ValueError, match="missing") as error:
        EmojiCorpus.load(copied_folder)
    assert name in str(error.value) and REBUILD in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", '{"format_version": 1}'])
def test_an_unreadable_manifest_is_corrupt(copied_folder: Path, content: str):
    (copied_folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is corrupt"):
        check_files(copied_folder)


def test_another_format_version_is_named(copied_folder: Path):
    path = copied_folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        check_files(copied_folder)


# --- splits ---------------------------------------------------------------------------------------


def test_counts_match_the_study(corpus: EmojiCorpus):
    assert len(corpus.concepts) > 1600 and len(corpus.groups) == 8
    styles = [style for concept in corpus.concepts for style in concept.styles]
    assert len(styles) == sum(len(corpus.drawings(split)) for split in SPLITS) > 4400
    assert all(styles.count(style) > 1200 for style in STYLES)
    assert len({concept.slug for concept in corpus.concepts}) == len(corpus.concepts)
    assert all(concept.name and concept.subgroup for concept in corpus.concepts)
    assert not any("skin tone" in concept.name for concept in corpus.concepts)


def test_families_are_not_shared_between_train_and_unseen_concepts(corpus: EmojiCorpus):
    split_of_family = defaultdict(set)
    for concept in corpus.concepts:
        split_of_family[concept.family].add(concept.split)
    assert all(len(splits) == 1 for splits in split_of_family.values())
    unseen = sum(splits == {"unseen_concept"} for splits in split_of_family.values())
    assert 0.08 < unseen / len(split_of_family) < 0.12


def test_each_drawing_is_in_exactly_one_split(corpus: EmojiCorpus):
    drawings = [drawing for split in SPLITS for drawing in corpus.drawings(split)]
    assert len(drawings) == len(set(drawings))
    for split in SPLITS:
        assert all(drawing.split == split for drawing in corpus.drawings(split))


def test_every_unseen_style_concept_is_seen_in_another_style_only(corpus: EmojiCorpus):
    train = {(drawing.concept.slug, drawing.style) for drawing in corpus.drawings("train")}
    train_concepts = {slug for slug, _ in train}
    families = {(d.concept.family, d.style) for d in corpus.drawings("train")}
    for drawing in corpus.drawings("unseen_style"):
        assert drawing.concept.slug in train_concepts
        assert (drawing.concept.slug, drawing.style) not in train
        assert (drawing.concept.family, drawing.style) not in families  # nor a near-duplicate
    candidates = sum(c.split == "train" and len(c.styles) > 1 for c in corpus.concepts)
    assert 0.08 < len(corpus.drawings("unseen_style")) / candidates < 0.12


def test_variants_of_one_drawing_share_a_family(corpus: EmojiCorpus):
    family = {concept.name: concept.family for concept in corpus.concepts}
    for names in (
        ("man running", "woman running", "person running facing right"),
        ("one-thirty", "twelve-thirty"),
        ("new moon", "full moon face"),
        ("keycap: 1", "keycap: 9"),
        ("man with red hair", "woman with white hair", "bald man"),
        ("red heart", "blue heart"),
        ("backhand index pointing left", "backhand index pointing up"),
    ):
        assert len({family[name] for name in names}) == 1, names
    assert family["fox"] != family["wolf"]


def test_all_groups_occur_in_all_splits(corpus: EmojiCorpus):
    for split in SPLITS:
        assert {drawing.concept.group for drawing in corpus.drawings(split)} == set(corpus.groups)


def test_unknown_split_lists_the_allowed_ones(corpus: EmojiCorpus):
    with pytest.raises(ValueError, match="'test' is unknown; allowed: train, unseen_concept"):
        corpus.drawings("test")


# --- pictures -------------------------------------------------------------------------------------


def test_smaller_views_are_exact_box_averages(corpus: EmojiCorpus):
    drawings = corpus.drawings("train")[::500]
    full = corpus.images(drawings, 64)
    for size in SIZES:
        views = corpus.images(drawings, size)
        assert views.shape == (len(drawings), size, size, 3) and views.dtype == np.uint8
        block = 64 // size
        for n, row, column in ((0, 3, 5), (1, size // 2, size // 2), (2, size - 1, 0)):
            rows, columns = row * block, column * block
            pixels = full[n, rows : rows + block, columns : columns + block].astype(float)
            expected = np.floor(pixels.mean(axis=(0, 1)) + 0.5)
            assert (views[n, row, column] == expected).all()
        assert (corpus.image(drawings[0], size) == views[0]).all()


def test_drawings_are_on_pure_white_and_fill_their_cell(corpus: EmojiCorpus):
    drawings = [drawing for split in SPLITS for drawing in corpus.drawings(split)][::7]
    is_white = (corpus.images(drawings, 64) == 255).all(-1)
    corners = is_white[:, [0, 0, 63, 63], [0, 63, 0, 63]]
    assert corners.any(1).mean() > 0.8  # a few flat icons are full squares
    assert is_white.mean(axis=(1, 2)).max() < 0.97  # no empty cell


def test_unavailable_size_lists_the_allowed_ones(corpus: EmojiCorpus):
    with pytest.raises(ValueError, match="size = 48 is not available; allowed: 16, 32, 64"):
        corpus.images(corpus.drawings("train")[:1], 48)


# --- captions -------------------------------------------------------------------------------------


def test_captions_name_the_concept_and_repeat_with_the_seed(corpus: EmojiCorpus):
    drawings = corpus.drawings("train")
    first = [corpus.caption(drawing, random.Random(n)) for n, drawing in enumerate(drawings)]
    second = [corpus.caption(drawing, random.Random(n)) for n, drawing in enumerate(drawings)]
    assert first == second
    assert all(d.concept.name in text for d, text in zip(drawings, first, strict=True))
    rng = random.Random(0)
    assert len({corpus.caption(drawings[0], rng) for _ in range(50)}) > 25
    with_style = sum("style" in text for text in first) / len(first)
    assert 0.4 < with_style < 0.6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fox", "a fox"),
        ("alien", "an alien"),
        ("unicorn", "a unicorn"),
        ("hourglass done", "an hourglass done"),
        ("SOS button", "an SOS button"),
        ("scissors", "scissors"),
        ("cooked rice", "cooked rice"),
        ("keycap: 1", "keycap: 1"),
        ("fork and knife", "a fork and knife"),
        ("bus", "a bus"),
        ("Libra", "Libra"),
    ],
)
def test_articles(name: str, expected: str):
    assert with_article(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fox", "foxes"),
        ("cherry blossom", "cherry blossoms"),
        ("butterfly", "butterflies"),
        ("face with tears of joy", "faces with tears of joy"),
        ("person running", "people running"),
        ("mouse", "mice"),
        ("monkey", "monkeys"),
        ("A button (blood type)", "A buttons (blood type)"),
    ],
)
def test_plurals(name: str, expected: str):
    assert is_countable(name) and pluralize(name) == expected


# --- scenes ---------------------------------------------------------------------------------------

FRAMES = (
    (r"(?:on the left) (.*), on the right (.*)", "left"),
    (r"(?:on the right) (.*), on the left (.*)", "right"),
    (r"(?:at the top) (.*), at the bottom (.*)", "above"),
    (r"(?:at the bottom) (.*), at the top (.*)", "below"),
    (r"(.*?) (?:to the )?left of (.*)", "left"),
    (r"(.*?) (?:to the )?right of (.*)", "right"),
    (r"(.*?) (?:above|over) (.*)", "above"),
    (r"(.*?) (?:below|under) (.*)", "below"),
)


def check_caption_is_true(scene: Scene) -> None:
    """Read the caption and compare it with the boxes."""
    subject, obj, relation = next(
        (*found.groups(), relation)
        for pattern, relation in FRAMES
        if (found := re.fullmatch(pattern, scene.caption))
    )
    sides = (range(scene.num_subjects), range(scene.num_subjects, len(scene.drawings)))
    for side, phrase in zip(sides, (subject, obj), strict=True):
        names = [scene.drawings[i].concept.name for i in side]
        if len(names) == 2 and names[0] == names[1]:
            assert phrase == f"two {pluralize(names[0])}"
        else:
            assert phrase == " and ".join(map(with_article, names))
    for s in sides[0]:
        for o in sides[1]:
            a, b = scene.boxes[s], scene.boxes[o]
            assert {
                "left": a.right <= b.left,
                "right": a.left >= b.right,
                "above": a.bottom <= b.top,
                "below": a.top >= b.bottom,
            }[relation], scene.caption


@pytest.mark.parametrize("split", SPLITS)
def test_scene_captions_are_true_of_the_picture(corpus: EmojiCorpus, split: str):
    rng = random.Random(7)
    counts = defaultdict(int)
    for _ in range(200):
        scene = corpus.compose_scene(rng, split, 64)
        check_caption_is_true(scene)
        assert all(drawing.split == split for drawing in scene.drawings)
        counts[len(scene.drawings)] += 1
        canvas = np.full((64, 64, 3), 255, np.uint8)
        for drawing, box in zip(scene.drawings, scene.boxes, strict=True):
            if (box.left * 64) % 1 or (box.top * 64) % 1:
                break  # half-pixel offsets are covered by the others
            left, top = int(box.left * 64), int(box.top * 64)
            canvas[top : top + 32, left : left + 32] = corpus.image(drawing, 32)
        else:
            assert (canvas == scene.image).all()  # each drawing is where its box says
    assert set(counts) == {2, 3, 4}


@pytest.mark.parametrize("size", SIZES)
def test_scenes_repeat_with_the_seed(corpus: EmojiCorpus, size: int):
    first = corpus.compose_scene(random.Random(3), "train", size)
    second = corpus.compose_scene(random.Random(3), "train", size)
    assert first.image.shape == (size, size, 3) and first.image.dtype == np.uint8
    assert (first.image == second.image).all()
    assert (first.caption, first.drawings, first.boxes) == (
        second.caption,
        second.drawings,
        second.boxes,
    )
