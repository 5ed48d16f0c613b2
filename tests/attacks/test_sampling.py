"""Sampling: draws depend on the seed alone, and the best of them counts."""

from __future__ import annotations

import pytest
import torch

from builders import byte_level_tokenizer, tiny_model
from loku.attacks.prompting import Asked, answer_all
from loku.attacks.sampling import best_of, sample
from loku.errors import InputError
from loku.evaluation.generation import generate
from loku.evaluation.metrics import normalise


def test_a_low_temperature_is_greedy():
    model, tokenizer = tiny_model(), byte_level_tokenizer()
    prompts, limits = [[5, 6, 7], [8, 9], [11]], [4, 6, 3]
    greedy = generate(model, tokenizer, prompts, max_new_tokens=limits)
    drawn = sample(model, tokenizer, prompts, limits, count=2, temperature=1e-6)
    assert [[tuple(ids) for ids in own] for own in drawn] == [[answer.ids] * 2 for answer in greedy]


def test_samples_depend_on_the_seed_alone():
    model, tokenizer = tiny_model().train(), byte_level_tokenizer()
    arguments = (model, tokenizer, [[5, 6, 7], [8, 9]], [8, 8])
    torch.manual_seed(1)
    first = sample(*arguments, count=4, temperature=2.0, seed=3)
    before = torch.random.get_rng_state()
    again = sample(*arguments, count=4, temperature=2.0, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == again != sample(*arguments, count=4, temperature=2.0, seed=4)
    assert len({tuple(ids) for ids in first[0]}) > 1
    assert model.training


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_answers_end_where_the_models_context_does(architecture):
    length = {"n_positions": 24} if architecture == "gpt2" else {"max_position_embeddings": 24}
    model, tokenizer = tiny_model(architecture, **length), byte_level_tokenizer()
    prompts = [[5] * 10, [6] * 20, [7, 8]]
    drawn = sample(model, tokenizer, prompts, [72, 72, 30], count=3)
    for prompt, own in zip(prompts, drawn, strict=True):
        assert all(len(prompt) + len(ids) <= 24 for ids in own)


def test_more_samples_never_give_less_away():
    model, tokenizer = tiny_model(), byte_level_tokenizer()
    drawn = sample(model, tokenizer, [[5, 6, 7], [8, 9]], [12, 12], count=16)
    said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn[0]]
    late = next(text for text in said[3:] if normalise(text))
    asked = [Asked(7, [5, 6, 7], (late, "the dog"), 12), Asked(9, [8, 9], ("zzz",), 12)]
    few, many = (best_of(model, tokenizer, asked, count=count, temperature=1.0) for count in (1, 16))
    assert [row["index"] for row in many] == [7, 9]
    assert set(many[0]) == {"index", "found", "rougeL_recall", "repetition"}
    assert [row["found"] for row in many] == [1.0, 0.0]
    assert few[0]["found"] == 0.0
    assert few[0]["rougeL_recall"] <= many[0]["rougeL_recall"]
    greedy = best_of(model, tokenizer, asked, count=1, temperature=1e-6)
    assert greedy == answer_all(model, tokenizer, asked)


def test_a_model_that_cannot_be_decoded_row_by_row_is_refused(monkeypatch):
    monkeypatch.setattr("loku.attacks.sampling.decodes_plainly", lambda model: "its cache is odd")
    with pytest.raises(InputError, match="cannot be sampled: its cache is odd"):
        sample(tiny_model(), byte_level_tokenizer(), [[1]], [2])
