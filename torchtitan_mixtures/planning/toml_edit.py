"""Writes a configuration with some keys changed, and its order and comments as they were."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchtitan_mixtures.checks import check_flavor
from torchtitan_mixtures.train import parse_job

Changes = Mapping[str, Mapping[str, Any]]
"""Section, such as "training" -> key -> value."""

_SECTION = re.compile(r"\s*\[\s*(?P<name>[^\[\]]+?)\s*\]\s*(#.*)?$")
_KEY = re.compile(r"\s*(?P<key>[A-Za-z0-9_-]+)\s*=")


def check_target(target: Path) -> None:
    """Check that a configuration can be written there.

    Raises:
        ValueError: It exists, or its folder does not.
    """
    if target.exists():
        raise ValueError(f"{target}: exists; name another file, or remove it.")
    if not target.parent.is_dir():
        raise ValueError(f"{target}: there is no folder {target.parent}; make it first.")


def write_config(
    source: Path, overrides: Sequence[str], header_lines: Sequence[str], target: Path
) -> None:
    """Write the configuration that a file and overrides on the command line make together.

    Args:
        source: A configuration of training.
        overrides: As they would follow it on the command line.
        header_lines: Comments that replace those above the first section, each without "#"; none:
            those stay.
        target: The file to write.

    Raises:
        ValueError: The target exists or its folder does not, or the source cannot be read or is
            written in a way that cannot be edited in place.
    """
    check_target(target)
    changes = changed_values(source, overrides)
    text = edit_toml(source.read_text(encoding="utf-8"), changes, str(source))
    if header_lines:  # what the source says above its first section is of another layout
        rest = itertools.dropwhile(
            lambda line: not line.strip() or line.startswith("#"), text.splitlines(keepends=True)
        )
        text = "".join((*(f"# {line}".rstrip() + "\n" for line in header_lines), "\n", *rest))
    target.write_text(text, encoding="utf-8")


def changed_values(source: Path, overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Find out which keys overrides change, as training reads them.

    Raises:
        ValueError: A value that TOML cannot say, or an override that training does not take.
    """
    before, after = (
        dataclasses.asdict(parse_job([f"--config={source}", *more], check_flavor))
        for more in ((), overrides)
    )
    changes: dict[str, dict[str, Any]] = {}
    _compare("", before, after, changes)
    return changes


def _compare(
    section: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    changes: dict[str, dict[str, Any]],
) -> None:
    for key, value in after.items():
        if isinstance(value, dict) and isinstance(before[key], dict):
            _compare(f"{section}.{key}".lstrip("."), before[key], value, changes)
        elif value != before[key]:
            if value is None:
                raise ValueError(f"{section}.{key} = None: TOML has no such value; leave it out.")
            changes.setdefault(section, {})[key] = value


def edit_toml(text: str, changes: Changes, name: str) -> str:
    """Change values in a TOML text in place; keys and sections that it lacks are added.

    Args:
        text: The text.
        changes: What is to be in it.
        name: Of the text, for messages.

    Raises:
        ValueError: The text has one of the keys in a form that cannot be edited in place.
    """
    lines = text.splitlines()
    for section, values in changes.items():
        for key, value in values.items():
            _set(lines, section, key, f"{key} = {toml_value(value)}")
    edited = "\n".join(lines) + "\n"
    expected = tomllib.loads(text)
    for section, values in changes.items():
        table = expected
        for part in section.split("."):
            table = table.setdefault(part, {})
        table.update(values)
    try:
        is_right = tomllib.loads(edited) == expected
    except tomllib.TOMLDecodeError:
        is_right = False
    if not is_right:
        raise ValueError(
            f"{name}: cannot be edited in place. Write each section as [section] and each key in "
            "it on a line of its own."
        )
    return edited


def _set(lines: list[str], section: str, key: str, statement: str) -> None:
    """Replace a key's statement, or add it at the end of its section."""
    bounds = _section_bounds(lines, section)
    if bounds is None:
        while lines and not lines[-1].strip():
            lines.pop()
        lines += ["", f"[{section}]", statement]
        return
    row, end = bounds
    last = row - 1  # of the section's statements
    while row < end:
        match = _KEY.match(lines[row])
        if match is None:
            row += 1
            continue
        after = _statement_end(lines, row, end)
        if match["key"] == key:
            comment = _comment(lines[after - 1], "\n".join(lines[row : after - 1]))
            lines[row:after] = [_with_comment(statement, comment, lines[after - 1])]
            return
        row, last = after, after - 1
    lines.insert(last + 1, statement)


def _section_bounds(lines: Sequence[str], section: str) -> tuple[int, int] | None:
    """First line after a section's header, and the line after its last; None: there is none."""
    start: int | None = None
    row = 0
    while row < len(lines):
        match = _SECTION.match(lines[row])
        if match is not None:
            if start is not None:
                return start, row
            if match["name"] == section:
                start = row + 1
        # Lines of an array may look like headers.
        row = _statement_end(lines, row, len(lines)) if _KEY.match(lines[row]) else row + 1
    return None if start is None else (start, len(lines))


def _statement_end(lines: Sequence[str], row: int, end: int) -> int:
    """The line after a statement: the first with which it is complete."""
    for after in range(row + 1, end + 1):
        if _parses("\n".join(lines[row:after])):
            return after
    return row + 1


def _comment(line: str, before: str) -> str:
    """The comment at the end of a statement's last line, if there is one."""
    for position, character in enumerate(line):
        if character == "#" and _parses(f"{before}\n{line[:position]}"):
            return line[position:]
    return ""


def _with_comment(statement: str, comment: str, line: str) -> str:
    """Put a comment behind a statement, in the column where it was if there is room."""
    if not comment:
        return statement
    return f"{statement.ljust(line.index(comment) - 2)}  {comment}"


def _parses(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


def toml_value(value: Any) -> str:
    """Write a value as TOML does."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{json.dumps(key)} = {toml_value(each)}" for key, each in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # TOML's basic strings escape as JSON's do
    return repr(value)
