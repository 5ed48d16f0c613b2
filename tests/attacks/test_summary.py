"""The summary: the right figure is scored, over common rows, and a broken model is called broken."""

from __future__ import annotations

import pytest

from loku.attacks.robustness import robustness
from loku.attacks.summary import summarise


def result(values, retain=1.0, name="exact_match", **more):
    rows = [{"index": place, name: value, "rougeL_recall": value / 2} | more for place, value in enumerate(values)]
    return {"rows": rows, "beside": {"retain_exact_match": retain, "retain_rougeL_recall": retain, "repetition": 0.1}}


def results(unlearned, *, target=(1, 1, 1, 1), retain=1.0, attacked=None, name="exact_match"):
    plain = {"target": result(target), "unlearned": result(unlearned, retain), "retain_only": result([0, 0, 0, 0])}
    found = {"none": {"family": "none", "roles": plain}}
    if attacked is not None:
        family = "prompts" if name == "found" else "relearn"
        roles = {
            "target": result(target, name=name), "unlearned": result(attacked, retain, name=name),
            "retain_only": result([0, 0, 0, 0], name=name),
        }  # fmt: skip
        found["attack"] = {"family": family, "roles": roles}
    return found


def test_what_comes_back_is_the_headline():
    found = summarise(results([0, 0, 0, 0], attacked=[1, 1, 0, 1]))
    assert found["metric"] == "exact_match"
    assert found["attacks"]["none"]["score"]["score"] == 0
    attack = found["attacks"]["attack"]
    expected = robustness([1] * 4, [1, 1, 0, 1], [0] * 4)
    assert attack["score"] == attack["scores"]["exact_match"] == expected.to_json()
    assert attack["figures"]["unlearned"]["exact_match"]["mean"] == 0.75
    assert found["headline"]["level"] == "hidden"
    assert found["headline"]["worst"] == "attack"


def test_a_broken_model_does_not_pass_for_one_that_forgot():
    assert summarise(results([0, 0, 0, 0]))["headline"]["level"] == "gone"
    broken = summarise(results([0, 0, 0, 0], retain=0.3))
    assert broken["headline"]["level"] == "damaged"
    assert "30%" in broken["damaged"]
    assert broken["attacks"]["none"]["damaged"] == broken["damaged"]


def test_long_answers_are_scored_by_rouge():
    found = summarise(results([0, 0, 0, 0], target=(1, 0, 0, 0.8), attacked=[1, 0, 0, 0]))
    assert found["metric"] == found["attacks"]["attack"]["metric"] == "rougeL_recall"


def test_prompts_are_scored_by_whether_the_fact_is_found():
    found = summarise(results([0, 0, 0, 0], attacked=[0, 0, 0, 0], name="found"))
    assert found["attacks"]["attack"]["metric"] == "found"
    assert found["attacks"]["attack"]["score"]["score"] == 0


def test_only_common_rows_are_paired():
    given = results([0, 0, 0, 0], attacked=[1, 1, 0, 0])
    del given["attack"]["roles"]["target"]["rows"][3], given["attack"]["roles"]["retain_only"]["rows"][0]
    found = summarise(given)["attacks"]["attack"]
    assert found["rows"] == 2
    assert found["score"]["raw"] == pytest.approx(0.5)


def test_adapters_are_compared_with_the_plain_models_and_stay_out_of_the_headline():
    given = results([0, 0, 0, 0])
    given["adapter-0"] = {"family": "adapter", "roles": {"unlearned": result([1, 1, 1, 1])}}
    found = summarise(given)
    assert found["attacks"]["adapter-0"]["score"]["score"] == 1
    assert found["headline"]["level"] == "gone"


def test_a_probe_is_scored_on_the_layer_that_reads_the_target_best():
    given = results([0, 0, 0, 0])
    layers = {"target": (0.2, 0.9), "unlearned": (0.9, 0.5), "retain_only": (0.1, 0.1)}
    roles = {
        role: {"rows": [{"index": place, "layer_1": low, "layer_2": high} for place in range(4)]}
        for role, (low, high) in layers.items()
    }
    given["probe"] = {"family": "probe", "roles": roles}
    found = summarise(given)["attacks"]["probe"]
    assert found["metric"] == "layer_2"
    assert found["score"]["raw"] == pytest.approx(0.5)
    assert found["beside"]["unlearned"]["retain_exact_match"] == 1.0  # from the plain measurement


def test_without_a_retain_only_model_there_is_no_score():
    given = results([0, 0, 0, 0])
    del given["none"]["roles"]["retain_only"]
    found = summarise(given)
    assert found["attacks"]["none"]["score"]["score"] is None
    assert found["headline"]["level"] == "not measured"
    assert summarise({})["headline"]["level"] == "not measured"
