"""What `manifest.json` says of pre-tokenised shards; see `tokenized_shards.py`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

MANIFEST = "manifest.json"
PLAN = "plan.json"
"""What was to be tokenised, written first. A folder that has it but no `MANIFEST` is incomplete."""

FORMAT_VERSION = 2
TOKENIZE_COMMAND = "python scripts/prepare_data.py tokenize"


@dataclass(frozen=True)
class ShardModality:
    """A modality of shards: what made its codes, and how many there are."""

    name: str
    tokenizer: str
    """What the configuration called it."""
    fingerprint: str
    vocab_size: int
    documents: int
    """Those with a segment of it."""
    segments: int
    codes: int


@dataclass(frozen=True)
class ShardFile:
    """One file of shards."""

    file: str
    bytes: int
    sha256: str
    header_sha256: str
    """Of all before the entries, whose own checksums are in it."""
    documents: int
    segments: int
    codes: dict[str, int]
    """Of each modality."""

    @property
    def num_codes(self) -> int:
        """Codes of all modalities."""
        return sum(self.codes.values())


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says."""

    documents: int
    modalities: tuple[ShardModality, ...]
    files: tuple[ShardFile, ...]
    source: dict[str, Any]
    """Name and settings of what was tokenised."""
    samples: int
    """Of the source, bad ones too."""
    bad_samples: int
    """Those skipped."""
    bad_keys: tuple[str, ...]
    """Some of them."""

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read and check `manifest.json`.

        Raises:
            ValueError: There is none, or it is corrupt or of another version; says what to do.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise _missing_manifest(folder)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content.pop("format_version")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise shard_error(path, f"is corrupt ({error!r})") from None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: has format version {version!r}, and this program reads "
                f"{FORMAT_VERSION}; use the program that wrote it, or tokenize again into a new "
                f"folder with `{TOKENIZE_COMMAND}`."
            )
        try:
            content["modalities"] = tuple(ShardModality(**m) for m in content["modalities"])
            content["files"] = tuple(ShardFile(**f) for f in content["files"])
            content["bad_keys"] = tuple(content["bad_keys"])
            manifest = Manifest(**content)
            manifest._check()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise shard_error(path, f"is corrupt ({error})") from None
        return manifest

    def _check(self) -> None:
        for part in (self, *self.modalities, *self.files):
            _check_types(part)
        names = [modality.name for modality in self.modalities]
        if not 0 < len(set(names)) == len(names) <= 256:
            raise ValueError(f"modalities {names}")
        for file in self.files:
            if Path(file.file).name != file.file or set(file.codes) - set(names):
                raise ValueError(f"file {file.file!r} with codes of {', '.join(file.codes)}")
            if not all(type(n) is int and n >= 0 for n in file.codes.values()):
                raise ValueError(f"file {file.file!r} with codes {file.codes}")
        if len({file.file for file in self.files}) < len(self.files):
            raise ValueError("a file is named twice")
        totals = {m.name: m.codes for m in self.modalities}
        found = {name: sum(file.codes.get(name, 0) for file in self.files) for name in names}
        documents = sum(file.documents for file in self.files)
        segments = sum(file.segments for file in self.files)
        if (totals, self.documents, sum(m.segments for m in self.modalities)) != (
            found,
            documents,
            segments,
        ):
            raise ValueError("its totals are not those of its files")


def _check_types(part: Any) -> None:
    """Check that fields are what they are declared to be, and that numbers count something."""
    hints = get_type_hints(type(part))
    for field in fields(part):
        value, kind = getattr(part, field.name), hints[field.name]
        kind = getattr(kind, "__origin__", kind)
        if type(value) is not kind or (kind is int and value < 0):
            raise ValueError(f"{field.name} = {value!r}")


def shard_error(path: Path, problem: str) -> ValueError:
    """What is wrong with a file of shards, and how to make it anew."""
    return ValueError(
        f"{path}: {problem}. Delete it and {MANIFEST} and run `{TOKENIZE_COMMAND}` as before, "
        "which writes what is missing; or copy the folder again."
    )


def _missing_manifest(folder: Path) -> ValueError:
    if (folder / PLAN).is_file():
        return ValueError(
            f"{folder}: its shards are not complete; run `{TOKENIZE_COMMAND}` as before, which "
            "goes on where it ended."
        )
    problem = f"has no {MANIFEST}" if folder.is_dir() else "no such folder"
    return ValueError(
        f"{folder}: {problem}; name a folder that `{TOKENIZE_COMMAND}` wrote, or write one."
    )
