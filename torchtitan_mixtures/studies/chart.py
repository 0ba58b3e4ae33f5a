"""Charts of what studies measured: lines over an axis, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours that most people can tell apart (Okabe and Ito 2008), by the order of lines."""

_WIDTH, _HEIGHT = 400, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 30, 46
_LETTER = 13
_TICKS = 5
_GREY = "#dddddd"
_HATCH = 2


class Point(NamedTuple):
    """A measured value, and how far others of its kind lie from it."""

    x: float
    y: float
    spread: float = 0.0


class Span(NamedTuple):
    """How far a line reaches up and down at one place."""

    x: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """Points that belong together.

    Attributes:
        label: What they are.
        points: Where they are, from left to right.
        is_level: Draw a dashed line at the height of the first point, to compare with.
        is_joined: Join the points.
        has_dots: Draw the points.
        band: Fill this, from left to right; it does not stretch the axes.
    """

    label: str
    points: Sequence[Point]
    is_level: bool = False
    is_joined: bool = True
    has_dots: bool = True
    band: Sequence[Span] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes; lines of the same label have the same colour in all panels.

    Attributes:
        title: What stands above them.
        lines: What is drawn.
        is_logarithmic: Whether both axes are; all values must then be above 0.
        x_label: What the horizontal axis says, where it is not that of the whole chart.
    """

    title: str
    lines: Sequence[Line]
    is_logarithmic: bool = False
    x_label: str = ""


def draw_chart(panels: Sequence[Panel], x_label: str, y_label: str) -> NDArray[np.uint8]:
    """Draw panels side by side, and below them what their lines are.

    Args:
        panels: At least one, with at least one point each.
        x_label: What the horizontal axes say.
        y_label: What the vertical axes say.

    Returns:
        `(height, width, 3)` uint8, on white.
    """
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    colors = {label: COLORS[number % len(COLORS)] for number, label in enumerate(labels)}
    font = ImageFont.load_default(_LETTER)
    rows = _legend_rows(labels, font, len(panels) * _WIDTH)
    size = (len(panels) * _WIDTH, _HEIGHT + (_LETTER + 6) * len(rows) + 6)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, panel in enumerate(panels):
        _Axes(draw, font, number * _WIDTH, panel).draw(colors, x_label, y_label)
    for number, row in enumerate(rows):
        left, top = _LEFT, _HEIGHT + (_LETTER + 6) * number
        for label in row:
            draw.line((left, top + 8, left + 22, top + 8), fill=colors[label], width=2)
            draw.text((left + 28, top), label, fill="black", font=font)
            left += _legend_width(label, font)
    return np.asarray(sheet)


class _Axes:
    """A panel's place on the sheet, and its scales."""

    def __init__(
        self,
        draw: ImageDraw.ImageDraw,
        font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
        left: int,
        panel: Panel,
    ) -> None:
        self._draw, self._font, self._panel = draw, font, panel
        self._left, self._right = left + _LEFT, left + _WIDTH - _RIGHT
        self._top, self._bottom = _TOP, _HEIGHT - _BOTTOM
        points = [point for line in panel.lines for point in line.points]
        xs = [point.x for point in points]
        ys = [p.y + sign * p.spread for p in points for sign in (-1, 1)]
        if panel.is_logarithmic:
            self._x_scale, self._y_scale = _LogScale(min(xs), max(xs)), _LogScale(min(ys), max(ys))
        else:
            self._x_scale, self._y_scale = _Scale(0.0, max(xs)), _Scale(min(ys), max(ys))

    def draw(self, colors: dict[str, str], x_label: str, y_label: str) -> None:
        """Draw axes, labels and lines."""
        draw, middle = self._draw, (self._left + self._right) / 2
        for tick in self._x_scale.ticks:
            x = self._x(tick)
            draw.line((x, self._top, x, self._bottom), fill=_GREY)
            draw.text((x, self._bottom + 4), f"{tick:g}", "black", self._font, "ma")
        for tick in self._y_scale.ticks:
            y = self._y(tick)
            draw.line((self._left, y, self._right, y), fill=_GREY)
            draw.text((self._left - 6, y), f"{tick:g}", "black", self._font, "rm")
        draw.rectangle((self._left, self._top, self._right, self._bottom), outline="black")
        x_label = self._panel.x_label or x_label
        draw.text((middle, self._bottom + 22), x_label, "black", self._font, "ma")
        draw.text((self._left, 6), f"{self._panel.title}: {y_label}", "black", self._font)
        for line in self._panel.lines:
            self._draw_band(line, colors[line.label])
        for line in self._panel.lines:
            self._draw_line(line, colors[line.label])

    def _draw_line(self, line: Line, color: str) -> None:
        draw = self._draw
        places = [(self._x(point.x), self._y(point.y)) for point in line.points]
        if line.is_level:
            y = places[0][1]
            for x in range(self._left, self._right - 4, 9):
                draw.line((x, y, x + 5, y), fill=color)
        if line.is_joined:
            draw.line(places, fill=color, width=2)
        for point, (x, y) in zip(line.points, places, strict=True):
            if not line.has_dots:
                continue
            ends = self._y(point.y - point.spread), self._y(point.y + point.spread)
            draw.line((x, ends[0], x, ends[1]), fill=color)
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)

    def _draw_band(self, line: Line, color: str) -> None:
        if not line.band:
            return
        # A hatch lets what is below it be seen, also where two bands lie on each other.
        edges = [(self._x(span.x), self._y(span.low), self._y(span.high)) for span in line.band]
        for x in range(math.ceil(edges[0][0]), math.floor(edges[-1][0]) + 1, _HATCH):
            low, high = (
                float(np.interp(x, [edge[0] for edge in edges], [edge[side] for edge in edges]))
                for side in (1, 2)
            )
            top, bottom = max(high, self._top), min(low, self._bottom)
            if top < bottom:
                self._draw.line((x, top, x, bottom), fill=_pale(color))

    def _x(self, value: float) -> float:
        return self._left + self._x_scale.share(value) * (self._right - self._left)

    def _y(self, value: float) -> float:
        return self._bottom - self._y_scale.share(value) * (self._bottom - self._top)


