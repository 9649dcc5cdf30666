"""Draws `padrec bench beam`'s records as an SVG: speed-up over plain beam search by K, a panel for each batch size.

A handful of lines and labels, so that no plotting library has to be installed where a benchmark runs. Knows records
only.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 380, 260, 46, 34, 40
COLOURS = ("#333333", "#7f7f7f", "#1f77b4", "#2ca02c", "#d62728", "#9467bd", "#ff7f0e")


def plot(records: Sequence[dict[str, Any]]) -> str:
    """The drawing. K are evenly spaced; records without a speed-up are left out. Raises ValueError without any."""
    shown = [record for record in records if "speedup" in record]
    if not shown:
        raise ValueError("no record has a speed-up to draw")
    ks, batches = sorted({r["k"] for r in shown}), sorted({r["batch"] for r in shown})
    plans = list(dict.fromkeys(r["plan"] for r in shown))
    colour = {plan: COLOURS[n % len(COLOURS)] for n, plan in enumerate(plans)}
    highest = 1.1 * max(1.0, *(r["speedup"] for r in shown))

    def x(k: int) -> float:
        return LEFT + (WIDTH - LEFT - 16) * (ks.index(k) / max(1, len(ks) - 1))

    def y(value: float) -> float:
        return float(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / highest)

    drawn = []
    for n, batch in enumerate(batches):
        parts = [_text(WIDTH / 2, 18, f"{shown[0]['data']}, batch {batch}", "middle")]
        for value in range(int(highest) + 1):
            parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - 16}" stroke="#ddd"/>')
            parts.append(_text(LEFT - 6, y(value) + 4, f"{value}x", "end"))
        parts += [_text(x(k), HEIGHT - BOTTOM + 16, f"K={k}", "middle") for k in ks]
        for plan in plans:
            points = sorted((r["k"], r["speedup"]) for r in shown if r["plan"] == plan and r["batch"] == batch)
            path = "L".join(f"{x(k):.1f} {y(value):.1f}" for k, value in points)
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour[plan]}" stroke-width="2"/>')
            parts += [f'<circle cx="{x(k):.1f}" cy="{y(v):.1f}" r="3" fill="{colour[plan]}"/>' for k, v in points]
        drawn.append(f'<g transform="translate({n * WIDTH} 0)">{"".join(parts)}</g>')
    legend = [
        f'<rect x="{LEFT + 120 * n}" y="{HEIGHT - 2}" width="12" height="12" fill="{colour[plan]}"/>'
        + _text(LEFT + 120 * n + 18, HEIGHT + 9, plan, "start")
        for n, plan in enumerate(plans)
    ]
    size = f'width="{max(len(batches) * WIDTH, LEFT + 120 * len(plans))}" height="{HEIGHT + 22}"'
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(drawn + legend)}</svg>\n'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
