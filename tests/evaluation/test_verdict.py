"""The verdict claims no more than its reference allows."""

from __future__ import annotations

import dataclasses

import pytest

from evaluation_builders import made_results
from loku.evaluation.reference import load_reference
from loku.evaluation.results import SetResults
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
    assert found.sentence == (
        "The truth ratios on the forget set cannot be told from those of the retain-only model 'clean' (forget quality "
        "p = 0.9 on 40 forget rows, utility 97% of the target's), but the model shows the removal: its answers to the "
        f"forget questions {'are ' if 'empty' in part else ''}{part}. 40 rows are few: weak evidence."
    )


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ({"p": 0.01}, "The model can be told from the retain-only model 'clean' (forget quality p = 0.01 on 40 forget"),
        (
            {"p": 0.4, "probability": 0.1},
            "The truth ratios on the forget set cannot be told from those of the retain-only model 'clean' (forget "
            "quality p = 0.4 on 40 forget rows, utility 97% of the target's), but other scores can: answer probability "
            "0.10 against 0.44. It knows less of the forget set than a model that never saw it, which betrays a "
            "removal.",
        ),
        (
            {"p": 0.4, "utility": 0.6},
            "The truth ratios on the forget set cannot be told from those of the retain-only model 'clean', but the "
            "model lost too much of what had to stay (forget quality p = 0.4 on 40 forget rows, utility 86% of the "
            "target's).",
        ),
        ({"p": 0.4, "utility": None}, "Compared with the retain-only model 'clean', but utility was not measured ("),
        ({"p": None}, "The forget set is suppressed; indistinguishability not measured ("),
    ],
)
def test_broken_answers_are_said_in_a_sentence_of_their_own_beside_other_findings(values, start):
    found, broken = (
        verdict(unlearned(**(values | more)), target=TARGET, reference=RETAIN_ONLY)
        for more in ({}, {"repetition": 0.5})
    )
    told = (
        " The model shows the removal: its answers to the forget questions repeat themselves (50% of 4-grams, 2% in "
        "the retain-only model's)."
    )
    assert found.sentence.startswith(start)
    assert broken.level == found.level
    assert broken.sentence.replace(told, "", 1) == found.sentence != broken.sentence


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


def test_a_reference_without_forget_quality_is_named_for_what_it_served():
    found = verdict(unlearned(), target=TARGET, reference=RETAIN_ONLY)
    assert found.level == "suppressed"
    assert found.rests_on == (
        f"the retain-only model 'clean' (sha256 {RETAIN_ONLY.sha256[:12]}; for damage alone: forget quality needs "
        "perturbed answers on both sides), the target 'target' before unlearning"
    )


def test_a_utility_of_zero_was_measured_but_has_no_shares():
    def sentence(target, reference, **values):
        found = verdict(unlearned(p=0.9, **values), target=target, reference=load_reference(reference))
        return found.level, found.sentence

    none, healthy = (
        made_results("m", utility=value, probability=0.45, rougeL_recall=0.5, **FLUENT) for value in (0, 0.7)
    )
    unmeasured = made_results("m", utility=None, probability=0.45, rougeL_recall=0.5, **FLUENT)
    level, told = sentence(none, healthy)
    assert level == "indistinguishable"
    assert "utility 97% of the retain-only model's" in told
    level, told = sentence(none, none)
    assert level == "undecided"
    assert "there is no utility to compare with (the target's and the retain-only model's are 0), and forget" in told
    assert "there is no utility to compare with (the target's is 0)" in sentence(none, unmeasured)[1]
    assert "utility was measured of neither the target nor the retain-only model" in sentence(None, unmeasured)[1]
    assert sentence(healthy, healthy, utility=0)[0] == "damaged"


def test_without_a_forget_set_there_is_no_verdict():
    results = unlearned()
    results.sets = {"retain": results.sets["forget"]}
    assert verdict(results, target=TARGET, reference=RETAIN_ONLY) is None


@pytest.mark.parametrize("change", ["sha256", "rows", "sets", "suite"])
def test_utilities_of_other_rows_are_not_compared(change):
    """The same model, measured on other rows to keep, is not damaged."""

    def measured(name, utility):
        found = made_results(name, utility=utility, probability=0.45, rougeL_recall=0.5, p=0.4, **FLUENT)
        found.sets["retain"] = SetResults(8, {}, [])
        found.data["retain"] = {"name": "r.jsonl", "sha256": "cd" * 32, "rows": 8}
        return found

    target, ours = measured("target", 0.7), measured("unlearned", 0.1)
    assert verdict(ours, target=target).level == "damaged"
    match change:
        case "sha256":
            ours.data["retain"]["sha256"] = "ef" * 32
        case "rows":
            ours.sets["retain"] = SetResults(4, {}, [])
        case "sets":
            ours.sets["general"] = ours.sets.pop("retain")
        case "suite":
            ours = dataclasses.replace(ours, suite="tofu")
    assert verdict(ours, target=target).level == "not suppressed"
    found = verdict(ours, target=target, reference=load_reference(made_results("clean", utility=None, **FLUENT)))
    assert found.level == "undecided"
    assert "utility was measured there on other rows (or sets) than here" in found.sentence
