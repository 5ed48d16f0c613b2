"""The report's section on attacks: the worst case, relearning curves of the three models, and a table of scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import altair as alt

from loku.report.artefacts import ROLES, at, number, section
from loku.report.charts import COLOURS, DASHES, WIDTH, Chart, role_scale
from loku.report.figures import Value
from loku.report.numerals import figure
from loku.report.svg import render

RETAIN = ("retain_exact_match", "retain_found", "retain_rougeL_recall")
CURVES = {"relearn-lora": "fine-tuned with LoRA", "relearn-full": "all weights fine-tuned"}


@dataclass(frozen=True)
class AttackRow:
    """One attack: each model's figure, the score, and what says whether the unlearned model still works."""

    name: str
    metric: str
    values: dict[str, Value]
    score: Value | None
    note: str
    retain: float | None
    repetition: float | None
    perplexity: float | None  # of what the unlearned model says, under the retain-only model
    damaged: str | None


def attack_section(document: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what the template shows of attacks.json, or None where there are no finished attacks."""
    summary = section(document, "summary")
    attacks = section(summary, "attacks")
    if not attacks:
        return None
    missing = section(document, "missing") | section(document, "failed")
    return {
        "level": str(at(summary, "headline", "level")),
        "sentence": str(at(summary, "headline", "sentence")),
        "labels": dict(ROLES),
        "rows": [row for name, found in attacks.items() for row in _rows(name, found)],
        "charts": curve_charts(section(document, "attacks"), str(summary.get("metric"))),
        "missing": [(name, str(reason)) for name, reason in missing.items()],
    }


def _rows(name: str, found: Mapping[str, Any]) -> Iterator[AttackRow]:
    """Yield the attack's row; of membership one for each attack of the family."""
    for label, each in section(found, "membership").items():
        aucs = {role: Value(value) for role in ROLES if (value := number(at(each, "auc", role))) is not None}
        yield _row(label, "AUC", aucs, section(each, "score"), found)
    metric = str(at(found, "metric"))
    values = {}
    for role in ROLES:
        entry = section(found, "figures", role, metric)
        mean = number(entry.get("mean"))
        if mean is not None:
            values[role] = Value(mean, number(entry.get("low")), number(entry.get("high")))
    if values:
        yield _row(name, metric, values, section(found, "score"), found)


def _row(
    name: str, metric: str, values: dict[str, Value], score: Mapping[str, Any], found: Mapping[str, Any]
) -> AttackRow:
    beside = section(found, "beside", "unlearned")
    mean, reason = number(score.get("score")), score.get("reason")
    damaged, nll = found.get("damaged"), number(beside.get("output_nll"))
    return AttackRow(
        name=name,
        metric=metric,
        values=values,
        score=None if mean is None else Value(mean, number(score.get("low")), number(score.get("high"))),
        note="" if not reason else ("no reference" if "no retain-only" in str(reason) else "cannot tell"),
        retain=next((value for key in RETAIN if (value := number(beside.get(key))) is not None), None),
        repetition=number(beside.get("repetition")),
        perplexity=None if nll is None else math.exp(min(nll, 700.0)),
        damaged=None if damaged is None else str(damaged),
    )


def curve_charts(attacks: Mapping[str, Any], metric: str) -> list[Chart]:
    """Draw, for either way of relearning, what the models know of the rows that were not trained on, by step."""
    drawn = []
    for name, how in CURVES.items():
        points = {}
        for role in ROLES:
            steps, values = (
                at(attacks, name, "roles", role, "curve", *keys) for keys in (("steps",), ("means", "rest", metric))
            )
            if isinstance(steps, list) and isinstance(values, list) and len(steps) == len(values):
                points[role] = list(zip(steps, values, strict=True))
        if points:
            drawn.append(relearning_chart(points, name, how, metric))
    return drawn


def relearning_chart(points: Mapping[str, list[tuple[int, float]]], name: str, how: str, metric: str) -> Chart:
    """Draw one figure of the rest of the forget set by optimiser step, a line for each model."""
    rows = [{"role": role, "step": step, "value": value} for role, own in points.items() for step, value in own]
    roles, what = list(points), metric.replace("_", " ")
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(strokeWidth=1.8)
        .encode(
            x=alt.X("step:Q", axis=alt.Axis(title="optimiser step", grid=False, tickCount=5, tickMinStep=1)),
            y=alt.Y("value:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title=what, tickCount=4)),
            color=alt.Color("role:N", scale=role_scale(roles, COLOURS), legend=None),
            strokeDash=alt.StrokeDash("role:N", scale=role_scale(roles, DASHES), legend=None),
        )
        .properties(width=WIDTH, height=170)
    )
    said = "; ".join(
        f"{ROLES[role].lower()} {figure(own[0][1], 2)} to {figure(own[-1][1], 2)}" for role, own in points.items()
    )
    caption = f"Forget rows that were not trained on, {how}, by {what}: {said}."
    return Chart(render(chart.to_dict(), f"{name}-chart", f"Relearning, {how}", caption), caption)
