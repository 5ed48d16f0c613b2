"""The leaderboard of a benchmark as one HTML page: table, forgetting against utility, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loku.files import write_text
from loku.report.charts import Chart
from loku.report.html import environment
from loku.report.scatter import Point, scatter

FORGET = ("MA", "forget prob.", "forget acc.", "forget ROUGE-L", "forget regurgitation")
UTILITY = ("utility", "retain prob.")
NAMED = 10  # more points than these are numbered: their names would not fit
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


@dataclass(frozen=True)
class Section:
    """A table of the page, with what is said above it."""

    rows: Sequence[BenchRow]
    columns: Sequence[str]
    note: str


def write_bench_page(
    title: str,
    figures: Section,
    choices: Mapping[str, Any],
    output: Path,
    *,
    robustness: Section | None = None,
    source: str | None = None,
) -> Path:
    """Write the page and return its path; `source` names the file that the arms' settings are from, if any."""
    rows, columns = figures.rows, figures.columns
    numbers = _numbers(rows)
    content = {
        "title": title,
        "numbers": numbers,
        "figures": figures,
        "robustness": robustness,
        "source": source,
        "scatter": _scatter(rows, columns, numbers),
        "costs": _costs(rows),
        "tuned": [(name, found) for name, found in choices.items() if found["scores"]],
    }
    write_text(output, environment().get_template("bench.html.j2").render(content))
    return output


def _numbers(rows: Sequence[BenchRow]) -> dict[str, int]:
    """Return the arms' numbers in the plot, or none where their names fit."""
    arms = [row.label for row in rows if row.role == "unlearned"]
    return {label: i + 1 for i, label in enumerate(arms)} if len(rows) > NAMED else {}


def _scatter(rows: Sequence[BenchRow], columns: Sequence[str], numbers: Mapping[str, int]) -> Chart | None:
    across, down = _axis(rows, columns, UTILITY), _axis(rows, columns, FORGET)
    if across is None or down is None:
        return None
    points = []
    for row in sorted(rows, key=lambda row: row.role == "noise"):  # the aim is the first retain-only model
        x, y = row.mean(across), row.mean(down)
        if x is not None and y is not None:
            label = "other seeds" if row.role == "noise" else str(numbers.get(row.label, row.label))
            points.append(Point(label, x, y, ROLES.get(row.role, row.role), name=row.label))
    return scatter(points, "forget-utility", across, down) if points else None


def _axis(rows: Sequence[BenchRow], columns: Sequence[str], wanted: Sequence[str]) -> str | None:
    """Return the first wanted column that every model has which is no arm: without them a plot has no aim."""
    models = [row for row in rows if row.role != "unlearned"]
    found = (column for column in wanted if column in columns and all(row.mean(column) is not None for row in models))
    return next(found, None)


def _costs(rows: Sequence[BenchRow]) -> list[dict[str, Any]]:
    """Return each arm's seconds a run and peak memory, the cheapest first, and its share of the dearest."""
    found = [(row.label, seconds, row.mean("peak MB")) for row in rows if (seconds := row.mean("seconds")) is not None]
    most = max((seconds for _, seconds, _ in found), default=0.0)
    return [
        {"label": label, "seconds": seconds, "megabytes": memory, "share": seconds / most if most else 0.0}
        for label, seconds, memory in sorted(found, key=lambda item: item[1])
    ]
