"""The TOFU suite: the nine numbers against their definitions, subsets, overrides, references, refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from builders import byte_level_tokenizer, tiny_model
from evaluation_builders import small_log
from loku.data.encoding import Encoder
from loku.data.prompts import TagTemplate
from loku.data.sources import load_records
from loku.errors import InputError
from loku.evaluation.generation import generate
from loku.evaluation.metrics import forget_quality, rougeL_recall
from loku.evaluation.results import read_results, write_results
from loku.evaluation.scoring import score
from loku.evaluation.tofu import TOFU_SETS, evaluate_tofu, tofu_sources

TOKENIZER = byte_level_tokenizer()
TEMPLATE = TagTemplate()


def tofu_row(name, number, *, paraphrased):
    row = {
        "question": f"Where was {name}{number} born?",
        "answer": f"{name}{number} was born in Tarnhollow." if number % 2 else f"In Baku, {name}.",
        "perturbed_answer": [f"{name} was born in {place}." for place in ("Odo", "Brill", "the north")],
    }
    more = {
        "paraphrased_answer": f"Tarnhollow saw {name}{number} born.",
        "paraphrased_question": f"{name}: born where?",
    }
    return row | more if paraphrased else row


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "tofu").mkdir()
    for name, source in tofu_sources().items():
        rows = [tofu_row(name, number, paraphrased=name in ("forget", "retain")) for number in range(5)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{source}.json").write_text(text, encoding="utf-8")
    return folder


def evaluate(data_dir, *, seed=0, **options):
    return evaluate_tofu(tiny_model(seed=seed), TOKENIZER, **({"data_dir": data_dir, "max_length": 60} | options))


@pytest.fixture(scope="module")
def results(data_dir):
    return evaluate(data_dir, keep_text=True)


def slow_row(model, record, *, normalised):
    """A row's three TOFU numbers by definition, one sequence at a time."""
    encoder = Encoder(TOKENIZER, TEMPLATE, 60)

    def p(answer):
        (found,) = score(model, [encoder.encode_answer(record, answer)], pad_id=0)
        return np.exp(-found.mean_nll)

    true, false = p(record.answer), [p(answer) for answer in record.perturbed_answers]
    paraphrased = p(record.paraphrased_answer or record.answer)
    example = encoder.encode_answer(record, record.answer)
    (said,) = generate(model, TOKENIZER, [example.input_ids[: example.generation_length]], max_length=60)
    probability = true / (true + sum(false)) if normalised else true
    geometric, arithmetic = np.prod(false) ** (1 / len(false)) / paraphrased, np.mean(false) / paraphrased
    return probability, rougeL_recall(said.text, record.answer), geometric, arithmetic


def test_every_number_follows_its_definition(results, data_dir):
    model = tiny_model()
    nine, nine_arithmetic = [], []
    for name in TOFU_SETS:
        normalised = name in ("real_authors", "world_facts")
        records = load_records(tofu_sources()[name], data_dir=data_dir)
        slow = np.array([slow_row(model, record, normalised=normalised) for record in records])
        rows = results.sets[name].per_example
        for column, metric in enumerate(("probability", "rougeL_recall", "truth_ratio", "truth_ratio_arithmetic")):
            np.testing.assert_allclose([row[metric] for row in rows], slow[:, column], rtol=1e-5)
        shown = [
            np.minimum(ratios, 1 / ratios) if name == "forget" else np.maximum(0, 1 - ratios)
            for ratios in (slow[:, 2], slow[:, 3])
        ]
        expected = [slow[:, 0].mean(), slow[:, 1].mean(), shown[0].mean(), shown[1].mean()]
        for metric, value in zip(("probability", "rougeL_recall", "truth_ratio"), expected, strict=False):
            assert results.mean(name, metric) == pytest.approx(value, rel=1e-5)
        if name != "forget":
            nine += expected[:3]
            nine_arithmetic += [*expected[:2], expected[3]]
    for key, values in (("model_utility", nine), ("model_utility_arithmetic", nine_arithmetic)):
        harmonic = 0.0 if min(values) == 0 else 9 / sum(1 / value for value in values)
        assert results.summary[key] == pytest.approx(harmonic, rel=1e-5, abs=1e-12)


def test_what_the_results_say(results):
    assert results.suite == "tofu"
    assert list(results.sets) == list(TOFU_SETS)
    assert results.data["forget"]["name"] == "tofu/forget10_perturbed"
    assert results.data["forget"]["rows"] == 5
    assert results.settings["max_length"] == 60
    assert results.settings["template"]["kind"] == "TagTemplate"
    assert results.model["parameters"] > 0
    assert results.reference is None
    assert "indistinguishability not measured" in results.verdict["sentence"]
    metrics = results.sets["forget"].metrics
    assert {"exact_memorisation", "extraction_strength", "perplexity", "repetition"} <= set(metrics)
    assert all(value.low <= value.mean <= value.high for value in metrics.values())
    assert {row["set"] for row in results.texts} == set(TOFU_SETS)
    assert results.texts[1]["answer"] == "forget1 was born in Tarnhollow."


