"""Official TOFU evaluation logs (`eval_log_aggregated.json`, plain or gzipped) and what follows from them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loku.errors import InputError, suggestion
from loku.evaluation import metrics
from loku.evaluation.metrics import Array

# The official names of the four evaluations, and ours.
LOG_KEYS = {
    "retain": "eval_log.json",
    "forget": "eval_log_forget.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
UTILITY_SETS = ("retain", "real_authors", "world_facts")
NORMALISED_SETS = ("real_authors", "world_facts")
REMEDY = "Give an eval_log_aggregated.json of the official TOFU evaluation, plain or gzipped."


@dataclass(frozen=True)
class LogSet:
    """One evaluation set of a log: arrays over its rows, in their order. Losses are mean NLL per token, in nats."""

    answer_nll: Array
    paraphrased_nll: Array
    perturbed_nll: tuple[Array, ...]
    rougeL_recall: Array  # noqa: N815 - the metric's name
    prompts: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.answer_nll.size)

    def truth_ratios(self, *, arithmetic: bool = False) -> Array:
        """Return R of every row; see `metrics.truth_ratio`."""
        pairs = zip(self.paraphrased_nll, self.perturbed_nll, strict=True)
        return np.array([metrics.truth_ratio(para, pert, arithmetic=arithmetic) for para, pert in pairs])

    def probabilities(self, *, normalised: bool) -> Array:
        """Return the probability of every row's answer, normalised over the perturbed ones on request."""
        if not normalised:
            return metrics.probability(self.answer_nll)
        pairs = zip(self.answer_nll, self.perturbed_nll, strict=True)
        return np.array([metrics.normalised_probability(true, false) for true, false in pairs])


def is_log(value: Any) -> bool:
    """Return whether a JSON value looks like an official log rather than a results file."""
    return isinstance(value, Mapping) and any(key in value for key in LOG_KEYS.values())


def read_json_or_gzip(path: str | Path) -> Any:
    """Read a JSON file that may be gzipped, whatever its name.

    Raises InputError when it is absent, damaged or no JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no log file '{path}'.", REMEDY)
    data = path.read_bytes()
    try:
        return json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"The log file '{path}' is not readable JSON ({error}).", REMEDY) from None


def parse_log(value: Any, source: str, *, sets: tuple[str, ...] = tuple(LOG_KEYS)) -> dict[str, LogSet]:
    """Return the sets of a log. Raises InputError naming the set or metric that is missing or unusable."""
    if not isinstance(value, Mapping):
        raise InputError(f"The log '{source}' holds a {type(value).__name__}, not a JSON object.", REMEDY)
    parsed = {}
    for name in sets:
        key = LOG_KEYS[name]
        if not isinstance(value.get(key), Mapping):
            found = f"it has: {', '.join(map(str, value)) or 'nothing'}"
            raise InputError(f"The log '{source}' has no set '{key}' ({name}); {found}.", REMEDY)
        parsed[name] = _parse_set(value[key], f"{source}: {key}")
    return parsed


def _parse_set(value: Mapping[str, Any], source: str) -> LogSet:
    rows = _keys(value, "avg_gt_loss", source)
    texts = value.get("generated_text")
    texts = [texts.get(row) for row in rows] if isinstance(texts, Mapping) else []
    if not all(isinstance(item, list) and len(item) == 3 for item in texts):
        texts = []
    return LogSet(
        answer_nll=_column(value, "avg_gt_loss", rows, source),
        paraphrased_nll=_column(value, "avg_paraphrased_loss", rows, source),
        perturbed_nll=_lists(value, "average_perturb_loss", rows, source),
        rougeL_recall=_shares(_column(value, "rougeL_recall", rows, source), "rougeL_recall", source),
        prompts=tuple(str(item[0]) for item in texts),
        answers=tuple(str(item[2]) for item in texts),
    )


def _keys(value: Mapping[str, Any], metric: str, source: str) -> list[str]:
    found = value.get(metric)
    if not isinstance(found, Mapping):
        raise InputError(
            f"The log '{source}' has no metric '{metric}'.", suggestion(metric, map(str, value)) + f" {REMEDY}"
        )
    if not found or not all(str(row).isdecimal() for row in found):
        raise InputError(f"The metric '{metric}' of '{source}' has no rows numbered from 0.", REMEDY)
    return sorted(found, key=int)


def _values(value: Mapping[str, Any], metric: str, rows: list[str], source: str) -> list[Any]:
    if _keys(value, metric, source) != rows:
        raise InputError(f"The metric '{metric}' of '{source}' has other rows than 'avg_gt_loss'.", REMEDY)
    return [value[metric][row] for row in rows]


def _column(value: Mapping[str, Any], metric: str, rows: list[str], source: str) -> Array:
    return _numbers(_values(value, metric, rows, source), metric, source, dimensions=1)


def _shares(values: Array, metric: str, source: str) -> Array:
    if values.min() < 0 or values.max() > 1:
        raise InputError(f"The metric '{metric}' of '{source}' holds values outside 0 to 1.", REMEDY)
    return values


def _lists(value: Mapping[str, Any], metric: str, rows: list[str], source: str) -> tuple[Array, ...]:
    lists = _values(value, metric, rows, source)
    return tuple(_numbers(item, metric, source, dimensions=1) for item in lists)


def _numbers(values: Any, metric: str, source: str, *, dimensions: int) -> Array:
    try:
        numbers = np.asarray(values)
        # Texts and truth values would be taken for numbers.
        numbers = numbers.astype(np.float64) if numbers.dtype.kind in "iuf" else np.array([np.nan])
    except ValueError:  # lists of several lengths
        numbers = np.array([np.nan])
    if numbers.ndim != dimensions or not numbers.size or not np.isfinite(numbers).all():
        raise InputError(f"The metric '{metric}' of '{source}' holds values that are not finite numbers.", REMEDY)
    return numbers


def set_values(name: str, found: LogSet) -> dict[str, float | int]:
    """Return a set's figures: rows, probability, ROUGE-L recall, and the truth ratio in both conventions."""
    shown = metrics.forget_truth_ratio if name == "forget" else metrics.utility_truth_ratio
    return {
        "rows": found.rows,
        "probability": float(found.probabilities(normalised=name in NORMALISED_SETS).mean()),
        "rougeL_recall": float(found.rougeL_recall.mean()),
        "truth_ratio": float(shown(found.truth_ratios()).mean()),
        "truth_ratio_arithmetic": float(shown(found.truth_ratios(arithmetic=True)).mean()),
    }


