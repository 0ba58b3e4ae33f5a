"""Type checks for configuration values: TorchTitan itself does not check those of a TOML."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from typing import Annotated, Any, Literal, Union

from tyro.constructors import PrimitiveConstructorSpec


def _parse_numbers(text: str) -> dict[str, float]:
    """Read `name=number` pairs, joined by commas, from the command line."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    return {name.strip(): float(number) for name, _, number in pairs}


# A TOML writes { text = 1e-4, image = 3e-3 }. By itself tyro would take this key on the command
# line in another form when the TOML has the table than when it does not, and 0.5 not for a 1.
Numbers = Annotated[
    dict[str, float],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME=NUMBER,...",
        instance_from_str=lambda words: _parse_numbers(words[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [",".join(f"{k}={v}" for k, v in value.items())],
    ),
]
"""A table from names to numbers; on the command line `name=number,name=number`."""


def _parse_tables(text: str) -> list[dict[str, Any]]:
    """Read a JSON list of tables from the command line."""
    tables = json.loads(text)
    if not isinstance(tables, list):
        raise ValueError("expected a JSON list of objects")
    return tables


# Named by position, tyro could not add an entry on the command line.
Tables = Annotated[
    list[dict[str, Any]],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda words: _parse_tables(words[0]),
        is_instance=lambda value: isinstance(value, list),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]
"""An array of tables; on the command line a JSON list of objects."""


def matches_type(value: Any, expected: Any) -> bool:
    """Say whether a configuration value may stand where its field's annotation says `expected`.

    An int may stand for a float; a bool may not stand for an int.
    """
    origin = typing.get_origin(expected)
    if expected is Any:
        return True
    if origin is Annotated:
        return matches_type(value, expected.__origin__)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in expected.__args__)
    if origin in (Union, types.UnionType):
        return any(matches_type(value, choice) for choice in expected.__args__)
    if origin in (list, tuple):
        item = expected.__args__[0] if expected.__args__ else Any
        return isinstance(value, (list, tuple)) and all(matches_type(v, item) for v in value)
    if origin is dict or expected is dict:
        name, item = typing.get_args(expected) or (Any, Any)
        return isinstance(value, dict) and all(
            matches_type(k, name) and matches_type(v, item) for k, v in value.items()
        )
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(expected, type) or isinstance(value, expected)


def describe_type(expected: Any) -> str:
    """Say in words what values a field's annotation admits."""
    origin = typing.get_origin(expected)
    if origin is Annotated:
        return describe_type(expected.__origin__)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in expected.__args__)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(choice) for choice in expected.__args__)
    if origin in (list, tuple) and expected.__args__:
        return f"a list of {describe_type(expected.__args__[0])}"
    if origin is dict and len(expected.__args__) == 2:
        return f"a table from names to {describe_type(expected.__args__[1])} each"
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return names.get(expected, getattr(expected, "__name__", str(expected)))


def check_value(key: str, value: Any, expected: Any) -> None:
    """Raise a `ValueError` that names the key if `value` is not of the type `expected`."""
    if not matches_type(value, expected):
        raise ValueError(f"{key} = {value!r}: must be {describe_type(expected)}.")


def check_section(name: str, section: Any) -> None:
    """Check every value of a section (a dataclass instance) against its annotation."""
    for key in dataclasses.fields(section):
        check_value(f"{name}.{key.name}", getattr(section, key.name), key.type)


def check_table(config_class: type, table: dict[str, Any], prefix: str = "") -> None:
    """Check a parsed TOML table against a configuration dataclass.

    Args:
        config_class: Dataclass whose fields name the allowed keys and their types.
        table: The parsed TOML.
        prefix: Dotted path of the table, for messages.

    Raises:
        ValueError: Names the first unknown key (with the nearest known ones) or the first value
            of a wrong type.
    """
    known = {key.name: key.type for key in dataclasses.fields(config_class)}
    for key, value in table.items():
        path = f"{prefix}{key}"
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or sorted(known)
            what = "section" if not prefix else "key"
            raise ValueError(
                f"{path}: unknown {what}; did you mean {', '.join(prefix + n for n in near)}?"
            )
        expected = known[key]
        if isinstance(expected, type) and dataclasses.is_dataclass(expected):
            if not isinstance(value, dict):
                raise ValueError(f"{path} = {value!r}: must be a section, [{path}].")
            check_table(expected, value, f"{path}.")
        else:
            check_value(path, value, expected)


def check_rules(section: str, values: Any, rules: dict[str, tuple[bool, str]]) -> None:
    """Raise ValueError for the first key whose rule does not hold.

    Args:
        section: Name of the section.
        values: The section.
        rules: Key -> whether its value is allowed, and what is.
    """
    for key, (holds, allowed) in rules.items():
        if not holds:
            raise ValueError(f"{section}.{key} = {getattr(values, key)}: must be {allowed}.")
