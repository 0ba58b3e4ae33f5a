"""Rows of files made into documents: lists of typed segments, pairs, or plain texts.

A list of segments, in the column `segments`:

    [{"text": "A cat: ", "loss": false}, {"image": "cats/1.jpg"}, {"audio": "meow.wav"}]

An image or a sound is a path, its bytes (in Parquet), `{"bytes": ..., "path": ...}`, or
`{"base64": "..."}`. A pair has a caption, or a list of captions of which one is drawn, and an image
or a sound or both, in columns of their own. A row with neither has its text in the column `text`.
What is null counts as absent. The columns may be called otherwise, see `SourceEntry`.
"""

from __future__ import annotations

import base64
import json
import os
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from torchtitan_mixtures.data.media import MediaReader, check_text
from torchtitan_mixtures.data.samples import choose_caption
from torchtitan_mixtures.data.sources import Document, PairOrder, Segment
from torchtitan_mixtures.source_entries import COLUMN_KEYS, SourceEntry

Finder = Callable[[str], Path | bytes]
"""Given the path by which a document names a file: where that is, or what it holds."""

_MODALITY_OF_KEY = {"text": "text", "image": "image", "audio": "speech"}


@dataclass(frozen=True)
class Columns:
    """What the columns of a row are called; see `SourceEntry`. Empty: there is no such."""

    segments: str = "segments"
    caption: str = "caption"
    image: str = "image"
    audio: str = "audio"
    text: str = "text"

    @classmethod
    def of(cls, entry: SourceEntry) -> Columns:
        """Those that an entry names."""
        return cls(*(getattr(entry, key) for key in COLUMN_KEYS))

    def called(self, key: str) -> str:
        """What the column is called that a key of an entry names."""
        return getattr(self, key.removesuffix("_column"))

    def names(self) -> list[str]:
        """All of them, each once."""
        named = (self.segments, self.caption, self.image, self.audio, self.text)
        return [name for name in dict.fromkeys(named) if name]

    def content(self) -> list[str]:
        """Those of which a row must have one: a caption alone is none."""
        named = (self.segments, self.image, self.audio, self.text)
        return [name for name in dict.fromkeys(named) if name]


class DocumentBuilder:
    """Makes documents of rows.

    Args:
        media: Reads pictures and sounds.
        order: Of captions and what they are about.
        columns: What the columns are called.
    """

    def __init__(self, media: MediaReader, order: PairOrder, columns: Columns = Columns()) -> None:
        self._media = media
        self._order = order
        self.columns = columns

    def build(self, row: Any, key: str, rng: Random, find: Finder) -> Document:
        """Make the document of a row.

        Args:
            row: What JSON or Parquet says; see above.
            key: Finds the row again.
            rng: Draws the caption and the order of a pair.
            find: Of paths.

        Raises:
            ValueError: The row is not as expected; says what is, and in which segment.
        """
        if not isinstance(row, Mapping):
            raise ValueError(f'expected an object such as {{"text": "..."}}, not {_show(row)}')
        columns = self.columns
        if (segments := row.get(columns.segments)) is not None:
            return Document(self._segments(segments, find), key)
        image, audio = _unless_null(row.get(columns.image)), _unless_null(row.get(columns.audio))
        if image is None and audio is None:
            return Document((self._plain_text(row),), key)
        if row.get(columns.caption) is None:
            raise ValueError(f"a pair with no {columns.caption!r}; it has {_names(row)}")
        try:
            caption = check_text(choose_caption(row[columns.caption], rng.random()))
        except ValueError as error:
            raise ValueError(f"{columns.caption}: {error}") from error
        others = []
        for name, column, value in (
            ("image", columns.image, image),
            ("audio", columns.audio, audio),
        ):
            if value is not None:
                try:
                    others.append(self._segment(name, value, True, find))
                except ValueError as error:
                    raise ValueError(f"{column}: {error}") from error
        segments = self._order.arrange(rng, Segment("text", caption), *others)
        return Document(segments, key, is_pair=True)

    def _plain_text(self, row: Mapping[str, Any]) -> Segment:
        columns = self.columns
        if (text := row.get(columns.text)) is None:
            alone = "".join(f"{name!r}, " for name in (columns.segments, columns.text) if name)
            others = " or ".join(repr(name) for name in (columns.image, columns.audio) if name)
            raise ValueError(
                f"expected {alone}{'or ' if alone else ''}{columns.caption!r} with {others}; "
                f"it has {_names(row)}"
            )
        segment = _text_segment(text, True)
        if not text.strip():
            raise ValueError("the text is nothing but white space")
        return segment

    def _segments(self, values: Any, find: Finder) -> tuple[Segment, ...]:
        if isinstance(values, str):
            values = parse_json(values)
        if not isinstance(values, list):
            raise ValueError(
                f"segments must be a list of objects, or JSON of one, not {_show(values)}"
            )
        segments = []
        for number, value in enumerate(values):
            try:
                segments.append(self._typed_segment(value, find))
            except ValueError as error:
                raise ValueError(f"segment {number}: {error}") from error
        if not any(not isinstance(s.payload, str) or s.payload.strip() for s in segments):
            raise ValueError(
                "an empty document: expected at least one segment with anything but white space"
            )
        return tuple(segments)

    def _typed_segment(self, value: Any, find: Finder) -> Segment:
        if not isinstance(value, Mapping):
            raise ValueError(f'expected an object such as {{"text": "..."}}, not {_show(value)}')
        given = {name: part for name, part in value.items() if _unless_null(part) is not None}
        has_loss = given.pop("loss", True)
        if len(given) != 1 or next(iter(given)) not in _MODALITY_OF_KEY:
            raise ValueError(
                f"has the keys {_names(given)}; expected exactly one of text, image and audio, "
                "and loss at most"
            )
        if not isinstance(has_loss, bool):
            raise ValueError(f"loss must be true or false, not {_show(has_loss)}")
        ((name, content),) = given.items()
        return self._segment(name, content, has_loss, find)

    def _segment(self, name: str, content: Any, has_loss: bool, find: Finder) -> Segment:
        if name == "text":
            return _text_segment(content, has_loss)
        file, label = _locate(name, content, find)
        try:
            payload = self._media.image(file) if name == "image" else self._media.sound(file, label)
        except ValueError as error:
            if isinstance(file, bytes) or label in str(error):
                raise
            raise ValueError(f"{label}: {error}") from error
        return Segment(_MODALITY_OF_KEY[name], payload, has_loss)


