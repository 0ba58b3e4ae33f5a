"""Entries of `[[multimodal.sources]]`: where documents of a mixture of sources come from.

    [multimodal]
    source = "mixture"

    [[multimodal.sources]]
    name = "captions"
    kind = "jsonl"
    path = "/data/captions/*.jsonl"
    weight = 0.7

`[[multimodal.validation_sources]]` has the same keys but those of the mixture.
"""

# No `from __future__ import annotations` here: the types of the fields are checked.

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from torchtitan_mixtures.config_values import check_rules, check_table


@dataclass(frozen=True)
class SourceEntry:
    """One source of a mixture."""

    name: str = ""
    """What metrics and messages call it; letters, digits and -_. only, each once."""

    kind: Literal["emoji", "folder", "webdataset", "jsonl", "parquet", "datasets", "shards"] = (
        "jsonl"
    )
    """`folder`: images with captions beside them. `webdataset`: tar files. `jsonl`, `parquet`:
    documents as lists of segments, pairs or texts. `datasets`: the same in what
    `datasets.load_dataset` opens.
    `shards`: what `scripts/prepare_data.py tokenize` wrote. `emoji`: the embedded corpus."""

    path: str = ""
    """A file, a folder, or a pattern such as "/data/*.jsonl". For `datasets` as multimodal.path."""

    weight: float = 1.0
    """Share of the tokens of the mixture, relative to the other weights."""

    max_epochs: int = 0
    """Ends after so many passes; the others then share its part. 0 = never."""

    max_tokens: int = 0
    """Ends after so many tokens of all ranks. 0 = never."""

    split: str = ""
    """For `emoji` and `datasets`: the split. Empty = "train"."""

    subset: str = ""
    """For `datasets`: name of the configuration, if there are several."""

    data_files: tuple[str, ...] = ()
    """For `datasets`: files to read when `path` is a format."""

    streaming: bool = False
    """For `datasets`: read without downloading first."""

    image_column: str = "image"
    """For `datasets`, `jsonl` and `parquet`: where the image of a pair is."""

    audio_column: str = "audio"
    """For the same: where the sound of a pair is."""

    caption_column: str = "caption"
    """For the same: where the caption of a pair is."""

    segments_column: str = "segments"
    """For the same: where the list of segments is."""

    text_column: str = "text"
    """For the same: where the text of a row is that has none of those."""

    media_folder: str = ""
    """For the same: what relative paths of images and sounds are relative to, and where absolute
    ones must be. Empty = the folder of the file that names them; of `datasets`, of all its files.
    """


COLUMN_KEYS = ("segments_column", "caption_column", "image_column", "audio_column", "text_column")
"""Keys of an entry that name the columns of its rows."""


def parse_entries(key: str, tables: Any, validates: bool = False) -> list[SourceEntry]:
    """Check the tables of a list of sources.

    Args:
        key: The list's key, for messages.
        tables: What the configuration says.
        validates: Whether nothing is mixed.

    Raises:
        ValueError: Names the entry, the key, its value and the remedy.
    """
    entries = [
        _parse_entry(f"{key}[{number}]", table, validates) for number, table in enumerate(tables)
    ]
    for number, entry in enumerate(entries):
        if entry.name in [other.name for other in entries[:number]]:
            raise ValueError(f"{key}[{number}].name = {entry.name!r}: occurs twice; rename one.")
    return entries


def _parse_entry(key: str, table: dict[str, Any], validates: bool) -> SourceEntry:
    table = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    check_table(SourceEntry, table, f"{key}.")
    for required in ("name", "kind"):
        if required not in table:
            raise ValueError(f"{key} has no {required!r}: {table}; add it.")
    entry = SourceEntry(**table)
    known = entry.name.replace("-", "").replace("_", "").replace(".", "").isalnum()
    rules = {
        "name": (known and entry.name.isascii(), "letters, digits and -_. only"),
        "weight": (0 < entry.weight < math.inf, "a finite number > 0 (or leave the entry out)"),
        "max_epochs": (entry.max_epochs >= 0, "0 (no limit) or more"),
        "max_tokens": (entry.max_tokens >= 0, "0 (no limit) or more"),
        "path": (entry.path != "" or entry.kind == "emoji", "a file, a folder or a pattern"),
    }
    check_rules(key, entry, rules)
    readers = {
        "split": ("emoji", "datasets"),
        "subset": ("datasets",),
        "data_files": ("datasets",),
        "streaming": ("datasets",),
        **dict.fromkeys((*COLUMN_KEYS, "media_folder"), ("datasets", "jsonl", "parquet")),
        **({} if not validates else dict.fromkeys(("weight", "max_epochs", "max_tokens"), ())),
    }
    defaults = {field.name: field.default for field in dataclasses.fields(SourceEntry)}
    for name, kinds in readers.items():
        if entry.kind not in kinds and getattr(entry, name) != defaults[name]:
            advice = f"is read of {' and '.join(kinds)} only" if kinds else "nothing is mixed here"
            raise ValueError(
                f"{key}.{name} = {getattr(entry, name)!r}: {advice}, and this is of kind "
                f"{entry.kind!r}; remove the key."
            )
    return entry
