"""Suites of a benchmark that are not `own`: what they measure, and what their utility means."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench_builders import TINY, tiny
from builders import byte_level_tokenizer, tiny_model
from loku.bench.models import check_memorised, measured_sources, results_file, shared_options
from loku.bench.recipe import parse_recipe
from loku.bench.suites import measure_tdec, perplexity_of, utility
from loku.bench.trial import _level_source
from loku.config import UnlearnOptions
from loku.data.sources import load_records
from loku.errors import InputError
from loku.evaluation.metrics import Interval
from loku.evaluation.results import Results, SetResults, read_results, write_results


def results(accuracy=None, perplexity=None):
    sets = {}
    if accuracy is not None:
        sets["cloze"] = SetResults(4, {"accuracy": Interval(accuracy, 0, 1)})
    if perplexity is not None:
        sets["validation"] = SetResults(4, {"perplexity": Interval(perplexity, 1, 1000)})
    return Results("tdec", {}, {}, {}, sets, {})


def test_utility_is_the_targets_perplexity_over_the_models():
    target = results(0.2, 50.0)
    assert utility(target, target) == 1.0
    assert utility(results(0.1, 100.0), target) == 0.5
    assert utility(results(0.4, 25.0), target) == 1.0  # better than the target is worth no more
    assert utility(results(0.0, 50.0), target) == 1.0  # the cloze is a column of its own
    assert utility(results(), results()) == utility(results(0.1), results(0.2)) == 1.0


def test_perplexity_is_that_of_all_tokens_of_all_texts():
    import torch

    model, tokenizer = tiny_model("gpt_neo"), byte_level_tokenizer()
    rows = load_records([{"text": "The fox rests. " * n} for n in (1, 9)])
    found = perplexity_of(model, tokenizer, rows, max_length=20, seed=0)
    nll, tokens = 0.0, 0
    for row in rows:
        ids = tokenizer(row.text)["input_ids"]
        for start in range(0, len(ids) - 1, 19):
            window = torch.tensor([ids[start : start + 20]])
            with torch.no_grad():
                logprobs = model(window).logits.double().log_softmax(-1)[0, :-1]
            nll -= logprobs.gather(1, window[0, 1:, None]).sum().item()
            tokens += window.shape[1] - 1
    assert found.mean("perplexity") == pytest.approx(math.exp(nll / tokens), rel=1e-5)


@pytest.fixture
def sources(tmp_path):
    texts = {"forget": 2, "holdout": 2, "validation": 3}
    for name, count in texts.items():
        rows = [{"text": f"{name} {i}: " + " ".join(str(i * j % 7) for j in range(30))} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"prompt": "The fox saw a dog, and the dog saw the", "completion": " fox"}] * 2
    (tmp_path / "cloze.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return {name: str(tmp_path / f"{name}.jsonl") for name in (*texts, "cloze")}


def test_the_level_is_the_targets_and_it_alone_reads_the_unseen_text(sources, tmp_path):
    model, tokenizer = tiny_model("gpt_neo"), byte_level_tokenizer()
    options = UnlearnOptions(max_length=40, eval_rows=10, seed=0)
    before = measure_tdec(model, tokenizer, sources, options, model_name="target")
    assert set(before.sets) == {"forget", "holdout", "validation", "cloze"}
    assert before.summary["utility"] == 1.0
    path = write_results(before, tmp_path / "target")
    other = tiny_model("gpt_neo", seed=1)
    after = measure_tdec(other, tokenizer, sources, options, model_name="other", target=path)
    assert set(after.sets) == {"forget", "validation", "cloze"}
    levels = ("level_ma", "level_el_10")
    assert [after.summary[name] for name in levels] == [before.summary[name] for name in levels]
    assert after.summary["utility"] == utility(after, read_results(path))


RECIPE = {
    "name": "made-up",
    "stages": {"target": {"model": "some/model"}},
    "unlearn": {"forget": "f.jsonl", "retain": "self", "holdout": "h.jsonl"},
    "measure": {"suite": "tdec", "validation": "v.jsonl", "memorised": {"forget.ma": 0.8}},
    "arms": [{"name": "IHL", "method": "ihl"}],
    "seeds": [0],
}


def test_rows_are_those_of_unlearning_unless_measure_names_others(tmp_path):
    recipe = parse_recipe(RECIPE, "recipe")
    found = measured_sources(recipe, shared_options(recipe, tmp_path, 0), tmp_path)
    assert found == {"forget": "f.jsonl", "holdout": "h.jsonl", "validation": "v.jsonl"}
    recipe = parse_recipe(RECIPE | {"measure": {"retain": "r.jsonl"}}, "recipe")
    assert measured_sources(recipe, shared_options(recipe, tmp_path, 0), tmp_path)["retain"] == "r.jsonl"


def test_the_level_is_measured_where_a_suites_results_do_not_hold_it():
    job = SimpleNamespace(forget=load_records([{"question": "Who?", "answer": "She."}]))
    text = SimpleNamespace(forget=load_records([{"text": "She counts lighthouses."}]))
    stages = TINY["stages"] | {"retain-only": {"model": "./retrained"}}
    folder = Path("seed-0")
    found = {
        suite: _level_source(job, parse_recipe(tiny(stages=stages, measure={"suite": suite}), "r.yaml"), folder)
        for suite in ("own", "lume", "tdec")
    }
    assert found == {"own": str(results_file(folder, "retain-only")), "lume": "./retrained", "tdec": None}
    own = parse_recipe(tiny(stages=stages), "r.yaml")
    assert _level_source(text, own, folder) == "./retrained"
    assert _level_source(job, parse_recipe(tiny(stages={"target": {"model": "./t"}}), "r.yaml"), folder) is None


def test_a_target_that_has_not_learnt_is_refused():
    recipe = parse_recipe(RECIPE, "recipe")
    check_memorised(recipe, {"values": {"forget.ma": {"mean": 0.81}}}, 3)
    with pytest.raises(InputError, match=r"seed 3 has forget\.ma 0\.790") as error:
        check_memorised(recipe, {"values": {"forget.ma": {"mean": 0.79}}}, 3)
    assert "Train the stage 'target' longer" in error.value.remedy
    with pytest.raises(InputError, match=r"asks for forget\.ma of the target, which is not measured") as error:
        check_memorised(recipe, {"values": {}}, 3)
    assert "name another score" in error.value.remedy


@pytest.mark.parametrize(
    "measure", [{"suite": "tdce"}, {"validation": 3}, {"memorised": {"forget.ma": "0.8"}}, {"memorised": 0.8}, {"x": 1}]
)
def test_measuring_that_does_not_exist_is_refused(measure):
    with pytest.raises(InputError):
        parse_recipe(RECIPE | {"measure": measure}, "recipe")
