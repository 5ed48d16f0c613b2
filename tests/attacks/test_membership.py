"""Membership: every attack's numbers are the evaluation's own, and scores are distances from the retain-only model."""

from __future__ import annotations

import copy
import zlib

import pytest

from builders import byte_level_tokenizer, tiny_model
from conftest import rows
from loku.attacks.membership import NUMBERS, member_numbers, membership_scores
from loku.data.encoding import Encoder
from loku.data.prompts import ChatTemplate, TagTemplate
from loku.data.sources import load_records
from loku.evaluation.membership import ATTACKS, REFERENCE_ATTACK, membership_auc
from loku.evaluation.own import evaluate_own


@pytest.mark.parametrize("kind", ["questions", "text"])
def test_numbers_are_those_of_the_evaluation(kind):
    given = rows(4) if kind == "questions" else [{"text": f"Mira Voss counts {i} lighthouses. " * 4} for i in range(3)]
    records = load_records(given)
    model, tokenizer = tiny_model(), byte_level_tokenizer()
    found = member_numbers(model, tokenizer, Encoder(tokenizer, TagTemplate(), 40), list(records))
    results = evaluate_own(
        model, tokenizer, forget=records, template=TagTemplate(), max_length=40, max_new_tokens=2,
        extras=("gradient_norm",),
    )  # fmt: skip
    for ours, theirs in zip(found, results.sets["forget"].per_example, strict=True):
        assert set(ours) == {"index", *NUMBERS}
        assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=1e-4)


def test_of_a_conversation_the_last_answer_counts_and_not_what_is_said_after_it():
    turns = [("user", "Where was Mira Voss born?"), ("assistant", "In Tarnhollow, by the sea."), ("user", "ok")]
    given = [{"messages": [{"role": role, "content": said} for role, said in turns]}]
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    model, records = tiny_model(), load_records(given)
    found = member_numbers(model, tokenizer, Encoder(tokenizer, ChatTemplate(None), 200), list(records))[0]
    scored = len(zlib.compress(b"In Tarnhollow, by the sea."))
    assert found["zlib"] == pytest.approx(found["nll"] / scored, rel=1e-5)


def test_scores_compare_the_three_models():
    def side(values):
        return [{"index": place} | dict.fromkeys(NUMBERS, value) for place, value in enumerate(values)]

    members = {
        "target": side([0.1, 0.2, 0.1, 0.3] * 8), "unlearned": side([1.0, 2.5, 0.5, 1.1] * 8),
        "retain_only": side([1.1, 2.1, 2.9, 1.9] * 8),
    }  # fmt: skip
    others = {
        "target": side([1.0, 2.0, 3.0] * 6), "unlearned": side([1.2, 2.2, 3.2] * 6),
        "retain_only": side([1.0, 2.0, 3.0] * 6),
    }  # fmt: skip
    found = membership_scores(members, others)
    assert set(found) == {*ATTACKS, REFERENCE_ATTACK}
    _, aucs = found["mia_auc"]
    for role, own in members.items():
        scores = [[row["nll"] for row in rows_] for rows_ in (own, others[role])]
        assert aucs[role] == pytest.approx(membership_auc(*scores))
    assert found[REFERENCE_ATTACK][1]["retain_only"] == 0.5
    assert 0.1 < found["mia_auc"][0].raw < 0.9
    assert found["mia_auc"][0].raw == pytest.approx(
        abs(aucs["unlearned"] - aucs["retain_only"]) / abs(aucs["target"] - aucs["retain_only"])
    )


def test_attacks_without_numbers_are_left_out():
    side = {
        role: [{"index": 0, "nll": 1.0}, {"index": 1, "nll": 2.0}] for role in ("target", "unlearned", "retain_only")
    }
    assert set(membership_scores(side, side)) == {"mia_auc", REFERENCE_ATTACK}
