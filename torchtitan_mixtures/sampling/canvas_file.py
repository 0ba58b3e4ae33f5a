"""Canvas files: what is to be drawn where, as TOML or as JSON of the same structure.

All lengths are in pixels; numbers in messages, as of `regions[0]`, begin at 0. Keys:

    width, height     of the canvas; with a grid that decides them
    sampler, num_steps, eta, shift, guidance, seed, negative_prompt    as of the command line
    kernel            of all regions: "gaussian" (default), "constant" or "quartic"
    [[regions]]       left, top, width, height, prompt or class_label (number or name), guidance,
                      negative_prompt, kernel, weight, seed
    [grid]            prompts or class_labels in rows, tile_width, tile_height, overlap or
                      row_overlap and column_overlap; and guidance, ..., weight as of regions
    [background]      a subject for all of the canvas: a region of little weight, drawn in tiles of
                      width, height, overlap
    [[images]]        left, top, width, height, path (from the file's folder), strength
    [[rerolls]]       left, top, width, height, seed, epsilon (left out: all of the noise is new)
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torchtitan_mixtures.data.images import open_image
from torchtitan_mixtures.sampling.canvas import (
    Canvas,
    Rectangle,
    ReferenceImage,
    Region,
    Reroll,
    covered_cells,
    grid_side,
    spread_tiles,
)
from torchtitan_mixtures.sampling.canvas_frame import MAX_SIDE, Frame, take_kernel
from torchtitan_mixtures.sampling.canvas_table import REQUIRED, Table
from torchtitan_mixtures.sampling.settings import (
    DenoisingSettings,
    SamplingSettings,
    check_denoising,
    check_values,
)

BACKGROUND_WEIGHT = 0.1

STRENGTH = 0.8

SETTINGS = {
    "sampler": str,
    "num_steps": int,
    "eta": float,
    "shift": float,
    "guidance": float,
    "seed": int,
    "negative_prompt": str,
}
"""Keys of a canvas file that are settings of the command line too, and their types."""


@dataclass(frozen=True)
class CanvasFile:
    """A file that was read, but for what depends on the model.

    Attributes:
        path: Where it is.
        content: What it says.
        settings: Those of `SETTINGS` that it has.
    """

    path: Path
    content: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def table(self) -> Table:
        """All of it."""
        return Table(self.content, "", f"{self.path}: ")


def read_canvas_file(path: Path) -> CanvasFile:
    """Read a canvas file, and check its settings.

    Raises:
        ValueError: Names the file, and the key that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(f"--canvas {path}: cannot be read as text ({reason}).") from error
    kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
    try:
        content = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        remedy = "" if kind == "JSON" else "; a file of JSON must be called .json"
        reason = " ".join(str(error).split())
        raise ValueError(f"--canvas {path}: is not {kind} ({reason}){remedy}.") from error
    table = Table(content, "", f"{path}: ")
    found = {key: table.take(key, kind) for key, kind in SETTINGS.items() if key in table}
    values = SimpleNamespace(**vars(SamplingSettings()), **vars(DenoisingSettings()))
    vars(values).update(found)
    check_values(values, f"{path}: ")
    check_denoising(values, f"{path}: ")
    return CanvasFile(path, content, found)


def build_canvas(file: CanvasFile, frame: Frame) -> Canvas:
    """Make a canvas of a file, and check all of it against the model.

    Args:
        file: See `read_canvas_file`.
        frame: What the model asks.

    Raises:
        ValueError: Names the file and the key, its value and what is allowed.
    """
    table = file.table
    for key, kind in SETTINGS.items():
        table.take(key, kind, None)
    frame = replace(frame, kernel=take_kernel(table, frame.kernel))
    if frame.class_names is not None and frame.negative_prompt:
        reason = f"the model draws {frame.kind}; leave it out"
        raise table.error("negative_prompt", frame.negative_prompt, reason)
    grid, background = table.table("grid"), table.table("background")
    width, height, regions = _take_grid(table, grid, frame)
    regions += [_take_region(entry, frame, width, height) for entry in table.tables("regions")]
    if background is not None:
        regions += _take_background(background, frame, width, height)
    images = [
        _take_image(entry, frame, width, height, file.path.parent)
        for entry in table.tables("images")
    ]
    rerolls = [_take_reroll(entry, frame, width, height) for entry in table.tables("rerolls")]
    table.finish()
    canvas = Canvas(width, height, tuple(regions), tuple(images), tuple(rerolls))
    frame.check_covered(canvas, covered_cells(canvas, frame.cell), table)
    return canvas


