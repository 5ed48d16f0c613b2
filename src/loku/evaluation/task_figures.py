"""Standard errors and intervals of a benchmark task's figures, from its rows' own numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from loku.evaluation.metrics import Array, Interval, bootstrap


class Figure(NamedTuple):
    """What rows tell of a figure: their own numbers, its 95 % interval over rows, and its standard error (n > 1)."""

    rows: list[float]
    interval: Interval
    error: float | None


def figure_of(value: float, items: Sequence[Any], seed: int = 42) -> Figure | None:
    """Return what a task's rows tell of its figure; None where the figure is made of them in no known way.

    Known are the mean of the rows; exp(-mean) of log-likelihoods; and, of pairs (log-likelihood, size), exp(-Σ / Σ) and
    its logarithm to base 2. The standard error of a mean is s / √n, s the sample deviation over rows; of the others it
    follows by the delta method, the ratio's with the deviation of (-log-likelihood - ratio x size) / mean size. Rows'
    own numbers are the figure of each row alone, but for exp(-mean), where they are log-likelihoods.
    """
    if not items or not _regular(items):
        return None
    array = np.array(items, dtype=np.float64)
    if array.ndim == 1:
        if math.isclose(array.mean(), value, rel_tol=1e-9, abs_tol=1e-12):
            return Figure(array.tolist(), bootstrap(array, seed=seed), standard_error(array))
        found = bootstrap(-array, seed=seed), standard_error(array), array
        known = math.isclose(_exp(-array.mean()), value, rel_tol=1e-9)
        return _exponential(*found) if known else None
    sums, sizes = -array[:, 0], array[:, 1]
    rate = float(sums.sum() / sizes.sum())
    error = standard_error((sums - rate * sizes) / sizes.mean())
    interval, alone = bootstrap(sums, weights=sizes, seed=seed), sums / sizes
    if math.isclose(_exp(rate), value, rel_tol=1e-9):
        return _exponential(interval, error, np.exp(np.minimum(alone, 700.0)))
    if math.isclose(rate / math.log(2), value, rel_tol=1e-9):
        bits = Interval(*(part / math.log(2) for part in interval))
        return Figure((alone / math.log(2)).tolist(), bits, None if error is None else error / math.log(2))
    return None


def _exponential(interval: Interval, error: float | None, rows: Array) -> Figure:
    mean, low, high = (_exp(part) for part in interval)
    return Figure(rows.tolist(), Interval(mean, low, high), None if error is None else mean * error)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def standard_error(values: Array) -> float | None:
    """Return s / √n, None for a single value."""
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else None


def pooled_error(value: float, values: Sequence[float], errors: Sequence[float], rows: Sequence[int]) -> float | None:
    """Return the standard error of a group's figure when it is the mean over all rows of its tasks, else None."""
    shares = np.array(rows, dtype=np.float64) / max(1, sum(rows))
    if not rows or not math.isclose(float(shares @ np.array(values)), value, rel_tol=1e-9, abs_tol=1e-12):
        return None
    return float(np.sqrt(((shares * np.array(errors)) ** 2).sum()))


def _regular(items: Sequence[Any]) -> bool:
    """Return whether items are all finite numbers, or all pairs of a finite number and a size."""
    if all(is_number(item) for item in items):
        return True
    return all(
        isinstance(item, tuple) and len(item) == 2 and all(map(is_number, item)) and item[1] > 0 for item in items
    )


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float | np.number) and math.isfinite(value)
