from __future__ import annotations

from collections.abc import Callable

import pytest

from loku.report.figures import (
    Value,
    beyond_retain_only,
    forget_quality_allowed,
    key_figures,
    read_forgetting,
    read_keeping,
    value_of,
)
from loku.report.numerals import count, duration, figure, memory, moment, percent
from loku.report.words import TONES, explanation, missing_pieces, not_claimed, release_note, verdict


@pytest.mark.parametrize(
    ("target", "unlearned", "aim", "sentence"),
    [
        (0.98, 0.71, 0.44, "50\N{THIN SPACE}% of the way to the retain-only level."),
        (0.98, 0.97, 0.44, "Hardly moved."),
        (0.90, 0.95, 0.44, "Moved away from the retain-only level."),
        (0.98, 0.30, 0.44, "Past the retain-only level by 0.140, which is no virtue."),
        (0.98, 0.445, 0.44, "At the retain-only level."),
        (0.55, 0.67, 0.79, "50\N{THIN SPACE}% of the way to the retain-only level."),
        (0.45, 0.10, 0.44, "Target and retain-only hardly differ here; unlearned is 0.340 away from both."),
        (None, 0.50, 0.44, "Above the retain-only level by 0.060."),
        (0.98, 0.30, None, "The retain-only level was not measured."),
    ],
)
def test_forgetting_is_read_against_the_retain_only_level(
    target: float | None, unlearned: float, aim: float | None, sentence: str
) -> None:
    found = {"target": target, "unlearned": unlearned, "retain_only": aim}
    values = {role: Value(mean) for role, mean in found.items() if mean is not None}
    assert read_forgetting(values)[1] == sentence


def test_inside_the_interval_counts_as_reached() -> None:
    values = {"target": Value(0.98), "unlearned": Value(0.50, 0.42, 0.58), "retain_only": Value(0.44)}
    assert read_forgetting(values) == ("\N{DOWNWARDS ARROW}", "At the retain-only level (inside the interval).")


def test_keeping_is_read_against_the_target() -> None:
    values = {"target": Value(0.8), "unlearned": Value(0.6)}
    assert read_keeping(values) == ("\N{DOWNWARDS ARROW}", "75\N{THIN SPACE}% of the target's.")
    assert read_keeping(values, higher_is_better=False)[1] == "0.75 times the target's."
    assert read_keeping({"unlearned": Value(0.6)})[1] == "The target was not measured."
    assert read_keeping({"target": Value(0.0), "unlearned": Value(0.6)})[1] == "The target has zero here."


def test_a_metric_is_explained_once(make_results: Callable[..., dict]) -> None:
    rows = [row for group in key_figures({"unlearned": make_results("loku")}) for row in group.rows]
    assert [bool(row.meaning) for row in rows if row.label == "Answer probability"] == [True, False, False, False]


def test_utility_and_fluency_allow_forget_quality(make_results: Callable[..., dict]) -> None:
    results = make_results("ga")
    assert forget_quality_allowed(results)
    del results["summary"]["model_utility"]
    assert forget_quality_allowed(results)  # the retain set's own figures show utility
    del results["sets"]["retain"]
    assert not forget_quality_allowed(results)
    assert not forget_quality_allowed(None)


def test_values() -> None:
    results = {"sets": {"forget": {"metrics": {"a": {"mean": 0.5, "low": 0.4, "high": 0.6}, "b": 0.25, "c": {}}}}}
    assert value_of(results, "forget", "a") == Value(0.5, 0.4, 0.6)
    assert value_of(results, "forget", "b") == Value(0.25)
    assert value_of(results, "forget", "c") is None
    assert value_of(None, "forget", "a") is None


@pytest.mark.parametrize("level", TONES)
def test_verdict_levels(level: str) -> None:
    found = verdict({"verdict": {"level": level, "sentence": "So it is.", "rests_on": "evidence"}})
    assert (found.level.lower(), found.sentence, found.rests_on, found.tone) == (
        level,
        "So it is.",
        "evidence",
        TONES[level],
    )


