"""Which grid point an arm is reported at: chosen by its runs on the tuning seeds alone, by one rule for all arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from loku.bench.figures import value_of
from loku.bench.recipe import RETAIN_ONLY

Record = Mapping[str, Any]

# What `closest` compares with the retain-only model: all of them lie between 0 and 1.
COMPARED = (
    "forget.probability", "forget.rougeL_recall", "forget.exact_match", "forget.exact_memorisation",
    "retain.probability", "retain.exact_match", "general.exact_match", "model_utility",
    "forget.ma", "forget.el_10", "cloze.accuracy",
    "forget.regurgitation", "forget.knowledge", "retain.regurgitation", "retain.knowledge",
    "verbmem_forget", "knowmem_forget", "knowmem_retain", "utility",
)  # fmt: skip
# What is left out where another figure was measured, which says the same.
SAID_BY = {"forget.exact_memorisation": "forget.ma", "utility": "retain.knowledge"}
PERCENT = ("verbmem_forget", "knowmem_forget", "knowmem_retain")  # of those, MUSE's own scale
UTILITY = ("model_utility", "utility")  # of suite own, of tdec and lume


def distance(figures: dict[str, Any] | None, reference: dict[str, Any]) -> float:
    """Return the mean of |figure - retain-only's| over `COMPARED`, of what both have; nothing counts twice (`SAID_BY`).

    It is 1, the farthest there is, for a run that diverged and where nothing was measured in both.
    """
    found = []
    for name in COMPARED:
        ours, theirs = value_of(figures, name), value_of(reference, name)
        said = name in SAID_BY and value_of(reference, SAID_BY[name]) is not None
        if ours is not None and theirs is not None and not said:
            found.append(abs(ours - theirs) / (100 if name in PERCENT else 1))
    return mean(found) if found else 1.0


def score(rule: str, records: Sequence[Record], models: Mapping[int, Record]) -> tuple[float, ...]:
    """Return what one grid point is worth, the less the better.

    closest: the mean distance to the retain-only model of the same seed.
    level: seeds that did not stop at the forget level; then utility lost; then steps taken.
    """
    if rule == "closest":
        references = [models[record["seed"]]["models"][RETAIN_ONLY]["figures"] for record in records]
        return (mean(distance(r["figures"], ref) for r, ref in zip(records, references, strict=True)),)
    missed = sum(not record.get("stopped") for record in records)
    utility = mean(sum(value_of(record["figures"], name) or 0.0 for name in UTILITY) for record in records)
    return float(missed), -round(utility, 2), mean(steps_taken(record) for record in records)


def steps_taken(record: Record) -> float:
    """Return the optimiser steps that a run took."""
    stopped = record.get("stopped")
    return float(stopped["step"] if stopped else record.get("steps") or 0)


def choose(
    rule: str, points: Sequence[Mapping[str, Any]], runs: Sequence[Sequence[Record]], models: Mapping[int, Record]
) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    """Return the best point, and every point's score for the record. The first of equals wins."""
    scores = [score(rule, records, models) for records in runs]
    best = min(range(len(points)), key=lambda i: scores[i])
    return points[best], [{"point": dict(p), "score": list(s)} for p, s in zip(points, scores, strict=True)]
