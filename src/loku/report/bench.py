"""The leaderboard of a benchmark as one HTML page: table, forgetting against utility, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import altair as alt

from loku.files import write_text
from loku.report.charts import Chart
from loku.report.html import environment
from loku.report.numerals import figure
from loku.report.scatter import Point, scatter
from loku.report.svg import INK, UNLEARNED, render

FORGET, UTILITY = ("forget prob.", "forget acc.", "forget ROUGE-L"), ("utility", "retain prob.")
ROLES = {"noise": "retain_only"}  # other retain-only models are drawn as what they are


class BenchRow(Protocol):
    """What the page asks of a row."""

    @property
    def label(self) -> str:
        """The model's name."""
        ...

    @property
    def role(self) -> str:
        """target, unlearned, noise or retain_only."""
        ...

    @property
    def diverged(self) -> int:
        """How many of its runs blew up."""
        ...

    def mean(self, column: str) -> float | None:
        """Return a column's mean over seeds."""
        ...

    def cell(self, column: str) -> str:
        """Return a column's text."""
        ...


def write_bench_page(
    title: str,
    note: str,
    rows: Sequence[BenchRow],
    columns: Sequence[str],
    choices: Mapping[str, Any],
    output: Path,
) -> Path:
    """Write the page and return its path."""
    content = {
        "title": title,
        "note": note,
        "rows": rows,
        "columns": columns,
        "scatter": _scatter(rows, columns),
        "costs": _costs(rows),
        "tuned": [(name, found) for name, found in choices.items() if found["scores"]],
    }
    write_text(output, environment().get_template("bench.html.j2").render(content))
    return output


def _scatter(rows: Sequence[BenchRow], columns: Sequence[str]) -> Chart | None:
    across = next((column for column in UTILITY if column in columns), None)
    down = next((column for column in FORGET if column in columns), None)
    if across is None or down is None:
        return None
    points = []
    for row in rows:
        x, y = row.mean(across), row.mean(down)
        if x is not None and y is not None:
            points.append(Point(row.label, x, y, ROLES.get(row.role, row.role)))
    return scatter(points, "forget-utility", across, down) if points else None


def _costs(rows: Sequence[BenchRow]) -> Chart | None:
    """Draw each arm's seconds a run, the cheapest first."""
    found = [(row.label, seconds) for row in rows if (seconds := row.mean("seconds")) is not None]
    if not found:
        return None
    found.sort(key=lambda item: item[1])
    values = [{"arm": label, "seconds": seconds, "text": figure(seconds)} for label, seconds in found]
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("seconds:Q", axis=alt.Axis(title="seconds a run, evaluation and attacks included", tickCount=5)),
        y=alt.Y("arm:N", sort=None, axis=alt.Axis(title=None, labelLimit=220)),
    )
    bars = base.mark_bar(color=UNLEARNED, height=9)
    texts = base.mark_text(align="left", dx=4, fontSize=11, color=INK).encode(text="text:N")
    chart = alt.layer(bars, texts).properties(width=300, height=18 * len(values))
    caption = "; ".join(f"{label}: {figure(seconds)} s" for label, seconds in found)
    return Chart(render(chart.to_dict(), "bench-costs", "Seconds a run by arm", caption), "Means over seeds.")
