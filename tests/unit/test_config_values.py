from dataclasses import dataclass, field
from typing import Literal

import pytest

from torchtitan_mixtures.config_values import check_table, matches_type


@dataclass
class Inner:
    rate: float = 1.0
    kind: Literal["a", "b"] = "a"
    names: list[str] = field(default_factory=list)
    limit: int | None = None
    on: bool = False


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("value", "expected", "matches"),
    [
        (1, float, True),
        (True, float, False),
        (1.0, int, False),
        (True, int, False),
        (1, bool, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        (True, Literal[1, 2], False),
        (None, int | None, True),
        ("x", int | None, False),
        (["x"], list[str], True),
        (["x", 1], list[str], False),
        ("x", list[str], False),
        ([[1], [2]], list[list[int]], True),
        ([[1], ["2"]], list[list[int]], False),
        ({"a": 1}, dict[str, int], True),
    ],
)
def test_values_are_matched_against_annotations(value, expected, matches):
    assert matches_type(value, expected) is matches


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"innr": {}}, r"innr: unknown section; did you mean inner"),
        ({"inner": {"rat": 1}}, r"inner\.rat: unknown key; did you mean inner\.rate"),
        ({"inner": {"zzzzzz": 1}}, r"inner\.zzzzzz: unknown key; did you mean inner\.kind"),
        ({"inner": {"rate": "fast"}}, r"inner\.rate = 'fast': must be a number"),
        ({"inner": {"kind": "c"}}, r"inner\.kind = 'c': must be one of 'a', 'b'"),
        ({"inner": {"names": [1]}}, r"inner\.names = \[1\]: must be a list of a string"),
        ({"inner": {"on": 1}}, r"inner\.on = 1: must be true or false"),
        ({"inner": 3}, r"inner = 3: must be a section, \[inner\]"),
    ],
)
def test_a_wrong_table_is_answered_with_key_value_and_what_is_allowed(table, message):
    with pytest.raises(ValueError, match=message):
        check_table(Outer, table)


def test_a_right_table_passes():
    check_table(Outer, {"inner": {"rate": 2, "kind": "b", "names": ["x"], "limit": 3, "on": True}})
