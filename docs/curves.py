"""Curves of training runs as SVG that stands in the page itself, so that the site needs no script to draw them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import cycle

# Okabe and Ito's colours, which the colour-blind tell apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
WIDTH, HEIGHT, LEFT, BOTTOM, LEGEND = 720, 360, 56, 34, 130

Curve = Mapping[float, float]


def svg(curves: Mapping[str, Curve], x_title: str, y_title: str, top: float | None = None) -> str:
    """A line a curve {x: y}; top: where the y axis is cut."""
    xs = [x for curve in curves.values() for x in curve]
    ys = [y for curve in curves.values() for y in curve.values() if top is None or y <= top]
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    wide, high = WIDTH - LEFT - LEGEND, HEIGHT - BOTTOM - 12

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(LEFT + wide * across, 1), round(12 + high * (1 - up), 1)

    parts = [_grid(x_ticks, y_ticks, place), _titles(x_title, y_title)]
    for row, ((name, curve), colour) in enumerate(zip(curves.items(), cycle(COLOURS), strict=False)):
        points = " ".join(f"{x},{y}" for x, y in (place(*p) for p in curve.items() if p[1] <= y_ticks[-1]))
        y = 20 + 18 * row
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<line x1="{WIDTH - LEGEND + 8}" x2="{WIDTH - LEGEND + 28}" y1="{y}" y2="{y}" stroke="{colour}" '
            f'stroke-width="2"/><text x="{WIDTH - LEGEND + 34}" y="{y + 4}">{name}</text>',
        ]
    label = f"{y_title} over {x_title}: {', '.join(curves)}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" font-size="12" fill="currentColor" '
        f'style="max-width: {WIDTH}px">{"".join(parts)}</svg>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Some five round numbers that enclose both."""
    raw = (high - low) / 5 or 1.0
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw)
    return [round(step * n, 10) for n in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _grid(x_ticks: list[float], y_ticks: list[float], place: object) -> str:
    assert callable(place)
    parts = []
    for y in y_ticks:
        (x1, at), (x2, _) = place(x_ticks[0], y), place(x_ticks[-1], y)
        parts.append(f'<line x1="{x1}" x2="{x2}" y1="{at}" y2="{at}" stroke="currentColor" opacity="0.15"/>')
        parts.append(f'<text x="{x1 - 6}" y="{at + 4}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        at, bottom = place(x, y_ticks[0])
        parts.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>')
    return "".join(parts)


def _titles(x_title: str, y_title: str) -> str:
    middle = LEFT + (WIDTH - LEFT - LEGEND) / 2
    return (
        f'<text x="{middle}" y="{HEIGHT - 2}" text-anchor="middle">{x_title}</text>'
        f'<text x="12" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 12 {HEIGHT / 2})">{y_title}</text>'
    )
