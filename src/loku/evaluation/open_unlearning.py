"""The evaluation JSON of open-unlearning (TOFU_EVAL.json and TOFU_SUMMARY.json): read and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from loku.errors import InputError
from loku.evaluation import metrics
from loku.evaluation.logs import LogSet
from loku.evaluation.membership import REFERENCE_ATTACK
from loku.evaluation.metrics import Array
from loku.evaluation.results import Results

REMEDY = "Give a TOFU_EVAL.json of open-unlearning, with its per-index values."
# Our sets, and the prefix of their metrics there. Retain and forget have paraphrased answers, the other two have not.
PREFIXES = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
PARAPHRASED = ("forget", "retain")
TRUTH_RATIO = {name: f"{prefix}_Truth_Ratio" for name, prefix in PREFIXES.items()} | {"forget": "forget_truth_ratio"}
# Our summary figures and forget metrics, and what they are called there.
SUMMARY = {"model_utility": "model_utility", "forget_quality": "forget_quality", "priv_leak": "privleak"}
FORGET = {"extraction_strength_floor": "extraction_strength", "exact_memorisation": "exact_memorization"}
ATTACKS = {
    "mia_auc": ("mia_loss", "nll"),
    "mia_auc_zlib": ("mia_zlib", "zlib"),
    "mia_auc_min_k": ("mia_min_k", "min_k"),
    "mia_auc_min_k_plus_plus": ("mia_min_k_plus_plus", "min_k_plus_plus"),
    "mia_auc_gradient_norm": ("mia_gradnorm", "gradient_norm"),
}
_KNOWN = ("forget_quality", "model_utility", "extraction_strength", *TRUTH_RATIO.values())


def is_evaluation(value: Any) -> bool:
    """Return whether a JSON value looks like open-unlearning's evaluation, with per-index values or a summary."""
    names = [*_KNOWN, *(name for name, _ in ATTACKS.values()), *(f"{prefix}_Q_A_Prob" for prefix in PREFIXES.values())]
    return isinstance(value, Mapping) and "sets" not in value and any(name in value for name in names)


def truth_ratios(value: Mapping[str, Any], source: str) -> dict[int, float]:
    """Return the forget set's truth ratios R by row, as logged there.

    Raises InputError for a file without them: a summary is no reference for forget quality.
    """
    rows = _values(value, "forget_truth_ratio", "score", source)
    return {index: float(score) for index, score in rows.items()}


