"""The report's section on attacks: every attack with a row, curves of the three models, and what was not run."""

from __future__ import annotations

import math

from loku.report.attacks import attack_section, relearning_chart


def document():
    figure = {"mean": 0.5, "low": 0.25, "high": 0.75}
    score = {"score": 0.4, "low": 0.2, "high": 0.6, "raw": 0.4, "gap": 0.9, "reason": None}
    none = {"score": None, "low": None, "high": None, "raw": None, "gap": 0.0, "reason": "it cannot tell"}
    roles = ("target", "unlearned", "retain_only")
    curve = {"steps": [0, 5], "means": {"rest": {"exact_match": [0.0, 0.5]}}, "losses": []}
    figures = {role: {"exact_match": figure, "depth": figure} for role in roles}
    beside = {"unlearned": {"retain_exact_match": 0.9, "repetition": 0.1, "output_nll": 2.0}}
    return {
        "schema_version": 1,
        "attacks": {"relearn-full": {"family": "relearn", "roles": {role: {"curve": curve} for role in roles}}},
        "missing": {"adapter-0": "there is no adapter"},
        "failed": {"lens (target)": "no <norm>"},
        "summary": {
            "metric": "exact_match", "headline": {"level": "hidden", "sentence": "It comes back."},
            "attacks": {
                "relearn-full": {"metric": "exact_match", "figures": figures, "score": score, "beside": beside},
                "prompt-cloze": {
                    "metric": "exact_match", "figures": figures, "score": none, "beside": beside, "damaged": "it is",
                },
                "membership": {
                    "beside": beside, "membership": {"mia_auc": {"auc": dict.fromkeys(roles, 0.6), "score": score}},
                },
            },
        },
    }  # fmt: skip


def test_every_attack_has_a_row():
    found = attack_section(document())
    rows = {row.name: row for row in found["rows"]}
    assert list(rows) == ["relearn-full", "prompt-cloze", "mia_auc"]
    assert rows["relearn-full"].score.text == "0.400"
    assert rows["relearn-full"].retain == 0.9
    assert rows["relearn-full"].perplexity == math.exp(2.0)
    assert rows["prompt-cloze"].score is None
    assert rows["prompt-cloze"].note == "cannot tell"
    assert rows["prompt-cloze"].damaged == "it is"
    assert rows["mia_auc"].metric == "AUC"
    assert found["missing"] == [("adapter-0", "there is no adapter"), ("lens (target)", "no <norm>")]
    assert len(found["charts"]) == 1
    assert "unlearned 0.00 to 0.50" in found["charts"][0].caption


def test_without_attacks_there_is_no_section():
    assert attack_section(None) is None
    assert attack_section({"summary": {}}) is None


def test_a_damaged_file_does_not_break_the_report():
    broken = document()
    broken["attacks"] = {"relearn-full": {"roles": {"target": {"curve": {"steps": [0], "means": {}}}}}}
    broken["summary"]["attacks"]["relearn-full"]["figures"] = "x"
    found = attack_section(broken)
    assert found["charts"] == []
    assert [row.name for row in found["rows"]] == ["prompt-cloze", "mia_auc"]


def test_the_chart_has_a_line_for_each_model():
    points = {"target": [(0, 1.0), (20, 1.0)], "unlearned": [(0, 0.0), (20, 0.5)], "retain_only": [(0, 0.0), (20, 0.0)]}
    chart = relearning_chart(points, "relearn-lora", "fine-tuned with LoRA", "exact_match")
    for role in ("target", "unlearned", "retain-only"):
        assert f"var(--{role})" in chart.svg
    assert "target 1.00 to 1.00; unlearned 0.00 to 0.50; retain-only 0.00 to 0.00." in chart.caption
