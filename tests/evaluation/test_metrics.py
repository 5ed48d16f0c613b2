"""Every metric against an obvious reference in float64, and its edge cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loku.evaluation import metrics

relaxed = settings(deadline=None)  # the first call of some metrics imports their library
nlls = st.floats(0.01, 20.0)
hit_lists = st.lists(st.booleans(), min_size=1, max_size=12)


@relaxed
@given(st.lists(st.floats(0.01, 5.0), min_size=1, max_size=8))
def test_probability_is_the_geometric_mean_of_token_probabilities(token_nlls):
    expected = math.prod(math.exp(-nll) for nll in token_nlls) ** (1 / len(token_nlls))
    assert metrics.probability(np.mean(token_nlls)) == pytest.approx(expected, rel=1e-9)
    assert metrics.perplexity(np.mean(token_nlls)) == pytest.approx(1 / expected, rel=1e-9)


def test_hopeless_answers_stay_finite():
    assert metrics.probability(1e6) < 1e-300
    assert math.isfinite(metrics.perplexity(1e6))
    assert math.isfinite(metrics.truth_ratio(5000.0, [1.0, 2.0]))
    assert math.isfinite(metrics.truth_ratio(5000.0, [1.0, 2.0], arithmetic=True))
    assert 0 < metrics.truth_ratio(0.0, [5000.0], arithmetic=True) < 1e-300
    assert metrics.forget_truth_ratio(metrics.truth_ratio(5000.0, [1.0])) == pytest.approx(0)


@relaxed
@given(nlls, st.lists(nlls, min_size=1, max_size=5))
def test_truth_ratio_in_both_conventions(paraphrased, perturbed):
    wrong = [math.exp(-nll) for nll in perturbed]
    geometric = math.prod(wrong) ** (1 / len(wrong)) / math.exp(-paraphrased)
    arithmetic = sum(wrong) / len(wrong) / math.exp(-paraphrased)
    assert metrics.truth_ratio(paraphrased, perturbed) == pytest.approx(geometric, rel=1e-9)
    assert metrics.truth_ratio(paraphrased, perturbed, arithmetic=True) == pytest.approx(arithmetic, rel=1e-9)
    assert geometric <= arithmetic * (1 + 1e-12)


@relaxed
@given(nlls, st.lists(nlls, min_size=1, max_size=5))
def test_normalised_probability(true, false):
    p = math.exp(-true)
    expected = p / (p + sum(math.exp(-nll) for nll in false))
    assert metrics.normalised_probability(true, false) == pytest.approx(expected, rel=1e-9)


def test_without_perturbed_answers_there_is_no_ratio():
    assert math.isnan(metrics.truth_ratio(1.0, []))
    assert math.isnan(metrics.truth_ratio(1.0, [], arithmetic=True))
    assert math.isnan(metrics.normalised_probability(1.0, []))


def test_what_is_averaged_of_the_truth_ratio():
    ratios = [0.25, 1.0, 4.0]
    assert metrics.forget_truth_ratio(ratios).tolist() == [0.25, 1.0, 0.25]
    assert metrics.utility_truth_ratio(ratios).tolist() == [0.75, 0.0, 0.0]


def slow_common_subsequence(one, other):
    return max(
        (
            size
            for size in range(len(one) + 1)
            for part in itertools.combinations(one, size)
            if any(part == rest for rest in itertools.combinations(other, size))
        ),
        default=0,
    )


@relaxed
@given(
    st.lists(st.sampled_from(["ox", "cat", "sun"]), max_size=6), st.lists(st.sampled_from(["ox", "cat"]), max_size=6)
)
def test_rouge_l_recall(generation, reference):
    expected = slow_common_subsequence(generation, reference) / len(reference) if reference else 0.0
    assert metrics.rougeL_recall(" ".join(generation), " ".join(reference)) == pytest.approx(expected)


def test_rouge_l_recall_stems_and_ignores_case():
    assert metrics.rougeL_recall("He PAINTED lighthouses!", "he paints lighthouse") == 1.0
    assert metrics.rougeL_recall("", "he paints") == 0.0
    assert metrics.rougeL_recall("he paints", "") == 0.0
    assert metrics.rougeL_recall("a b c d e", "a x") == 0.5  # recall, not precision


def test_exact_match_is_up_to_case_punctuation_and_blanks():
    assert metrics.exact_match(" Born in  Tarnhollow", ["born in tarnhollow."]) == 1.0
    assert metrics.exact_match("in Tarnhollow", ["Born in Tarnhollow.", "In Tarnhollow."]) == 1.0
    assert metrics.exact_match("Born in Tarnhollow, perhaps", ["Born in Tarnhollow."]) == 0.0
    assert metrics.exact_match("C", ["C++"]) == 0.0
    assert metrics.exact_match("3.5", ["35"]) == 0.0
    assert metrics.exact_match("", ["..."]) == 0.0  # nothing said matches nothing


@relaxed
@given(hit_lists)
def test_exact_memorisation_and_extraction_strength(hits):
    length = len(hits)
    cut = next(k for k in range(length + 1) if all(hits[k:]))
    assert metrics.exact_memorisation(hits) == pytest.approx(sum(hits) / length)
    assert metrics.extraction_strength(hits) == pytest.approx(1 - cut / length)


@pytest.mark.parametrize(
    ("hits", "expected"), [([True], 1.0), ([False], 0.0), ([True, False], 0.0), ([False, True], 0.5)]
)
def test_extraction_strength_of_short_answers(hits, expected):
    assert metrics.extraction_strength(hits) == expected


def test_answers_without_tokens_have_no_memorisation():
    assert math.isnan(metrics.exact_memorisation([]))
    assert math.isnan(metrics.extraction_strength([]))


def slow_floor(hits):
    """Open-unlearning's loop, as it stands there: the cut stays at the last place where nothing matched."""
    for cut in range(len(hits)):
        if all(hits[cut:]):
            break
    return 1 - cut / len(hits)


