"""What was measured while training: figures over steps, with the level and the marked steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from loku.report.artefacts import at, number
from loku.report.charts import WIDTH, Chart
from loku.report.figures import metric_info
from loku.report.numerals import figure, percent
from loku.report.svg import INK, MUTED, RETAIN_ONLY, UNLEARNED, render

SHOWN = ("probability", "exact_memorisation", "ma", "el_10")
LABELS = {"ma": "Memorisation accuracy", "el_10": "Extraction likelihood, 10-grams"}
Points = list[tuple[float, float]]


def watched_charts(rows: Sequence[Mapping[str, Any]], run: Mapping[str, Any] | None) -> list[Chart]:
    """Draw each forget figure by step with its level, and the answer probability of what had to stay."""
    drawn = []
    marks = step_marks(run)
    for metric in SHOWN:
        points = _points(rows, "forget", metric)
        level = number(at(run, "level", "figures", metric))
        if points and (metric in SHOWN[:2] or level is not None):
            drawn.append(step_chart(points, f"watched-{metric.replace('_', '-')}", _label(metric), level, marks))
    for name in ("retain", "general"):
        points = _points(rows, name, "probability")
        if points:
            what = f"{metric_info('probability').label}, {name} set"
            drawn.append(step_chart(points, f"watched-{name}", what, None, marks))
    return drawn


def watched_notes(run: Mapping[str, Any] | None) -> list[str]:
    """Say what the level is, where the training stopped and which step was kept."""
    notes = []
    if at(run, "level", "source"):
        notes.append(f"The level, drawn as a dashed line, is from: {at(run, 'level', 'source')}.")
    if at(run, "stopped", "rule"):
        notes.append(f"The training stopped at step {at(run, 'stopped', 'step')}: {at(run, 'stopped', 'rule')}.")
    best = at(run, "best")
    if isinstance(best, Mapping):
        utility = number(best.get("utility"))
        more = "" if utility is None else f"; mean answer probability on what had to stay {percent(utility)}"
        kept = f"Step {best.get('step')} was kept: {best.get('rule')}{more}."
        if not best.get("meets_rule"):
            kept = f"No measurement met the rule ({best.get('rule')}): the last step was kept."
        elif not best.get("at_level"):
            kept += " It has not reached the level."
        notes.append(kept)
    return notes


def step_marks(run: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the steps to mark, by what happened there; one mark where both happened."""
    stopped, best = number(at(run, "stopped", "step")), number(at(run, "best", "step"))
    if stopped is not None and stopped == best:
        return {"stopped, kept": stopped}
    found = {"stopped": stopped, "kept": best}
    return {name: step for name, step in found.items() if step is not None}


def step_chart(points: Points, name: str, what: str, level: float | None, marks: Mapping[str, float]) -> Chart:
    """Draw one figure from 0 to 1 by optimiser step."""
    x = alt.X("step:Q", axis=alt.Axis(title="optimiser step", grid=False, tickCount=5, tickMinStep=1))
    y = alt.Y("value:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title=what.lower(), tickCount=4))
    line = alt.Chart(alt.Data(values=[{"step": step, "value": value} for step, value in points]))
    dots = alt.OverlayMarkDef(color=UNLEARNED, size=16)
    layers = [line.mark_line(color=UNLEARNED, strokeWidth=1.6, point=dots).encode(x=x, y=y)]
    if level is not None:
        rule = alt.Chart(alt.Data(values=[{"value": level}]))
        layers.append(rule.mark_rule(color=RETAIN_ONLY, strokeDash=[4, 3], strokeWidth=1.4).encode(y="value:Q"))
    if marks:
        # Labels stand inside the plot, at its top: left of the rule in the right half of it, else right.
        last = max(step for step, _ in points) or 1.0
        for side in ("left", "right"):
            chosen = {text: step for text, step in marks.items() if (step > last / 2) == (side == "right")}
            values = [{"step": step, "text": text, "top": 1.0} for text, step in chosen.items()]
            if not values:
                continue
            rules = alt.Chart(alt.Data(values=values))
            layers.append(rules.mark_rule(color=MUTED, strokeWidth=1).encode(x="step:Q"))
            text = rules.mark_text(color=INK, fontSize=10, align=side, dx=-4 if side == "right" else 4, dy=8)
            layers.append(text.encode(x="step:Q", y="top:Q", text="text:N"))
    chart = alt.layer(*layers).properties(width=WIDTH, height=150)
    (first_step, first), (last_step, last_value) = points[0], points[-1]
    caption = f"{what}: {figure(first)} at step {first_step:.0f}, {figure(last_value)} at step {last_step:.0f}"
    caption += "" if level is None else f"; level {figure(level)}"
    caption += "".join(f"; {text} at step {step:.0f}" for text, step in marks.items()) + "."
    return Chart(render(chart.to_dict(), name, f"{what} by step", caption), caption)


def _label(metric: str) -> str:
    return f"{LABELS.get(metric) or metric_info(metric).label}, forget set"


def _points(rows: Sequence[Mapping[str, Any]], name: str, metric: str) -> Points:
    found = [(number(row.get("step")), number(at(row, name, metric))) for row in rows]
    return [(step, value) for step, value in found if step is not None and value is not None]
