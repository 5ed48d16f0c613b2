"""The report's charts as inline SVG: truth ratios, training curves, importance by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
from markupsafe import Markup

from loku.report.artefacts import ROLES, at, number
from loku.report.numerals import figure
from loku.report.svg import HEAT, INK, MUTED, RETAIN_ONLY, TARGET, UNLEARNED, render

COLOURS = {"target": TARGET, "unlearned": UNLEARNED, "retain_only": RETAIN_ONLY}
DASHES = {"target": [5, 3], "unlearned": [1, 0], "retain_only": [2, 2]}
WIDTH = 300  # of the plot, in px: with its axis a chart fills a phone, and on a desktop two stand in a row


@dataclass(frozen=True)
class Chart:
    """An inline SVG with the caption that reads it."""

    svg: Markup
    caption: str


def truth_ratios(
    samples: Mapping[str, Sequence[float]],
    name: str,
    labels: Mapping[str, str] = ROLES,
    *,
    width: int = WIDTH,
    height: int = 190,
    limits: tuple[float, float] | None = None,
    brief: bool = False,
) -> Chart:
    """Draw the cumulative distribution of each model's truth ratios, and the widest gap to the retain-only model."""
    low, high = limits or ratio_limits([value for sample in samples.values() for value in sample])
    rows = []
    for role, sample in samples.items():
        ordered = sorted(sample)
        steps = [(low, 0.0), *((max(v, low), (i + 1) / len(ordered)) for i, v in enumerate(ordered)), (high, 1.0)]
        rows += [{"role": role, "ratio": ratio, "share": share} for ratio, share in steps]
    scale = alt.Scale(type="log" if low > 0 else "linear", domain=[low, high], nice=False)
    axis = alt.Axis(title="truth ratio of a forget question", values=_ticks(low, high), format="~g", grid=False)
    x = alt.X("ratio:Q", scale=scale, axis=axis)
    y = alt.Y("share:Q", axis=alt.Axis(title="share of questions below", format="%", tickCount=4))
    roles = list(samples)
    lines = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(interpolate="step-after", strokeWidth=1.8)
        .encode(
            x=x,
            y=y,
            color=alt.Color("role:N", scale=role_scale(roles, COLOURS), legend=None),
            strokeDash=alt.StrokeDash("role:N", scale=role_scale(roles, DASHES), legend=None),
        )
    )
    layers = [lines]
    short = f"median {figure(_median(samples['unlearned']), 2)}" if brief and "unlearned" in samples else ""
    caption = "; ".join(f"{labels[role]}: median {figure(_median(samples[role]), 2)}" for role in roles) + "."
    if "unlearned" in samples and "retain_only" in samples:
        where, first, second = ks_gap(samples["unlearned"], samples["retain_only"])
        gap = alt.Data(values=[{"ratio": max(where, low), "share": first, "other": second}])
        layers.append(
            alt.Chart(gap).mark_rule(color=MUTED, strokeWidth=1).encode(x="ratio:Q", y="share:Q", y2="other:Q")
        )
        caption += f" Widest gap between unlearned and retain-only (KS distance): {figure(abs(first - second), 2)}."
        if brief:
            short = f"KS distance to retain-only {figure(abs(first - second), 2)}"
    chart = alt.layer(*layers).properties(width=width, height=height)
    title = "Truth ratios of the forget questions, cumulative"
    return Chart(render(chart.to_dict(), name, title, caption), short or caption)


def ratio_limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the axis: 0 to 1 where that is enough, else logarithmic, with a lower end above 0."""
    if max(values) <= 1.05:
        return 0.0, max(1.0, *values)
    return min(value for value in values if value > 0) / 1.1, max(values) * 1.1


def _ticks(low: float, high: float) -> list[float]:
    if low <= 0:
        return [0, 0.2, 0.4, 0.6, 0.8, 1]
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, round((last - first) / 6))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [step * 10.0**power for power in range(first, last + 1, every) for step in steps]
    return [float(f"{tick:.1g}") for tick in ticks if low <= tick <= high]


def ks_gap(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Return where two empirical distributions lie farthest apart, and both shares there."""

    def share(sample: Sequence[float], limit: float) -> float:
        return sum(value <= limit for value in sample) / len(sample)

    where = max({*first, *second}, key=lambda limit: abs(share(first, limit) - share(second, limit)))
    return where, share(first, where), share(second, where)


def _median(sample: Sequence[float]) -> float:
    ordered, half = sorted(sample), len(sample) // 2
    return ordered[half] if len(sample) % 2 else (ordered[half - 1] + ordered[half]) / 2


def role_scale(roles: Sequence[str], values: Mapping[str, object]) -> alt.Scale:
    """Give each role its own colour, dash or shape."""
    return alt.Scale(domain=list(roles), range=[values[role] for role in roles])


