"""Rows made into documents: the schema, what is refused and why, images and sounds of any kind."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.unit.data.file_fakes import RATE, SIZE, picture, sound
from torchtitan_mixtures.data.documents import (
    Columns,
    DocumentBuilder,
    find_beside,
    parse_json,
)
from torchtitan_mixtures.data.media import MediaReader, decode_text, read_file
from torchtitan_mixtures.data.sources import Document, PairOrder


def build(row: Any, folder: Path = Path("nowhere"), rate: int | None = RATE, **options: Any):
    order = options.pop("order", PairOrder(1.0))
    builder = DocumentBuilder(MediaReader(SIZE, rate), order, Columns(**options))
    return builder.build(row, "the key", random.Random(0), find_beside(folder))


def shape_of(document: Document) -> list[tuple[str, Any, bool]]:
    return [
        (s.modality, s.payload if isinstance(s.payload, str) else s.payload.shape, s.has_loss)
        for s in document.segments
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cat.png").write_bytes(picture(70))
    (tmp_path / "meow.wav").write_bytes(sound(160))
    return tmp_path


# --- segments -------------------------------------------------------------------------------------


def test_segments_keep_their_order_and_their_loss(folder: Path) -> None:
    segments = [
        {"text": "A cat: ", "loss": False},
        {"image": "a/cat.png"},
        {"text": "\n"},
        {"audio": "meow.wav", "loss": True},
    ]
    expected = [
        ("text", "A cat: ", False),
        ("image", (SIZE, SIZE, 3), True),
        ("text", "\n", True),
        ("speech", (160,), True),
    ]
    for value in (segments, json.dumps(segments)):
        document = build({"segments": value}, folder)
        assert shape_of(document) == expected
        assert document.key == "the key" and not document.is_pair
    assert document.segments[1].payload.dtype == np.uint8
    assert (document.segments[1].payload == 70).all()
    assert document.segments[3].payload.dtype == np.float32


def test_every_spelling_of_a_file_gives_the_same(folder: Path) -> None:
    content = (folder / "a" / "cat.png").read_bytes()
    spellings = [
        "a/cat.png",
        str(folder / "a" / "cat.png"),
        content,
        {"bytes": content, "path": "elsewhere.png"},
        {"bytes": content},
        {"bytes": None, "path": "a/cat.png"},
        {"path": "a/cat.png"},
        {"base64": base64.b64encode(content).decode()},
    ]
    for spelling in spellings:
        (segment,) = build({"segments": [{"image": spelling}]}, folder).segments
        assert (segment.payload == 70).all(), spelling


def test_what_is_null_counts_as_absent(folder: Path) -> None:
    nothing = {"bytes": None, "path": None}
    row = {
        "segments": [
            {"text": "x", "image": None, "audio": nothing, "loss": None},
            {"text": None, "image": "a/cat.png", "audio": None, "loss": False},
        ]
    }
    assert shape_of(build(row, folder)) == [("text", "x", True), ("image", (SIZE, SIZE, 3), False)]
    text = build({"segments": None, "text": "x", "image": nothing})
    assert shape_of(text) == [("text", "x", True)]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ({"text": "x"}, r"segments must be a list of objects, or JSON of one, not dict"),
        (3, r"segments must be a list of objects, or JSON of one, not int 3"),
        ("[", r"not JSON"),
        ([], r"an empty document"),
        ([{"text": " \n"}, {"text": "\t"}], r"an empty document"),
        ([{"text": "x"}, "x"], r"segment 1: expected an object .* not str 'x'"),
        ([{}], r"segment 0: has the keys nothing; expected exactly one of text, image and audio"),
        ([{"text": "x", "image": "y"}], r"segment 0: has the keys 'text', 'image'; expected"),
        ([{"txt": "x"}], r"segment 0: has the keys 'txt'; expected exactly one"),
        ([{"text": "x", "weight": 2}], r"segment 0: has the keys 'text', 'weight'"),
        ([{"loss": False}], r"segment 0: has the keys nothing"),
        ([{"text": "x", "loss": 0}], r"segment 0: loss must be true or false, not int 0"),
        ([{"text": 3}], r"segment 0: text must be a string, not int 3"),
        ([{"text": ""}], r"segment 0: the text is empty"),
        ([{"text": "a\ud800b"}], r"segment 0: the text has half a surrogate pair at character 1"),
        ([{"image": 3}], r"segment 0: image must be a path, bytes, .* not int 3"),
        ([{"image": ["x"]}], r"segment 0: image must be a path"),
        ([{"image": {"url": "x"}}], r"segment 0: image must be a path"),
        ([{"image": {"bytes": "x"}}], r"segment 0: image must be a path"),
        ([{"image": {"base64": "a?"}}], r"segment 0: not base64"),
        ([{"image": {"base64": 3}}], r"segment 0: base64 must be a string, not int 3"),
        ([{"image": ""}], r"segment 0: '' is no path of the image"),
        ([{"image": "a\0b"}], r"segment 0: 'a\\x00b' is no path"),
        ([{"image": "https://x.org/a.png"}], r"segment 0: https.* download it first"),
        ([{"image": "none.png"}], r"segment 0: cannot read .*nowhere.none.png \(No such file"),
        ([{"image": "x" * 5000}], r"segment 0: cannot read .*\(File name too long\)"),
        ([{"image": b""}], r"segment 0: the file is empty"),
        ([{"image": b"GIF89a"}], r"segment 0: .*"),
        ([{"audio": b"RIFF"}], r"segment 0: .*audio.*"),
    ],
)
def test_wrong_segments_are_refused_by_number(segments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({"segments": segments})


@pytest.mark.parametrize("row", [None, 3, "text", ["text"]])
def test_rows_must_be_objects(row: Any) -> None:
    with pytest.raises(ValueError, match="expected an object"):
        build(row)


def test_sound_needs_a_model_with_speech(folder: Path) -> None:
    for row in (
        {"segments": [{"audio": "meow.wav"}]},
        {"caption": "x", "image": "a/cat.png", "audio": "meow.wav"},
    ):
        with pytest.raises(ValueError, match=r"audio, and the model has no speech; choose a model"):
            build(row, folder, rate=None)


# --- pairs and texts ------------------------------------------------------------------------------


def test_pairs_have_the_caption_first_or_last(folder: Path) -> None:
    row = {"caption": "a cat", "image": "a/cat.png", "audio": "meow.wav", "width": 3}
    first, last = (build(row, folder, order=PairOrder(share)) for share in (1.0, 0.0))
    assert first.is_pair and last.is_pair
    assert [s.modality for s in first.segments] == ["text", "image", "speech"]
    assert [s.modality for s in last.segments] == ["image", "speech", "text"]
    dropped = build(row, folder, order=PairOrder(1.0, 1.0))
    assert [s.modality for s in dropped.segments] == ["image", "speech"]


def test_one_of_several_captions_is_drawn(folder: Path) -> None:
    row = {"say": ["a", "", None, "b"], "pic": "a/cat.png"}
    builder = DocumentBuilder(
        MediaReader(SIZE, None), PairOrder(1.0), Columns(caption="say", image="pic")
    )
    drawn = [
        builder.build(row, "", random.Random(seed), find_beside(folder)).segments[0].payload
        for seed in range(200)
    ]
    assert 70 < drawn.count("a") < 130 and drawn.count("a") + drawn.count("b") == 200


def test_the_caption_may_be_the_column_of_texts(folder: Path) -> None:
    assert build({"text": "x", "image": "a/cat.png"}, folder, caption="text").is_pair
    assert not build({"text": "x"}, folder, caption="text").is_pair


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a/cat.png"}, r"a pair with no 'caption'; it has 'image'"),
        ({"image": "a/cat.png", "caption": " "}, r"the caption is empty"),
        ({"image": "a/cat.png", "caption": 3}, r"caption: the caption is no text but int 3"),
        ({"image": "none", "caption": "x"}, r"image: cannot read .*none"),
        ({"caption": "x"}, r"expected 'segments', 'text', or 'caption' with 'image' or 'audio'"),
        ({}, r"it has nothing"),
        ({"text": "  "}, r"nothing but white space"),
        ({"text": ""}, r"the text is empty"),
        ({"text": ["x"]}, r"text must be a string, not list"),
    ],
)
def test_wrong_rows_are_refused(row: Any, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build(row, folder)


@pytest.mark.parametrize(
    "text", ["", "{", '{"a": 1e}', "[" * 100_000, '{"a": ' * 100_000, "1" * 10_000, "\ud800"]
)
def test_no_json_can_do_more_than_raise_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="JSON"):
        parse_json(text)


# --- media ----------------------------------------------------------------------------------------


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_images_of_every_mode_become_rgb() -> None:
    reader = MediaReader(SIZE, None)
    grey = Image.new("L", (16, 16), 100)
    files = {
        "palette": encode(grey.convert("P"), "PNG"),
        "CMYK": encode(Image.new("CMYK", (16, 16), (0, 0, 0, 155)), "JPEG", quality=100),
        "16 bit": encode(Image.fromarray(np.full((16, 16), 100 << 8, np.uint16)), "PNG"),
        "alpha": encode(Image.new("RGBA", (16, 16), (100, 100, 100, 255)), "PNG"),
        "grey": encode(grey, "WEBP", lossless=True),
    }
    for name, content in files.items():
        pixels = reader.image(content)
        assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.uint8
        assert np.abs(pixels.astype(int) - 100).max() <= 3, name
    clear = encode(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "PNG")
    assert (reader.image(clear) == 255).all()


def test_images_are_turned_upright() -> None:
    image = Image.new("RGB", (16, 16), "black")
    image.paste("white", (0, 0, 16, 8))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = MediaReader(SIZE, None).image(encode(image, "PNG", exif=exif))
    assert pixels[:3].max() < 50 and pixels[-3:].min() > 200


def test_decompression_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="DecompressionBomb"):
        MediaReader(SIZE, None).image(encode(Image.new("L", (64, 64)), "PNG"))


def test_sounds_are_brought_to_the_rate() -> None:
    reader = MediaReader(SIZE, 2 * RATE)
    assert reader.sound(sound(160), "x").shape == (320,)


def test_only_regular_files_of_a_sane_size_are_read(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "not a regular file"), (Path("/dev/zero"), "not a regular")):
        with pytest.raises(ValueError, match=message):
            read_file(path)
    (tmp_path / "x").write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"has 5 bytes; at most 4 are read"):
        read_file(tmp_path / "x", 4)
    assert read_file(tmp_path / "x", 5) == b"12345"


def test_text_is_utf_8() -> None:
    assert decode_text(b"\xef\xbb\xbf\xc3\xa4") == "\u00e4"
    with pytest.raises(ValueError, match=r"not UTF-8: byte 0xe4 at 1 "):
        decode_text(b"a\xe4b")
