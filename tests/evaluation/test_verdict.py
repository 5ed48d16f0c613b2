"""The verdict claims no more than its reference allows."""

from __future__ import annotations

import pytest

from evaluation_builders import made_results
from loku.evaluation.reference import load_reference
from loku.evaluation.verdict import verdict

FLUENT = {"repetition": 0.02, "token_entropy": 4.0}
TARGET = made_results("target", utility=0.7, probability=0.98, rougeL_recall=0.99, **FLUENT)
RETAIN_ONLY = load_reference(made_results("clean", utility=0.72, probability=0.44, rougeL_recall=0.5, **FLUENT))


def unlearned(**values):
    return made_results(**({"utility": 0.68, "probability": 0.45, "rougeL_recall": 0.5} | FLUENT | values))


def test_indistinguishable_names_the_reference_and_shows_utility_with_p():
    found = verdict(unlearned(p=0.4, rows=300), target=TARGET, reference=RETAIN_ONLY)
    assert found.level == "indistinguishable"
    assert "'clean'" in found.sentence
    assert "p = 0.4 on 300 forget rows, utility 97% of the target's" in found.sentence
    assert "'clean'" in found.rests_on
    assert "'target'" in found.rests_on
    assert "few" not in found.sentence


def test_few_rows_are_called_weak_evidence():
    found = verdict(unlearned(p=0.4, rows=40), target=TARGET, reference=RETAIN_ONLY)
    assert "40 rows are few: weak evidence" in found.sentence


def test_without_a_target_utility_is_compared_with_the_reference():
    found = verdict(unlearned(p=0.4), reference=RETAIN_ONLY)
    assert found.level == "indistinguishable"
    assert "of the retain-only model's" in found.sentence
    assert "target" not in found.rests_on


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"p": 0.049}, "can be told from"),
        ({"p": 0.01, "probability": 0.9}, "still knows more of the forget set than a model that never saw it"),
        ({"p": 0.4, "probability": 0.9}, "but other scores can: answer probability 0.90 against 0.44"),
        ({"p": 0.01, "probability": 0.1}, "which betrays a removal"),
        ({"p": 0.4, "utility": 0.6}, "lost too much of what had to stay"),
    ],
)
def test_distinguishable(values, part):
    found = verdict(unlearned(**values), target=TARGET, reference=RETAIN_ONLY)
    assert found.level == "distinguishable"
    assert part in found.sentence
    assert "'clean'" in found.sentence


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"repetition": 0.5}, "repeat themselves (50% of 4-grams, 2% in the retain-only model's)"),
        ({"token_entropy": 0.5}, "empty or monotonous (0.5 bits of token entropy, 4.0 in the retain-only model's)"),
    ],
)
def test_broken_answers_to_forget_questions_show_the_removal(values, part):
    found = verdict(unlearned(p=0.9, **values), target=TARGET, reference=RETAIN_ONLY)
    assert found.level == "distinguishable"
    assert "cannot be told by its truth ratios from" in found.sentence
    assert f"But the removal shows: its answers to the forget questions {'are ' if 'empty' in part else ''}{part}" in (
        found.sentence
    )


def test_a_broken_model_is_damaged_whatever_its_p():
    found = verdict(unlearned(p=0.9, utility=0.3), target=TARGET, reference=RETAIN_ONLY)
    assert found.level == "damaged"
    assert "its utility is 43% of the target's" in found.sentence
    assert "0.9" not in found.sentence
    broken, healthy = unlearned(p=0.9), made_results("target", utility=0.7, **FLUENT)
    broken.sets["retain"] = made_results(**(FLUENT | {"repetition": 0.6})).sets["forget"]
    healthy.sets["retain"] = healthy.sets["forget"]
    found = verdict(broken, target=healthy)
    assert found.level == "damaged"
    assert (
        "its answers to the retain questions repeat themselves (60% of 4-grams, 2% in the target's)" in found.sentence
    )


def test_damage_is_seen_without_a_reference_too():
    found = verdict(unlearned(utility=0.1), target=TARGET)
    assert found.level == "damaged"
    assert found.sentence.endswith("Indistinguishability not measured.")


def test_p_is_never_shown_without_utility():
    found = verdict(unlearned(p=0.9, utility=None), target=TARGET, reference=RETAIN_ONLY)
    assert found.level == "undecided"
    assert "0.9" not in found.sentence
    assert "utility was not measured" in found.sentence


def test_without_a_reference_suppression_is_all_that_is_claimed():
    found = verdict(unlearned(), target=TARGET)
    assert found.level == "suppressed"
    assert "suppressed; indistinguishability not measured" in found.sentence
    assert "answer probability 0.98 before, 0.45 after" in found.sentence
    assert "no retain-only reference" in found.rests_on


@pytest.mark.parametrize("values", [{"probability": 0.9}, {"rougeL_recall": 0.97}, {"probability": 0.98}])
def test_scores_that_did_not_fall_clearly_are_not_suppressed(values):
    found = verdict(unlearned(**values), target=TARGET)
    assert found.level == "not suppressed"
    assert "indistinguishability not measured" in found.sentence


def test_without_anything_to_compare_with_the_level_of_the_scores_decides():
    low, high = verdict(unlearned(rougeL_recall=0.4)), verdict(unlearned(probability=0.9))
    assert (low.level, high.level) == ("suppressed", "not suppressed")
    assert "suppressed; indistinguishability not measured" in low.sentence
    assert "rests on the level of the scores alone" in low.sentence
    assert "rests on the level of the scores alone" in high.sentence


def test_a_reference_without_forget_quality_is_not_what_the_verdict_rests_on():
    found = verdict(unlearned(), target=TARGET, reference=RETAIN_ONLY)
    assert found.level == "suppressed"
    assert "clean" not in found.rests_on


def test_without_a_forget_set_there_is_no_verdict():
    results = unlearned()
    results.sets = {"retain": results.sets["forget"]}
    assert verdict(results, target=TARGET, reference=RETAIN_ONLY) is None
