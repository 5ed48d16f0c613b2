"""Retain-only references: results, folders, official logs, and what they may be compared with."""

from __future__ import annotations

import dataclasses
import json

import pytest

from evaluation_builders import made_results, small_log
from loku.data.records import Record
from loku.errors import InputError
from loku.evaluation.logs import LOG_KEYS
from loku.evaluation.reference import check_reference, load_reference, reference_quality
from loku.evaluation.results import read_results, write_results
from loku.files import sha256_file

SHA = "ab" * 32  # of the forget data in the hand-made results


def rows(answers):
    return [Record(place, question="Who?", answer=answer) for place, answer in enumerate(answers)]


def test_a_results_file_or_its_folder_is_a_reference(tmp_path):
    path = write_results(made_results("retain90", ratios=[0.5, 0.7], utility=0.6), tmp_path)
    for source in (path, tmp_path, str(tmp_path)):
        reference = load_reference(source)
        assert reference.truth_ratios == {0: 0.5, 1: 0.7}
        assert reference.to_json() == {"name": "retain90", "kind": "retain-only", "sha256": sha256_file(path)}
        assert reference.summary_value("model_utility") == 0.6
    assert load_reference(reference) is reference


def test_results_in_memory_have_the_hash_of_the_file_that_they_become(tmp_path):
    results = made_results("retain90", ratios=[0.5], probability=0.4, p=0.3)
    reference = load_reference(results)
    assert reference.results is results
    path = write_results(results, tmp_path)
    assert reference.sha256 == sha256_file(path) == load_reference(path).sha256
    assert load_reference(path).path == path
    assert load_reference(read_results(path)).sha256 == reference.sha256
    results.seconds = 9.0
    assert load_reference(results).sha256 != reference.sha256


def test_in_a_run_folder_the_unlearned_results_are_never_the_reference(tmp_path):
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    write_results(made_results("unlearned"), tmp_path)
    write_results(made_results("target"), tmp_path, role="target")
    with pytest.raises(InputError, match=r"is an unlearning run: .*\nEvaluate the retain-only model with"):
        load_reference(tmp_path)
    write_results(made_results("retain-only"), tmp_path, role="retain_only")
    assert load_reference(tmp_path).name == "retain-only"


def test_an_official_log_is_a_reference(tmp_path):
    path = tmp_path / "phi_retain90.eval_log_aggregated.json"
    path.write_text(json.dumps(small_log(rows=2)), encoding="utf-8")
    reference = load_reference(path)
    assert reference.name == "phi_retain90"
    assert reference.answers == ("a0 is a poet", "a1 is a poet")
    assert reference.summary_value("model_utility") > 0
    path.write_text(json.dumps({LOG_KEYS["forget"]: small_log()[LOG_KEYS["forget"]]}), encoding="utf-8")
    assert load_reference(path).summary_value("model_utility") is None


def test_a_log_with_unusable_values_is_refused(tmp_path):
    path = tmp_path / "log.json"
    for name, metric, value in (
        ("eval_log_forget.json", "avg_paraphrased_loss", "low"),
        ("eval_log_forget.json", "rougeL_recall", -1.0),
    ):
        log = small_log(rows=2)
        log[name][metric]["1"] = value
        path.write_text(json.dumps(log), encoding="utf-8")
        with pytest.raises(InputError, match=rf"The metric '{metric}' of '.*' holds values .*\nGive an eval_log"):
            load_reference(path)
    log = small_log(rows=2)  # a set that only utility needs: forget quality can be measured without
    log["eval_log.json"]["rougeL_recall"]["1"] = -1.0
    path.write_text(json.dumps(log), encoding="utf-8")
    assert load_reference(path).summary_value("model_utility") is None


def test_missing_references(tmp_path):
    with pytest.raises(InputError, match=r"no reference '.*absent'\.\nGive the results\.json of the retain-only model"):
        load_reference(tmp_path / "absent")
    with pytest.raises(InputError, match=r"folder '.*' holds no results\.json\.\nGive the results\.json of"):
        load_reference(tmp_path)


def test_a_reference_measured_on_other_data_or_rows_is_refused():
    reference = load_reference(made_results("retain90", ratios=[0.5, 0.7]))
    assert check_reference(reference, rows(["x", "y"]), SHA) == []
    with pytest.raises(
        InputError, match=r"'retain90' was measured on other forget data \(sha256 abab.* there, cdcd.* here"
    ):
        check_reference(reference, rows(["x", "y"]), "cd" * 32)
    sentence = r"measured on 2 forget rows, and they are not the 1 rows of this evaluation\.\nEvaluate the retain-only"
    with pytest.raises(InputError, match=sentence):
        check_reference(reference, rows(["x"]), SHA)
    with pytest.raises(InputError, match="not the 2 rows of this evaluation"):
        check_reference(reference, [Record(5, question="?", answer="x"), Record(6, question="?", answer="y")], SHA)


def test_a_log_of_other_questions_is_compared_with_a_warning(tmp_path):
    path = tmp_path / "log.json"
    path.write_text(json.dumps(small_log(rows=2)), encoding="utf-8")
    reference = load_reference(path)
    assert check_reference(reference, rows(["a0 is  a poet", "a1 is a poet"]), SHA) == []
    (warning,) = check_reference(reference, rows(["a0 is a poet", "b1 is a poet"]), SHA)
    assert "not the same questions: 1 of 2 answers differ from the log 'log'" in warning
    (warning,) = check_reference(reference, rows(["a0 is a poet"]), SHA)
    assert "1 rows here, 2 in the log 'log'" in warning
    log = small_log(rows=1)
    del log[LOG_KEYS["forget"]]["generated_text"]
    path.write_text(json.dumps(log), encoding="utf-8")
    (warning,) = check_reference(load_reference(path), rows(["a0 is a poet"]), SHA)
    assert "lacks texts" in warning


def test_a_log_that_lacks_the_texts_of_a_row_is_compared_with_a_warning(tmp_path):
    reference = dataclasses.replace(
        load_reference(write_log(tmp_path, rows=3)), answers=("a0 is a poet", "a1 is a poet")
    )
    (warning,) = check_reference(reference, rows(["a0 is a poet", "a1 is a poet", "a2 is a poet"]), SHA)
    assert "lacks texts" in warning


def write_log(folder, **more):
    path = folder / "log.json"
    path.write_text(json.dumps(small_log(**more)), encoding="utf-8")
    return path


def test_forget_quality_needs_ratios_on_both_sides():
    reference = load_reference(made_results(ratios=[0.5, 0.7, 0.9]))
    assert reference_quality(reference, [0.5, 0.7, 0.9]).p == 1.0
    assert reference_quality(reference, []) is None
    assert reference_quality(load_reference(made_results()), [0.5]) is None
    assert reference_quality(None, [0.5]) is None