def curve(points: Sequence[tuple[float, float]], name: str, what: str) -> Chart:
    """Draw one loss by optimiser step."""
    rows = [{"step": step, "loss": loss} for step, loss in points]
    (first_step, first), (last_step, last) = points[0], points[-1]
    few = len(points) <= 25
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(color=UNLEARNED, strokeWidth=1.6, point=few and alt.OverlayMarkDef(color=UNLEARNED, size=16))
        .encode(
            x=alt.X("step:Q", axis=alt.Axis(title="optimiser step", grid=False, tickCount=5, tickMinStep=1)),
            y=alt.Y("loss:Q", scale=alt.Scale(zero=False), axis=alt.Axis(title=what, tickCount=4)),
        )
        .properties(width=WIDTH, height=150)
    )
    caption = (
        f"{what.capitalize()}: {figure(first)} at step {first_step:.0f}, {figure(last)} at step {last_step:.0f}; "
        f"lowest {figure(min(loss for _, loss in points))}, highest {figure(max(loss for _, loss in points))}."
    )
    return Chart(render(chart.to_dict(), name, f"{what.capitalize()} by step", caption), caption)


@dataclass(frozen=True)
class Place:
    """Where a layer stands: its block's number and the projection's name within the block."""

    block: int
    projection: str


def place_of(layer: str) -> Place | None:
    """Split 'model.layers.3.self_attn.q_proj' into block 3 and 'self_attn.q_proj'; None without a block number."""
    match = re.search(r"\.(\d+)\.(.+)$", f".{layer}")
    return Place(int(match.group(1)), match.group(2)) if match else None


def importance(layers: Sequence[Mapping[str, Any]], name: str, activations: bool = False) -> Chart | None:
    """Draw the ratio of mean forget to mean retain importance, block by projection; None with nothing to draw.

    With `activations` the two are shares of the rows' activation energy in the chosen directions.
    """
    cells = []
    for layer in layers:
        place, forget, retain = (
            place_of(str(layer.get("name"))),
            number(layer.get("forget")),
            number(layer.get("retain")),
        )
        if place and forget and retain and forget > 0 and retain > 0:
            cells.append((place, forget / retain))
    if not cells:
        return None
    projections = list(dict.fromkeys(place.projection for place, _ in cells))
    short = [projection.rpartition(".")[2] for projection in projections]
    labels = dict(zip(projections, short if len(set(short)) == len(short) else projections, strict=True))
    logs = [math.log10(ratio) for _, ratio in cells]
    low, high = min(logs), max(logs)
    blocks = sorted({place.block for place, _ in cells})
    rows = [
        {
            "block": place.block,
            "projection": labels[place.projection],
            "shade": 0.08 + 0.72 * ((math.log10(ratio) - low) / (high - low) if high > low else 0.5),
            "text": figure(ratio, 1 if ratio >= 1 else 2),
        }
        for place, ratio in cells
    ]
    height = max(12, min(26, 460 // len(blocks)))
    x = alt.X(
        "projection:N",
        sort=list(labels.values()),
        axis=alt.Axis(orient="top", title=None, labelAngle=-40, domain=False, ticks=False, labelPadding=6),
        scale=alt.Scale(paddingInner=0.04, paddingOuter=0),
    )
    y = alt.Y(
        "block:O",
        sort="ascending",
        axis=alt.Axis(title="block", domain=False, ticks=False),
        scale=alt.Scale(paddingInner=0.06, paddingOuter=0),
    )
    opacity = alt.FillOpacity("shade:Q", scale=None, legend=None)
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y)
    chart = base.mark_rect(fill=HEAT, cornerRadius=2).encode(fillOpacity=opacity)
    if height >= 16 and len(projections) <= 8:
        chart = alt.layer(chart, base.mark_text(fill=INK, fontSize=10).encode(text="text:N"))
    chart = chart.properties(width=WIDTH, height=height * len(blocks))
    top, bottom = max(cells, key=lambda cell: cell[1]), min(cells, key=lambda cell: cell[1])
    caption = (
        f"{_what(activations)}; the stronger the colour, the more "
        f"a layer matters for what had to go. Highest in {_where(top[0])} ({figure(top[1], 2)}), lowest in "
        f"{_where(bottom[0])} ({figure(bottom[1], 2)})."
    )
    return Chart(render(chart.to_dict(), name, "Relative importance by block and projection", caption), caption)


def _what(activations: bool) -> str:
    if activations:
        return "Share of the forget rows' activations in the chosen directions over that of the retain rows"
    return "Mean importance for the forget set over mean importance for the retain set"


def _where(place: Place) -> str:
    return f"block {place.block}, {place.projection}"


def truth_samples(results: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return each model's truth ratios of the forget questions."""
    samples = {}
    for role in ROLES:
        rows = at(results.get(role), "sets", "forget", "per_example")
        found = [number(at(row, "truth_ratio")) for row in rows] if isinstance(rows, list) else []
        sample = [value for value in found if value is not None]
        if sample:
            samples[role] = sample
    return samples


def truth_chart(results: Mapping[str, Mapping[str, Any]], name: str, labels: Mapping[str, str] = ROLES) -> Chart | None:
    """Draw the truth ratios, where there are any."""
    samples = truth_samples(results)
    return truth_ratios(samples, name, labels) if samples else None


def curve_charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Draw forget and retain loss by step, each with its own scale; values that are not finite are left out."""
    drawn = []
    for field, what in (("forget_loss", "forget loss"), ("retain_loss", "retain loss")):
        points = [(number(row.get("step")), number(row.get(field))) for row in rows]
        finite = [(step, loss) for step, loss in points if step is not None and loss is not None]
        if finite:
            drawn.append(curve(finite, f"curve-{field.replace('_', '-')}", what))
    return drawn
