"""Documents in tars as WebDataset lays them out: members of one name make one sample.

`0001.jpg` and `0001.txt` are a pair. What belongs to `0001` besides:

    .jpg .png .webp ...        the image of a pair
    .wav .flac .mp3 .ogg       the sound of a pair
    .txt .caption .text        its caption, or, alone, the text of a document
    .cls .id .url ...          not read (`NOTES_SUFFIXES`); any other is a bad sample
    .json                      {"caption": ...}, or {"segments": [{"image": "a.jpg"}, ...]}, whose
                               paths are members, `a.jpg` for `0001.a.jpg`, or whole names
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from torchtitan_mixtures.data.documents import Columns, DocumentBuilder, parse_json
from torchtitan_mixtures.data.image_files import SUFFIXES as IMAGE_SUFFIXES
from torchtitan_mixtures.data.media import MAX_MEDIA_BYTES, decode_text
from torchtitan_mixtures.data.source_files import DataFile, FileSettings, FileSource
from torchtitan_mixtures.data.sources import Document
from torchtitan_mixtures.data.tar_index import Member, read_index

SUFFIXES = (".tar",)

BLOCK_BYTES = 1 << 26
"""Of an archive, for a block; its headers are read for each. Less if the data are small."""

SOUND_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
CAPTION_SUFFIXES = (".txt", ".caption", ".text")

NOTES_SUFFIXES = (
    ".cls",
    ".id",
    ".index",
    ".url",
    ".license",
    ".md5",
    ".sha256",
    ".width",
    ".height",
)
"""Of members that say something about a sample and are not read."""

_MANY_BLOCKS = 256
_LEAST_BYTES = 1 << 12
_NUM_INDICES = 4  # of archives, kept


@dataclass
class Group:
    """The members of one sample.

    Attributes:
        file: The archive.
        name: What their names have in common: all before the first dot of the last part.
        members: By the rest of the name, in lower case, without the dot.
        error: Why the sample is bad; empty if nothing is wrong so far.
    """

    file: DataFile
    name: str
    members: dict[str, Member] = field(default_factory=dict)
    error: str = ""


class WebDatasetSource(FileSource[Group]):
    """Samples of tars. A block is a part of one; nothing is extracted to the disk.

    Args:
        files: The archives.
        settings: See there.
    """

    def __init__(self, files: Sequence[DataFile], settings: FileSettings) -> None:
        wanted = sum(file.size for file in files) // _MANY_BLOCKS
        size = min(max(wanted, _LEAST_BYTES), BLOCK_BYTES)
        # By size, so that starting up opens nothing; an empty file counts as a bad sample.
        super().__init__(files, [max(1, file.size // size) for file in files], settings)
        self._builder = DocumentBuilder(settings.media, settings.order, Columns())

    def read_part(self, file: DataFile, part: int, num_parts: int) -> Sequence[Group]:
        """See `FileSource.read_part`: where the samples are; `build` reads them."""
        try:
            starts, members = _index(file)
        except ValueError as error:
            raise ValueError(f"{file.path}: {error}") from error
        num_groups = len(starts) - 1
        begin, end = (num_groups * place // num_parts for place in (part, part + 1))
        return [_group(file, members[a:b]) for a, b in pairwise(starts[begin : end + 1])]

    def sample_key(self, block: int, number: int, sample: Group) -> str:
        """See `BlockSource.sample_key`: the archive and the name in it."""
        return f"{sample.file.path}: {sample.name}"

    def build(self, sample: Group, key: str, rng: Random) -> Document:
        """See `BlockSource.build`."""
        if sample.error:
            raise ValueError(sample.error)
        return self._builder.build(_row(sample), key, rng, lambda path: _find(sample, path))


@lru_cache(maxsize=_NUM_INDICES)
def _index(file: DataFile) -> tuple[list[int], list[Member]]:
    """The members of an archive, and where each sample begins among them; its end is the last.

    Raises:
        ValueError: It is no archive, or has no samples.
    """
    members = [member for member in read_index(file.path) if member.error or _split(member.name)]
    if not members:
        raise ValueError("has no samples: no members of names such as 0001.jpg")
    names = [(_split(member.name) or (member.name, ""))[0] for member in members]
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    return [*starts, len(members)], members


def _split(name: str) -> tuple[str, str] | None:
    """A name up to the first dot of its last part, and what follows; None if there is no such."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot else None


def _group(file: DataFile, members: Sequence[Member]) -> Group:
    name, _ = _split(members[0].name) or (members[0].name, "")
    group = Group(file, name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
    for member in members:
        _, suffix = _split(member.name) or ("", "")
        if suffix in group.members and not group.error:
            group.error = f"has two members {suffix!r}; names must differ before the first dot"
        group.error = group.error or member.error
        group.members[suffix] = member
    return group


def _row(group: Group) -> dict[str, Any]:
    """What a group says, as a row of the default columns."""
    row: dict[str, Any] = {}
    if "json" in group.members:
        described = parse_json(decode_text(_read(group, group.members["json"])))
        if not isinstance(described, dict):
            raise ValueError("its .json is no object")
        row |= {name: described.get(name) for name in ("segments", "caption", "text")}
        if row["segments"] is not None:
            return row
    for column, suffixes in (("image", IMAGE_SUFFIXES), ("audio", SOUND_SUFFIXES)):
        if (member := _only(group, suffixes)) is not None:
            row[column] = _read(group, member)
    if (member := _only(group, CAPTION_SUFFIXES)) is not None:
        text = decode_text(_read(group, member))
        is_pair = "image" in row or "audio" in row
        row["caption" if is_pair else "text"] = text.strip() if is_pair else text
    if "image" not in row and "audio" not in row:
        _refuse_unknown(group)
    return row


def _refuse_unknown(group: Group) -> None:
    """Refuse a sample whose picture or sound has a suffix that nobody knows; its text is no pair.

    Raises:
        ValueError: Names the member, and the suffixes that are read.
    """
    known = (*CAPTION_SUFFIXES, ".json", *NOTES_SUFFIXES)
    for name in group.members:
        if not f".{name}".endswith(known):
            read = " ".join((*IMAGE_SUFFIXES, *SOUND_SUFFIXES))
            raise ValueError(f"has a member .{name}, which is none of {read}")


def _only(group: Group, suffixes: Sequence[str]) -> Member | None:
    """The member with one of some suffixes; one that has nothing else before it is preferred.

    Raises:
        ValueError: There are several.
    """
    whole = [name for name in group.members if f".{name}" in suffixes]
    found = whole or [name for name in group.members if f".{name}".endswith(tuple(suffixes))]
    if len(found) > 1:
        raise ValueError(
            f"has {' and '.join(sorted(found))}; expected one of them, or a .json with segments"
        )
    return group.members[found[0]] if found else None


def _find(group: Group, path: str) -> bytes:
    """Read the member that a document names."""
    folder = f"{Path(group.name).name}."
    for name in (path, path.rpartition("/")[2].removeprefix(folder)):
        if (member := group.members.get(name.lower())) is not None:
            return _read(group, member)
    known = ", ".join(group.members)
    raise ValueError(f"{path} is no member of {group.name} (it has {known})")


def _read(group: Group, member: Member) -> bytes:
    if member.size > MAX_MEDIA_BYTES:
        raise ValueError(f"{member.name} has {member.size} bytes; at most {MAX_MEDIA_BYTES}")
    with group.file.path.open("rb") as stream:
        stream.seek(member.start)
        content = stream.read(member.size)
    if len(content) < member.size:
        raise ValueError(f"the archive is cut off in {member.name}")
    return content
