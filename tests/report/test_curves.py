"""Curves as SVG: their ticks, what is left of many points, and what they say to who does not see them."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as Tree

import pytest

from finetune.report.curves import MOST, Chart, Line, number, smoothed, thinned, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.71, 0.83, [0.75, 0.8]),
        (0, 1000, [0, 200, 400, 600, 800, 1000]),
        (-0.13, 0.17, [-0.1, 0, 0.1]),
        (1e-6, 5e-6, [1e-6, 2e-6, 3e-6, 4e-6, 5e-6]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "said"), [(0.25, "0.25"), (1200, "1200"), (2e-6, "2e-06"), (1.5e-6, "1.5e-06"), (0, "0"), (-0.1, "-0.1")]
)
def test_numbers_are_short(value: float, said: str) -> None:
    assert number(value) == said


def test_smoothing_keeps_a_constant_and_follows_a_step() -> None:
    assert [y for _, y in smoothed([(x, 2.0) for x in range(9)])] == pytest.approx([2.0] * 9)
    after = smoothed([(x, float(x >= 50)) for x in range(100)])
    assert after[49][1] == 0 and 0 < after[50][1] < 0.5 and after[99][1] > 0.99


def test_many_points_become_few_and_no_peak_is_lost() -> None:
    points = [(float(x), math.sin(x) + (9 if x == 4321 else 0)) for x in range(10_000)]
    left = thinned(points)
    assert len(left) <= MOST and left == sorted(left)
    assert max(points, key=lambda point: point[1]) in left and min(points, key=lambda point: point[1]) in left
    assert thinned(points[:5]) == points[:5]


def drawn(chart: Chart) -> Tree.Element:
    return Tree.fromstring(str(chart.svg()))


def test_a_curve_tells_what_it_is_and_marks_what_was_chosen() -> None:
    line = Line("", [(100, 0.5), (200, 0.7)], band=[(100, 0.4, 0.6), (200, 0.6, 0.8)])
    svg = drawn(Chart("a <b> by step", 'it "rises"', [line], (200, "chosen: step 200"), (0.1, "base 0.1")))
    named = {svg.find(tag).attrib["id"]: svg.find(tag).text for tag in ("title", "desc")}  # type: ignore[union-attr]
    assert svg.attrib["role"] == "img" and svg.attrib["aria-labelledby"].split() == [*named]
    assert [*named.values()] == ["a <b> by step", 'it "rises"']
    texts = [one.text for one in svg.iter("text")]
    assert {"chosen: step 200", "base 0.1", "100", "200"} <= {*texts}
    (ring,) = [one for one in svg.iter("circle") if one.attrib["class"] == "ring"]
    (mark,) = [one for one in svg.iter("line") if one.attrib["class"] == "mark"]
    assert ring.attrib["cx"] == mark.attrib["x1"] == mark.attrib["x2"]
    (path,) = [one.attrib["points"] for one in svg.iter("polyline")]
    (x1, y1), (x2, y2) = [map(float, pair.split(",")) for pair in path.split()]
    assert x1 < x2 and y1 > y2, "up is more"


@pytest.mark.parametrize("points", [[], [(5, 0.0)], [(5, 0.3)], [(5, 0.0), (6, 0.0)], [(1, 1e-9), (2, 1.1e-9)]])
def test_few_and_equal_points_are_drawn_too(points: list[tuple[float, float]]) -> None:
    band = [(x, y, float("nan")) for x, y in points]
    svg = drawn(Chart("t", "d", [Line("a", points, band=band), Line("b", points, "raw")]))
    assert not re.search("nan|inf", str(Tree.tostring(svg)).lower())


def test_lines_that_end_together_keep_their_names_apart() -> None:
    svg = drawn(Chart("t", "d", [Line("each step", [(0, 1), (9, 0.5)], "raw"), Line("smoothed", [(0, 1), (9, 0.5)])]))
    places = [float(one.attrib["y"]) for one in svg.iter("text") if one.text in ("each step", "smoothed")]
    assert len(places) == 2 and abs(places[0] - places[1]) >= 14
