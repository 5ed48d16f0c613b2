"""MEMO against its definition, cut by cut."""

from __future__ import annotations

import pytest

from builders import byte_level_tokenizer, tiny_model
from loku.data.prompts import ChatTemplate, TagTemplate
from loku.data.sources import load_records
from loku.evaluation.generation import generate
from loku.evaluation.memo import memo_cuts, memo_scores
from loku.evaluation.metrics import rouge
from loku.evaluation.own import evaluate_own

TOKENIZER = byte_level_tokenizer()
ROWS = [{"question": "Where was Mira born?", "answer": "Mira was born."}, {"question": "Q?", "answer": "B"}]


def test_cuts_follow_every_fifth_character():
    assert memo_cuts("Who?", "abcdefgh") == [("Who?", "a", "bcdefgh"), ("Who?", "abcdef", "gh")]
    assert memo_cuts("Who is", "A.", mode="prefix") == [("W", "", "ho is A.")]
    assert memo_cuts("Who?", "a") == memo_cuts("Who?", "") == []  # one character cannot be cut
    with pytest.raises(ValueError, match="takes one of suffix, prefix"):
        memo_cuts("Q", "A", mode="middle")


@pytest.mark.parametrize("mode", ["suffix", "prefix"])
def test_scores_are_means_over_cuts(mode):
    model = tiny_model()
    found = memo_scores(model, TOKENIZER, TagTemplate(), load_records(ROWS).records, mode=mode, max_new_tokens=6)
    precisions, recalls = [], []
    for question, beginning, rest in memo_cuts(*ROWS[0].values(), mode=mode):
        text = question if mode == "prefix" else f"Question: {question}\nAnswer: {beginning}"
        [said] = generate(model, TOKENIZER, [TOKENIZER(text)["input_ids"]], max_new_tokens=6)
        score = rouge(said.text, rest, "rouge1")
        precisions.append(score.precision)
        recalls.append(score.recall)
    assert found[0] == pytest.approx((sum(precisions) / len(precisions), sum(recalls) / len(recalls)))
    assert (found[1] is None) == (mode == "suffix")  # a one-letter answer has no cut


def test_rows_of_other_formats():
    texts = load_records([{"text": "The quick brown fox."}]).records
    assert memo_scores(tiny_model(), TOKENIZER, TagTemplate(), texts) == [None]
    verbatim = load_records([{"prompt": "Mira was", "completion": " born."}]).records
    tokenizer = byte_level_tokenizer.__wrapped__()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    for records, template in ((verbatim, ChatTemplate()), (load_records(ROWS).records, ChatTemplate())):
        found = memo_scores(tiny_model(), tokenizer, template, records, max_new_tokens=2)
        assert 0 <= found[0].precision <= 1


def test_memo_is_measured_on_request():
    found = evaluate_own(
        tiny_model(), TOKENIZER, forget=load_records(ROWS), template=TagTemplate(), max_new_tokens=2, extras=("memo",)
    )
    assert {"memo_precision", "memo_recall"} <= set(found.sets["forget"].metrics)
    assert "memo_recall" not in found.sets["forget"].per_example[1]
