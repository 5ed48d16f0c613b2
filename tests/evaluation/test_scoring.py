"""The scoring pass against one sequence at a time in float64, and what must not matter to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from builders import ARCHITECTURES, byte_level_tokenizer, tiny_model
from loku.data.encoding import IGNORE, Example
from loku.errors import InputError
from loku.evaluation import distributions
from loku.evaluation.modes import end_ids, evaluating
from loku.evaluation.scoring import length_batches, score

PAD = byte_level_tokenizer().pad_token_id
EOS = byte_level_tokenizer().eos_token_id


def example(seed, length=12, prompt=5, *, end=True, generation=None):
    ids = torch.randint(2, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    ids = [*ids, EOS] if end else ids
    return Example(seed, ids, [IGNORE] * prompt + ids[prompt:], prompt, prompt if generation is None else generation)


EXAMPLES = [example(seed, length=6 + 5 * (seed % 4), prompt=2 + seed % 4) for seed in range(9)]


def reference(model, item):
    """Log-probabilities, hits and entropies of one sequence, without padding, token by token."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([item.input_ids])).logits[0].double()
    logprobs, hits, entropies = [], [], []
    for place in range(1, len(item.input_ids)):
        if item.labels[place] == IGNORE:
            continue
        shares = [math.exp(value) for value in (logits[place - 1] - logits[place - 1].max()).tolist()]
        shares = [share / sum(shares) for share in shares]
        logprobs.append(math.log(shares[item.labels[place]]))
        hits.append(shares.index(max(shares)) == item.labels[place])
        entropies.append(-sum(share * math.log(share) for share in shares))
    return logprobs, hits, sum(entropies) / len(entropies)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_agree_with_one_sequence_at_a_time_in_float64(architecture):
    model = tiny_model(architecture)
    found = score(model, EXAMPLES[:4], pad_id=PAD, eos_ids=[EOS])
    double = tiny_model(architecture).double()
    for item, got in zip(EXAMPLES, found, strict=False):
        logprobs, hits, entropy = reference(double, item)
        np.testing.assert_allclose(got.logprobs, logprobs, rtol=2e-6, atol=2e-6)
        assert got.hits.tolist() == hits
        assert got.nll == pytest.approx(-sum(logprobs), rel=2e-6)
        assert got.mean_nll == pytest.approx(-sum(logprobs) / len(logprobs), rel=2e-6)
        assert got.entropy == pytest.approx(entropy, rel=2e-6)
        assert got.tokens == len(logprobs) == len(got.answer_hits) + 1  # the end of sequence is no answer token
        assert got.index == item.index


def test_batching_and_order_do_not_matter():
    model = tiny_model()
    together = score(model, EXAMPLES, pad_id=PAD)
    for other in (
        score(model, EXAMPLES, pad_id=PAD, batch_tokens=1),
        score(model, EXAMPLES[::-1], pad_id=PAD, batch_tokens=50)[::-1],
        score(model, EXAMPLES, pad_id=EOS),
    ):
        for one, two in zip(together, other, strict=True):
            assert one.index == two.index
            assert one.mean_nll == pytest.approx(two.mean_nll, abs=1e-6)
            np.testing.assert_allclose(one.logprobs, two.logprobs, atol=2e-6)
            assert one.hits.tolist() == two.hits.tolist()


def test_half_precision_is_widened_before_the_softmax(monkeypatch):
    model = tiny_model().bfloat16()
    monkeypatch.setattr(distributions, "LEAST_ROWS", 2)  # a few positions at a time
    monkeypatch.setattr(distributions, "LOGITS_CPU", 1000)
    monkeypatch.setattr(distributions, "STRIP_CPU", 400)
    for item, got in zip(EXAMPLES, score(model, EXAMPLES, pad_id=PAD, batch_tokens=1), strict=True):
        logprobs, _, _ = reference(model, item)
        np.testing.assert_allclose(got.logprobs, logprobs, rtol=1e-5, atol=1e-6)


def test_hits_are_what_greedy_decoding_would_say():
    model = tiny_model()
    item = example(3, end=False)
    for place in range(item.prompt_length, len(item.input_ids)):  # make the answer the model's own
        with torch.no_grad():
            item.input_ids[place] = model(torch.tensor([item.input_ids[:place]])).logits[0, -1].argmax().item()
        item.labels[place] = item.input_ids[place]
    (got,) = score(model, [item], pad_id=PAD, eos_ids=[EOS])
    assert got.hits.all()


@pytest.mark.parametrize(
    ("item", "kept"),
    [
        (example(0, length=9, prompt=5), 4),  # without the end of sequence
        (example(0, length=9, prompt=5, end=False), 4),  # truncated before its end
        (example(0, length=9, prompt=5, generation=7), 2),  # without the supervised answer tag
        (example(0, length=6, prompt=5), 1),  # one token
        (example(0, length=5, prompt=5), 0),  # an empty answer: only the end of sequence
    ],
)
def test_the_answer_proper(item, kept):
    (got,) = score(tiny_model(), [item], pad_id=PAD, eos_ids=[EOS])
    assert len(got.answer_hits) == kept
    assert got.tokens == len(item.input_ids) - 5


def test_a_newline_after_the_end_of_a_turn_is_no_answer_token():
    item = example(0, length=9, prompt=5)
    item.input_ids.append(7)
    item.labels.append(7)
    (got,) = score(tiny_model(), [item], pad_id=PAD, eos_ids=[EOS])
    assert (got.tokens, len(got.answer_hits)) == (6, 4)


def test_nothing_to_score_is_refused_and_no_examples_are_fine():
    item = example(4)
    empty = Example(4, item.input_ids, [item.labels[0]] + [IGNORE] * (len(item.labels) - 1), 0, 0)
    with pytest.raises(InputError, match=r"Row 4 has no supervised token to score\.\nGive every row an answer"):
        score(tiny_model(), [item, empty], pad_id=PAD)
    assert score(tiny_model(), [], pad_id=PAD) == []


def test_batches_hold_at_most_their_tokens_and_every_position_once():
    lengths = [3, 9, 4, 4, 12, 1]
    batches = length_batches(lengths, 12)
    assert batches == [[4], [1], [2, 3, 0], [5]]
    assert sorted(position for batch in length_batches(lengths, 1) for position in batch) == list(range(6))


def test_modes_and_gradients_are_left_as_they_were():
    model = tiny_model()
    model.train()
    model.model.layers[0].mlp.eval()
    before = [module.training for module in model.modules()]
    seen = []
    handle = model.model.layers[1].register_forward_hook(
        lambda module, *_: seen.append((module.training, torch.is_grad_enabled()))
    )
    score(model, EXAMPLES[:2], pad_id=PAD)
    assert set(seen) == {(False, False)}
    handle.remove()
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == before


def test_the_tokens_that_end_an_answer():
    model, tokenizer = tiny_model(), byte_level_tokenizer()
    assert end_ids(model, tokenizer) == [EOS]
    model.generation_config.eos_token_id = [7, EOS]
    assert end_ids(model, tokenizer) == [EOS, 7]


def test_progress_counts_every_example():
    seen = []
    score(tiny_model(), EXAMPLES, pad_id=PAD, batch_tokens=60, progress=seen.append)
    assert sum(seen) == len(EXAMPLES)
    assert len(seen) > 1
