"""The forget level: what a model knows of rows that it never saw, and what follows from a curve towards it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loku.evaluation.extraction import below

QA_FIGURES = ("probability", "exact_memorisation")  # what the level of rows with answers consists of
TEXT_FIGURES = ("ma", "el_10")  # of running text: Jang et al. 2023
FIGURES = ("probability", "exact_memorisation", "extraction_strength", *TEXT_FIGURES)
KEPT_SETS = ("retain", "general")

Figures = Mapping[str, float]
Curve = Sequence[Mapping[str, Any]]  # rows of curve.jsonl, in the order of their steps, the target's (step 0) first


@dataclass(frozen=True)
class Level:
    """Forget figures that unlearning should come down to, and where they are from.

    `rule` names the figures that the stopping rule reads: all of them at their level or below; `ma` and `el_10` below
    it, as in TDEC, where 0 is below every level. The other figures only count for the distance.
    """

    figures: dict[str, float]
    rule: tuple[str, ...]
    source: str

    def to_json(self) -> dict[str, Any]:
        """Return what run.json says about the level."""
        return {"source": self.source, "rule": list(self.rule), "figures": self.figures}

    def reached(self, forget: Figures) -> bool:
        """Return whether every figure of the rule was measured and has come down to its level."""
        return all(name in forget and self._holds(name, forget[name]) for name in self.rule)

    def may_be_reached(self, forget: Figures) -> bool:
        """Return whether the rule holds for the figures measured so far: EL, the dear one, is measured only then."""
        return all(self._holds(name, forget[name]) for name in self.rule if name in forget)

    def distance(self, forget: Figures) -> float:
        """Return the mean absolute difference of the forget figures from the level.

        `el_10` is left out: it is not measured at every step. Infinite where a figure is missing (it was not finite).
        """
        names = [name for name in self.figures if name != "el_10"] or list(self.figures)
        return sum(abs(forget.get(name, math.inf) - self.figures[name]) for name in names) / len(names)

    def describe(self) -> str:
        """Return the rule in words."""
        parts = [f"{name} {'<' if name in TEXT_FIGURES else '<='} {self.figures[name]:.4g}" for name in self.rule]
        return f"{' and '.join(parts)} ({self.source})"

    def _holds(self, name: str, value: float) -> bool:
        wanted = self.figures[name]
        return below(value, wanted) if name in TEXT_FIGURES else value <= wanted


@dataclass(frozen=True)
class Best:
    """The measurement whose weights are kept; `meets` says whether it kept enough utility."""

    step: int
    distance: float
    utility: float
    meets: bool


def utility(row: Mapping[str, Any]) -> float | None:
    """Return the mean answer probability over the sets that had to stay, or None where none was measured."""
    found = [row[name]["probability"] for name in KEPT_SETS if "probability" in row.get(name, {})]
    return sum(found) / len(found) if found else None


def best_of(curve: Curve, level: Level, share: float) -> Best | None:
    """Return the measurement nearest to the level among those with at least `share` of the target's utility.

    The target itself (step 0, the curve's first row) is none to choose. Of equally near ones the first counts. When no
    measurement keeps enough utility it is the last one, and `meets` is False. None before the first step.
    """
    if len(curve) < 2:
        return None
    floor = share * (utility(curve[0]) or 0.0)
    rows = [Best(row["step"], level.distance(row["forget"]), utility(row) or 0.0, meets=True) for row in curve[1:]]
    kept = [row for row in rows if row.utility >= floor and math.isfinite(row.distance)]
    last = rows[-1]
    return min(kept, key=lambda row: row.distance) if kept else Best(last.step, last.distance, last.utility, False)


def best_rule(level: Level, share: float) -> str:
    """Return the rule of `best_of` in words."""
    names = ", ".join(name for name in level.figures if name != "el_10")
    near = f"least mean distance of forget {names} from their level ({level.source})"
    return f"{near}, with utility >= {share:.0%} of the target's"