@relaxed
@given(hit_lists)
def test_extraction_strength_with_a_floor(hits):
    assert metrics.extraction_strength_floor(hits) == pytest.approx(slow_floor(hits))


def test_extraction_strength_with_a_floor_at_the_edges():
    assert metrics.extraction_strength_floor([False]) == 1.0  # as in open-unlearning
    assert metrics.extraction_strength_floor([True, False]) == 0.5
    assert math.isnan(metrics.extraction_strength_floor([]))


@relaxed
@given(nlls, st.lists(nlls, min_size=1, max_size=5))
def test_truth_ratio_as_a_probability(paraphrased, perturbed):
    true, false = math.exp(-paraphrased), math.exp(-sum(perturbed) / len(perturbed))
    assert metrics.truth_ratio_probability(paraphrased, perturbed) == pytest.approx(true / (true + false), rel=1e-9)
    assert math.isnan(metrics.truth_ratio_probability(paraphrased, []))


@relaxed
@given(
    st.lists(st.sampled_from(["ox", "cat", "sun"]), max_size=6), st.lists(st.sampled_from(["ox", "cat"]), max_size=6)
)
def test_rouge_1_and_rouge_l_in_all_three_forms(generation, reference):
    common = {
        "rouge1": sum(min(generation.count(word), reference.count(word)) for word in {*generation, *reference}),
        "rougeL": slow_common_subsequence(generation, reference),
    }
    for kind, shared in common.items():
        precision = shared / len(generation) if generation else 0.0
        recall = shared / len(reference) if reference else 0.0
        f1 = 2 * precision * recall / (precision + recall) if shared else 0.0
        found = metrics.rouge(" ".join(generation), " ".join(reference), kind, stemmer=False)
        assert found == pytest.approx((precision, recall, f1))


def test_stemming_can_be_left_out():
    assert metrics.rouge("he paints", "he painted", stemmer=False).recall == 0.5
    assert metrics.rouge("he paints", "he painted").recall == 1.0


@relaxed
@given(st.lists(st.integers(0, 2), max_size=12), st.integers(1, 4))
def test_repetition(tokens, n):
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens)) if i + n <= len(tokens)]
    repeated = sum(gram in grams[:place] for place, gram in enumerate(grams))
    assert metrics.repetition(tokens, n) == pytest.approx(repeated / len(grams) if grams else 0.0)


