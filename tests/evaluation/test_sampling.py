"""Sampling: the distribution that is drawn from, independence of batches, and the figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from builders import byte_level_tokenizer, tiny_model
from conftest import rows
from loku.data.sources import load_records
from loku.errors import InputError
from loku.evaluation import sampling
from loku.evaluation.decoding import decode
from loku.evaluation.metrics import rougeL_recall
from loku.evaluation.own import evaluate_own
from loku.evaluation.sampling import sampled_recall, sampler

TOKENIZER = byte_level_tokenizer()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    logits, draws = torch.tensor([2.0, 1.0, 0.0, -1.0]), 8000
    choose = sampler(list(range(draws)), temperature)
    counts = torch.bincount(choose(logits.expand(draws, 4), list(range(draws))), minlength=4) / draws
    wanted = np.exp(logits.double().numpy() / temperature)
    wanted /= wanted.sum()
    np.testing.assert_allclose(counts.numpy(), wanted, atol=4 * np.sqrt(0.25 / draws))


def test_neighbours_change_nothing():
    model, prompts = tiny_model(), [TOKENIZER.encode(text) for text in ("Who?", "She wrote it.", "They did not, or so")]
    together = decode(model, prompts, [6, 4, 6], [0], 1, choose=sampler([7, 8, 9], 1.0))
    for prompt, limit, seed, found in zip(prompts, (6, 4, 6), (7, 8, 9), together, strict=True):
        assert decode(model, [prompt], [limit], [0], 1, choose=sampler([seed], 1.0)) == [found]
    assert decode(model, prompts[:1], [6], [0], 1, choose=sampler([8], 1.0)) != together[:1]


def test_recalls_are_those_of_the_drawn_answers():
    model, prompts = tiny_model(), [TOKENIZER.encode(text) for text in ("Who wrote it?", "Where?")]
    found = sampled_recall(model, TOKENIZER, prompts, ["She", "here"], max_new_tokens=[5, 4], samples=3, seed=2)
    assert (
        sampled_recall(
            model, TOKENIZER, prompts, ["She", "here"], max_new_tokens=[5, 4], samples=3, seed=2, batch_rows=1
        )
        == found
    )
    for row, (prompt, wanted, limit) in enumerate(zip(prompts, ("She", "here"), (5, 4), strict=True)):
        for number in range(3):
            seed = 2 * 1_000_003 + row * 3 + number
            [ids] = decode(model, [prompt], [limit], [TOKENIZER.eos_token_id], 1, choose=sampler([seed], 1.0))
            text = TOKENIZER.decode(ids, skip_special_tokens=True).strip()
            assert found[row][number] == rougeL_recall(text, wanted)


def test_a_suite_shows_the_best_and_the_mean():
    found = evaluate_own(tiny_model(), TOKENIZER, forget=load_records(rows(2)), extras=("sampling",), max_new_tokens=4)
    for row in found.sets["forget"].per_example:
        assert 0.0 <= row["sampled_rougeL_mean"] <= row["sampled_rougeL_max"] <= 1.0
    assert found.sets["forget"].metrics["sampled_rougeL_max"].mean >= 0.0
    text = load_records([{"text": "The quick brown fox jumps over the lazy dog, and so on."}])
    found = evaluate_own(tiny_model(), TOKENIZER, forget=text, extras=("sampling",), max_length=12, max_new_tokens=4)
    assert 0.0 <= found.sets["forget"].per_example[0]["sampled_rougeL_max"] <= 1.0


def test_a_model_that_cannot_be_decoded_is_refused(monkeypatch):
    monkeypatch.setattr(sampling, "decodes_plainly", lambda model: "it is odd")
    with pytest.raises(InputError, match=r"cannot sample from this model: it is odd\.\nLeave sampling out"):
        sampled_recall(tiny_model(), TOKENIZER, [[3, 4]], ["x"], max_new_tokens=[2])
