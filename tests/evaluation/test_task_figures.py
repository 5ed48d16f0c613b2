"""Standard errors and intervals of tasks' figures, against resampling and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loku.evaluation.task_figures import figure_of, pooled_error

RNG = np.random.default_rng(3)


def resampled(of, items, draws=4000):
    """The deviation of a figure over resampled rows: a slow reference for its standard error."""
    rng = np.random.default_rng(5)
    values = [of([items[place] for place in rng.integers(0, len(items), len(items))]) for _ in range(draws)]
    return np.std(values), np.quantile(values, [0.025, 0.975])


def mean(items):
    return sum(items) / len(items)


FIGURES = {
    "mean": (mean, [float(value) for value in RNG.integers(0, 2, 60)]),
    "perplexity": (lambda items: math.exp(-mean(items)), RNG.normal(-2, 0.4, 60).tolist()),
    "word_perplexity": (
        lambda items: math.exp(-sum(a for a, _ in items) / sum(b for _, b in items)),
        [(-2.0 * n + float(RNG.normal(0, 2)), int(n)) for n in RNG.integers(5, 40, 60)],
    ),
    "bits_per_byte": (
        lambda items: -sum(a for a, _ in items) / sum(b for _, b in items) / math.log(2),
        [(-2.0 * n + float(RNG.normal(0, 2)), int(n)) for n in RNG.integers(5, 40, 60)],
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_errors_and_intervals_are_those_of_resampled_rows(name):
    of, items = FIGURES[name]
    found = figure_of(of(items), items)
    deviation, (low, high) = resampled(of, items)
    assert found.interval.mean == pytest.approx(of(items))
    assert found.error == pytest.approx(deviation, rel=0.1)
    assert found.interval.low == pytest.approx(low, abs=deviation / 2)
    assert found.interval.high == pytest.approx(high, abs=deviation / 2)
    assert len(found.rows) == 60
    if name != "perplexity":
        assert found.rows[7] == pytest.approx(of(items[7:8]))


def test_edges():
    one = figure_of(0.25, [0.25])
    assert one.error is None
    assert one.interval == (0.25, 0.25, 0.25)
    assert figure_of(0.9, [0.1, 0.2]) is None  # made of its rows in no known way
    assert figure_of(0.5, []) is None
    assert figure_of(0.5, [float("nan"), 0.5]) is None
    assert figure_of(0.5, [(0, "a"), (1, "b")]) is None
    assert figure_of(math.exp(700), [-900.0, -900.0]).interval.high == pytest.approx(math.exp(700))  # stays a number


def test_a_groups_error():
    left, right = [1.0, 0.0, 1.0, 1.0], [0.0, 1.0]
    values, errors = zip(*((mean(rows), figure_of(mean(rows), rows).error) for rows in (left, right)), strict=True)
    expected = math.sqrt((4 / 6 * errors[0]) ** 2 + (2 / 6 * errors[1]) ** 2)
    assert pooled_error(mean(left + right), values, errors, [4, 2]) == pytest.approx(expected)
    assert pooled_error(mean(values), values, errors, [4, 2]) is None  # not weighted by rows
    assert pooled_error(0.5, [], [], []) is None
