"""The forget level: the stopping rule, the distance, and the best measurement, against plain searches."""

from __future__ import annotations

import math
import random

import pytest

from loku.levels import Best, Level, best_of, best_rule, utility

QA = Level({"probability": 0.2, "exact_memorisation": 0.5}, ("probability", "exact_memorisation"), "test")
TEXT = Level({"probability": 0.1, "ma": 0.3, "el_10": 0.05}, ("ma", "el_10"), "test")


@pytest.mark.parametrize(
    ("forget", "reached"),
    [
        ({"probability": 0.2, "exact_memorisation": 0.5}, True),  # at the level counts
        ({"probability": 0.1, "exact_memorisation": 0.51}, False),
        ({"probability": 0.21, "exact_memorisation": 0.0}, False),
        ({"probability": 0.1}, False),  # a figure that is not finite is missing, and is no evidence
    ],
)
def test_rows_with_answers_are_forgotten_at_both_figures(forget, reached):
    assert QA.reached(forget) is reached


def test_texts_are_forgotten_below_both_figures_and_nothing_is_below_zero():
    assert TEXT.reached({"ma": 0.29, "el_10": 0.04})
    assert not TEXT.reached({"ma": 0.3, "el_10": 0.04})  # at the level is not below it
    assert not TEXT.reached({"ma": 0.29})
    assert TEXT.may_be_reached({"ma": 0.29})
    assert not TEXT.may_be_reached({"ma": 0.3})
    none = Level({"ma": 0.0, "el_10": 0.0}, ("ma", "el_10"), "test")
    assert none.reached({"ma": 0.0, "el_10": 0.0})


def test_the_distance_is_the_mean_absolute_difference_without_el():
    assert QA.distance({"probability": 0.1, "exact_memorisation": 0.8}) == pytest.approx((0.1 + 0.3) / 2)
    assert TEXT.distance({"probability": 0.2, "ma": 0.1, "el_10": 1.0}) == pytest.approx((0.1 + 0.2) / 2)
    assert TEXT.distance({"probability": 0.2}) == math.inf


def row(step, probability, kept, general=None):
    found = {"step": step, "forget": {"probability": probability, "exact_memorisation": probability}}
    found["retain"] = {"probability": kept}
    return found | ({} if general is None else {"general": {"probability": general}})


def test_utility_is_the_mean_over_the_sets_that_had_to_stay():
    assert utility(row(0, 1.0, 0.9, 0.5)) == pytest.approx(0.7)
    assert utility({"forget": {"probability": 1.0}}) is None


def test_the_best_measurement_is_the_nearest_that_kept_enough():
    curve = [row(0, 1.0, 1.0), row(5, 0.7, 0.99), row(10, 0.3, 0.97), row(15, 0.35, 0.98)]
    best = best_of(curve, QA, 0.98)
    assert (best.step, best.meets) == (15, True)
    assert best_of(curve, QA, 0.9).step == 10
    assert best_of(curve, QA, 0.995) == Best(15, pytest.approx(0.15), 0.98, meets=False)  # none: the last one
    assert best_of(curve[:1], QA, 0.98) is None  # the target is none to choose
    assert best_of([curve[0], row(5, 0.3, 1.0), row(10, 0.3, 1.0)], QA, 0.98).step == 5  # the first of equals


def test_the_best_measurement_is_that_of_a_search_through_all():
    generator = random.Random(3)
    for _ in range(200):
        curve = [row(0, 1.0, 0.9)]
        curve += [
            row(5 * i, generator.random(), generator.uniform(0.8, 0.95)) for i in range(1, generator.randint(2, 9))
        ]
        expected, nearest = None, math.inf
        for found in curve[1:]:
            apart = (abs(found["forget"]["probability"] - 0.2) + abs(found["forget"]["probability"] - 0.5)) / 2
            if found["retain"]["probability"] >= 0.98 * 0.9 and apart < nearest:
                expected, nearest = found["step"], apart
        best = best_of(curve, QA, 0.98)
        assert best.meets is (expected is not None)
        assert best.step == (expected if expected is not None else curve[-1]["step"])


def test_the_rules_are_told_in_words():
    assert QA.describe() == "probability <= 0.2 and exact_memorisation <= 0.5 (test)"
    assert TEXT.describe() == "ma < 0.3 and el_10 < 0.05 (test)"
    assert best_rule(TEXT, 0.98) == (
        "least mean distance of forget probability, ma from their level (test), with utility >= 98% of the target's"
    )