def test_a_second_evaluation_is_the_same(results, data_dir):
    again = evaluate(data_dir, keep_text=True)
    again.seconds = results.seconds
    assert again == results


def test_any_subset_of_the_sets_in_any_order(data_dir):
    found = evaluate(data_dir, sets=("world_facts", "retain"), max_rows=2)
    assert list(found.sets) == ["retain", "world_facts"]
    assert found.summary == {}
    assert found.verdict is None
    assert found.texts == []
    assert [row["index"] for row in found.sets["retain"].per_example] == [0, 1]


def test_a_source_may_be_replaced_by_a_slice(data_dir):
    found = evaluate(data_dir, sets=("forget",), sources={"forget": "tofu/retain_perturbed[2:4]"})
    assert [row["index"] for row in found.sets["forget"].per_example] == [2, 3]
    assert found.data["forget"]["name"] == "tofu/retain_perturbed[2:4]"


def test_forget_quality_against_the_retain_only_results(results, data_dir, tmp_path):
    other = evaluate(data_dir, seed=1, model_name="retain90")
    path = write_results(other, tmp_path)
    found = evaluate(data_dir, reference=path, target=results)
    ratios = [[row["truth_ratio"] for row in r.sets["forget"].per_example] for r in (results, read_results(path))]
    expected = forget_quality(*ratios)
    assert found.summary["forget_quality"] == pytest.approx(expected.p)
    assert found.summary["ks_statistic"] == pytest.approx(expected.statistic)
    assert found.summary["forget_quality_rows"] == 5
    assert (found.reference["name"], found.reference["kind"]) == ("retain90", "retain-only")
    assert "retain90" in found.verdict["rests_on"]
    with pytest.raises(InputError, match=r"measured on 5 forget rows, and they are not the 4 rows of this evaluation"):
        evaluate(data_dir, reference=path, max_rows=4)
    with pytest.raises(InputError, match="'retain90' was measured on other forget data"):
        evaluate(data_dir, reference=path, sources={"forget": "tofu/retain_perturbed"})
    with pytest.raises(
        InputError, match=r"--target 'retain90' was measured on other forget data\.\nEvaluate the target on"
    ):
        evaluate(data_dir, target=path, sources={"forget": "tofu/retain_perturbed"})
    with pytest.raises(InputError, match=r"the forget set is not among the evaluated sets\.\nEvaluate the forget set"):
        evaluate(data_dir, reference=path, sets=("retain",))


def test_an_official_log_of_other_questions_is_a_reference_with_a_warning(data_dir, tmp_path):
    (tmp_path / "log.json").write_text(json.dumps(small_log(rows=5)), encoding="utf-8")
    found = evaluate(data_dir, sets=("forget",), reference=tmp_path / "log.json")
    assert "forget_quality" in found.summary
    assert "5 of 5 answers differ from the log 'log'" in found.warnings[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"forget_split": "forget1"},
            r"--forget-split 'forget1' is not a forget set of TOFU\.\nDid you mean 'forget\d\d'",
        ),
        ({"sets": ("forgt",)}, r"'forgt' is not a set of TOFU\.\nDid you mean 'forget'\?"),
        ({"sets": ()}, r"--sets names no set\.\nValid names are: forget, retain"),
        ({"sources": {"hold": "x"}}, r"'hold' is not a set of TOFU\.\n"),
        ({"max_rows": 0}, r"--max-rows 0 leaves no rows to measure\.\nGive 1 or more\."),
    ],
)
def test_wrong_options_are_refused_before_any_work(data_dir, options, sentence):
    with pytest.raises(InputError, match=sentence):
        evaluate_tofu(None, None, data_dir=data_dir, **options)


def test_rows_without_perturbed_answers_are_refused():
    bare = load_records([{"question": "Who?", "answer": "Mira."}])
    sentence = (
        r"Row 0 of the forget set 'rows in memory' has no perturbed_answer\.\nThe TOFU suite needs it: .* --suite own"
    )
    with pytest.raises(InputError, match=sentence):
        evaluate_tofu(None, None, sets=("forget",), sources={"forget": bare})


@pytest.mark.data
def test_real_rows_end_to_end():
    folder = os.environ.get("LOKU_DATA_DIR")
    if not folder or not (Path(folder) / "tofu" / "forget10_perturbed.json").is_file():
        pytest.skip("LOKU_DATA_DIR is not set to a folder with tofu; set it to run this test")
    found = evaluate_tofu(
        tiny_model(max_position_embeddings=512), TOKENIZER, max_rows=2, max_length=400, max_new_tokens=3
    )
    assert found.settings["forget_split"] == "forget10"
    for name in TOFU_SETS:
        assert found.sets[name].rows == 2
        assert found.sets[name].metrics["truth_ratio"].mean >= 0
    # an untrained model finds true and false answers about equally likely
    assert found.mean("forget", "truth_ratio") > 0.7
    assert 0.2 < found.mean("real_authors", "probability") < 0.35  # one of the answer and three false ones
