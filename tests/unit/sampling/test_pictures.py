"""Sheets of many images."""

import numpy as np

from torchtitan_mixtures.sampling.pictures import COLUMNS, MAX_IMAGES, SheetRow, contact_sheet

STEP = 96 + 4


def grey(value):
    return np.full((96, 96, 3), value, np.uint8)


def test_long_rows_go_on_below():
    rows = [SheetRow("a", [grey(value) for value in range(COLUMNS + 3)]), SheetRow("b", [grey(99)])]
    sheet = contact_sheet(rows)
    assert sheet.shape == (4 + 3 * STEP, 180 + COLUMNS * STEP + 4, 3)
    shown = sheet[4 + 48 :: STEP, 180 + 48 :: STEP, 0]
    assert shown[0].tolist() == list(range(COLUMNS))
    assert shown[1, :4].tolist() == [16, 17, 18, 255]
    assert shown[2, :2].tolist() == [99, 255]
    labels = [bool((sheet[4 + line * STEP :][:STEP, :180] < 128).any()) for line in range(3)]
    assert labels == [True, False, True]


def test_a_sheet_of_very_many_says_what_it_leaves_out():
    rows = [SheetRow("a", [grey(7)] * (MAX_IMAGES - 1)), SheetRow("b", [grey(8)] * 4_000)]
    sheet = contact_sheet([*rows, SheetRow("c", [grey(9)])])
    shown = sheet[4 + 48 :: STEP, 180 + 48 :: STEP, 0]
    assert [(shown == value).sum() for value in (7, 8, 9)] == [MAX_IMAGES - 1, 1, 0]
    assert (sheet[-STEP:, :180] < 128).any(), "no word of the rest"
