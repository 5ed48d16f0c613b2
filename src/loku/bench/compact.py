"""What is committed of a run: the figures that tables are made of, rounded; everything else stays in its own JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loku.bench.leaderboard import FIGURES, OWN_UTILITY
from loku.bench.tuning import COMPARED
from loku.evaluation.lume import KINDS, TASKS

DIGITS = 5  # significant ones: more than any interval has
CURVE = ("probability", "exact_memorisation", "ma", "el_10")  # of the forget set, by step
# LUME's twelve values and what its membership score is made of: too many for columns.
PLACES = [(name, task + 1) for name in ("forget", "retain") for task in range(len(TASKS))]
LUME = (*(f"{name}_task{task}_{kind}" for name, task in PLACES for kind in KINDS.values()), "mia_auc")
KEPT = (*FIGURES.values(), *COMPARED, OWN_UTILITY, *LUME)


def compact(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of a run or of a seed's models with fewer figures, and of the curve the forget set alone."""
    found = dict(record)
    if "models" in found and "arm" not in found:
        found["models"] = {name: _model(model) for name, model in found["models"].items()}
    if found.get("figures"):
        found["figures"] = _figures(found["figures"])
    if found.get("curve"):
        found["curve"] = [
            {"step": row["step"]} | {name: row["forget"][name] for name in CURVE if name in row["forget"]}
            for row in found["curve"]
        ]
    rounded: dict[str, Any] = _rounded(found)
    return rounded


def _model(model: Mapping[str, Any]) -> dict[str, Any]:
    return {**model, "figures": _figures(model["figures"])}


def _figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {**figures, "values": {name: value for name, value in figures["values"].items() if name in KEPT}}


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
