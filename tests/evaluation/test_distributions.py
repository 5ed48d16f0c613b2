"""Statistics of labels in blocks against whole distributions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loku.evaluation import distributions
from loku.evaluation.distributions import label_statistics
from loku.losses.lm_head import HeadSpec


def slow(logits, sources, labels):
    """The four statistics by definition."""
    rows = []
    for source, label in zip(sources.tolist(), labels.tolist(), strict=True):
        logp = logits[source].double().log_softmax(0)
        p = logp.exp()
        mean = (p * logp)[p > 0].sum()
        variance = (p * (logp - mean) ** 2)[p > 0].sum()
        rows.append([logp[label], float(logits[source].argmax() == label), mean, variance])
    return torch.tensor(rows, dtype=torch.float64).T


def case(rows=37, vocab=203, d=16, spread=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(d, vocab)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocab, d, generator=generator) * spread / d**0.5)
        head.bias.copy_(torch.randn(vocab, generator=generator))
    states = torch.randn(rows, d, generator=generator)
    sources = torch.arange(rows).repeat_interleave(torch.randint(1, 4, (rows,), generator=generator))
    return states, head, sources, torch.randint(0, vocab, sources.shape, generator=generator)


def check(found, expected, atol=2e-6):
    for name, got, want in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=atol, msg=name)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("vocab", "rows"), [(203, 37), (64, 1), (5, 20), (128, 300)])
@torch.no_grad()
def test_blocks_agree_with_whole_distributions(monkeypatch, vocab, rows, softcap):
    states, head, sources, labels = case(rows, vocab)
    logits = head(states)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = slow(logits, sources, labels)
    check(label_statistics(states, HeadSpec(head, softcap), sources, labels), expected)
    check(label_statistics(logits, None, sources, labels), expected)
    monkeypatch.setattr(distributions, "LEAST_ROWS", 5)
    monkeypatch.setattr(distributions, "LOGITS_CPU", 7 * vocab)
    monkeypatch.setattr(distributions, "STRIP_CPU", 3 * vocab)
    check(label_statistics(states, HeadSpec(head, softcap), sources, labels), expected)


@torch.no_grad()
def test_given_logits_are_not_written_to_and_double_stays_double():
    states, head, sources, labels = case()
    logits = head(states)
    before = logits.clone()
    label_statistics(logits, None, sources, labels)
    assert torch.equal(logits, before)
    found = label_statistics(states.double(), HeadSpec(head.double()), sources, labels)
    assert found.logprobs.dtype == torch.float64
    torch.testing.assert_close(
        torch.stack(list(found)), slow(head(states.double()), sources, labels), rtol=1e-12, atol=0
    )


def test_the_first_of_equals_is_the_choice():
    logits = torch.zeros(4, 150)
    logits[0, [20, 90, 140]] = 1.0
    logits[1, [148, 149]] = 1.0
    logits[2, 149] = 1.0
    sources, labels = torch.tensor([0, 0, 1, 1, 2, 3, 3]), torch.tensor([20, 90, 148, 149, 149, 0, 1])
    assert label_statistics(logits, None, sources, labels).hits.tolist() == [1, 0, 1, 0, 1, 1, 0]


def test_memorised_and_impossible_tokens():
    logits = torch.full((2, 70), -torch.inf)
    logits[0, 3], logits[0, 4] = 200.0, 0.0
    logits[1, :2] = 0.0
    found = label_statistics(logits, None, torch.tensor([0, 0, 1, 1]), torch.tensor([3, 4, 0, 69]))
    assert found.logprobs[:2].tolist() == [0.0, -200.0]
    torch.testing.assert_close(found.logprobs[2], torch.tensor(0.5).log())
    assert found.logprobs[3] == -torch.inf
    assert found.variances.tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    assert torch.isfinite(found.means).all()


def test_no_labels_are_fine():
    none = torch.zeros(0, dtype=torch.long)
    assert label_statistics(torch.zeros(0, 8), None, none, none).logprobs.shape == (0,)
