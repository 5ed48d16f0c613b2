"""Results of suite tofu as an official TOFU log (`eval_log_aggregated.json`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from loku.evaluation.logs import LOG_KEYS, NORMALISED_SETS
from loku.evaluation.open_unlearning import perturbed
from loku.evaluation.results import Results

Row = Mapping[str, float]


def official_log(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the sets of a TOFU evaluation in the official schema: metric, then row number in the set, then value.

    Losses are in nats, their counts include the end of sequence; without a paraphrased answer the answer itself takes
    its place. `generated_text` is there where texts were kept.
    """
    return {key: _log_set(results, name) for name, key in LOG_KEYS.items() if name in results.sets}


def _log_set(results: Results, name: str) -> dict[str, dict[str, Any]]:
    rows = results.sets[name].per_example
    columns: dict[str, Callable[[Row], Any]] = {
        "avg_gt_loss": lambda row: row["nll"],
        "gt_loss": lambda row: row["nll"] * row["tokens"],
        "num_token_gt": lambda row: int(row["tokens"]),
        "avg_paraphrased_loss": lambda row: _paraphrased(row)[0],
        "paraphrased_loss": lambda row: _paraphrased(row)[0] * _paraphrased(row)[1],
        "num_token_paraphrased": lambda row: int(_paraphrased(row)[1]),
        "average_perturb_loss": perturbed,
        "perturb_loss": lambda row: [nll * count for nll, count in zip(perturbed(row), _counts(row), strict=True)],
        "num_token_perturb": _counts,
        "truth_ratio": lambda row: row["truth_ratio"],
        "rouge1_recall": lambda row: row["rouge1_recall"],
        "rougeL_recall": lambda row: row["rougeL_recall"],
    }
    if name in NORMALISED_SETS:
        columns["normalized_gt_loss"] = lambda row: float(-np.log(max(row["probability"], 1e-300)))
    found = {metric: {str(place): value(row) for place, row in enumerate(rows)} for metric, value in columns.items()}
    texts = {row["index"]: row for row in results.texts if row["set"] == name}
    if texts:
        found["generated_text"] = {
            str(place): [texts[row["index"]][key] for key in ("question", "generation", "answer")]
            for place, row in enumerate(rows)
        }
    return found


def _paraphrased(row: Row) -> tuple[float, float]:
    """Return the paraphrased answer's mean NLL and token count, or the answer's own."""
    if "paraphrased_nll" in row:
        return row["paraphrased_nll"], row["paraphrased_tokens"]
    return row["nll"], row["tokens"]


def _counts(row: Row) -> list[int]:
    return [int(row[f"perturbed_tokens_{place}"]) for place in range(len(perturbed(row)))]
