"""TOFU's numbers from logs, in the official format or in open-unlearning's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loku.evaluation import metrics, open_unlearning
from loku.evaluation.logs import (
    LOG_KEYS,
    LogSet,
    forget_row_warnings,
    log_utility,
    parse_log,
    read_json_or_gzip,
    set_values,
)


def read_sets(path: str | Path, sets: tuple[str, ...] = tuple(LOG_KEYS)) -> dict[str, LogSet]:
    """Read the named sets of a log. Raises InputError for a file that is neither format, or lacks one of them."""
    value = read_json_or_gzip(path)
    if open_unlearning.is_evaluation(value):
        return open_unlearning.parse_evaluation(value, str(path), sets)
    return parse_log(value, str(path), sets=sets)


def evaluate_logs(logs: str | Path, *, retain_logs: str | Path | None = None) -> dict[str, Any]:
    """Return TOFU's numbers from a model's log, official or open-unlearning's; forget quality with a retain-only one.

    `model_utility` uses the geometric truth ratio, as the published numbers do; `model_utility_arithmetic` the other.
    Forget quality is the p-value of the exact two-sample Kolmogorov-Smirnov test on the forget sets' geometric truth
    ratios; without `retain_logs` it and its companions are None. Forget rows that are not the same questions are
    compared all the same, and `warnings` says so.
    """
    ours = read_sets(logs)
    theirs = None
    if retain_logs is not None:
        theirs = read_sets(retain_logs, ("forget",))["forget"]
    sets = {name: set_values(name, found) for name, found in ours.items()}
    quality = None if theirs is None else metrics.forget_quality(ours["forget"].truth_ratios(), theirs.truth_ratios())
    return {
        "model_utility": log_utility(ours),
        "model_utility_arithmetic": log_utility(ours, arithmetic=True),
        "forget_quality": quality and quality.p,
        "ks_statistic": quality and quality.statistic,
        "forget_quality_rows": quality and quality.rows,
        "sets": sets,
        "warnings": [] if theirs is None else forget_row_warnings(ours["forget"], theirs),
    }
