"""A small figure as a value: axes and marks in data units. One template draws them all as SVG.

A figure is 360 units wide, so that its text stays readable on a phone. Colours come from the
page's style sheet, so that they follow its theme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 42
ROW = 18
# Grey; no method has it.
ORACLE_SERIES = 6
# Longest words of a legend, in characters.
LEGEND = 46

LineKind = Literal["line", "thin", "front", "rule"]
DotKind = Literal["seed", "mean", "small"]


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        ticks: values that get a mark, with the words beside it.
    """

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def share(self, value: float) -> float:
        """How far along the axis a value lies, held within [0, 1]."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(one, 1e-300)) for one in (value, low, high))
        return min(1.0, max(0.0, (value - low) / (high - low)))


@dataclass(frozen=True)
class Line:
    """Points that are joined, in a series' colour; ``rule`` and ``front`` are grey."""

    points: tuple[tuple[float, float], ...]
    series: int = 0
    kind: LineKind = "line"


@dataclass(frozen=True)
class Dot:
    """One point; ``text`` is told when it is pointed at."""

    x: float
    y: float
    series: int = 0
    kind: DotKind = "seed"
    text: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
        name: of its file, and of what refers to it on the page.
        title: stands above it.
        told: what it shows, for those who do not see it.
        legend: (series, words) of each row under it.
        left: room for the words beside the axis that goes up.
        body: height without the legend.
    """

    name: str
    title: str
    told: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...] = ()
    dots: tuple[Dot, ...] = ()
    legend: tuple[tuple[int, str], ...] = field(default=())
    left: int = LEFT
    body: int = HEIGHT

    width = WIDTH
    right = WIDTH - RIGHT
    top = TOP

    @property
    def bottom(self) -> int:
        """Where the axis across lies."""
        return self.body - BOTTOM

    @property
    def height(self) -> int:
        """With the legend's rows."""
        return self.body + ROW * len(self.legend)

    def px(self, x: float) -> float:
        """Where a value lies across."""
        return round(self.left + (self.right - self.left) * self.x.share(x), 1)

    def py(self, y: float) -> float:
        """Where a value lies down."""
        return round(self.bottom - (self.bottom - TOP) * self.y.share(y), 1)

    def path(self, line: Line) -> str:
        """A line as an SVG path."""
        return " ".join(
            f"{'L' if at else 'M'}{self.px(x)} {self.py(y)}"
            for at, (x, y) in enumerate(line.points)
        )

    def rows(self) -> list[tuple[int, int, str, str]]:
        """(down, series, words, all words) of the legend."""
        return [
            (self.body + 8 + ROW * at, series, _cut(words), words)
            for at, (series, words) in enumerate(self.legend)
        ]


def glyph(series: int, size: float) -> str:
    """The shape of a series around (0, 0), as an SVG path: no two neighbours look alike."""
    s = size
    shapes = (
        f"M{-s} 0a{s} {s} 0 1 0 {2 * s} 0a{s} {s} 0 1 0 {-2 * s} 0z",  # disc
        f"M{-s} {-s}h{2 * s}v{2 * s}h{-2 * s}z",  # square
        f"M0 {-1.2 * s:.1f}L{1.2 * s:.1f} {s}L{-1.2 * s:.1f} {s}z",  # triangle
        f"M0 {-1.3 * s:.1f}L{1.3 * s:.1f} 0L0 {1.3 * s:.1f}L{-1.3 * s:.1f} 0z",  # diamond
        f"M0 {1.2 * s:.1f}L{1.2 * s:.1f} {-s}L{-1.2 * s:.1f} {-s}z",  # triangle, point down
        f"M{-s / 2} {-s}h{s}v{s / 2}h{s / 2}v{s}h{-s / 2}v{s / 2}h{-s}v{-s / 2}h{-s / 2}v{-s}"
        f"h{s / 2}z",  # cross
    )
    return shapes[series % len(shapes)]


def shares(values: Iterable[float], label: str) -> Axis:
    """An axis of shares, in per cent: as narrow as the values allow, within 0 and 1."""
    held = [min(1.0, max(0.0, value)) for value in values] or [0.0, 1.0]
    low, high = min(held), max(held)
    for step in (0.02, 0.05, 0.1, 0.2):
        bottom = math.floor(low / step + 1e-9) * step
        top = min(1.0, math.ceil(high / step - 1e-9) * step)
        if bottom == top:
            bottom = top - step if top > 0 else bottom
            top = max(top, bottom + step)
        count = round((top - bottom) / step)
        if count <= 6:
            break
    if count < 3:
        bottom = max(0.0, top - 3 * step)
        top = max(top, bottom + 3 * step)
        count = 3
    ticks = [bottom + step * at for at in range(count + 1)]
    return Axis(label, bottom, top, tuple((tick, f"{100 * tick:.0f}") for tick in ticks))


def linear(values: Iterable[float], label: str, *, whole: bool = False) -> Axis:
    """An axis with round ticks around the values; ``whole``: of whole numbers, such as steps."""
    held = list(values) or [0.0, 1.0]
    low, high = min(held), max(held)
    if low == high:
        low, high = (0.0, 2 * high) if high > 0 else (low - 1, high + 1)
    step = _nice((high - low) / 4)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [step * at for at in range(first, last + 1)]
    return Axis(label, ticks[0], ticks[-1], tuple((tick, f"{tick:.6g}") for tick in ticks))


def logarithmic(values: Iterable[float], label: str) -> Axis:
    """A logarithmic axis of positive values, with ticks at 1, 2 and 5 of each decade."""
    held = [value for value in values if value > 0] or [1.0]
    low, high = min(held), max(held)
    places = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [base * 10.0**place for place in places for base in (1, 2, 5)]
    bottom = max((tick for tick in every if tick <= low * 1.0001), default=every[0])
    top = min((tick for tick in every if tick >= high * 0.9999), default=every[-1])
    if bottom == top:
        top = bottom * 2
    inside = [tick for tick in every if bottom <= tick <= top] or [bottom, top]
    if len(inside) > 7:
        inside = [tick for tick in inside if f"{tick:e}".startswith("1")]
    return Axis(label, bottom, top, tuple((tick, f"{tick:.3g}") for tick in inside), log=True)


def _nice(step: float) -> float:
    size = 10.0 ** math.floor(math.log10(step))
    return min((size * by for by in (1, 2, 5, 10) if size * by >= step * 0.999), default=size * 10)


def _cut(words: str) -> str:
    return words if len(words) <= LEGEND else words[: LEGEND - 1] + "…"
