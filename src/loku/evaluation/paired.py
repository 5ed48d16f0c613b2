"""Two evaluations of the same rows, row by row; and one evaluation over several seeds. Pure functions of numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from loku.errors import InputError
from loku.evaluation import metrics
from loku.evaluation.measuring import ROW_ONLY, ROW_ONLY_PARTS
from loku.evaluation.metrics import Array
from loku.evaluation.results import Results

FLIPS = 9999  # random sign flips of the permutation test; all of them where there are no more


class Difference(NamedTuple):
    """A paired difference b - a: its mean with a 95 % interval, a two-sided p-value, its test, and the rows."""

    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float
    test: str
    rows: int


def paired_difference(a: ArrayLike, b: ArrayLike, *, seed: int = 42) -> Difference:
    """Compare two measurements of the same rows.

    The interval is the percentile bootstrap of the mean of b - a over rows. p is McNemar's exact test where all values
    are 0 or 1 (a binomial test on the rows that changed), else a permutation test that flips the signs of differences:
    all 2^n of them up to 9,999, random ones beyond. Rows without any difference give p = 1. Raises ValueError without
    rows, or for unequal numbers of them.
    """
    ours, theirs = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if ours.shape != theirs.shape or not ours.size:
        raise ValueError(f"paired_difference got {ours.size} and {theirs.size} rows: it needs as many of both")
    differences = theirs - ours
    interval = metrics.bootstrap(differences, seed=seed)
    binary = bool(np.isin(ours, (0, 1)).all() and np.isin(theirs, (0, 1)).all())
    p = _mcnemar(differences) if binary else _sign_flips(differences, seed)
    means = float(ours.mean()), float(theirs.mean())
    return Difference(*means, *interval, p, "mcnemar" if binary else "permutation", int(ours.size))


def _mcnemar(differences: Array) -> float:
    from scipy.stats import binomtest

    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _sign_flips(differences: Array, seed: int) -> float:
    from scipy.stats import permutation_test

    changed = differences[differences != 0]
    if changed.size < 2:  # one row can be flipped in two ways, both as extreme as it is
        return 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = permutation_test(
            (changed,),
            lambda sample, axis: sample.sum(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=FLIPS,
            batch=max(1, 2**20 // changed.size),
            rng=np.random.default_rng(seed),
        )
    return float(found.pvalue)


def compare(a: Results, b: Results, *, names: tuple[str, str] = ("a", "b"), seed: int = 42) -> dict[str, Any]:
    """Return the paired differences b - a of every metric that rows of both evaluations have, by set.

    Rows are matched by index. Truth ratios are compared as their set averages them. p-values are not adjusted for the
    number of comparisons. Raises InputError when suites or data differ, no set is common, or an index stands twice.
    """
    if a.suite != b.suite:
        raise InputError(f"--compare got results of suites '{a.suite}' and '{b.suite}'.", "Give two of one suite.")
    common = [name for name in a.sets if name in b.sets]
    for name in common:
        hashes = [found.data.get(name, {}).get("sha256") for found in (a, b)]
        if hashes[0] != hashes[1]:
            raise InputError(
                f"--compare got results of different {name} data ({names[0]} and {names[1]}).",
                "Evaluate both models on the same rows.",
            )
    if not common:
        raise InputError("--compare got results without a common set.", "Evaluate both models on the same rows.")
    notes, sets = [], {}
    for name in common:
        ours, theirs = (_by_index(found, name, where) for found, where in zip((a, b), names, strict=True))
        both = [index for index in ours if index in theirs]
        if len(both) < max(len(ours), len(theirs)):
            notes.append(f"{name}: only {len(both)} rows are in both ({len(ours)} and {len(theirs)}).")
        rows = {}
        for metric in dict.fromkeys(key for index in both for key in ours[index] if key in theirs[index]):
            if metric != "nll" and (metric in ROW_ONLY or metric == "task" or metric.startswith(ROW_ONLY_PARTS)):
                continue
            pairs = [
                (ours[index][metric], theirs[index][metric])
                for index in both
                if metric in ours[index] and metric in theirs[index]
            ]
            values = [_as_averaged(name, metric, np.array(column)) for column in zip(*pairs, strict=True)]
            rows[metric] = paired_difference(*values, seed=seed)._asdict()
        sets[name] = rows
    return {"a": names[0], "b": names[1], "suite": a.suite, "sets": sets, "warnings": notes}


def _by_index(results: Results, name: str, where: str) -> dict[int, dict[str, float]]:
    rows = results.sets[name].per_example
    found = {int(row["index"]): row for row in rows}
    if len(found) < len(rows):
        raise InputError(f"{where}: a row of the set '{name}' stands twice.", "Evaluate the model again.")
    return found


def _as_averaged(name: str, metric: str, values: Array) -> Array:
    if metric in ("truth_ratio", "truth_ratio_arithmetic"):
        return metrics.forget_truth_ratio(values) if name == "forget" else metrics.utility_truth_ratio(values)
    return values


class Spread(NamedTuple):
    """A figure over several seeds: mean, sample standard deviation, 95 % t-interval of the mean, and the values."""

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    values: tuple[float, ...]


def spread(values: Sequence[float]) -> Spread:
    """Return mean, standard deviation (n - 1) and the interval mean ± t_{0.975, n-1} s / √n; None where n is 1.

    Raises ValueError without values.
    """
    from scipy.stats import t

    if not values:
        raise ValueError("spread got no values: it needs at least one")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, None, None, None, tuple(values))
    deviation = float(np.std(values, ddof=1))
    half = float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Spread(mean, deviation, mean - half, mean + half, tuple(values))


def across_seeds(runs: Sequence[Results]) -> dict[str, Any]:
    """Return the spread over runs of every figure that all of them have: a set's metrics, and the summary.

    The interval is about training seeds, unlike that of a single run, which is about rows. Forget quality is spread as
    its logarithm to base 10, `log10_forget_quality`: p-values span orders of magnitude. Raises InputError without runs,
    and when runs differ in suite or data.
    """
    if not runs:
        raise InputError("--seeds names no results.", "Give two or more results.json.")
    first = runs[0]
    for found in runs[1:]:
        different = {
            "suite": found.suite != first.suite,
            "data": {k: v.get("sha256") for k, v in found.data.items()}
            != {k: v.get("sha256") for k, v in first.data.items()},
        }
        if any(different.values()):
            what = " and ".join(name for name, differs in different.items() if differs)
            raise InputError(f"--seeds got results of different {what}.", "Give runs that differ in their seed alone.")
    sets = {
        name: {
            metric: spread([run.sets[name].metrics[metric].mean for run in runs])._asdict()
            for metric in first.sets[name].metrics
            if all(metric in run.sets[name].metrics for run in runs)
        }
        for name in first.sets
    }
    summary = {
        name: spread([run.summary[name] for run in runs])._asdict()
        for name in first.summary
        if all(name in run.summary for run in runs) and name != "forget_quality"
    }
    if all("forget_quality" in run.summary for run in runs):
        logs = [math.log10(max(run.summary["forget_quality"], 1e-300)) for run in runs]
        summary["log10_forget_quality"] = spread(logs)._asdict()
    return {"runs": len(runs), "suite": first.suite, "sets": sets, "summary": summary}
