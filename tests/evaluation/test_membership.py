"""The membership attacks against obvious references: scores, orientation, distances from the retain-only model."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import byte_level_tokenizer, tiny_model
from loku.data.encoding import IGNORE, Encoder
from loku.data.prompts import TagTemplate
from loku.data.sources import load_records
from loku.errors import InputError
from loku.evaluation import membership
from loku.evaluation.extras import add_extras, parse_extras
from loku.evaluation.gradients import gradient_norms
from loku.evaluation.measuring import Effort, measure
from loku.evaluation.own import evaluate_own
from loku.evaluation.results import write_results
from loku.evaluation.scoring import score

relaxed = settings(deadline=None)
TOKENIZER = byte_level_tokenizer()
FORGET = [{"question": f"Where was Mira{n} born?", "answer": f"Mira{n} was born in Tarnhollow."} for n in range(4)]
HOLDOUT = [{"question": f"What paints Odo{n}?", "answer": f"Odo{n} paints lighthouses."} for n in range(3)]


@relaxed
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_membership_auc_counts_pairs(members, others):
    pairs = [(m < o) + 0.5 * (m == o) for m in members for o in others]
    assert membership.membership_auc(members, others) == pytest.approx(sum(pairs) / len(pairs))


@relaxed
@given(st.lists(st.floats(-20.0, 0.0), min_size=1, max_size=12), st.sampled_from([0.1, 0.4, 1.0]))
def test_min_k(logprobs, share):
    lowest = sorted(logprobs)[: max(1, int(share * len(logprobs)))]
    assert membership.min_k(logprobs, share) == pytest.approx(-sum(lowest) / len(lowest))
    assert membership.min_k_plus_plus(logprobs, [0.0] * len(logprobs), [1.0] * len(logprobs), share) == pytest.approx(
        membership.min_k(logprobs, share)
    )


def test_scores_at_the_edges():
    assert membership.min_k([-3.0]) == 3.0  # one token
    assert math.isnan(membership.min_k([]))
    assert math.isnan(membership.min_k_plus_plus([], [], []))
    assert membership.min_k_plus_plus([-1.0], [-1.5], [0.0]) == pytest.approx(-0.5 / math.sqrt(1e-6))
    assert membership.zlib_score(2.0, "Mira") == 2.0 / len(zlib.compress(b"Mira"))
    assert membership.zlib_score(2.0, "") == 2.0 / len(zlib.compress(b""))
    assert membership.zlib_score(1.0, "\ud800") > 0  # half a surrogate pair


def test_min_k_plus_plus_of_a_model_token_by_token():
    model = tiny_model()
    example = Encoder(TOKENIZER, TagTemplate(), 500).encode(load_records(FORGET)[0])[0]
    [found] = score(model, [example], pad_id=0, eos_ids=[TOKENIZER.eos_token_id])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
    scores = []
    places = [place for place, label in enumerate(example.labels) if label != IGNORE and place]
    for place in places[:-1]:  # without the end of sequence
        shares = logits[place - 1].softmax(0)
        logs = shares.log()
        mu = float((shares * logs).sum())
        variance = float((shares * logs**2).sum()) - mu**2
        scores.append((float(logs[example.labels[place]]) - mu) / math.sqrt(max(variance, 1e-6)))
    lowest = sorted(scores)[: max(1, int(0.4 * len(scores)))]
    part = found.answer
    ours = membership.min_k_plus_plus(found.logprobs[part], found.means[part], found.variances[part])
    assert ours == pytest.approx(-sum(lowest) / len(lowest), rel=1e-4)


def test_impossible_tokens_leave_the_variance_finite():
    class Silent(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **inputs):
            output = self.model(**inputs)
            output.logits[..., 5] = float("-inf")
            return output

    example = Encoder(TOKENIZER, TagTemplate(), 500).encode(load_records(FORGET)[0])[0]
    [found] = score(Silent(tiny_model()), [example], pad_id=0)
    assert np.isfinite(found.variances).all()
    assert (found.variances >= 0).all()


def test_priv_leak_is_oriented_as_in_muse():
    assert membership.priv_leak(1.0, 0.5) == -100.0  # membership fully visible
    assert membership.priv_leak(0.5, 0.5) == 0.0
    assert membership.priv_leak(0.2, 0.5) > 0  # pushed too far
    assert math.isnan(membership.priv_leak(0.4, 1.0))


def rows(*nlls):
    return [{"index": place, "nll": nll} for place, nll in enumerate(nlls)]


def test_the_reference_attack_takes_the_references_loss_away():
    members, others = rows(1.0, 2.0), rows(1.5)
    theirs = rows(3.0, 3.0), rows(2.5)
    assert membership.reference_auc(members, others, *theirs) == membership.membership_auc([-2.0, -1.0], [-1.0])
    assert membership.reference_auc(members, others, rows(3.0), theirs[1]) is None  # other rows
    assert membership.reference_auc([], [], [], []) is None


def test_attacks_need_their_score_in_every_row():
    assert membership.attack_aucs(rows(1.0), rows(2.0)) == {"mia_auc": 1.0}
    assert membership.attack_aucs([], rows(2.0)) == {}
    assert membership.distances({"mia_auc": 0.9, "mia_auc_zlib": 0.5}, {"mia_auc": 0.4}) == {
        "mia_auc_distance": pytest.approx(0.5)
    }


def evaluate(seed=0, **options):
    return evaluate_own(
        tiny_model(seed=seed), TOKENIZER, forget=load_records(FORGET), holdout=load_records(HOLDOUT),
        template=TagTemplate(), max_new_tokens=3, **options,
    )  # fmt: skip


def test_a_reference_gives_distances_and_its_own_attack(tmp_path):
    clean = evaluate(seed=1)
    found = evaluate(reference=write_results(clean, tmp_path)).summary
    for attack in ("mia_auc", "mia_auc_zlib", "mia_auc_min_k", "mia_auc_min_k_plus_plus"):
        assert found[f"{attack}_distance"] == pytest.approx(abs(found[attack] - clean.summary[attack]))
    assert 0 <= found["mia_auc_reference"] <= 1
    assert evaluate(seed=1, reference=tmp_path).summary["mia_auc_reference"] == 0.5  # against itself


def slow_norm(model, example, p):
    model.zero_grad()
    logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
    places = [place for place, label in enumerate(example.labels) if label != IGNORE and place][:-1]
    loss = -sum(logits[place - 1].log_softmax(0)[example.labels[place]] for place in places) / len(places)
    loss.backward()
    norms = [weight.grad.norm(p=p).item() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    return sum(norms) / len(norms)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_gradient_norms_one_by_one(p):
    model = tiny_model()
    examples = [Encoder(TOKENIZER, TagTemplate(), 500).encode(record)[0] for record in load_records(FORGET)]
    answers = [found.answer for found in score(model, examples, pad_id=0, eos_ids=[TOKENIZER.eos_token_id])]
    expected = [slow_norm(tiny_model(), example, p) for example in examples]
    next(iter(model.parameters())).requires_grad_(False)
    model.train()
    assert gradient_norms(model, examples, answers, p=p) == pytest.approx(expected, rel=1e-4)
    assert not next(iter(model.parameters())).requires_grad
    assert all(weight.grad is None for weight in model.parameters())
    assert model.training


def test_gradient_norms_need_weights_of_a_float_type():
    with pytest.raises(InputError, match="has no weights of a float type"):
        gradient_norms(torch.nn.Module(), [], [])


def test_gradient_norms_join_the_attacks_on_request():
    found = evaluate(extras=("gradient_norm",))
    norms = [[row["gradient_norm"] for row in found.sets[name].per_example] for name in ("forget", "holdout")]
    assert found.summary["mia_auc_gradient_norm"] == membership.membership_auc(*norms)
    assert "gradient_norm" not in found.sets["forget"].metrics
    assert "mia_auc_gradient_norm" not in evaluate().summary


def test_what_a_reference_model_makes_of_the_output():
    model, other = tiny_model(), tiny_model(seed=1)
    encoder = Encoder(TOKENIZER, TagTemplate(), 500)
    effort = Effort(None, 5)
    texts = [{"text": "The quick brown fox jumps over the lazy dog, " * 4}]
    sets = {"forget": load_records(FORGET).records, "general": load_records(texts).records}
    measured = measure(model, TOKENIZER, encoder, sets, effort=effort)
    measured["forget"][0].generations = []
    measured["forget"][0].prompts = []
    add_extras(model, TOKENIZER, TagTemplate(), measured, reference_model=other, effort=effort)
    for row in (*measured["forget"][1:], *measured["general"]):
        total, tokens = 0.0, 0
        for prompt, answer in zip(row.prompts, row.generations, strict=True):
            with torch.no_grad():
                logits = other(input_ids=torch.tensor([[*prompt, *answer.ids]])).logits[0].double().log_softmax(-1)
            for place, token in enumerate(answer.ids, start=len(prompt)):
                total, tokens = total - float(logits[place - 1, token]), tokens + 1
        assert row.numbers()["output_nll"] == pytest.approx(total / tokens, rel=1e-5)
    assert "output_nll" not in measured["forget"][0].more  # nothing was said


def test_a_reference_model_with_another_vocabulary_is_refused():
    with pytest.raises(InputError, match=r"--reference-model has a vocabulary of 512 tokens, the model one of 400\."):
        evaluate(reference_model=tiny_model(vocab_size=512))


def test_extras_are_checked():
    assert parse_extras("memo, gradient_norm") == ("memo", "gradient_norm")
    assert parse_extras("") == ()
    with pytest.raises(InputError, match=r"--extras 'memmo' is not known\.\nDid you mean 'memo'"):
        parse_extras("memmo")
