"""Line charts as plain SVG, made from committed JSON: the same file on every machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, TOP, GAP, BOTTOM = 190, 150, 58, 34, 58, 46
COLOURS = ("#1b6ca8", "#c8553d")


@dataclass(frozen=True)
class Panel:
    """One chart: points by name of line. Both axes are logarithmic."""

    title: str
    x_title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    y_title: str = ""


def grid(rows: Sequence[Sequence[Panel]], description: str) -> str:
    """Draw rows of panels. A dotted line shows what growth in proportion would be."""
    width = LEFT + len(rows[0]) * (WIDTH + GAP)
    height = len(rows) * (TOP + HEIGHT + BOTTOM) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11" role="img"><title>{description}</title>'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    ]
    for number, name in enumerate(rows[0][0].lines):
        x = LEFT + 150 * number
        parts.append(f'<path d="M{x} 14h22" stroke="{COLOURS[number]}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 28}" y="18" fill="#333333">{name}</text>')
    x = LEFT + 150 * len(rows[0][0].lines)
    parts.append(f'<path d="M{x} 14h22" stroke="#999999" stroke-dasharray="2 3"/>')
    parts.append(f'<text x="{x + 28}" y="18" fill="#333333">in proportion</text>')
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            parts.append(_panel(panel, LEFT + j * (WIDTH + GAP), 24 + TOP + i * (TOP + HEIGHT + BOTTOM)))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, left: float, top: float) -> str:
    points = [point for line in panel.lines.values() for point in line]
    low_x, high_x = (f(x for x, _ in points) for f in (min, max))
    low_y, high_y = min(y for _, y in points) / 1.3, max(y for _, y in points) * 1.3

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + WIDTH * math.log(x / low_x) / math.log(high_x / low_x),
            top + HEIGHT * (1 - math.log(y / low_y) / math.log(high_y / low_y)),
        )

    parts = [f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#cccccc"/>']
    parts.append(f'<text x="{left}" y="{top - 10}" font-weight="bold" fill="#222222">{panel.title}</text>')
    parts.append(
        f'<text x="{left + WIDTH / 2}" y="{top + HEIGHT + 34}" text-anchor="middle" fill="#555555">'
        f"{panel.x_title}</text>"
    )
    for x in sorted({x for x, _ in points}):
        place = at(x, high_y)[0]
        parts.append(f'<path d="M{place:.1f} {top + HEIGHT}v4" stroke="#888888"/>')
        parts.append(
            f'<text x="{place:.1f}" y="{top + HEIGHT + 17}" text-anchor="middle" fill="#555555">{_short(x)}</text>'
        )
    for y in _ticks(low_y, high_y):
        place = at(low_x, y)[1]
        parts.append(f'<path d="M{left} {place:.1f}h{WIDTH}" stroke="#eeeeee"/>')
        parts.append(f'<text x="{left - 6}" y="{place + 4:.1f}" text-anchor="end" fill="#555555">{_short(y)}</text>')
    first = next(iter(panel.lines.values()))
    scale = first[0][1] / first[0][0]
    # The reference line ends at the frame.
    ends = [(low_x, scale * low_x), (min(high_x, high_y / scale), min(scale * high_x, high_y))]
    parts.append(_path([at(x, y) for x, y in ends], "#999999", 'stroke-dasharray="2 3"'))
    for line, colour in zip(panel.lines.values(), COLOURS, strict=False):
        places = [at(x, y) for x, y in line]
        parts.append(_path(places, colour, 'stroke-width="2"'))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    return "\n".join(parts)


def _path(places: Sequence[tuple[float, float]], colour: str, more: str) -> str:
    return f'<path d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in places)}" fill="none" stroke="{colour}" {more}/>'


def _ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten between two values."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in (1, 2, 5) if low <= step * 10.0**power <= high]


def _short(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
