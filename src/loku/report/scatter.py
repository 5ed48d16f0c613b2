"""Forgetting against utility, every model named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from loku.report.artefacts import ROLES
from loku.report.charts import COLOURS, Chart, role_scale
from loku.report.numerals import figure
from loku.report.svg import INK, LINE, PAGE, render


@dataclass(frozen=True)
class Point:
    """A model in the scatter: how useful it is, and how much of the forget set it still knows."""

    label: str
    utility: float
    forget: float
    role: str


def scatter(points: Sequence[Point], name: str, x_title: str, y_title: str) -> Chart:
    """Draw forgetting against utility with every model named; the retain-only model is the place to be."""
    width, height = 320, 260
    x_domain, y_domain = _padded([p.utility for p in points]), _padded([p.forget for p in points])
    rows: list[dict[str, Any]] = []
    for point, offset in zip(points, _label_offsets(points, x_domain, y_domain, width, height), strict=True):
        right = (point.utility - x_domain[0]) / (x_domain[1] - x_domain[0]) > 0.62
        rows.append(
            {
                "x": point.utility,
                "y": point.forget,
                "label": point.label,
                "role": point.role,
                "dy": offset,
                "right": right,
            }
        )
    roles = [role for role in ROLES if any(point.role == role for point in points)]
    x = alt.X("x:Q", scale=alt.Scale(domain=x_domain, nice=False), axis=alt.Axis(title=x_title, tickCount=5))
    y = alt.Y("y:Q", scale=alt.Scale(domain=y_domain, nice=False), axis=alt.Axis(title=y_title, tickCount=5))
    marks = (
        alt.Chart(alt.Data(values=rows))
        .mark_point(filled=True, size=70, opacity=1, stroke=PAGE, strokeWidth=1)
        .encode(
            x=x,
            y=y,
            fill=alt.Fill("role:N", scale=role_scale(roles, COLOURS), legend=None),
            shape=alt.Shape(
                "role:N",
                scale=role_scale(roles, {"target": "square", "unlearned": "circle", "retain_only": "diamond"}),
                legend=None,
            ),
        )
    )
    layers: list[alt.Chart] = []
    aim = next((point for point in points if point.role == "retain_only"), None)
    if aim:
        for field, value in (("x", aim.utility), ("y", aim.forget)):
            line = alt.Chart(alt.Data(values=[{field: value}])).mark_rule(color=LINE, strokeDash=[4, 3])
            layers.append(line.encode(**{field: f"{field}:Q"}))
    layers.append(marks)
    for row in rows:  # text offsets are constants of a mark, so every label is a mark of its own
        text = alt.Chart(alt.Data(values=[row])).mark_text(
            align="right" if row["right"] else "left",
            dx=-9 if row["right"] else 9,
            dy=row["dy"],
            baseline="middle",
            fontSize=11,
            color=INK,
        )
        layers.append(text.encode(x="x:Q", y="y:Q", text="label:N"))
    chart = alt.layer(*layers).properties(width=width, height=height)
    caption = "; ".join(f"{p.label}: {x_title} {figure(p.utility, 2)}, forget {figure(p.forget, 2)}" for p in points)
    description = f"{y_title} against {x_title}. {caption}."
    svg = render(chart.to_dict(), name, "Forgetting against utility", description)
    return Chart(svg, "The dashed lines mark the retain-only model: the nearer to their crossing, the better.")


def _padded(values: Sequence[float]) -> list[float]:
    low, high = min(0.0, *values), max(*values, 0.1)
    room = 0.06 * (high - low)
    return [low - room, high + room]


def _label_offsets(
    points: Sequence[Point], x_domain: Sequence[float], y_domain: Sequence[float], width: int, height: int
) -> list[float]:
    """Push labels of points that lie close together apart, from top to bottom, by at least a line's height."""
    line, reach = 13.0, 110.0

    def pixels(point: Point) -> tuple[float, float]:
        x = (point.utility - x_domain[0]) / (x_domain[1] - x_domain[0]) * width
        return x, (y_domain[1] - point.forget) / (y_domain[1] - y_domain[0]) * height

    places = [pixels(point) for point in points]
    offsets = [0.0] * len(points)
    done: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: places[i][1]):
        x, y = places[index]
        near = [places[i][1] + offsets[i] for i in done if abs(places[i][0] - x) < reach]
        offsets[index] = max([y, *(other + line for other in near if other + line > y)]) - y
        done.append(index)
    return offsets