def log_utility(sets: Mapping[str, LogSet], *, arithmetic: bool = False) -> float:
    """Return TOFU's model utility: the harmonic mean of three metrics on each of three sets."""
    values = {name: set_values(name, sets[name]) for name in UTILITY_SETS}
    ratio = "truth_ratio_arithmetic" if arithmetic else "truth_ratio"
    return metrics.harmonic_mean(
        values[name][metric] for name in UTILITY_SETS for metric in ("probability", "rougeL_recall", ratio)
    )


def forget_row_warnings(ours: LogSet, theirs: LogSet) -> list[str]:
    """Return what speaks against comparing two logs' forget sets row by row."""
    if ours.rows != theirs.rows:
        return [
            f"The forget rows are not the same questions: {ours.rows} rows here, {theirs.rows} in the retain-only log. "
            "Forget quality compares two different sets."
        ]
    if not ours.answers or not theirs.answers:
        return ["A log holds no texts: whether the forget rows are the same questions could not be checked."]
    different = [not same for same in map(_same_text, ours.answers, theirs.answers)]
    different_questions = [not same for same in map(_same_text, questions(ours.prompts), questions(theirs.prompts))]
    count = sum(one or other for one, other in zip(different, different_questions, strict=True))
    if not count:
        return []
    return [
        f"The forget rows are not the same questions: {count} of {ours.rows} differ between the two logs. "
        "Forget quality compares two different sets."
    ]


def _same_text(one: str, other: str) -> bool:
    """Return whether two texts agree up to blanks, which some tokenizers clean up on decoding ("Baku , is")."""
    return "".join(one.split()) == "".join(other.split())


def questions(prompts: tuple[str, ...]) -> list[str]:
    """Return prompts without what all of them share at both ends: the tags of one template or another."""
    tight = ["".join(prompt.split()) for prompt in prompts]
    start = _shared_start(tight)
    tails = [prompt[start:][::-1] for prompt in tight]
    end = _shared_start(tails)
    return [tail[end:][::-1] for tail in tails]


def _shared_start(texts: list[str]) -> int:
    """Return how many characters all texts have in common at their start: what the first and last in order share."""
    first, last = min(texts), max(texts)
    return next(
        (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first)
    )
