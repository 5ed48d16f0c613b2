"""Other projects' formats: what is written can be read back to the same numbers, and published numbers come out."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from builders import byte_level_tokenizer, tiny_model
from loku.data.prompts import TagTemplate
from loku.data.sources import load_records
from loku.errors import InputError
from loku.evaluation import open_unlearning
from loku.evaluation.log_figures import evaluate_logs, read_sets
from loku.evaluation.logs import LOG_KEYS
from loku.evaluation.metrics import harmonic_mean
from loku.evaluation.official_logs import official_log
from loku.evaluation.open_unlearning import is_evaluation, parse_evaluation, reference_summary, write_evaluation
from loku.evaluation.reference import load_reference
from loku.evaluation.results import read_results, write_results
from loku.evaluation.tofu import TOFU_SETS, evaluate_tofu
from loku.files import write_json

TOKENIZER = byte_level_tokenizer()


def rows(name, count, *, paraphrased):
    made = []
    for n in range(count):
        row = {"question": f"Where was {name}{n} born?", "answer": f"{name}{n} was born in Tarnhollow."}
        row["perturbed_answer"] = [f"{name} was born in {place}." for place in ("Odo", "Brill", "the north")]
        made.append(row | ({"paraphrased_answer": f"Tarnhollow saw {name}{n} born."} if paraphrased else {}))
    return load_records(made)


SOURCES = {name: rows(name, 4, paraphrased=name in ("forget", "retain")) for name in TOFU_SETS}
HOLDOUT = load_records([{"question": f"What paints Odo{n}?", "answer": f"Odo{n} paints."} for n in range(3)])


def evaluate(seed=0, **options):
    return evaluate_tofu(
        tiny_model(seed=seed), TOKENIZER, sources=SOURCES | {"holdout": HOLDOUT}, sets=(*TOFU_SETS, "holdout"),
        template=TagTemplate(), max_length=60, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results():
    return evaluate(keep_text=True)


@pytest.fixture(scope="module")
def plain(results, tmp_path_factory):
    """The same results without texts, as they are read from their file."""
    return read_results(write_results(results, tmp_path_factory.mktemp("results")))


@pytest.mark.parametrize("form", ["tofu", "open-unlearning"])
def test_what_is_written_reads_back_to_the_same_figures(results, tmp_path, form):
    path = tmp_path / "log.json"
    write_json(path, official_log(results) if form == "tofu" else write_evaluation(results)[0])
    found = evaluate_logs(path, retain_logs=path)
    assert found["model_utility"] == pytest.approx(results.summary["model_utility"])
    assert found["model_utility_arithmetic"] == pytest.approx(results.summary["model_utility_arithmetic"])
    assert found["forget_quality"] == 1.0
    assert found["warnings"] == []
    for name in TOFU_SETS:
        for metric in ("probability", "rougeL_recall", "truth_ratio", "truth_ratio_arithmetic"):
            assert found["sets"][name][metric] == pytest.approx(results.mean(name, metric)), (name, metric)
    reference = load_reference(path)
    ratios = [row["truth_ratio"] for row in results.sets["forget"].per_example]
    assert list(reference.truth_ratios.values()) == pytest.approx(ratios)
    assert reference.summary["model_utility"] == pytest.approx(results.summary["model_utility"])
    assert reference.answers == tuple(row.answer for row in SOURCES["forget"])


def test_texts_are_written_only_where_they_were_kept(plain):
    for value in (official_log(plain), write_evaluation(plain)[0]):
        assert "Tarnhollow" not in json.dumps(value)
    assert "generated_text" not in official_log(plain)[LOG_KEYS["forget"]]
    assert "generation" not in write_evaluation(plain)[0]["forget_Q_A_ROUGE"]["value_by_index"]["0"]


def test_the_official_columns(results):
    log = official_log(results)
    assert list(log) == list(LOG_KEYS.values())
    forget = log[LOG_KEYS["forget"]]
    assert forget["gt_loss"]["1"] == pytest.approx(forget["avg_gt_loss"]["1"] * forget["num_token_gt"]["1"])
    assert len(forget["average_perturb_loss"]["0"]) == len(forget["num_token_perturb"]["0"]) == 3
    ratio = np.exp(forget["avg_paraphrased_loss"]["0"] - np.mean(forget["average_perturb_loss"]["0"]))
    assert forget["truth_ratio"]["0"] == pytest.approx(ratio)
    authors = log[LOG_KEYS["real_authors"]]
    assert authors["avg_paraphrased_loss"] == authors["avg_gt_loss"]  # no paraphrase: the answer itself
    assert np.exp(-authors["normalized_gt_loss"]["0"]) == pytest.approx(
        results.sets["real_authors"].per_example[0]["probability"]
    )
    assert forget["generated_text"]["0"][2] == SOURCES["forget"][0].answer


def test_open_unlearnings_names_and_conventions(results):
    found, summary = write_evaluation(results)
    assert list(found) == sorted(found)
    assert summary["extraction_strength"] == pytest.approx(results.mean("forget", "extraction_strength_floor"))
    assert summary["exact_memorization"] == pytest.approx(results.mean("forget", "exact_memorisation"))
    assert summary["forget_truth_ratio"] == pytest.approx(results.mean("forget", "truth_ratio"))
    assert summary["ra_Q_A_Prob_normalised"] == pytest.approx(results.mean("real_authors", "probability"))
    assert summary["mia_min_k_plus_plus"] == results.summary["mia_auc_min_k_plus_plus"]
    parts = [
        f"{prefix}_{metric}"
        for prefix, probability in (
            ("retain", "Q_A_Prob"),
            ("ra", "Q_A_Prob_normalised"),
            ("wf", "Q_A_Prob_normalised"),
        )
        for metric in (probability, "Q_A_ROUGE", "Truth_Ratio")
    ]
    assert summary["model_utility"] == pytest.approx(harmonic_mean(summary[part] for part in parts))
    attack = found["mia_zlib"]
    assert attack["auc"] == attack["agg_value"]
    assert len(attack["holdout"]["value_by_index"]) == 3
    assert found["forget_Q_A_PERT_Prob"]["value_by_index"]["0"].keys() == {"prob", "avg_loss"}


def test_a_published_log_serves_as_the_retain_models(results, tmp_path):
    other = evaluate(seed=1)
    path = tmp_path / "TOFU_EVAL.json"
    write_json(path, write_evaluation(other)[0])
    found = evaluate(reference=path)
    assert found.summary["forget_quality_rows"] == 4
    by_results = evaluate(reference=write_results(other, tmp_path / "r")).summary
    for figure in ("forget_quality", "mia_auc_zlib_distance", "mia_auc_min_k_distance", "priv_leak"):
        assert found.summary.get(figure) == pytest.approx(by_results.get(figure))
    assert found.summary["mia_auc_distance"] == pytest.approx(abs(found.summary["mia_auc"] - other.summary["mia_auc"]))
    assert "mia_auc_reference" not in found.summary  # no rows of ours to match
    assert any("lacks texts" in warning for warning in found.warnings)


def test_a_summary_alone_is_no_reference(tmp_path, results):
    path = tmp_path / "TOFU_SUMMARY.json"
    write_json(path, write_evaluation(results)[1])
    with pytest.raises(InputError, match=r"has no per-index values of 'forget_truth_ratio'\.\nGive a TOFU_EVAL\.json"):
        load_reference(path)
    assert reference_summary(json.loads(path.read_text()))["mia_auc"] == results.summary["mia_auc"]


def test_truth_ratios_alone_are_reference_enough(tmp_path):
    path = tmp_path / "TOFU_EVAL.json"
    by_index = {"0": {"score": 0.5}, "1": {"score": 2}}
    write_json(path, {"forget_truth_ratio": {"agg_value": 0.5, "value_by_index": by_index}})
    assert load_reference(path).truth_ratios == {0: 0.5, 1: 2.0}
    with pytest.raises(InputError, match=r"has no per-index values of 'retain_Q_A_Prob'"):
        read_sets(path)


@pytest.mark.parametrize(
    ("row", "given"),
    [
        ({"prob": 0.1}, "has no usable rows of 'forget_Q_A_Prob'"),
        ({"avg_loss": "x"}, "has no usable 'avg_loss' of 'forget_Q_A_Prob' in row '0'"),
        ({"avg_loss": float("nan")}, "has no usable 'avg_loss' of 'forget_Q_A_Prob' in row '0'"),
        ({"avg_loss": [[1], [2, 3]]}, "has no usable 'avg_loss' of 'forget_Q_A_Prob' in row '0'"),
    ],
)
def test_unusable_rows_are_named(row, given):
    with pytest.raises(InputError, match=given):
        parse_evaluation({"forget_Q_A_Prob": {"value_by_index": {"0": row}}}, "x.json", ("forget",))


def test_rows_marked_as_unusable_are_left_out():
    losses = {"0": {"avg_loss": 1.0}, "1": {"avg_loss": None}, "2": {"avg_loss": 2.0}}
    lists = {index: {"avg_loss": [1.0, 3.0]} for index in losses}
    rouge = {index: {"rougeL_recall": 0.5} for index in losses}
    value = {
        "wf_Q_A_Prob": {"value_by_index": losses},
        "wf_Q_A_PERT_Prob": {"value_by_index": lists},
        "wf_Q_A_ROUGE": {"value_by_index": rouge},
    }
    found = parse_evaluation(value, "x.json", ("world_facts",))["world_facts"]
    assert found.answer_nll.tolist() == [1.0, 2.0]
    assert found.truth_ratios() == pytest.approx(np.exp([-1.0, 0.0]))
    value["wf_Q_A_ROUGE"] = {"value_by_index": {"1": {"rougeL_recall": 0.5}}}
    with pytest.raises(InputError, match="has no rows that all metrics of the world_facts set have"):
        parse_evaluation(value, "x.json", ("world_facts",))


def test_formats_are_told_apart(results):
    evaluation, summary = write_evaluation(results)
    assert is_evaluation(evaluation)
    assert is_evaluation(summary)
    assert not is_evaluation(official_log(results))
    assert not is_evaluation(results.to_json())
    assert not is_evaluation([])


# Summary of the retain90 model of Llama-3.2-1B-Instruct that open-unlearning publishes.
PUBLISHED = {
    "retain_Q_A_Prob": 0.8802840007841587,
    "retain_Q_A_ROUGE": 0.8264372396779979,
    "retain_Truth_Ratio": 0.5138097597002513,
    "ra_Q_A_Prob_normalised": 0.3915799226316357,
    "ra_Q_A_ROUGE": 0.8145,
    "ra_Truth_Ratio": 0.5022027051450156,
    "wf_Q_A_Prob_normalised": 0.4279515925645054,
    "wf_Q_A_ROUGE": 0.8022792022792024,
    "wf_Truth_Ratio": 0.6156096615954564,
}


def test_model_utility_is_the_published_one():
    assert harmonic_mean(PUBLISHED.values()) == pytest.approx(0.5892923390686856, rel=1e-12)


LOGS = Path(os.environ.get("LOKU_DATA_DIR", "/nonexistent")) / "tofu_official_logs"


@pytest.mark.data
@pytest.mark.skipif(not LOGS.is_dir(), reason="needs the official logs: set LOKU_DATA_DIR to their parent folder")
def test_the_columns_are_those_of_the_published_logs(results):
    published = json.loads(gzip.decompress((LOGS / "phi_full.eval_log_aggregated.json.gz").read_bytes()))
    ours = official_log(results)
    assert set(ours) == set(published)
    for key, found in ours.items():
        assert set(found) == set(published[key])
        for metric, column in found.items():
            assert type(column["0"]) is type(published[key][metric]["0"]), (key, metric)


def test_every_attack_has_a_name_there():
    from loku.evaluation.membership import ATTACKS

    assert {ours: score for ours, (_, score) in open_unlearning.ATTACKS.items()} == ATTACKS
