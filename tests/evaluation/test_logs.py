"""Official TOFU logs: hand-made ones for the errors and warnings, the published ones for the numbers."""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path

import pytest

from evaluation_builders import small_log
from loku.errors import InputError
from loku.evaluation.log_figures import evaluate_logs
from loku.evaluation.logs import LOG_KEYS

KEYS = {
    "model_utility",
    "model_utility_arithmetic",
    "forget_quality",
    "ks_statistic",
    "forget_quality_rows",
    "sets",
    "warnings",
}


def written(folder, name, value):
    path = Path(folder) / name
    data = json.dumps(value).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def test_values_of_a_small_log_by_hand(tmp_path):
    found = evaluate_logs(written(tmp_path, "a.json", small_log(rows=1)))
    assert set(found) == KEYS
    retain, authors, forget = (found["sets"][name] for name in ("retain", "real_authors", "forget"))
    p, ratio = math.exp(-0.1), math.exp(0.5 - 1.5)
    arithmetic = (math.exp(-1.0) + math.exp(-2.0)) / 2 / math.exp(-0.5)
    assert retain["probability"] == pytest.approx(p)
    assert authors["probability"] == pytest.approx(p / (p + math.exp(-1.0) + math.exp(-2.0)))
    assert retain["truth_ratio"] == pytest.approx(1 - ratio)
    assert retain["truth_ratio_arithmetic"] == pytest.approx(1 - arithmetic)
    assert forget["truth_ratio"] == pytest.approx(ratio)
    assert forget["rows"] == 1
    nine = [p, 0.5, 1 - ratio] + 2 * [authors["probability"], 0.5, 1 - ratio]
    assert found["model_utility"] == pytest.approx(9 / sum(1 / value for value in nine))
    assert found["forget_quality"] is found["ks_statistic"] is found["forget_quality_rows"] is None
    assert found["warnings"] == []


def test_gzip_and_plain_files_are_the_same_and_rows_are_numbered_not_spelled(tmp_path):
    log = small_log(rows=12)
    shuffled = {key: {m: dict(sorted(v.items())) for m, v in part.items()} for key, part in log.items()}
    one = evaluate_logs(written(tmp_path, "a.json", log), retain_logs=written(tmp_path, "b.json.gz", shuffled))
    assert one["forget_quality"] == 1.0
    assert one["forget_quality_rows"] == 12
    assert one["warnings"] == []


def test_a_retain_log_needs_only_the_forget_set(tmp_path):
    log = small_log()
    retain = written(tmp_path, "b.json", {LOG_KEYS["forget"]: log[LOG_KEYS["forget"]]})
    assert evaluate_logs(written(tmp_path, "a.json", log), retain_logs=retain)["ks_statistic"] == 0.0


def test_other_prompt_tags_and_cleaned_blanks_are_the_same_questions(tmp_path):
    ours, theirs = small_log(), small_log(tag="[INST] {} [/INST]")
    theirs[LOG_KEYS["forget"]]["generated_text"]["1"][2] = "a1 is  a poet "
    found = evaluate_logs(written(tmp_path, "a.json", ours), retain_logs=written(tmp_path, "b.json", theirs))
    assert found["warnings"] == []


@pytest.mark.parametrize("place", [0, 2])
def test_other_questions_or_answers_are_compared_with_a_warning(tmp_path, place):
    ours, theirs = small_log(), small_log()
    theirs[LOG_KEYS["forget"]]["generated_text"]["2"][place] = "Question: Something else?\n"
    found = evaluate_logs(written(tmp_path, "a.json", ours), retain_logs=written(tmp_path, "b.json", theirs))
    assert found["forget_quality"] == 1.0
    (warning,) = found["warnings"]
    assert "not the same questions" in warning
    assert "of 4 differ" in warning


def test_other_numbers_of_rows_are_compared_with_a_warning(tmp_path):
    ours, theirs = written(tmp_path, "a.json", small_log(rows=4)), written(tmp_path, "b.json", small_log(rows=3))
    found = evaluate_logs(ours, retain_logs=theirs)
    (warning,) = found["warnings"]
    assert "not the same questions: 4 rows here, 3 in the retain-only log" in warning
    assert found["forget_quality_rows"] == 4


def test_logs_without_texts_say_that_nothing_was_checked(tmp_path):
    log = small_log()
    del log[LOG_KEYS["forget"]]["generated_text"]
    path = written(tmp_path, "a.json", log)
    assert "could not be checked" in evaluate_logs(path, retain_logs=path)["warnings"][0]


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(InputError, match=r"no log file '.*absent\.json'\.\nGive an eval_log_aggregated\.json"):
        evaluate_logs(tmp_path / "absent.json")
    path = tmp_path / "bad.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"'.*bad\.json' is not readable JSON .*\nGive an eval_log_aggregated"):
        evaluate_logs(path)
    cut = written(tmp_path, "cut.json.gz", small_log())
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"cut\.json\.gz' is not readable JSON"):
        evaluate_logs(cut)
    with pytest.raises(InputError, match=r"holds a list, not a JSON object\.\nGive an eval_log"):
        evaluate_logs(written(tmp_path, "list.json", [1]))