def test_unknown_and_absent_verdicts_stay_unmarked() -> None:
    assert verdict({"verdict": {"level": "undecided"}}).tone == "none"
    assert verdict({"verdict": None}).level == "No verdict"
    assert verdict(None).tone == "none"


def test_plain_words(make_results: Callable[..., dict]) -> None:
    results = {"target": make_results("target"), "unlearned": make_results("ga")}
    text = " ".join(explanation(results))
    assert "the model before unlearning gives the right answer a probability of 0.98 per token" in text
    assert "it stammers" in text
    assert "The aim is not zero" not in text  # nobody measured what it is
    claims = " ".join(not_claimed(None, results))
    assert "no guarantee" in claims
    assert "No retain-only model was measured" in claims
    assert "An adapter can be removed" in release_note({})
    assert "it is what is released" in release_note({"method": {"tune": "full"}})
    assert missing_pieces({}, {}, has_texts=True, has_curves=True)[0].startswith(
        "The unlearned model was not evaluated"
    )


def test_numerals() -> None:
    thin = "\N{THIN SPACE}"
    assert [figure(v) for v in (None, 0.0, 0.12345, 12.34, 12345.6, 1.2e-9, -0.5)] == [
        "\N{EN DASH}",
        "0.000",
        "0.123",
        "12.3",
        f"12{thin}346",
        "1.2e\N{MINUS SIGN}9",
        "\N{MINUS SIGN}0.500",
    ]
    assert count(1234567) == f"1{thin}234{thin}567"
    assert [percent(v) for v in (0.5, 0.05, 0.001, 0.0)] == [f"50{thin}%", f"5.0{thin}%", f"0.10{thin}%", f"0.0{thin}%"]
    assert [duration(v) for v in (3.21, 185, 7260)] == [f"3.2{thin}s", f"3{thin}min 05{thin}s", f"2{thin}h 01{thin}min"]
    assert [memory(v) for v in (12, 5 * 2**20, 3 * 2**30)] == [f"12{thin}B", f"5{thin}MiB", f"3.00{thin}GiB"]
    assert [f(None) for f in (count, percent, duration, memory)] == ["\N{EN DASH}"] * 4
    assert moment("2026-11-23T10:14:02+01:00") == "2026-11-23 09:14 UTC"
    assert moment("2026-11-23T10:14:02") == "2026-11-23 10:14"
    assert moment("yesterday") == "yesterday"
    assert moment(None) is None


def one_figure(mean: float, low: float, high: float, metric: str = "probability") -> dict:
    return {"sets": {"forget": {"metrics": {metric: {"mean": mean, "low": low, "high": high}}}}}


@pytest.mark.parametrize(
    ("unlearned", "retain_only", "beyond"),
    [
        ((0.05, 0.02, 0.08), (0.2, 0.15, 0.25), True),
        ((0.05, 0.02, 0.17), (0.2, 0.15, 0.25), False),  # the intervals overlap
        ((0.16, 0.15, 0.17), (0.2, 0.19, 0.21), False),  # apart, but by a trifle
        ((0.3, 0.28, 0.32), (0.2, 0.19, 0.21), False),  # it knows more
    ],
)
def test_knowing_less_than_the_retain_only_model_is_told(
    unlearned: tuple[float, ...], retain_only: tuple[float, ...], *, beyond: bool
) -> None:
    results = {"unlearned": one_figure(*unlearned), "retain_only": one_figure(*retain_only)}
    assert beyond_retain_only(results) == (["answer probability 0.05 (retain-only 0.20)"] if beyond else [])
    told = " ".join(explanation(results))
    assert ("Better than retain-only is no virtue here: answer probability 0.05" in told) is beyond
    del results["retain_only"]
    assert beyond_retain_only(results) == []


def test_more_of_another_figure_is_not_less_knowledge() -> None:
    results = {
        "unlearned": one_figure(0.0, 0.0, 0.0, "repetition"),
        "retain_only": one_figure(0.5, 0.4, 0.6, "repetition"),
    }
    assert beyond_retain_only(results) == []
