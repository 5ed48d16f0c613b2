"""The TDEC suite: sets, level, stopping rule; the real files where they are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from builders import CORPUS, byte_level_tokenizer, tiny_model
from loku.data.encoding import Encoder
from loku.data.prompts import TagTemplate
from loku.data.sources import load_records
from loku.errors import InputError
from loku.evaluation.extraction import measure_extraction
from loku.evaluation.metrics import Interval
from loku.evaluation.results import SetResults, read_results, write_results
from loku.evaluation.tdec import evaluate_tdec, is_forgotten, stopping_level

TOKENIZER = byte_level_tokenizer()
TARGETS = load_records([{"text": text} for text in CORPUS])
UNSEEN = load_records([{"text": f"{text} Again: {text}"} for text in CORPUS[2:]])


def evaluate(**options):
    return evaluate_tdec(tiny_model(), TOKENIZER, **({"data": TARGETS, "max_length": 40, "ngrams": (3, 10)} | options))


def test_targets_unseen_text_and_validation_sets(tmp_path):
    seen = []
    found = evaluate(
        holdout=UNSEEN, validation={"other": UNSEEN}, max_rows=3, progress=lambda *step: seen.append(step[:2])
    )
    assert {name: one.rows for name, one in found.sets.items()} == {"forget": 3, "holdout": 2, "other": 2}
    encoder = Encoder(TOKENIZER, TagTemplate(), max_length=40)
    first = [encoder.encode(row)[0] for row in list(TARGETS)[:3]]
    for row, one in zip(
        found.sets["forget"].per_example, measure_extraction(tiny_model(), TOKENIZER, first), strict=True
    ):
        assert row["ma"] == one.ma
        assert row["el_10"] == one.el[10]
    assert found.summary["level_ma"] == pytest.approx(np.mean([row["ma"] for row in found.sets["holdout"].per_example]))
    assert found.summary["forgotten"] in (0.0, 1.0)
    assert {"ma", "el_3", "el_10", "perplexity"} <= set(found.sets["other"].metrics)
    assert seen[-1] == (7, 7)
    read = read_results(write_results(found, tmp_path))
    assert read.summary == found.summary
    assert found.data["forget"]["rows"] == 3


def test_validation_rows_are_the_unseen_text_where_there_is_no_holdout():
    found = evaluate(validation={"one": UNSEEN, "two": TARGETS}, max_rows=2)
    rows = [row for name in ("one", "two") for row in found.sets[name].per_example]
    assert found.summary["level_el_10"] == pytest.approx(np.mean([row["el_10"] for row in rows]))


def test_the_level_of_the_model_before_unlearning_counts():
    before = evaluate(holdout=UNSEEN)
    before.summary |= {"level_ma": 0.9, "level_el_10": 0.8}
    after = evaluate(holdout=UNSEEN, target=before)
    assert after.summary["level_ma"] == 0.9
    assert after.summary["forgotten"] == 1.0


def test_the_rule_wants_both_figures_below_the_level():
    def forget(ma, el):
        return SetResults(1, {"ma": Interval(ma, ma, ma), "el_10": Interval(el, el, el)})

    level = {"level_ma": 0.3, "level_el_10": 0.1}
    assert is_forgotten(forget(0.2, 0.05), level) == {"forgotten": 1.0}
    assert is_forgotten(forget(0.3, 0.05), level) == {"forgotten": 0.0}  # at the level is not below it
    assert is_forgotten(forget(0.2, 0.2), level) == {"forgotten": 0.0}
    assert is_forgotten(forget(0.2, 0.0), {"level_ma": 0.3, "level_el_10": 0.0}) == {"forgotten": 1.0}
    assert is_forgotten(SetResults(1, {}), level) == {}
    assert is_forgotten(forget(0.2, 0.05), {}) == {}
    assert stopping_level([]) == {}


def test_without_unseen_text_there_is_no_level():
    found = evaluate(data=load_records([{"text": "The quick fox"}]))  # one row, too short for EL_10
    assert found.summary == {}
    assert "el_10" not in found.sets["forget"].metrics


def test_rows_with_questions_are_refused():
    with pytest.raises(InputError, match=r"is no running text\.\nGive rows with a `text` column as forget\."):
        evaluate(data=load_records([{"question": "Q?", "answer": "A."}]))


DATA = Path(os.environ.get("LOKU_DATA_DIR", "/nonexistent")) / "tdec"


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the TDEC files: set LOKU_DATA_DIR to the folder that holds tdec")
def test_the_real_files():
    data = load_records(DATA / "lm_extraction_32_0.csv")
    assert len(data) == 32
    validation = {name: load_records(DATA / "validation" / f"{name}.csv") for name in ("wikitext", "lambada", "pile")}
    found = evaluate(data=data, validation=validation, max_rows=2)
    assert {name: one.rows for name, one in found.sets.items()} == dict.fromkeys(("forget", *validation), 2)
    assert {"level_ma", "level_el_10", "forgotten"} <= set(found.summary)
