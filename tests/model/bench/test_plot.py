import math
from xml.etree import ElementTree

import pytest

from model.bench.plot import BOTTOM, HEIGHT, TOP, Panel, figure, ticks

SVG = "{http://www.w3.org/2000/svg}"
BARS = Panel("by slot", "slot", "accepted", ("a", "b"), {"one": [0.5, 1.0], "<two>": [0.25]})
LINES = Panel("by step", "step", "accepted", ("1", "2", "3"), {"one": [0.9, 0.6, 0.3]}, "lines")


def heights(svg: ElementTree.Element) -> dict[str, float]:
    """Height in pixels of every bar, by what hovering over it says."""
    bars = [r for r in svg.iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
    return {str(r.findtext(f"{SVG}title")): float(r.attrib["height"]) for r in bars}


def test_a_bar_is_as_high_as_its_value() -> None:
    found = heights(ElementTree.fromstring(figure([BARS])))
    whole = HEIGHT - TOP - BOTTOM
    assert found == {"one a: 0.5": whole / 2, "one b: 1": whole, "<two> a: 0.25": whole / 4}


def test_a_line_goes_down_with_its_values_and_has_a_point_each() -> None:
    svg = ElementTree.fromstring(figure([LINES]))
    (line,) = svg.iter(f"{SVG}polyline")
    points = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
    assert [x for x, _ in points] == sorted({x for x, _ in points})
    assert [y for _, y in points] == sorted({y for _, y in points})
    assert len(list(svg.iter(f"{SVG}circle"))) == 3


def test_axes_labels_titles_and_one_legend_are_there() -> None:
    svg = ElementTree.fromstring(figure([BARS, LINES]))
    words = [text.text for text in svg.iter(f"{SVG}text")]
    for word in ("by slot", "by step", "slot", "step", "accepted", "a", "3", "0", "1", "<two>"):
        assert word in words
    assert words.count("one") == 1


def test_a_series_has_one_colour_in_all_panels() -> None:
    svg = ElementTree.fromstring(figure([BARS, LINES]))
    bar = next(r for r in svg.iter(f"{SVG}rect") if (r.findtext(f"{SVG}title") or "").startswith("one"))
    (line,) = svg.iter(f"{SVG}polyline")
    assert bar.attrib["fill"] == line.attrib["stroke"]


@pytest.mark.parametrize("highest", [0.0, 0.03, 0.99, 1.0, 1.01, 3.7, 10.0, 4711.0])
def test_ticks_begin_at_0_and_just_cover_the_highest_value(highest: float) -> None:
    found = ticks(highest)
    assert found[0] == 0
    assert found[-2] < highest <= found[-1] or highest == 0
    assert 2 <= len(found) <= 11


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [math.nan], [-1.0]])
def test_values_that_cannot_be_drawn_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="panel 'p'"):
        Panel("p", "x", "y", ("a", "b"), {"s": values})
