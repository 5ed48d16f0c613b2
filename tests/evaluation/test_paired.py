"""Paired comparisons and spreads against obvious references, and what does not compare."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation_builders import made_results
from loku.errors import InputError
from loku.evaluation.metrics import Interval
from loku.evaluation.paired import across_seeds, compare, paired_difference, spread
from loku.evaluation.results import SetResults

relaxed = settings(deadline=None, max_examples=40)


def slow_sign_flips(differences):
    """All ways to flip signs; the share whose sum is at least as far from 0."""
    observed = abs(sum(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in _signs(len(differences))]
    return sum(value >= observed - 1e-9 for value in sums) / len(sums)


def _signs(count):
    return list(itertools.product((1, -1), repeat=count))


@relaxed
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=9))
def test_the_permutation_test_flips_every_sign(pairs):
    a, b = [x + 0.5 for x, _ in pairs], [y + 0.5 for _, y in pairs]
    found = paired_difference(a, b)
    assert found.test == "permutation"
    assert found.difference == pytest.approx(np.mean(b) - np.mean(a))
    assert found.p == pytest.approx(slow_sign_flips([y - x for x, y in zip(a, b, strict=True)]))
    assert found.low <= found.difference <= found.high


def slow_mcnemar(gained, lost):
    count = gained + lost
    shares = [math.comb(count, k) / 2**count for k in range(count + 1)]
    return sum(share for share in shares if share <= shares[gained] * (1 + 1e-9))


@relaxed
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=12))
def test_truth_values_take_mcnemars_test(pairs):
    a, b = zip(*pairs, strict=True)
    found = paired_difference(a, b)
    gained, lost = pairs.count((0, 1)), pairs.count((1, 0))
    assert found.test == "mcnemar"
    assert found.p == pytest.approx(slow_mcnemar(gained, lost) if gained + lost else 1.0)
    # With differences of 1 the exact permutation test is the same test.
    assert found.p == pytest.approx(slow_sign_flips([y - x for x, y in pairs if x != y] or [0]))


def test_the_interval_is_the_bootstrap_of_differences():
    generator = np.random.default_rng(0)
    a, b = generator.random(30), generator.random(30)
    picks = np.random.default_rng(7).integers(0, 30, size=(1000, 30))
    means = (b - a)[picks].mean(axis=1)
    found = paired_difference(a, b, seed=7)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert found == paired_difference(a, b, seed=7)


def test_many_rows_and_edges():
    generator = np.random.default_rng(1)
    a = generator.random(200)
    assert paired_difference(a, a + 0.3).p == pytest.approx(2 / 10_000, rel=0.6)
    assert paired_difference(a, a).p == 1.0
    assert paired_difference(a, a + generator.normal(0, 1, 200)).p > 0.01
    one = paired_difference([0.2], [0.7])
    assert (one.difference, one.low, one.high, one.p, one.rows) == (pytest.approx(0.5),) * 3 + (1.0, 1)
    for pair in (([], []), ([0.1], [0.1, 0.2])):
        with pytest.raises(ValueError, match="needs as many of both"):
            paired_difference(*pair)


def results(values, name="forget", suite="own", sha="ab" * 32, **summary):
    found = made_results("model", utility=None)
    found.suite = suite
    found.data = {name: {"name": "f", "sha256": sha, "rows": len(values)}}
    rows = [
        {"index": n, "nll": 1 + value, "tokens": 5, "min_k": 1.0, "probability": value, "truth_ratio": 2 * value}
        for n, value in enumerate(values)
    ]
    mean = float(np.mean(values))
    found.sets = {name: SetResults(len(rows), {"probability": Interval(mean, mean, mean)}, rows)}
    found.summary = dict(summary)
    return found


def test_two_evaluations_are_compared_row_by_row():
    found = compare(results([0.2, 0.6, 0.5]), results([0.3, 0.9, 0.5]), names=("before", "after"))
    rows = found["sets"]["forget"]
    assert set(rows) == {"nll", "probability", "truth_ratio"}  # tokens and scores without a scale of their own are not
    assert rows["probability"]["difference"] == pytest.approx(0.4 / 3)
    expected = [min(r, 1 / r) for r in (0.4, 1.2, 1.0)], [min(r, 1 / r) for r in (0.6, 1.8, 1.0)]
    assert rows["truth_ratio"]["a"] == pytest.approx(np.mean(expected[0]))
    assert rows["truth_ratio"]["b"] == pytest.approx(np.mean(expected[1]))
    elsewhere = compare(results([0.2, 0.6], "retain"), results([0.3, 0.9], "retain"))["sets"]["retain"]
    assert elsewhere["truth_ratio"]["a"] == pytest.approx(np.mean([0.6, 0.0]))
    assert found["warnings"] == []
    assert (found["a"], found["b"]) == ("before", "after")


def test_rows_of_one_side_only_are_left_out_with_a_note():
    found = compare(results([0.2, 0.6, 0.5]), results([0.3, 0.9]))
    assert found["sets"]["forget"]["probability"]["rows"] == 2
    assert found["warnings"] == ["forget: only 2 rows are in both (3 and 2)."]


def test_what_does_not_compare_is_refused():
    one = results([0.2])
    with pytest.raises(InputError, match=r"suites 'own' and 'tofu'\.\nGive two of one suite"):
        compare(one, results([0.2], suite="tofu"))
    with pytest.raises(InputError, match=r"different forget data \(x and y\)\.\nEvaluate both"):
        compare(one, results([0.2], sha="other"), names=("x", "y"))
    with pytest.raises(InputError, match="without a common set"):
        compare(one, results([0.2], "retain"))
    twice = results([0.2, 0.3])
    twice.sets["forget"].per_example[1]["index"] = 0
    with pytest.raises(InputError, match="stands twice"):
        compare(twice, twice)


def test_spread_over_seeds():
    found = spread([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.deviation == pytest.approx(statistics.stdev([1.0, 2.0, 4.0]))
    half = 4.302653 * found.deviation / math.sqrt(3)  # the table's t for 2 degrees of freedom
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), rel=1e-6)
    assert spread([0.5]) == (0.5, None, None, None, (0.5,))
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_runs_are_aggregated():
    runs = [
        results([0.2, 0.4], model_utility=0.6, forget_quality=1e-4),
        results([0.4, 0.6], model_utility=0.7, forget_quality=1e-2),
    ]
    runs[0].summary["extra"] = 1.0
    found = across_seeds(runs)
    assert found["runs"] == 2
    assert found["sets"]["forget"]["probability"]["mean"] == pytest.approx(0.4)
    assert found["summary"]["model_utility"]["values"] == (0.6, 0.7)
    assert found["summary"]["log10_forget_quality"]["mean"] == pytest.approx(-3)
    assert set(found["summary"]) == {"model_utility", "log10_forget_quality"}
    assert across_seeds(runs[:1])["sets"]["forget"]["probability"]["low"] is None
    assert across_seeds([results([0.2], forget_quality=0.0)])["summary"]["log10_forget_quality"]["mean"] == -300
    with pytest.raises(InputError, match=r"--seeds names no results\."):
        across_seeds([])
    with pytest.raises(InputError, match=r"different data\.\nGive runs that differ in their seed alone"):
        across_seeds([runs[0], results([0.2], sha="other")])