def reference_summary(value: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures that are known under our names: model utility and the AUCs of membership attacks."""
    names = {"model_utility": "model_utility"} | {ours: theirs for ours, (theirs, _) in ATTACKS.items()}
    found = {ours: _aggregate(value.get(theirs)) for ours, theirs in names.items()}
    return {name: number for name, number in found.items() if number is not None}


def parse_evaluation(value: Mapping[str, Any], source: str, sets: Sequence[str] = tuple(PREFIXES)) -> dict[str, LogSet]:
    """Return the sets as those of an official TOFU log: mean NLLs and ROUGE-L recall by row.

    The rows are those that all of a set's metrics have, in order. Raises InputError naming the metric that is missing.
    """
    return {name: _parse_set(value, name, source) for name in sets}


def _parse_set(value: Mapping[str, Any], name: str, source: str) -> LogSet:
    prefix = PREFIXES[name]
    answers = _values(value, f"{prefix}_Q_A_Prob", "avg_loss", source)
    para = _values(value, f"{prefix}_Q_A_PARA_Prob", "avg_loss", source) if name in PARAPHRASED else answers
    perturbed = _values(value, f"{prefix}_Q_A_PERT_Prob", "avg_loss", source)
    rouge = _values(value, f"{prefix}_Q_A_ROUGE", "rougeL_recall", source)
    rows = [index for index in sorted(answers) if index in para and index in perturbed and index in rouge]
    if not rows:
        raise InputError(f"'{source}' has no rows that all metrics of the {name} set have.", REMEDY)
    texts = value[f"{prefix}_Q_A_ROUGE"]["value_by_index"]
    with_texts = all("ground_truth" in texts[str(index)] and "input" in texts[str(index)] for index in rows)
    return LogSet(
        answer_nll=_array(answers, rows),
        paraphrased_nll=_array(para, rows),
        perturbed_nll=tuple(np.atleast_1d(np.asarray(perturbed[index], dtype=np.float64)) for index in rows),
        rougeL_recall=_array(rouge, rows),
        prompts=tuple(str(texts[str(index)]["input"]) for index in rows) if with_texts else (),
        answers=tuple(str(texts[str(index)]["ground_truth"]) for index in rows) if with_texts else (),
    )


def _array(column: Mapping[int, Any], rows: Sequence[int]) -> Array:
    return np.array([float(np.mean(column[index])) for index in rows])


def _values(value: Mapping[str, Any], metric: str, key: str, source: str) -> dict[int, Any]:
    """Return a metric's finite numbers by row. Rows that the framework marks as unusable (null) are left out."""
    found = value.get(metric)
    by_index = found.get("value_by_index") if isinstance(found, Mapping) else None
    if not isinstance(by_index, Mapping):
        raise InputError(f"'{source}' has no per-index values of '{metric}'.", REMEDY)
    rows = {}
    for index, row in by_index.items():
        number = row.get(key) if isinstance(row, Mapping) else None
        if number is None:
            continue
        try:
            usable = str(index).isdecimal() and bool(np.isfinite(np.asarray(number, dtype=np.float64)).all())
        except (TypeError, ValueError):
            usable = False
        if not usable:
            raise InputError(f"'{source}' has no usable '{key}' of '{metric}' in row '{index}'.", REMEDY)
        rows[int(index)] = number
    if not rows:
        raise InputError(f"'{source}' has no usable rows of '{metric}'.", REMEDY)
    return rows


def _aggregate(found: Any) -> float | None:
    """Return a metric's aggregate, from per-index files or from a summary."""
    number = found.get("agg_value") if isinstance(found, Mapping) else found
    return float(number) if isinstance(number, int | float) and np.isfinite(number) else None


def write_evaluation(results: Results) -> tuple[dict[str, Any], dict[str, float]]:
    """Return what TOFU_EVAL.json and TOFU_SUMMARY.json hold, for results of suite tofu.

    Their names and conventions: `extraction_strength` is the variant with a floor, truth ratios are geometric, R per
    row. Texts stand with ROUGE where they were kept. Not written, since not measured: the probabilities of its fluency
    classifier, and by row the reference attack, whose AUC stands alone.
    """
    found: dict[str, Any] = {}
    for name in (name for name in PREFIXES if name in results.sets):
        found |= _write_set(results, name)
    if "forget" in results.sets:
        rows = results.sets["forget"].per_example
        for ours, theirs in FORGET.items():
            found[theirs] = _metric(rows, _score(ours))
    for ours, (theirs, score) in ATTACKS.items():
        if ours in results.summary:
            found[theirs] = {
                name: _metric(results.sets[name].per_example, _score(score)) for name in ("forget", "holdout")
            } | {"auc": results.summary[ours], "agg_value": results.summary[ours]}
    for ours, theirs in (SUMMARY | {REFERENCE_ATTACK: "mia_reference"}).items():
        if ours in results.summary:
            found[theirs] = {"agg_value": results.summary[ours]}
    found = dict(sorted(found.items()))
    return found, {name: item["agg_value"] for name, item in found.items()}


def _write_set(results: Results, name: str) -> dict[str, Any]:
    prefix, rows = PREFIXES[name], results.sets[name].per_example
    texts = {row["index"]: row for row in results.texts if row["set"] == name}
    found = {
        f"{prefix}_Q_A_Prob": _metric(rows, lambda row: _likelihood(row["nll"]), "prob"),
        f"{prefix}_Q_A_PERT_Prob": _metric(rows, lambda row: _likelihood(perturbed(row)), "prob"),
        f"{prefix}_Q_A_ROUGE": _metric(rows, lambda row: _rouge(row, texts.get(row["index"])), "rougeL_recall"),
    }
    if name in PARAPHRASED:
        found[f"{prefix}_Q_A_PARA_Prob"] = _metric(
            rows, lambda row: _likelihood(row.get("paraphrased_nll", row["nll"])), "prob"
        )
    else:
        # Probability among the options: what `probability` already is on these sets.
        found[f"{prefix}_Q_A_Prob_normalised"] = _metric(rows, lambda row: {"prob": row["probability"]}, "prob")
    averaged = metrics.forget_truth_ratio if name == "forget" else metrics.utility_truth_ratio
    ratios = _metric(rows, _score("truth_ratio"))
    ratios["agg_value"] = float(averaged([row["truth_ratio"] for row in rows]).mean())
    return found | {TRUTH_RATIO[name]: ratios}


def perturbed(row: Mapping[str, float]) -> list[float]:
    """Return the mean NLLs of a row's perturbed answers, in their order."""
    count = sum(name.startswith("perturbed_nll_") for name in row)
    return [row[f"perturbed_nll_{place}"] for place in range(count)]


def _likelihood(nll: float | list[float]) -> dict[str, Any]:
    return {"prob": metrics.probability(nll).tolist(), "avg_loss": nll}


def _score(name: str) -> Callable[[Mapping[str, float]], dict[str, Any]]:
    return lambda row: {"score": row[name]}


def _rouge(row: Mapping[str, float], text: Mapping[str, Any] | None) -> dict[str, Any]:
    found: dict[str, Any] = {name: row[name] for name in ("rouge1_recall", "rougeL_f1", "rougeL_recall") if name in row}
    if text is not None:
        found |= {"input": text["question"], "ground_truth": text["answer"], "generation": text["generation"]}
    return found


def _metric(
    rows: Sequence[Mapping[str, float]], entry: Callable[[Mapping[str, float]], dict[str, Any]], key: str = "score"
) -> dict[str, Any]:
    """Return a metric with its values by row and their mean; of several values a row, the mean of their means."""
    by_index = {str(int(row["index"])): entry(row) for row in rows}
    return {
        "agg_value": float(np.mean([np.mean(item[key]) for item in by_index.values()])),
        "value_by_index": by_index,
    }
