"""Tables of a canvas file, whose keys are taken one by one and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_KINDS = {int: "a whole number", float: "a finite number", str: "a text", list: "a list"}

REQUIRED: Any = object()
"""In place of a default: there is none."""


class Table:
    """A table of a file, all of whose keys must be known.

    Args:
        content: What the file says.
        name: What the file calls the table, as `regions[0]`; empty: it is all of the file.
        prefix: Goes before names in messages, as `canvas.toml: `.

    Raises:
        ValueError: It is no table.
    """

    def __init__(self, content: Any, name: str, prefix: str) -> None:
        self.name = name
        self.where = prefix + name if name else prefix.removesuffix(": ")
        self.keys_begin = f"{prefix}{name}." if name else prefix
        self._prefix = prefix
        if not isinstance(content, Mapping):
            raise ValueError(f"{self.where}: must be a table of keys and values.")
        self._content = content
        self._known: dict[str, None] = {}  # in the order of taking

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def error(self, key: str, value: Any, reason: str) -> ValueError:
        """Make the error that a key has a wrong value."""
        return ValueError(f"{self.keys_begin}{key} = {value!r}: {reason}.")

    def take(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """Take the value of a key.

        Args:
            key: Its name.
            kind: `int`, `float` (which whole numbers are too), `str` or `list`.
            default: If it is not there; without one it must be.

        Raises:
            ValueError: It is not there, or of another kind.
        """
        self._known[key] = None
        if key not in self._content:
            if default is REQUIRED:
                raise ValueError(f"{self.where}: has no {key}; add {key}, {_KINDS[kind]}.")
            return default
        value = self._content[key]
        is_bool = isinstance(value, bool)  # which Python holds to be a number
        if kind is float and isinstance(value, int | float) and not is_bool:
            # A whole number may be too large for a float.
            if not -1e300 < value < 1e300:
                raise self.error(key, value, f"must be {_KINDS[kind]}")
            value = float(value)
        if not isinstance(value, kind) or is_bool or (kind is float and not math.isfinite(value)):
            raise self.error(key, value, f"must be {_KINDS[kind]}")
        return value

    def take_any(self, key: str) -> Any:
        """Take the value of a key that is there, of whatever kind."""
        self._known[key] = None
        return self._content[key]

    def take_number(self, key: str, kind: type, default: Any, limits: tuple[float, float]) -> Any:
        """Take a number that must be between limits, which are allowed; see `take`."""
        value = self.take(key, kind, default)
        least, most = limits
        if value is not None and not least <= value <= most:
            allowed = f"{least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
            raise self.error(key, value, f"must be {allowed}")
        return value

    def table(self, key: str) -> Table | None:
        """Take a table, None if it is not there."""
        self._known[key] = None
        return Table(self._content[key], key, self._prefix) if key in self._content else None

    def tables(self, key: str) -> list[Table]:
        """Take a list of tables, empty if it is not there."""
        entries = self.take(key, list, [])
        return [Table(entry, f"{key}[{i}]", self._prefix) for i, entry in enumerate(entries)]

    def finish(self) -> None:
        """Refuse keys that nobody took.

        Raises:
            ValueError: Names one, and those that there are.
        """
        for key in self._content:
            if key not in self._known:
                raise ValueError(
                    f"{self.keys_begin}{key}: unknown key; there are {', '.join(self._known)}."
                )
