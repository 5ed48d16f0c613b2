"""The MUSE suite: prompts, cuts and scores as in the official code; the real files where they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from builders import byte_level_tokenizer, tiny_model
from loku.errors import InputError
from loku.evaluation.generation import generate
from loku.evaluation.membership import membership_auc, priv_leak
from loku.evaluation.metrics import rouge
from loku.evaluation.muse import evaluate_muse, few_shot, first_answer, load_muse
from loku.evaluation.results import read_results, write_results

TOKENIZER = byte_level_tokenizer()
QA = [{"question": f"Who is Mira{n}?", "answer": f"Mira{n} paints"} for n in range(3)]
SHOTS = [{"question": "Who?", "answer": "She."}]
FILES = {
    "verbmem/forget": [{"prompt": "The quick brown", "gt": " fox jumps over the lazy dog"}],
    "knowmem/forget_qa": QA,
    "knowmem/forget_qa_icl": SHOTS,
    "knowmem/retain_qa": QA[:2],
    "knowmem/retain_qa_icl": SHOTS,
    "privleak/forget": [{"text": f"The quick brown fox jumps {n} times"} for n in range(4)],
    "privleak/holdout": [{"text": f"Who wrote it? She wrote {n}"} for n in range(3)],
}


def write(folder, files=FILES, corpus="news"):
    for name, rows in files.items():
        path = folder / "muse" / corpus / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def data(tmp_path):
    return load_muse("news", write(tmp_path))[0]


def evaluate(data, **options):
    return evaluate_muse(tiny_model(), TOKENIZER, data, corpus="news", **options)


def test_prompts_and_cuts_are_the_official_ones():
    assert few_shot("Where?", SHOTS) == "Question: Who?\nAnswer: She.\n\nQuestion: Where?\nAnswer: "
    assert few_shot("Where?", []) == "Question: Where?\nAnswer: "
    assert first_answer("Baku\n\nQuestion: Who?") == "Baku"
    assert first_answer("Baku\nQuestion: Who?") == "Baku"
    assert first_answer("BakuQuestion: Who?") == "Baku"
    assert first_answer("\n\nBaku") == ""  # a blank line at once: nothing was said
    assert first_answer("Baku\nOos") == "Baku\nOos"


def test_memorisation_by_hand(data):
    found = evaluate(data, keep_text=True)
    model = tiny_model()
    scores = []
    for row in QA:
        ids = TOKENIZER(few_shot(row["question"], SHOTS))["input_ids"]
        [said] = generate(model, TOKENIZER, [ids], max_new_tokens=32)
        text = first_answer(TOKENIZER.decode(list(said.ids), skip_special_tokens=True))
        scores.append(rouge(text, row["answer"], stemmer=False).f1)
    assert found.summary["knowmem_forget"] == pytest.approx(100 * sum(scores) / 3)
    [said] = generate(model, TOKENIZER, [TOKENIZER("The quick brown")["input_ids"]], max_new_tokens=128)
    expected = 100 * rouge(said.text, " fox jumps over the lazy dog", stemmer=False).f1
    assert found.summary["verbmem_forget"] == pytest.approx(expected)
    assert len(found.texts) == 6
    assert {row["set"] for row in found.texts} == {"verbmem_forget", "knowmem_forget", "knowmem_retain"}


def test_the_continuation_is_compared_with_the_first_128_tokens(data, monkeypatch):
    monkeypatch.setattr("loku.evaluation.muse.VERBMEM_TOKENS", 3)
    text = evaluate(data, keep_text=True).texts[0]
    assert TOKENIZER(FILES["verbmem/forget"][0]["gt"])["input_ids"][:3] == TOKENIZER(text["answer"])["input_ids"]


def test_leak_against_the_benchmarks_model_and_against_a_reference(data, tmp_path):
    found = evaluate(data)
    rows = [[row["min_k"] for row in found.sets[name].per_example] for name in ("forget", "holdout")]
    auc = membership_auc(*rows)
    assert found.summary["mia_auc_min_k"] == auc
    # MUSE: A = P(holdout scores below forget), A_ref = 0.4772 for News.
    official = sum((h < f) + 0.5 * (h == f) for f in rows[0] for h in rows[1]) / 12
    assert found.summary["priv_leak"] == pytest.approx(100 * (official - 0.4772) / 0.4772)
    assert "fits no other target" in found.warnings[0]
    other = evaluate_muse(tiny_model(seed=1), TOKENIZER, data, corpus="news")
    path = write_results(other, tmp_path)
    found = evaluate(data, reference=read_results(path))
    assert found.summary["priv_leak"] == pytest.approx(priv_leak(auc, other.summary["mia_auc_min_k"]))
    assert found.warnings == []
    assert "mia_auc_zlib_distance" in found.summary


def test_parts_that_are_missing_are_named(tmp_path):
    folder = write(tmp_path, {name: rows for name, rows in FILES.items() if name.startswith("knowmem")}, "books")
    data, warnings = load_muse("books", folder)
    assert warnings == [
        "Not measured, since these files are missing: verbmem/forget, privleak/forget, privleak/holdout."
    ]
    found = evaluate_muse(tiny_model(), TOKENIZER, data, corpus="books", max_rows=1, warnings=warnings)
    assert set(found.summary) == {"knowmem_forget", "knowmem_retain"}
    assert found.sets["knowmem_forget"].rows == 1
    assert found.warnings == warnings
    del data["knowmem_forget_shots"]  # then without demonstrations
    assert evaluate_muse(tiny_model(), TOKENIZER, data, corpus="books").summary


def test_what_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--corpus 'new' is not one of MUSE's\.\nDid you mean 'news'"):
        load_muse("new", tmp_path)
    (tmp_path / "muse" / "news").mkdir(parents=True)
    with pytest.raises(InputError, match=r"holds no part of MUSE\.\nGive --data-dir"):
        load_muse("news", tmp_path)
    write(tmp_path, {"verbmem/forget": [{"prompt": "x"}]})
    with pytest.raises(InputError, match=r"row 0 has no text in the column 'gt'\.\nGive rows with the columns prompt"):
        load_muse("news", tmp_path)


DATA = Path(os.environ.get("LOKU_DATA_DIR", "/nonexistent"))


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "muse").is_dir(), reason="needs MUSE: set LOKU_DATA_DIR to the folder with muse")
def test_the_real_files():
    data, warnings = load_muse("news", DATA)
    assert (len(data["knowmem_forget"]), len(data["knowmem_forget_shots"]), warnings) == (100, 10, [])
    found = evaluate_muse(
        tiny_model(max_position_embeddings=4096), TOKENIZER, data, corpus="news", max_rows=2, max_length=256
    )
    assert {"verbmem_forget", "knowmem_forget", "knowmem_retain", "priv_leak"} <= set(found.summary)
    assert list(load_muse("books", DATA)[0]) == [name for name in data if name.startswith("knowmem")]
