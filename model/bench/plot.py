"""Small figures as SVG text: panels of grouped bars or lines over named places, with axes, labels and one legend.

Knows numbers and words; nothing of what they mean. No plotting library: two kinds of figure are a page of code.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.sax.saxutils import escape

COLOURS = (
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1", "#9c755f", "#edc948", "#ff9da7", "#333333",
)  # fmt: skip
WIDTH, HEIGHT = 460, 300  # of a panel, in pixels
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 34, 46  # margins inside it
LEGEND_LINE, LEGEND_COLUMN = 20, 150
FONT = "font-family='sans-serif' font-size='12'"
Scale = Callable[[float], float]  # value -> height on the page


@dataclass(frozen=True)
class Panel:
    """One figure: `series` by name, a value per place of `places` (fewer: the rest is missing), from 0 upwards."""

    title: str
    x_label: str
    y_label: str
    places: tuple[str, ...]
    series: Mapping[str, Sequence[float]]
    kind: Literal["bars", "lines"] = "bars"

    def __post_init__(self) -> None:
        if not self.places or not self.series:
            raise ValueError(f"panel {self.title!r} needs places and series")
        for name, values in self.series.items():
            if len(values) > len(self.places) or not all(math.isfinite(v) and v >= 0 for v in values):
                raise ValueError(f"panel {self.title!r}: values of {name!r} must be finite, not negative, one a place")


def figure(panels: Sequence[Panel], columns: int = 2) -> str:
    """An SVG document of all panels, a series of the same name in the same colour everywhere."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    across = max(1, columns * WIDTH // LEGEND_COLUMN)
    width, height = columns * WIDTH, rows * HEIGHT + (math.ceil(len(names) / across) + 1) * LEGEND_LINE
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
        f"viewBox='0 0 {width} {height}' {FONT}>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
    ]
    for index, panel in enumerate(panels):
        x, y = index % columns * WIDTH, index // columns * HEIGHT
        parts += [f"<g transform='translate({x} {y})'>", *_panel(panel, colours), "</g>"]
    for index, name in enumerate(names):
        x = 12 + index % across * LEGEND_COLUMN
        y = rows * HEIGHT + (index // across + 1) * LEGEND_LINE
        parts.append(f"<rect x='{x}' y='{y - 10}' width='12' height='12' fill='{colours[name]}'/>")
        parts.append(_text(x + 18, y, name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def ticks(highest: float) -> list[float]:
    """Four to ten round values from 0 to the first one not below `highest`."""
    if highest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(power * m for m in (0.1, 0.2, 0.5, 1.0) if highest <= power * m * 10 + 1e-12)
    return [round(n * step, 12) for n in range(math.ceil(highest / step - 1e-9) + 1)]


def _panel(panel: Panel, colours: Mapping[str, str]) -> Iterator[str]:
    marks = ticks(max((v for values in panel.series.values() for v in values), default=0.0))
    inner, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    room = inner / len(panel.places)

    def up(value: float) -> float:
        return TOP + tall * (1 - value / marks[-1])

    yield _text(LEFT + inner / 2, 18, panel.title, "middle", "font-weight='bold'")
    for mark in marks:
        yield f"<path d='M{LEFT} {up(mark):.1f}H{WIDTH - RIGHT}' stroke='#dddddd'/>"
        yield _text(LEFT - 6, up(mark) + 4, f"{mark:g}", "end")
    for index, place in enumerate(panel.places):
        yield _text(LEFT + room * (index + 0.5), HEIGHT - BOTTOM + 16, place, "middle")
    yield _text(LEFT + inner / 2, HEIGHT - 10, panel.x_label, "middle")
    middle = TOP + tall / 2
    yield _text(14, middle, panel.y_label, "middle", f"transform='rotate(-90 14 {middle:.1f})'")
    if panel.kind == "bars":
        yield from _bars(panel, colours, room, up)
    else:
        yield from _lines(panel, colours, room, up)
    yield f"<path d='M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}' stroke='black' fill='none'/>"


def _bars(panel: Panel, colours: Mapping[str, str], room: float, up: Scale) -> Iterator[str]:
    wide = room * 0.86 / len(panel.series)
    for number, (name, values) in enumerate(panel.series.items()):
        for index, value in enumerate(values):
            x, y = LEFT + room * (index + 0.07) + wide * number, up(value)
            size = f"width='{wide * 0.92:.1f}' height='{up(0) - y:.1f}'"
            yield (
                f"<rect x='{x:.1f}' y='{y:.1f}' {size} fill='{colours[name]}'>"
                f"<title>{escape(name)} {escape(panel.places[index])}: {value:g}</title></rect>"
            )


def _lines(panel: Panel, colours: Mapping[str, str], room: float, up: Scale) -> Iterator[str]:
    for name, values in panel.series.items():
        points = [(LEFT + room * (index + 0.5), up(value)) for index, value in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f"<polyline points='{path}' stroke='{colours[name]}' stroke-width='2' fill='none'/>"
        for index, (x, y) in enumerate(points):
            title = f"{escape(name)} {escape(panel.places[index])}: {values[index]:g}"
            yield f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colours[name]}'><title>{title}</title></circle>"


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {more}>{escape(text)}</text>"
