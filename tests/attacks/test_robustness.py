"""The robustness score: 0 at the retain-only model, 1 at the target, with a paired interval, or none at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loku.attacks.robustness import Score, auc_score, damage, headline, robustness
from loku.evaluation.membership import membership_auc


def reference(target, unlearned, retain_only, seed=42, resamples=1000):
    """Slow float64 reference: ratio of means, resampled row by row."""
    means = [sum(x) / len(x) for x in (target, unlearned, retain_only)]
    picks = np.random.default_rng(seed).integers(0, len(target), size=(resamples, len(target)))
    ratios = []
    for pick in picks:
        t, u, r = (sum(x[i] for i in pick) / len(pick) for x in (target, unlearned, retain_only))
        if t > r:
            ratios.append(min(2.0, max(-1.0, (u - r) / (t - r))))
    low, high = (min(1.0, max(0.0, q)) for q in np.quantile(ratios, [0.025, 0.975]))
    return (means[1] - means[2]) / (means[0] - means[2]), low, high


def test_it_is_the_share_of_the_gap_with_a_paired_interval():
    draw = np.random.default_rng(0)
    target, unlearned, retain = draw.uniform(0.6, 1, 25), draw.uniform(0, 1, 25), draw.uniform(0, 0.3, 25)
    found = robustness(target, unlearned, retain)
    raw, low, high = reference(list(target), list(unlearned), list(retain))
    assert (found.score, found.raw) == (pytest.approx(raw), pytest.approx(raw))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.gap == pytest.approx(target.mean() - retain.mean())
    assert found.low < found.score < found.high


def test_the_ends_of_the_scale():
    target, retain = [1.0] * 8, [0.0] * 8
    assert robustness(target, retain, retain)[:3] == (0, 0, 0)
    assert robustness(target, target, retain)[:3] == (1, 1, 1)


def test_beyond_the_ends_is_clipped_and_the_raw_ratio_said():
    over = robustness([0.8] * 4, [1.0] * 4, [0.0] * 4)
    under = robustness([0.8] * 4, [0.1] * 4, [0.2] * 4)
    assert (over.score, over.raw) == (1.0, pytest.approx(1.25))
    assert (under.score, under.raw) == (0.0, pytest.approx(-1 / 6))


@pytest.mark.parametrize(
    ("target", "retain"),
    [([0.5] * 6, [0.5] * 6), ([0.0] * 6, [1.0] * 6), ([0.53] * 6, [0.5] * 6), ([1, 0, 0, 0], [0, 0, 0, 0])],
)
def test_there_is_no_score_where_target_and_retain_only_do_not_differ(target, retain):
    found = robustness(target, target, retain)
    assert found[:4] == (None, None, None, None)
    assert "cannot tell" in found.reason


def test_rows_must_match():
    for rows in (([], [], []), ([1.0], [1.0, 0.0], [0.0])):
        with pytest.raises(ValueError, match="robustness got"):
            robustness(*rows)


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=12))
def test_the_interval_holds_the_score_and_stays_in_range(rows):
    found = robustness(*zip(*rows, strict=True), resamples=50)
    if found.score is not None:
        assert 0 <= found.low <= found.score <= found.high <= 1


def test_auc_scores_are_distances_from_the_retain_only_models():
    draw = np.random.default_rng(1)
    others = [draw.normal(size=17) for _ in range(3)]
    members = [draw.normal(shift, size=12).round(1) for shift in (-2.5, -1.0, 0.0)]
    others = [item.round(1) for item in others]  # with ties
    score, aucs = auc_score(members, others)
    assert aucs == pytest.approx([membership_auc(m, o) for m, o in zip(members, others, strict=True)])
    assert score.raw == pytest.approx(abs(aucs[1] - aucs[2]) / abs(aucs[0] - aucs[2]))
    pushed, aucs = auc_score([members[0], -members[0], members[2]], [others[0], -others[0], others[2]])
    assert aucs[1] < aucs[2]  # less familiar than to a model that never saw them
    assert pushed.score > 0.4


def test_auc_intervals_are_those_of_resampled_rows():
    members, others = [[0.0, 1.0, 2.0], [1.0, 2.0, 2.5], [3.0, 1.5, 2.0]], [[2.0, 3.0], [2.0, 3.0], [2.0, 1.0]]
    score, _ = auc_score(members, others, seed=3, resamples=400)
    generator = np.random.default_rng(3)
    picks = [generator.integers(0, size, size=(400, size)) for size in (3, 2)]
    ratios, gaps = [], []
    for ours, theirs in zip(*picks, strict=True):
        auc = [membership_auc(np.array(m)[ours], np.array(o)[theirs]) for m, o in zip(members, others, strict=True)]
        gaps.append(abs(auc[0] - auc[2]))
        if gaps[-1] > 0:
            ratios.append(min(2.0, abs(auc[1] - auc[2]) / gaps[-1]))
    if score.score is None:
        assert np.quantile(gaps, 0.025) <= 0
    else:
        assert score.low == pytest.approx(min(1.0, np.quantile(ratios, 0.025)))


@pytest.mark.parametrize(
    ("retain", "said"),
    [
        ({"target": 1.0, "unlearned": 0.79}, "keeps 79%"),
        ({"target": 1.0, "unlearned": 0.8}, None),
        ({"target": 0.0, "unlearned": 0.0}, None),
        ({"unlearned": 0.1}, None),
        ({}, None),
    ],
)
def test_damage_is_a_lost_retain_set(retain, said):
    found = damage(retain)
    assert (found is None) if said is None else (said in found)


def made(score, low, high):
    return Score(score, low, high, score, 1.0)


NONE = Score(None, None, None, None, 0.0, "cannot tell")


@pytest.mark.parametrize(
    ("scores", "membership", "damaged", "level", "worst"),
    [
        ({}, {}, None, "not measured", None),
        ({"a": NONE}, {}, None, "not measured", None),
        ({"a": made(0.0, 0.0, 0.0), "b": NONE}, {}, None, "gone", "a"),
        ({"a": made(0.0, 0.0, 0.0)}, {}, "it keeps 3%", "damaged", "a"),
        ({"a": made(0.0, 0.0, 0.0), "b": made(0.5, 0.3, 0.7)}, {}, None, "hidden", "b"),
        ({"b": made(0.5, 0.3, 0.7)}, {}, "it keeps 3%", "hidden", "b"),
        ({"a": made(0.2, 0.05, 0.4)}, {}, None, "unclear", "a"),
        ({"a": made(0.0, 0.0, 0.0)}, {"m": made(0.8, 0.5, 1.0)}, None, "visible", "a"),
        ({"a": made(0.0, 0.0, 0.0)}, {"m": made(0.2, 0.0, 0.4)}, None, "unclear", "a"),
        ({"a": made(0.3, 0.1, 0.4), "b": made(0.3, 0.2, 0.4)}, {}, None, "hidden", "b"),
    ],
)
def test_the_headline_is_the_worst_case(scores, membership, damaged, level, worst):
    found = headline(scores, membership, damaged)
    assert (found.level, found.worst) == (level, worst)
    assert found.worst_membership == ("m" if membership else None)
    assert set(found.to_json()) == {"level", "sentence", "worst", "score", "worst_membership"}