def _take_grid(table: Table, grid: Table | None, frame: Frame) -> tuple[int, int, list[Region]]:
    """Width and height of the canvas, and the regions of `[grid]`."""
    if grid is None:
        sides = [frame.take_side(table, key, REQUIRED) for key in ("width", "height")]
        return sides[0], sides[1], []
    cells = _take_cells(grid, frame)
    tile = frame.take_tile(grid, ("tile_width", "tile_height"), (MAX_SIDE, MAX_SIDE))
    overlaps = []
    for key, side in zip(("column_overlap", "row_overlap"), tile, strict=True):
        default = frame.take_overlap(grid, "overlap", side, frame.half(side))
        overlaps.append(frame.take_overlap(grid, key, side, default))
    look = frame.take_look(grid)
    grid.finish()
    sides = list(map(grid_side, tile, (len(cells[0]), len(cells)), overlaps))
    for key, side in zip(("width", "height"), sides, strict=True):
        said = table.take(key, int, side)
        if said != side:
            raise table.error(key, said, f"the grid makes it {side}; leave it out")
        if side > MAX_SIDE:
            raise ValueError(f"{grid.where}: its {key} is {side}; it must be at most {MAX_SIDE}.")
    step = [side - overlap for side, overlap in zip(tile, overlaps, strict=True)]
    regions = [
        Region(name, Rectangle(column * step[0], row * step[1], *tile), subject, **look)
        for row, subjects in enumerate(cells)
        for column, (name, subject) in enumerate(subjects)
    ]
    return sides[0], sides[1], regions


def _take_cells(grid: Table, frame: Frame) -> list[list[tuple[str, str | int]]]:
    """Names and subjects of the cells of a grid, in rows."""
    key, other = "prompts", "class_labels"
    if frame.class_names is not None:
        key, other = other, key
    if other in grid:
        raise ValueError(f"{grid.keys_begin}{other}: the model draws {frame.kind}; use {key}.")
    rows = grid.take(key, list)
    lengths = {len(row) if isinstance(row, list) else 0 for row in rows}
    if len(lengths) != 1 or 0 in lengths:
        raise grid.error(key, rows, "must be a list of rows, lists that are equally long")
    named = [
        [(f"{key}[{i}][{j}]", value) for j, value in enumerate(row)] for i, row in enumerate(rows)
    ]
    return [
        [(f"grid.{name}", frame.check_subject(grid, name, value)) for name, value in row]
        for row in named
    ]


def _take_region(table: Table, frame: Frame, width: int, height: int) -> Region:
    """A region of `[[regions]]`; width and height are those of the canvas, here and below."""
    place = frame.take_rectangle(table, width, height)
    frame.check_size(table, ("width", "height"), (place.width, place.height))
    subject = frame.take_subject(table)
    seed = table.take_number("seed", int, None, (0, inf))
    look = frame.take_look(table)
    table.finish()
    return Region(table.name, place, subject, seed=seed, **look)


def _take_background(table: Table, frame: Frame, width: int, height: int) -> list[Region]:
    """The tiles of `[background]`."""
    tile = frame.take_tile(table, ("width", "height"), (width, height))
    lefts, tops = (
        spread_tiles(
            whole, side, frame.take_overlap(table, "overlap", side, frame.half(side)), frame.cell
        )
        for whole, side in zip((width, height), tile, strict=True)
    )
    subject = frame.take_subject(table)
    look = frame.take_look(table, BACKGROUND_WEIGHT)
    table.finish()
    corners = [(left, top) for top in tops for left in lefts]
    return [
        Region(f"{table.name}[{number}]", Rectangle(left, top, *tile), subject, **look)
        for number, (left, top) in enumerate(corners)
    ]


def _take_image(
    table: Table, frame: Frame, width: int, height: int, folder: Path
) -> ReferenceImage:
    """A picture of `[[images]]`, opened."""
    place = frame.take_rectangle(table, width, height)
    strength = table.take_number("strength", float, STRENGTH, (0, 1))
    name = table.take("path", str)
    table.finish()
    path = folder / Path(name).expanduser()
    try:
        picture = open_image(path.read_bytes())
    except OSError as error:
        raise table.error("path", name, f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise table.error("path", name, f"cannot be read as an image ({error})") from error
    return ReferenceImage(place, path, picture, strength)


def _take_reroll(table: Table, frame: Frame, width: int, height: int) -> Reroll:
    place = frame.take_rectangle(table, width, height)
    seed = table.take_number("seed", int, REQUIRED, (0, inf))
    epsilon = table.take_number("epsilon", float, None, (0, 1e6))
    table.finish()
    return Reroll(place, seed, epsilon)
