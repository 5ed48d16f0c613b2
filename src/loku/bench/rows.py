"""Rows of a benchmark's tables: a model's values over seeds, as cells and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev


@dataclass(frozen=True)
class Row:
    """One model of the leaderboard: its role, and its values over seeds by column."""

    label: str
    role: str  # "target", "retain_only", "noise" or "unlearned"
    values: Mapping[str, list[float]]
    diverged: int = 0
    texts: Mapping[str, str] = field(default_factory=dict)  # cells that are no mean over seeds

    def mean(self, column: str) -> float | None:
        """Return the mean over seeds, or None without values."""
        return mean(self.values[column]) if self.values.get(column) else None

    def cell(self, column: str) -> str:
        """Return mean and standard deviation as text, or what stands in their place."""
        return self.texts[column] if column in self.texts else spread(self.values.get(column, []))


def spread(values: Sequence[float]) -> str:
    """Return `mean ± standard deviation`; p-values and other small numbers as a range."""
    if not values:
        return "-"
    if 0 < max(values) < 0.005:
        return f"{min(values):.0e}" + (f" to {max(values):.0e}" if len(values) > 1 else "")
    digits = 0 if max(map(abs, values)) >= 100 else 1 if max(map(abs, values)) >= 10 else 2
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return the table as Markdown."""
    lines = ["| model | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for row in rows:
        label = row.label + (f" ({row.diverged} diverged)" if row.diverged else "")
        lines.append(f"| {label} | " + " | ".join(row.cell(column) for column in columns) + " |")
    return "\n".join(lines)