def parse_json(text: str) -> Any:
    """Parse JSON of unknown origin.

    Raises:
        ValueError: It is malformed, or nested too deeply to read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def find_beside(folder: Path) -> Finder:
    """Find paths relative to a folder, and refuse those that lead out of it.

    Data of others could otherwise have any file of this machine opened. Links are followed: who has
    made one wanted that.
    """
    root = os.path.abspath(folder)

    def find(path: str) -> Path:
        if "://" in path:
            raise ValueError(f"{path} is an address and not a path; download it first")
        found = os.path.normpath(os.path.join(root, path))
        if os.path.commonpath([root, found]) != root:
            raise ValueError(
                f"{path} is outside of {folder}; set media_folder of the source to a folder that "
                "holds it"
            )
        return Path(found)

    return find


def _text_segment(content: Any, has_loss: bool) -> Segment:
    if not isinstance(content, str):
        raise ValueError(f"text must be a string, not {_show(content)}")
    return Segment("text", check_text(content), has_loss)


def _locate(name: str, value: Any, find: Finder) -> tuple[Path | bytes, str]:
    """The file that a segment names or holds, and what messages call it."""
    if isinstance(value, bytes):
        return value, name
    if isinstance(value, Mapping):
        keys = {key for key, part in value.items() if part is not None}
        if keys == {"base64"}:
            return _from_base64(value["base64"]), name
        if keys and keys <= {"bytes", "path"}:
            path = value.get("path")
            content = value.get("bytes")
            if isinstance(content, bytes):
                return content, path if isinstance(path, str) else name
            if content is None:
                value = path
    if not isinstance(value, str):
        raise ValueError(
            f"{name} must be a path, bytes, an object with bytes or path, or one with base64, not "
            f"{_show(value)}"
        )
    if not value or "\0" in value:
        raise ValueError(f"{value!r} is no path of the {name}")
    return find(value), value


def _from_base64(value: Any) -> bytes:
    if not isinstance(value, str):
        raise ValueError(f"base64 must be a string, not {_show(value)}")
    try:
        return base64.b64decode(value, validate=True)
    except ValueError as error:
        raise ValueError(f"not base64: {error}") from error


def _unless_null(value: Any) -> Any:
    """None if it is, or an object of nothing but that, as columns of files spell it."""
    if isinstance(value, Mapping) and all(part is None for part in value.values()):
        return None
    return value


def _names(row: Mapping[str, Any]) -> str:
    given = [name for name, value in row.items() if value is not None]
    return ", ".join(map(repr, given[:20])) or "nothing"


def _show(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"