def test_a_missing_set_or_metric_is_named(tmp_path):
    log = small_log()
    del log["eval_real_author_wo_options.json"]
    with pytest.raises(
        InputError, match=r"no set 'eval_real_author_wo_options\.json' \(real_authors\); it has: .*\nGive"
    ):
        evaluate_logs(written(tmp_path, "a.json", log))
    log = small_log()
    part = log["eval_log.json"]
    part["avg_paraphrase_loss"] = part.pop("avg_paraphrased_loss")
    sentence = r"eval_log\.json' has no metric 'avg_paraphrased_loss'\.\nDid you mean 'avg_paraphrase_loss'\? Give"
    with pytest.raises(InputError, match=sentence):
        evaluate_logs(written(tmp_path, "b.json", log))


def test_unusable_values_are_named(tmp_path):
    log = small_log()
    del log["eval_log.json"]["rougeL_recall"]["3"]
    with pytest.raises(InputError, match=r"'rougeL_recall' of '.*' has other rows than 'avg_gt_loss'\.\nGive"):
        evaluate_logs(written(tmp_path, "a.json", log))
    for value in (None, "x", float("nan"), [1.0]):
        log = small_log()
        log["eval_log.json"]["avg_gt_loss"]["0"] = value
        with pytest.raises(InputError, match=r"'avg_gt_loss' of '.*' holds values that are not finite numbers\.\nGive"):
            evaluate_logs(written(tmp_path, "b.json", log))
    for value in ("1.5", True, {"x": 1}, 10**400):
        log = small_log()
        log["eval_log.json"]["avg_gt_loss"] = dict.fromkeys(log["eval_log.json"]["avg_gt_loss"], value)
        with pytest.raises(InputError, match=r"'avg_gt_loss' of '.*' holds values that are not finite numbers\.\nGive"):
            evaluate_logs(written(tmp_path, "b.json", log))
    for value in (-0.1, 1.1):
        log = small_log()
        log["eval_log.json"]["rougeL_recall"]["0"] = value
        with pytest.raises(
            InputError, match=r"'rougeL_recall' of '.*' holds values outside 0 to 1\.\nGive an eval_log"
        ):
            evaluate_logs(written(tmp_path, "b.json", log))
    log = small_log()
    log["eval_log.json"]["average_perturb_loss"]["0"] = []
    with pytest.raises(InputError, match=r"'average_perturb_loss' of '.*' holds values that are not finite"):
        evaluate_logs(written(tmp_path, "c.json", log))
    log["eval_log.json"]["avg_gt_loss"] = {}
    with pytest.raises(InputError, match=r"'avg_gt_loss' of '.*' has no rows numbered from 0\.\nGive"):
        evaluate_logs(written(tmp_path, "d.json", log))


def official(name):
    folder = os.environ.get("LOKU_DATA_DIR")
    path = Path(folder or ".") / "tofu_official_logs" / f"{name}.eval_log_aggregated.json.gz"
    if not folder or not path.is_file():
        pytest.skip("LOKU_DATA_DIR is not set to a folder with tofu_official_logs; set it to run this test")
    return path


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "geometric", "arithmetic"),
    [("phi_full", 0.5221, 0.5034), ("llama2-7b_full", 0.6227, 0.5859), ("phi_retain90", 0.5320, 0.5130)],
)
def test_published_model_utility(name, geometric, arithmetic):
    found = evaluate_logs(official(name))
    assert found["model_utility"] == pytest.approx(geometric, abs=5e-5)
    assert found["model_utility_arithmetic"] == pytest.approx(arithmetic, abs=5e-5)


@pytest.mark.data
def test_published_forget_quality():
    found = evaluate_logs(official("phi_full"), retain_logs=official("phi_retain90"))
    assert math.log10(found["forget_quality"]) == pytest.approx(-15.66, abs=0.005)
    assert found["forget_quality_rows"] == 300
    assert found["warnings"] == []
    across = evaluate_logs(official("phi_full"), retain_logs=official("llama2-7b_retain90"))
    assert across["warnings"] == []  # other prompt tags, and one answer whose blanks were cleaned up


@pytest.mark.data
@pytest.mark.parametrize("retain", ["phi_retain95", "phi_retain99"])
def test_other_forget_sets_are_compared_with_a_warning(retain):
    found = evaluate_logs(official("phi_full"), retain_logs=official(retain))
    assert "not the same questions" in found["warnings"][0]
    assert 0 < found["forget_quality"] < 1
