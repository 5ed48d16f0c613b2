"""The results file: written, read back, refused."""

from __future__ import annotations

import json

import pytest

from evaluation_builders import made_results
from loku.errors import InputError
from loku.evaluation.results import read_results, write_results


def test_results_survive_the_file(tmp_path):
    results = made_results(probability=0.4, truth_ratio=0.6, ratios=[0.5, 0.7], p=0.3)
    results.verdict = {"level": "suppressed", "sentence": "…", "rests_on": "nothing"}
    results.warnings = ["mind the gap"]
    path = write_results(results, tmp_path / "run")
    assert path.name == "results.json"
    assert read_results(path) == results
    value = json.loads(path.read_text(encoding="utf-8"))
    assert value["schema_version"] == 1
    assert value["sets"]["forget"]["metrics"]["probability"] == pytest.approx({"mean": 0.4, "low": 0.38, "high": 0.42})
    assert value["sets"]["forget"]["per_example"][1] == {"index": 1, "truth_ratio": 0.7}
    assert not {"texts", "examples"} & set(value)


def test_texts_stand_beside_and_never_in_the_results(tmp_path):
    results = made_results()
    results.texts = [
        {"set": "forget", "index": 0, "question": "Wer?", "answer": "Jörg\u2028K.", "generation": "secret"}
    ]
    path = write_results(results, tmp_path, role="target")
    assert path.name == "results.target.json"
    assert "secret" not in path.read_text(encoding="utf-8")
    lines = (tmp_path / "examples.target.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines if line] == results.texts
    assert read_results(path).texts == []


def test_texts_of_an_earlier_evaluation_do_not_stay(tmp_path):
    results = made_results()
    results.texts = [{"set": "forget", "index": 0}]
    write_results(results, tmp_path)
    results.texts = []
    write_results(results, tmp_path)
    assert not (tmp_path / "examples.jsonl").exists()


def test_nan_is_not_written(tmp_path):
    results = made_results(utility=float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        write_results(results, tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(InputError, match=r"no results file '.*absent\.json'\.\nGive a results\.json written by"):
        read_results(tmp_path / "absent.json")
    path = tmp_path / "results.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"'.*results\.json' is not readable JSON .*\nRestore the file"):
        read_results(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"is not a results file: it has no 'sets'\.\nGive a results\.json written by"):
        read_results(path)


def changed(tmp_path, change):
    path = write_results(made_results(probability=0.5, ratios=[0.5]), tmp_path)
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda v: v.update(schema_version=9),
            r"has schema_version 9; this version of loku reads 1\.\nRun the evaluation",
        ),
        (lambda v: v.update(suite="muse9"), r"is of suite 'muse9'\.\nGive one of: tofu, own, .*, rwku, utility\."),
        (lambda v: v.pop("summary"), r"has no usable 'summary'\.\nRestore the file"),
        (lambda v: v.update(data=3), r"has no usable 'data'\.\nRestore the file"),
        (lambda v: v["sets"]["forget"].pop("per_example"), r": forget' has no usable 'per_example'\.\nRestore"),
        (lambda v: v["sets"].update(forget=1), r": forget' has no usable 'metrics'\.\nRestore"),
        (lambda v: v["sets"]["forget"]["metrics"].update(probability=1), r"no usable numbers for 'probability'\.\nRes"),
        (lambda v: v["data"].update(forget="f.jsonl"), r"has no usable 'forget'\.\nRestore"),
        (lambda v: v["summary"].update(model_utility="high"), r"has no usable number for 'model_utility'\.\nRestore"),
        (
            lambda v: v["sets"]["forget"]["per_example"][0].update(truth_ratio="low"),
            r"has a row without usable numbers\.\nRestore",
        ),
        (lambda v: v["sets"]["forget"]["per_example"][0].pop("index"), r"has a row without usable numbers\.\nRestore"),
        (lambda v: v["sets"]["forget"]["per_example"].append(3), r"has a row without usable numbers\.\nRestore"),
    ],
)
def test_unusable_parts_are_named(tmp_path, change, sentence):
    with pytest.raises(InputError, match=sentence):
        read_results(changed(tmp_path, change))
