"""Curves as inline SVG: axes with round ticks, lines told apart by dash and marker, bands for intervals, direct labels.

Colours and widths are the page's (its style sheet); nothing here needs them to be understood.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Literal

from markupsafe import Markup, escape

Point = tuple[float, float]
HEIGHT, LEFT, TOP, BOTTOM = 210, 48, 28, 30
MOST = 400
"""Points that a line is drawn with"""
LETTER = 6.9
"""Width of a letter in pixels, about"""
_numbers = count()


@dataclass(frozen=True)
class Line:
    """A curve. `raw`: thin, what is measured at every step; `smooth`: bold; `dots`: a marker at each point."""

    name: str
    points: Sequence[Point]
    kind: Literal["raw", "smooth", "dots"] = "dots"
    band: Sequence[tuple[float, float, float]] = ()
    """x, low, high"""


@dataclass(frozen=True)
class Chart:
    title: str
    description: str
    """What is to be seen, for who does not see it"""
    lines: Sequence[Line]
    mark: tuple[float, str] | None = None
    """A place on the x axis, and what it is called"""
    level: tuple[float, str] | None = None
    """The same on the y axis"""
    x_name: str = "step"

    def svg(self, width: int = 340) -> Markup:
        """Drawn for so many pixels; it scales to where it stands."""
        return _Drawn(self, width).svg()


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about a twentieth of the points, without the pull of its beginning."""
    keep, mean, made = 1 - 2 / (max(5, len(points) / 20) + 1), 0.0, []
    for number, (x, y) in enumerate(points, 1):
        mean = keep * mean + (1 - keep) * y
        made.append((x, mean / (1 - keep**number)))
    return made


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(1, most)
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough * (1 - 1e-9))
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """As short as it can be told apart: 0.25, 1200, 2e-06."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}" if f"{value:.0e}" == f"{value:.1e}".replace(".0", "") else f"{value:.1e}"
    return f"{value:.3f}".rstrip("0").rstrip(".") if abs(value) < 100 else f"{value:.0f}"


class _Drawn:
    def __init__(self, chart: Chart, width: int) -> None:
        self.chart, self.width = chart, width
        self.labelled = [line for line in chart.lines if line.name and line.points]
        longest = max((len(line.name) for line in self.labelled), default=0) if len(self.labelled) > 1 else 0
        self.right = max(18, longest * LETTER + 14)
        xs = [x for line in chart.lines for x, _ in line.points] + ([chart.mark[0]] if chart.mark else [])
        ys = [y for line in chart.lines for y in _heights(line)] + ([chart.level[0]] if chart.level else [])
        self.x0, self.x1 = _apart(min(xs, default=0), max(xs, default=1))
        if any(line.kind == "dots" for line in chart.lines):  # markers keep off the axes
            self.x0, self.x1 = self.x0 - 0.06 * (self.x1 - self.x0), self.x1 + 0.03 * (self.x1 - self.x0)
        low, high = _apart(min(ys, default=0), max(ys, default=1))
        margin = 0 if low == 0 else 0.08 * (high - low)
        self.y0, self.y1 = (max(0.0, low - margin) if low >= 0 else low - margin), high + 0.08 * (high - low)

    def svg(self) -> Markup:
        name = f"curve{next(_numbers)}"
        parts = [
            Markup('<svg class="curve" viewBox="0 0 {} {}" role="img" aria-labelledby="{}-t {}-d">').format(
                self.width, HEIGHT, name, name
            ),
            Markup('<title id="{}-t">{}</title><desc id="{}-d">{}</desc>').format(
                name, self.chart.title, name, self.chart.description
            ),
            *self._axes(),
            *(self._band(line) for line in self.chart.lines if line.band),
            *self._level(),
            *self._mark(),
            *(part for line in self.chart.lines for part in self._line(line)),
            *self._labels(),
            Markup("</svg>"),
        ]
        return Markup("\n").join(parts)

    def _x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.width - LEFT - self.right)

    def _y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def _axes(self) -> list[Markup]:
        end, parts = self.width - self.right, []
        for value in ticks(self.y0, self.y1, 4):
            y = self._y(value)
            parts.append(_draw("line", "grid", x1=LEFT, x2=end, y1=y, y2=y))
            parts.append(_text(LEFT - 7, y + 4, number(value), "tick", "end"))
        measured = sorted({x for line in self.chart.lines if line.kind == "dots" for x, _ in line.points})
        few = 1 < len(measured) <= 5 and min(b - a for a, b in pairwise(measured)) > (self.x1 - self.x0) / 8
        for value in measured if few else ticks(self.x0, self.x1, max(2, self.width // 90)):
            if value == int(value):
                x = self._x(value)
                parts.append(_draw("line", "axis", x1=x, x2=x, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4))
                parts.append(_text(x, HEIGHT - BOTTOM + 17, number(value), "tick", "middle"))
        base = HEIGHT - BOTTOM
        parts.append(_draw("line", "axis", x1=LEFT, x2=end, y1=base, y2=base))
        parts.append(_text(LEFT - 7, base + 17, self.chart.x_name, "tick", "end"))
        return parts

    def _band(self, line: Line) -> Markup:
        there = [(x, low, high) for x, low, high in line.band if math.isfinite(low) and math.isfinite(high)]
        if len(there) == 1:
            x, low, high = there[0]
            return _draw("line", "whisker", x1=self._x(x), x2=self._x(x), y1=self._y(low), y2=self._y(high))
        edge = [(x, high) for x, _, high in there] + [(x, low) for x, low, _ in reversed(there)]
        return _draw("polygon", "band", points=self._path(edge))

    def _level(self) -> list[Markup]:
        if self.chart.level is None:
            return []
        value, name = self.chart.level
        y, end = self._y(value), self.width - self.right
        early = self.chart.mark is not None and self._x(self.chart.mark[0]) > (LEFT + end) / 2
        points = [point for line in self.chart.lines for point in line.points]
        beside = min(points, default=(0, value)) if early else max(points, default=(0, value))
        below = beside[1] > value and y < HEIGHT - BOTTOM - 14  # on the side where the curve is not
        place, anchor = (LEFT + 3, "start") if early else (end - 3, "end")
        return [
            _draw("line", "level", x1=LEFT, x2=end, y1=y, y2=y),
            _text(place, y + 15 if below else y - 6, name, "said quiet", anchor),
        ]

    def _mark(self) -> list[Markup]:
        if self.chart.mark is None:
            return []
        value, name = self.chart.mark
        x, half = self._x(value), len(name) * LETTER / 2
        at = min(max(x, LEFT + half), self.width - half - 2)
        return [
            _draw("line", "mark", x1=x, x2=x, y1=TOP - 6, y2=HEIGHT - BOTTOM),
            _text(at, TOP - 11, name, "said strong", "middle"),
        ]

    def _line(self, line: Line) -> list[Markup]:
        order = self.chart.lines.index(line) + 1
        parts = [_draw("polyline", f"line {line.kind} n{order}", points=self._path(thinned(line.points)))]
        if line.kind != "dots":
            return parts
        for x, y in line.points:
            chosen = self.chart.mark is not None and x == self.chart.mark[0]
            told = Markup("<title>{}</title>").format(f"{self.chart.x_name} {number(x)}: {number(y)}")
            if chosen:
                parts.append(_draw("circle", "ring", cx=self._x(x), cy=self._y(y), r=8))
            parts.append(_draw("circle", f"dot n{order}", told, cx=self._x(x), cy=self._y(y), r=4))
        return parts

    def _labels(self) -> list[Markup]:
        """At the lines' ends, where there are several, pushed apart where they would lie over one another."""
        if len(self.labelled) < 2:
            return []
        ends = sorted((self._y(line.points[-1][1]), line.name) for line in self.labelled)
        places: list[float] = []
        for y, _ in ends:
            places.append(max(y, places[-1] + 15) if places else y)
        over = max(0.0, places[-1] - (HEIGHT - BOTTOM - 4))
        x = self.width - self.right + 7
        return [_text(x, y - over + 4, name, "said", "start") for y, (_, name) in zip(places, ends, strict=True)]

    def _path(self, points: Sequence[Point]) -> str:
        return " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about `MOST` points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= MOST:
        return list(points)
    size, made = math.ceil(2 * len(points) / MOST), []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        made += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return made


def _heights(line: Line) -> list[float]:
    return [y for _, y in line.points] + [y for _, *edges in line.band for y in edges if math.isfinite(y)]


def _apart(low: float, high: float) -> tuple[float, float]:
    """Never one and the same, so that there is something to draw in."""
    if high - low > 1e-12 * max(abs(low), abs(high), 1e-12):
        return low, high
    return (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)


def _draw(tag: str, kind: str, inside: Markup | str = "", **attributes: float | str) -> Markup:
    told = Markup(" ").join(
        Markup('{}="{}"').format(name, f"{value:.1f}" if isinstance(value, float) else value)
        for name, value in attributes.items()
    )
    return Markup('<{0} class="{1}" {2}>{3}</{0}>').format(tag, kind, told, inside)


def _text(x: float, y: float, said: str, kind: str, anchor: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, escape(said)
    )
