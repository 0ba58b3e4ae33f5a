"""Files that say which domain each image belongs to.

    {"format": 1,
     "names": ["photos", "drawings"],
     "splits": {"train": {"cat/1.png": 0, "cat/2.png": 1}, "val": {"cat/3.png": 0}}}

Keys of a split are the images', as `relative_key` of their set says: `red_heart (noto)` of emoji,
the path within its split of a picture in a folder (`cat/1.png`), the number of the row of
`datasets` (`17`), shard and row of latents (`train-00000.safetensors[17]`). Every image must have a
domain.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchtitan_mixtures.data.latents import write_json

CLUSTER_COMMAND = "python scripts/prepare_data.py cluster"
FORMAT_VERSION = 1

KINDS = ("style", "class")
"""Values of `multimodal.domains` that are no file."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class DomainFile:
    """What a file says."""

    path: str
    names: tuple[str, ...]
    splits: Mapping[str, Mapping[str, int]]

    def of_split(self, key: str, split: str) -> Mapping[str, int]:
        """The domain of each image of a split by its key.

        Raises:
            ValueError: There is no such split; names `key`, which names it.
        """
        if split not in self.splits:
            raise ValueError(
                f'{key}: multimodal.domains = "{self.path}" has no domains for split "{split}"; '
                f"it has some for {', '.join(self.splits)}. Add them, or make it again with "
                f"`{CLUSTER_COMMAND}`."
            )
        return self.splits[split]


def read_domain_file(named: str) -> DomainFile:
    """Read a file of domains; the same one when it is asked for again.

    Args:
        named: Its path, as `multimodal.domains` says.

    Raises:
        ValueError: There is none, or it is not as it must be.
    """
    path = Path(named).expanduser()
    if not path.is_file():
        raise ValueError(
            f'multimodal.domains = "{named}": is none of {", ".join(KINDS)}, and there is no '
            f"such file. `{CLUSTER_COMMAND}` makes one."
        )
    stat = path.stat()
    return _parse_file(named, path, stat.st_mtime_ns, stat.st_size)


# A start-up needs it several times, and that of a large data set is large.
@functools.lru_cache(maxsize=2)
def _parse_file(named: str, path: Path, *version: int) -> DomainFile:
    error = f'multimodal.domains = "{named}": '
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version_found, names, splits = (content[key] for key in ("format", "names", "splits"))
    except (ValueError, KeyError, TypeError) as reason:
        raise ValueError(f"{error}not a JSON file of domains ({reason!r}).") from None
    if version_found != FORMAT_VERSION:
        raise ValueError(f"{error}is of format {version_found!r}, not {FORMAT_VERSION}.")
    if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
        raise ValueError(f"{error}its names {names!r} must be a list of different names.")
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"{error}the name {name!r} must have letters, digits, _ and - alone, as experts "
                "are called that."
            )
    if not isinstance(splits, dict) or not all(isinstance(s, dict) for s in splits.values()):
        raise ValueError(f"{error}its splits must be an object of objects.")
    for split, entries in splits.items():
        for key, number in entries.items():
            if type(number) is not int or not 0 <= number < len(names):
                raise ValueError(
                    f'{error}split "{split}" has the domain {number!r} for "{key}"; domains are 0 '
                    f"to {len(names) - 1}."
                )
    return DomainFile(named, tuple(names), splits)


def write_domain_file(
    path: Path, names: Sequence[str], splits: Mapping[str, Mapping[str, int]]
) -> None:
    """Write a file of domains, whole or not at all; see above."""
    write_json(path, {"format": FORMAT_VERSION, "names": list(names), "splits": splits})
