"""Rows of tables of tests that the default run leaves to `-m slow`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(wanted: Collection[Any], rows: Iterable[Any]) -> list[Any]:
    """All rows, those that are not wanted marked as slow."""
    rows = list(rows)
    assert set(wanted) <= set(rows), set(wanted) - set(rows)
    return [
        row
        if row in wanted
        else pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.slow)
        for row in rows
    ]
