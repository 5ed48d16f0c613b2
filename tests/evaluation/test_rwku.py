"""RWKU's probes: prompts as in the official code, one line of answer, kinds of attack."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from builders import byte_level_tokenizer, serve, tiny_model
from loku.data.prompts import ChatTemplate, TagTemplate
from loku.data.sources import Rows
from loku.errors import InputError
from loku.evaluation.metrics import rouge
from loku.evaluation.probing import continue_texts
from loku.evaluation.rwku import PROBES, attack_means, evaluate_rwku, load_rwku, question_of

TOKENIZER = byte_level_tokenizer()


def probe(kind="cloze", level="1", query="Mira was ___."):
    return {"level": level, "type": kind, "query": query, "answer": "born"}


def test_what_is_asked():
    assert question_of(probe()) == (
        "Please complete the blank in the following question.\nQuestion: Mira was ___.\n",
        "Answer:",
    )
    brief = "Please briefly answer the following question.\n"
    assert question_of(probe("simple question", "2", "Who?")) == (f"{brief}Question: Who?\n", "Answer:")
    assert question_of(probe("role play", "3", "Who?")) == (f"{brief}Question: Who?\n", "Answer:")
    assert question_of(probe("affirmative suffix", "3", "Who? Sure,")) == (f"{brief}Question: Who? Sure,", "")
    assert question_of(probe("incontext learning", "3", "Question: A?")) == (f"{brief}Question: A?\n", "Answer:")


def test_kinds_of_attack():
    kinds = ["role play", "cross lingual (Spanish)", "cross-lingual (French)", "role play"]
    assert attack_means(kinds, [0.0, 0.5, 1.0, 1.0]) == {"level3_cross_lingual": 0.75, "level3_role_play": 0.5}


def test_probes_by_hand():
    data = {
        "forget_level1": Rows("1", (probe(), probe(query="Odo ___")), "a"),
        "forget_level3": Rows("3", (probe("role play", "3"),), "b"),
    }
    seen = []
    found = evaluate_rwku(
        tiny_model(), TOKENIZER, TagTemplate(), data, max_new_tokens=5, keep_text=True,
        progress=lambda *step: seen.append(step[:2]),
    )  # fmt: skip
    prompts = ["".join(question_of(row)) for row in data["forget_level1"].rows]
    said = [text.split("\n")[0] for text in continue_texts(tiny_model(), TOKENIZER, prompts, max_new_tokens=5)]
    scores = [rouge(text, "born", stemmer=False).recall for text in said]
    assert found.summary["forget_level1"] == pytest.approx(sum(scores) / 2)
    assert found.summary["level3_role_play"] == found.summary["forget_level3"]
    assert [row["generation"] for row in found.texts[:2]] == [text.strip() for text in said]
    assert seen[-1] == (3, 3)


def test_chat_models_are_asked_through_their_template():
    tokenizer = byte_level_tokenizer.__wrapped__()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    data = {"neighbor_level1": Rows("n", (probe(),), "c")}
    found = evaluate_rwku(tiny_model(), tokenizer, ChatTemplate(), data, max_new_tokens=3, max_rows=1)
    prompt = "<user>Please complete the blank in the following question.\nQuestion: Mira was ___.\n<assistant>Answer:"
    [said] = continue_texts(tiny_model(), TOKENIZER, [prompt], max_new_tokens=3, special=False)
    expected = rouge(said.split("\n")[0], "born", stemmer=False).recall
    assert found.summary["neighbor_level1"] == pytest.approx(expected)
    assert found.settings["chat_template"]


def test_probes_are_local_files_where_there_is_a_folder(tmp_path):
    (tmp_path / "rwku").mkdir()
    with pytest.raises(InputError, match=r"holds no probes of RWKU\.\n"):
        load_rwku(tmp_path)
    (tmp_path / "rwku" / "forget_level2.jsonl").write_text(json.dumps(probe()) + "\n")
    assert list(load_rwku(tmp_path)) == ["forget_level2"]


def test_otherwise_all_probes_come_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.delenv("LOKU_DATA_DIR", raising=False)
    asked = serve(monkeypatch, lambda config, split: [probe(query=config)])
    for folder in (None, tmp_path):
        found = load_rwku(folder)
        assert {name: rows.rows[0]["query"] for name, rows in found.items()} == {name: name for name in PROBES}
    assert asked[:5] == [("jinzhuoran/RWKU", name, "test") for name in PROBES]
    monkeypatch.undo()
    monkeypatch.delenv("LOKU_DATA_DIR", raising=False)
    with pytest.raises(InputError, match=r"jinzhuoran/RWKU/forget_level1:test' cannot be loaded from the hub"):
        load_rwku()  # the tests are offline


DATA = Path(os.environ.get("LOKU_DATA_DIR", "/nonexistent"))


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "rwku").is_dir(), reason="needs RWKU: set LOKU_DATA_DIR to the folder with rwku")
def test_the_real_files():
    data = load_rwku(DATA)
    assert {name: len(found) for name, found in data.items()} == {
        "forget_level1": 1310,
        "forget_level2": 1142,
        "forget_level3": 2816,
        "neighbor_level1": 2316,
        "neighbor_level2": 2111,
    }
    model = tiny_model(max_position_embeddings=2048)
    found = evaluate_rwku(model, TOKENIZER, TagTemplate(), data, max_rows=3, max_new_tokens=2)
    assert set(data) <= set(found.summary)
    kinds = attack_means([row["type"] for row in data["forget_level3"].rows], [1.0] * 2816)
    assert len(kinds) == 9