class _Scale:
    """Even distances, from the first tick to the last."""

    def __init__(self, low: float, high: float) -> None:
        self.ticks = nice_ticks(low, high)

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        return (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])


class _LogScale:
    """Equal distances for equal ratios, and a little room at both ends."""

    def __init__(self, low: float, high: float) -> None:
        room = max(0.05 * math.log(high / low), 0.01)
        self._low, self._high = math.log(low) - room, math.log(high) + room
        self.ticks = log_ticks(math.exp(self._low), math.exp(self._high))

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        return (math.log(value) - self._low) / (self._high - self._low)


def _pale(color: str) -> str:
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{(value + 2 * 255) // 3:02x}" for value in (red, green, blue))


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers at even distances, the first at most `low` and the last at least `high`."""
    high = high if high > low else low + 1.0
    power = 10.0 ** math.floor(math.log10((high - low) / _TICKS))
    step = next(s * power for s in (1, 2, 5, 10) if s * power * _TICKS >= (high - low) * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers within an interval above 0, as few as say where one is on a log scale."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1,), (1, 3), (1, 2, 5)):
        ticks = [float(f"{mantissa}e{power}") for power in powers for mantissa in mantissas]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks[:: 1 + len(ticks) // (2 * _TICKS)]
    return [tick for tick in nice_ticks(low, high) if low <= tick <= high]


def _legend_rows(
    labels: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[list[str]]:
    """Labels by the lines that they fill."""

    def rows() -> Iterator[list[str]]:
        row: list[str] = []
        used = float(_LEFT)
        for label in labels:
            needed = _legend_width(label, font)
            if row and used + needed > width:
                yield row
                row, used = [], float(_LEFT)
            row.append(label)
            used += needed
        yield row

    return list(rows())


def _legend_width(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> float:
    return 28 + font.getlength(label) + 20
