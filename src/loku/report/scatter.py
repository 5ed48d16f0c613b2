"""Forgetting against utility, every model named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from loku.report.artefacts import ROLES
from loku.report.charts import COLOURS, Chart, role_scale
from loku.report.numerals import figure
from loku.report.svg import INK, LINE, MUTED, PAGE, render

LETTER, LINE_HEIGHT = 6.2, 12.0  # pixels of a label's text
NEAR = 9.0  # pixels from a point to a label beside it


@dataclass(frozen=True)
class Point:
    """A model in the scatter: how useful it is, and how much of the forget set it still knows.

    `label` is drawn beside it; `name` is what a screen reader says, where the label is but a number.
    """

    label: str
    utility: float
    forget: float
    role: str
    name: str = ""


def scatter(points: Sequence[Point], name: str, x_title: str, y_title: str) -> Chart:
    """Draw forgetting against utility with every model named; the retain-only model is the place to be."""
    width, height = 320, 260
    x_domain, y_domain = _padded([p.utility for p in points]), _padded([p.forget for p in points])
    to_x, to_y = (x_domain[1] - x_domain[0]) / width, (y_domain[1] - y_domain[0]) / height  # units a pixel
    places = [((p.utility - x_domain[0]) / to_x, (y_domain[1] - p.forget) / to_y) for p in points]
    rows: list[dict[str, Any]] = []
    for point, (dx, dy) in zip(points, place_labels(places, [p.label for p in points], width, height), strict=True):
        end = {"x2": point.utility + dx * to_x, "y2": point.forget - dy * to_y}
        rows.append({"x": point.utility, "y": point.forget, "label": point.label, "role": point.role, **end})
        rows[-1] |= {"dx": dx, "dy": dy}
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
    far = [row for row in rows if math.hypot(row["dx"], row["dy"]) > 1.5 * NEAR]
    if far:  # a line leads from the point to its label
        lines = alt.Chart(alt.Data(values=far)).mark_rule(color=MUTED, strokeWidth=0.7)
        layers.append(lines.encode(x="x:Q", y="y:Q", x2="x2:Q", y2="y2:Q"))
    layers.append(marks)
    for row in rows:  # text offsets are constants of a mark, so every label is a mark of its own
        text = alt.Chart(alt.Data(values=[row])).mark_text(
            align="right" if row["dx"] < 0 else "left",
            dx=row["dx"],
            dy=row["dy"],
            baseline="middle",
            fontSize=11,
            color=INK,
        )
        layers.append(text.encode(x="x:Q", y="y:Q", text="label:N"))
    chart = alt.layer(*layers).properties(width=width, height=height)
    caption = "; ".join(
        f"{p.name or p.label}: {x_title} {figure(p.utility, 2)}, forget {figure(p.forget, 2)}" for p in points
    )
    description = f"{y_title} against {x_title}. {caption}."
    svg = render(chart.to_dict(), name, "Forgetting against utility", description)
    return Chart(svg, "The dashed lines mark the retain-only model: the nearer to their crossing, the better.")


def _padded(values: Sequence[float]) -> list[float]:
    low, high = min(0.0, *values), max(*values, 0.1)
    room = 0.06 * (high - low)
    return [low - room, high + room]


def place_labels(
    places: Sequence[tuple[float, float]], labels: Sequence[str], width: float, height: float
) -> list[tuple[float, float]]:
    """Return where each label's near end stands, in pixels from its point: as near as it covers nothing.

    `places` are the points in pixels of the plot. A label goes to the right of its point where it can, else to the
    left, above or below, ever farther off. One that finds no free place within the plot stands beside its point.
    """
    boxes = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    found = [(NEAR, 0.0)] * len(places)
    spots = [
        (reach * math.cos(math.radians(angle)), reach * math.sin(math.radians(angle)))
        for reach in range(int(NEAR), int(width / 2), 4)
        for angle in (0, 180, 30, -30, 150, -150, 60, -60, 120, -120)
    ]
    for index in sorted(range(len(places)), key=lambda i: places[i][1]):
        x, y = places[index]
        others = boxes[:index] + boxes[index + 1 :]
        for dx, dy in spots:
            box = _label_box(x + dx, y + dy, labels[index], leftwards=dx < 0)
            inside = box[0] >= 0 and box[1] >= 0 and box[2] <= width + 8 and box[3] <= height
            if inside and not any(_overlap(box, other) for other in others):
                found[index] = (dx, dy)
                boxes.append(box)
                break
    return found


def _label_box(x: float, y: float, label: str, *, leftwards: bool) -> tuple[float, float, float, float]:
    long = LETTER * len(label) + 2
    return (x - long if leftwards else x, y - LINE_HEIGHT / 2, x if leftwards else x + long, y + LINE_HEIGHT / 2)


def _overlap(one: tuple[float, ...], two: tuple[float, ...]) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]