def test_repetition_and_entropy_of_stammering_and_of_silence():
    assert metrics.repetition([7] * 103) == pytest.approx(0.99)
    assert metrics.token_entropy([7] * 103) == 0.0
    assert metrics.repetition([]) == metrics.token_entropy([]) == 0.0
    assert metrics.token_entropy([1, 2, 3, 4]) == pytest.approx(2.0)
    assert metrics.token_entropy([1, 1, 2, 2]) == pytest.approx(1.0)


@relaxed
@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=9))
def test_harmonic_mean(values):
    assert metrics.harmonic_mean(values) == pytest.approx(1 / np.mean([1 / value for value in values]))


def test_harmonic_mean_of_nothing_and_of_zero():
    assert metrics.harmonic_mean([0.5, 0.0, 0.9]) == 0.0
    with pytest.raises(ValueError, match="needs one or more non-negative values"):
        metrics.harmonic_mean([])
    with pytest.raises(ValueError, match="needs one or more non-negative values"):
        metrics.harmonic_mean([0.5, -0.1])


def slow_statistic(one, other):
    points = [*one, *other]
    return max(abs(sum(v <= x for v in one) / len(one) - sum(v <= x for v in other) / len(other)) for x in points)


def slow_p(one, other):
    """The exact p-value: the share of all ways to deal the ranks that give a statistic at least as large."""
    observed = slow_statistic(one, other)
    ranks = range(len(one) + len(other))
    deals = list(itertools.combinations(ranks, len(one)))
    return sum(slow_statistic(deal, [r for r in ranks if r not in deal]) >= observed - 1e-12 for deal in deals) / len(
        deals
    )


@pytest.mark.parametrize(("rows", "others"), [(4, 4), (5, 3), (2, 6), (1, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_forget_quality_is_the_exact_two_sample_test(rows, others, seed):
    generator = np.random.default_rng(seed)
    one, other = generator.normal(size=rows), generator.normal(0.5, size=others)
    quality = metrics.forget_quality(one, other)
    assert quality.statistic == pytest.approx(slow_statistic(one, other))
    assert quality.p == pytest.approx(slow_p(one.tolist(), other.tolist()))
    assert quality.rows == rows


@pytest.mark.parametrize(("rows", "steps"), [(5, 1), (300, 1), (300, 2), (400, 5)])
def test_forget_quality_of_nearly_equal_samples_is_one(rows, steps):
    sample = np.arange(rows, dtype=float)
    other = np.where(sample < steps, rows + sample, sample)  # scipy rounds these exact p-values to above 1, and warns
    quality = metrics.forget_quality(sample, other)
    assert quality.statistic == pytest.approx(steps / rows)
    assert quality.p == pytest.approx(1.0, abs=1e-12)


def test_forget_quality_of_equal_and_of_tied_samples():
    assert metrics.forget_quality([0.5, 0.7, 0.9], [0.5, 0.7, 0.9]) == (1.0, 0.0, 3)
    assert metrics.forget_quality([0.5] * 5, [0.5] * 5).p == 1.0
    assert metrics.forget_quality([0.1] * 300, [0.9] * 300).p < 1e-100
    assert metrics.forget_quality(np.linspace(0, 1, 300), np.linspace(0, 1, 199)).p > 0.99


def test_bootstrap_is_the_seeded_percentile_interval():
    values = np.random.default_rng(3).random(25)
    picks = np.random.default_rng(7)
    means = sorted(sum(values[i] for i in picks.integers(0, 25, size=25)) / 25 for _ in range(1000))
    mean, low, high = metrics.bootstrap(values, seed=7)
    assert mean == pytest.approx(values.mean(), rel=1e-12)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=1e-9)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=1e-9)
    assert metrics.bootstrap(values, seed=7) == (mean, low, high)
    assert metrics.bootstrap(values, seed=8) != (mean, low, high)


def test_bootstrap_of_ratios_and_of_one_row():
    mean, low, high = metrics.bootstrap([6.0, 1.0, 3.0], weights=[3, 1, 2], seed=0)
    assert mean == pytest.approx(10 / 6)
    assert low <= mean <= high
    assert metrics.bootstrap([0.3]) == (0.3, 0.3, 0.3)
    assert metrics.bootstrap([0.1] * 3)[1] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="at least one"):
        metrics.bootstrap([])
