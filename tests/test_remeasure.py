"""Measuring a share of the rows again: which rows, within which tolerance, and what follows from rows at all."""

from __future__ import annotations

import math

import numpy as np
import pytest

from builders import byte_level_tokenizer, tiny_model
from conftest import perturbed, rows
from loku.data.prompts import ChatTemplate, TagTemplate
from loku.data.sources import load_records
from loku.errors import InputError
from loku.evaluation.own import evaluate_own
from loku.evaluation.results import Results, SetResults, parse_results
from loku.remeasure import (
    choose_rows,
    compare,
    figures_that_do_not_follow,
    is_apart,
    measure_again,
    template_of,
    tolerance_of,
)


def made(per_example, *, dtype="float32", name="forget"):
    sets = {name: SetResults(len(per_example), {}, per_example)}
    return Results("own", {"dtype": dtype}, {}, {"seed": 1}, sets, {})


def test_a_share_is_rounded_up_and_follows_from_the_seed():
    results = made([{"index": 10 * place} for place in range(10)])
    assert choose_rows(results, 0.0, 1) == {}
    assert [len(choose_rows(results, share, 1)["forget"]) for share in (0.01, 0.1, 0.11, 1.0)] == [1, 1, 2, 10]
    assert choose_rows(results, 0.3, 1) == choose_rows(results, 0.3, 1)
    assert len({frozenset(choose_rows(results, 0.3, seed)["forget"]) for seed in range(20)}) > 10
    assert choose_rows(results, 0.5, 3)["forget"] <= {10 * place for place in range(10)}


def test_the_tolerance_is_the_types_unless_given():
    assert tolerance_of(made([], dtype="float32"), None) == 1e-3
    assert tolerance_of(made([], dtype="bfloat16"), None) == 5e-2
    assert tolerance_of(made([], dtype="bfloat16"), 1e-6) == 1e-6


def test_numbers_are_apart_beyond_the_tolerance_times_their_size():
    assert not is_apart(0.5, 0.5009, 1e-3)
    assert is_apart(0.5, 0.5011, 1e-3)
    assert not is_apart(1000.0, 1000.9, 1e-3)
    assert is_apart(1000.0, 1001.1, 1e-3)
    assert is_apart(0.5, math.nan, 1e-3)


def test_a_number_that_is_gone_is_a_difference():
    before = made([{"index": 4, "probability": 0.5, "nll": 2.0}])
    outcome = compare(before, made([{"index": 4, "probability": 0.5004}]), 1e-3)
    assert (outcome.rows, outcome.numbers) == (1, 3)
    assert [str(item) for item in outcome.differences] == ["forget row 4: nll 2 recorded, nothing now"]
    assert outcome.largest == pytest.approx(4e-4)


def test_templates_come_back_as_they_were():
    results = made([])
    results.settings["template"] = {"kind": "TagTemplate", "answer_tag": "A: ", "supervise_answer_tag": True}
    assert template_of(results) == TagTemplate(answer_tag="A: ", supervise_answer_tag=True)
    results.settings["template"] = {"kind": "ChatTemplate", "system_prompt": "Be brief."}
    assert template_of(results) == ChatTemplate("Be brief.")
    for wrong in (None, {"kind": "Other"}, {"kind": "TagTemplate", "colour": "red"}):
        results.settings["template"] = wrong
        with pytest.raises(InputError, match="do not say how their prompts were made"):
            template_of(results)


@pytest.fixture(scope="module")
def evaluated():
    """A model, its rows, and their results: questions with perturbed answers, one much longer than the others."""
    data = [perturbed(row) for row in rows(6)]
    data[2]["answer"] = " ".join([data[2]["answer"]] * 5)
    sets = {"forget": load_records(data), "retain": load_records([perturbed(row) for row in rows(5, start=30)])}
    model = tiny_model("llama", seed=3)
    return model, sets, evaluate_own(model, byte_level_tokenizer(), **sets, seed=5)


def test_every_row_measured_apart_from_the_others_gives_its_numbers_again(evaluated):
    """One row at a time, so also without the long answer that limits how much is generated for all."""
    model, sets, results = evaluated
    for place in range(5):
        chosen = {"forget": {place}, "retain": {(place + 1) % 5}}
        now = measure_again(model, byte_level_tokenizer(), results, sets, chosen)
        assert {name: [int(row["index"]) for row in found.per_example] for name, found in now.sets.items()} == {
            name: sorted(indices) for name, indices in chosen.items()
        }
        outcome = compare(results, now, 1e-4)
        assert outcome.differences == []
        assert outcome.rows == 2
        assert outcome.numbers > 40


def test_another_model_gives_other_numbers(evaluated):
    _, sets, results = evaluated
    other = tiny_model("llama", seed=4)
    outcome = compare(results, measure_again(other, byte_level_tokenizer(), results, sets, {"forget": {0}}), 1e-3)
    assert {item.metric for item in outcome.differences} >= {"nll", "min_k"}


def test_figures_follow_from_their_rows_or_are_named(evaluated):
    results = evaluated[2]
    assert figures_that_do_not_follow(results) == []
    value = results.to_json()
    mean = float(np.mean([row["probability"] for row in value["sets"]["forget"]["per_example"]]))
    assert value["sets"]["forget"]["metrics"]["probability"]["mean"] == pytest.approx(mean, rel=1e-12)
    value["sets"]["forget"]["metrics"]["probability"]["high"] += 1e-6
    value["sets"]["retain"]["metrics"]["invented"] = {"mean": 1.0, "low": 1.0, "high": 1.0}
    value["sets"]["retain"]["rows"] = 9
    named = figures_that_do_not_follow(parse_results(value, "test"))
    assert [line.split(" ")[:2] for line in named] == [
        ["forget", "probability"],
        ["retain", "invented"],
        ["retain:", "9"],
    ]
