"""Measuring sets together: what is told on the way, and that answers start from the scores."""

from __future__ import annotations

import pytest
import torch

from builders import byte_level_tokenizer, tiny_model
from loku.data.encoding import Encoder
from loku.data.prompts import TagTemplate
from loku.data.sources import load_records
from loku.evaluation import generation, measuring
from loku.evaluation.measuring import Effort, measure

TOKENIZER = byte_level_tokenizer()
ROWS = [{"question": f"Where was Mira{n} born?", "answer": "Mira was born."} for n in range(3)]
TEXT = [{"text": "The quick brown fox jumps over the lazy dog."}]


def measured(model, rows=ROWS, told=None):
    encoder = Encoder(TOKENIZER, TagTemplate(), 60)
    progress = None if told is None else lambda *update: told.append(update)
    return measure(
        model, TOKENIZER, encoder, {"forget": list(load_records(rows))}, effort=Effort(None, 8), progress=progress
    )["forget"]


def test_the_reason_for_the_plain_way_is_told():
    told = []
    measured(tiny_model("llama"), told=told)
    assert {note for *_, note in told} == {"scoring", "generating"}
    told.clear()
    measured(tiny_model("mistral", sliding_window=8), told=told)
    reason = "its attention window of 8 tokens is too small for trees"
    assert {note for *_, note in told} == {f"scoring, the plain way: {reason}", "generating"}
    assert told[-1][:2] == (6, 6)


def test_answers_only_scores_and_asks_nothing_else_and_finds_the_same():
    more = {"paraphrased_question": "Mira: born where?", "paraphrased_answer": "She was born, Mira was, in a place."}
    rows = [row | more | {"perturbed_answer": ["Mira sang.", "Mira ran away."]} for row in ROWS]
    model, encoder = tiny_model(), Encoder(TOKENIZER, TagTemplate(), 60)
    told, found = [], []
    for only in (False, True):
        effort = Effort(fit_answers=True, answers_only=only)
        found.append(measure(
            model, TOKENIZER, encoder, {"forget": list(load_records(rows))}, effort=effort,
            progress=lambda *update: told.append(update),
        )["forget"])  # fmt: skip
        told.append(None)
    totals = [told[told.index(None) - 1][1], told[-2][1]]
    assert totals == [3 * (1 + 1 + 2 + 2), 3 * 2]
    for whole, answer in zip(*found, strict=True):
        assert answer.generations == whole.generations  # as long as theirs: the limit is that of all answers
        assert (answer.paraphrased, answer.perturbed, answer.asked_otherwise) == (None, [], None)
        ours, theirs = answer.numbers(), whole.numbers()
        assert not {"truth_ratio", "paraphrase_exact_match"} & set(ours)
        assert ours == pytest.approx({name: theirs[name] for name in ours}, abs=1e-5)


def test_what_is_memorised_is_not_decoded(monkeypatch):
    model = tiny_model()
    encoder = Encoder(TOKENIZER, TagTemplate(), 60)
    batch = [encoder.encode(record)[0] for record in [*load_records(ROWS), *load_records(TEXT)]]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = sum(
            model(torch.tensor([e.input_ids]), labels=torch.tensor([e.labels]), use_cache=False).loss for e in batch
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "known_start", lambda *_: [])
        expected = [row.generations for rows in (ROWS, TEXT) for row in measured(model, rows)]
    monkeypatch.setattr(generation, "decode", None)  # from here on nothing may be decoded
    found = [row.generations for rows in (ROWS, TEXT) for row in measured(model, rows)]
    assert found == expected
    assert [answer.text for (answer,) in found[:3]] == ["Mira was born."] * 3
