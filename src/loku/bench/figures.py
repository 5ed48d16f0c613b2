"""What a benchmark keeps of an evaluation: every set's means with intervals, and the summary."""

from __future__ import annotations

from typing import Any

from loku.evaluation.results import Results


def figures_of(results: Results) -> dict[str, Any]:
    """Return `{"forget.probability": {"mean", "low", "high"}, ..., "model_utility": {"mean"}}` and the verdict."""
    figures = {
        f"{name}.{metric}": interval._asdict()
        for name, found in results.sets.items()
        for metric, interval in found.metrics.items()
    }
    figures |= {name: {"mean": value} for name, value in results.summary.items()}
    return {"values": figures, "verdict": results.verdict["level"] if results.verdict else None}


def value_of(figures: dict[str, Any] | None, name: str) -> float | None:
    """Return one figure's mean, or None where it was not measured."""
    found = (figures or {}).get("values", {}).get(name)
    return None if found is None else float(found["mean"])
