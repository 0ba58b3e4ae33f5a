"""What a model asks of the parts of a canvas, as files say them: places, sizes and subjects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchtitan_mixtures.sampling.canvas import KERNELS, Canvas, Rectangle
from torchtitan_mixtures.sampling.canvas_table import REQUIRED, Table

MAX_SIDE = 16384
"""Of a canvas, in pixels: more are a slip of the keyboard."""

DEFAULT_KERNEL = "gaussian"


@dataclass(frozen=True)
class Frame:
    """What a model asks of regions, and what those are that say nothing.

    All methods raise `ValueError` that names the file and the key, its value and what is allowed.

    Attributes:
        side: Of the squares that the model was trained on, in pixels.
        cell: Pixels to a side of a cell of latents.
        multiple: Pixels that sides must be multiples of, see `side_multiple`; 0: `side` is the only
            one.
        class_names: Of the model's classes; None: it draws prompts.
        guidance: Of regions that do not say theirs.
        negative_prompt: Likewise, of those with guidance.
        kernel: Likewise.
    """

    side: int
    cell: int
    multiple: int
    class_names: Sequence[str] | None
    guidance: float
    negative_prompt: str
    kernel: str

    def take_side(self, table: Table, key: str, default: Any) -> int:
        """Take a side of the canvas or of a part of it."""
        side = table.take_number(key, int, default, (1, MAX_SIDE))
        self._check_on_grid(table, key, side)
        return side

    def take_rectangle(self, table: Table, width: int, height: int) -> Rectangle:
        """Take a place on a canvas, by default a square of the model's.

        Args:
            table: Says it.
            width: Of the canvas, as `height`.
        """
        place = []
        for start, side, whole in (("left", "width", width), ("top", "height", height)):
            first = table.take_number(start, int, REQUIRED, (0, math.inf))
            self._check_on_grid(table, start, first)
            length = self.take_side(table, side, self.side)
            if first + length > whole:
                key, value = (side, length) if side in table else (start, first)
                reason = f"the part ends at {first + length}, beyond the canvas, whose {side} is"
                raise table.error(key, value, f"{reason} {whole}")
            place.append((first, length))
        (left, own_width), (top, own_height) = place
        return Rectangle(left, top, own_width, own_height)

    def take_tile(
        self, table: Table, keys: tuple[str, str], most: tuple[int, int]
    ) -> tuple[int, int]:
        """Take width and height of what the model draws, by default those of its squares.

        Args:
            table: Says them.
            keys: What it calls them.
            most: What they can be at most.
        """
        sides = []
        for key, limit in zip(keys, most, strict=True):
            side = self.take_side(table, key, min(self.side, limit))
            if side > limit:
                raise table.error(key, side, f"must be at most {limit}, as the canvas")
            sides.append(side)
        self.check_size(table, keys, (sides[0], sides[1]))
        return sides[0], sides[1]

    def check_size(self, table: Table, keys: tuple[str, str], size: tuple[int, int]) -> None:
        """Refuse sizes that the model cannot take."""
        for key, side in zip(keys, size, strict=True):
            if not self.multiple and side != self.side:
                raise table.error(
                    key, side, f"the model takes squares of {self.side} pixels only; leave it out"
                )
            if self.multiple and side % self.multiple:
                allowed = f"a multiple of {self.multiple} pixels, as the model's patches"
                raise table.error(key, side, f"must be {allowed}")

    def take_overlap(self, table: Table, key: str, tile: int, default: int) -> int:
        """Take by how much tiles overlap; they have to get ahead."""
        overlap = table.take_number(key, int, default, (0, tile - self.cell))
        self._check_on_grid(table, key, overlap)
        return overlap

    def half(self, side: int) -> int:
        """Half a side, on the grid of latents."""
        return side // 2 // self.cell * self.cell

    def take_subject(self, table: Table) -> str | int:
        """Take `prompt` or `class_label`."""
        key, other = "prompt", "class_label"
        if self.class_names is not None:
            key, other = other, key
        if other in table:
            raise ValueError(
                f"{table.keys_begin}{other}: the model draws {self.kind}; use {key} instead."
            )
        if key not in table:
            raise ValueError(f"{table.where}: has no {key}; the model draws {self.kind}.")
        return self.check_subject(table, key, table.take_any(key))

    def check_subject(self, table: Table, key: str, value: Any) -> str | int:
        """Check a prompt, or find a class by its number or name."""
        names = self.class_names
        if names is None:
            if not isinstance(value, str) or not value.strip():
                raise table.error(key, value, "must be a text that is not blank")
            return value
        if isinstance(value, str) and list(names).count(value) == 1:
            return list(names).index(value)
        if isinstance(value, str) or not isinstance(value, int) or isinstance(value, bool):
            shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise table.error(key, value, f"must be a number or the name of one class of {shown}")
        if not 0 <= value < len(names):
            raise table.error(key, value, f"must be from 0 to {len(names) - 1}")
        return value

    @property
    def kind(self) -> str:
        """What the model draws."""
        return "images of prompts" if self.class_names is None else "images of classes"

    def take_look(self, table: Table, weight: float = 1.0) -> dict[str, Any]:
        """Take what regions, grid and background have in common, as arguments of `Region`.

        Args:
            table: Says it.
            weight: If it does not say that.
        """
        guidance = table.take_number("guidance", float, self.guidance, (0, 1000))
        inherited = self.negative_prompt if guidance != 1 else ""
        return {
            "guidance": guidance,
            "negative_prompt": table.take("negative_prompt", str, inherited),
            "kernel": take_kernel(table, self.kernel),
            "weight": table.take_number("weight", float, weight, (0, math.inf)),
        }

    def check_covered(self, canvas: Canvas, covered: Tensor, table: Table) -> None:
        """Refuse a canvas parts of which nothing is drawn on.

        Args:
            canvas: The canvas.
            covered: See `covered_cells`.
            table: All of the file.
        """
        bare = (~covered).nonzero()
        if not len(bare):
            return
        top, left = (self.cell * place for place in bare[0].tolist())
        count = len(bare) * self.cell**2
        raise ValueError(
            f"{table.where}: no region with a weight covers {count:,} of {canvas.width} x "
            f"{canvas.height} pixels ({count / (canvas.width * canvas.height):.1%}), the first at "
            f"left = {left}, top = {top}; add a region there, or a [background]."
        )

    def _check_on_grid(self, table: Table, key: str, value: int) -> None:
        if value % self.cell:
            raise table.error(
                key, value, f"must be a multiple of {self.cell}, the pixels to a cell of latents"
            )


def take_kernel(table: Table, default: str) -> str:
    """Take `kernel`.

    Raises:
        ValueError: There is none of that name.
    """
    kernel = table.take("kernel", str, default)
    if kernel not in KERNELS:
        raise table.error("kernel", kernel, f"must be one of {', '.join(KERNELS)}")
    return kernel
