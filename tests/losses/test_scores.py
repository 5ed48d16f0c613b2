"""Scores from logits against the float64 reference, and the exactness of what is formed from them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scores_reference as slow
from loku.errors import InputError
from loku.losses.scores import TokenScores, scores_from_logits


def batch(seed=0, rows=3, length=6, vocab=7, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, length, vocab, generator=generator) * scale).to(dtype)
    labels = torch.randint(0, vocab, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.4] = -100
    labels[:, 1] = torch.randint(0, vocab, (rows,), generator=generator)
    return logits, labels


def one_position(z, y):
    """Scores of a single position with logits z and label y; z gets a gradient."""
    z = z.clone().requires_grad_()
    logits = torch.stack([z, torch.zeros_like(z)]).unsqueeze(0)
    return z, scores_from_logits(logits, torch.tensor([[-100, y]]), need=slow.EXTRAS)


@pytest.mark.parametrize("field", slow.FIELDS)
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_agree_with_float64(field, seed):
    logits, labels = batch(seed)
    fast_logits, slow_logits = logits.clone().requires_grad_(), logits.double().requires_grad_()
    value = getattr(scores_from_logits(fast_logits, labels, need=slow.EXTRAS), field)
    expected = slow.scores(slow_logits, labels)[field]
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    direction = torch.randn(len(expected), generator=torch.Generator().manual_seed(seed))
    (value * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(fast_logits.grad.double(), slow_logits.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("field", ["target", "runner_up", "spread", "mean_logit"])  # expected_other stops a gradient
def test_gradcheck(field):
    logits, labels = batch(1, rows=2, length=4, dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: getattr(scores_from_logits(z, labels, need=slow.EXTRAS), field), logits)


def test_what_is_formed_from_the_scores_is_the_softmax():
    logits, labels = batch(2, dtype=torch.float64)
    scores = scores_from_logits(logits, labels)
    for i, (b, t) in enumerate((labels[:, 1:] != -100).nonzero().tolist()):
        p = logits[b, t].softmax(0)
        y = int(labels[b, t + 1])
        others = torch.cat([p[:y], p[y + 1 :]])
        expected = {
            "label_prob": p[y],
            "label_logprob": p[y].log(),
            "label_log_odds": (p[y] / (1 - p[y])).log(),
            "runner_up_prob": others.max(),
            "runner_up_logprob": others.max().log(),
            "logsumexp": logits[b, t].logsumexp(0),
            "logsumexp_other": torch.cat([logits[b, t, :y], logits[b, t, y + 1 :]]).logsumexp(0),
            "largest": logits[b, t].max(),
        }
        for name, value in expected.items():
            torch.testing.assert_close(getattr(scores, name)[i], value)
        assert scores.targets[i] == y
        assert scores.sequence[i] == b
    assert (scores.batch_size, scores.vocab_size) == (3, 7)
    assert len(scores) == int((labels[:, 1:] != -100).sum())


@pytest.mark.parametrize("gap", [5.0, 12.0, 20.0, 30.0])
def test_a_memorised_token_keeps_its_gradient(gap):
    """1 - p_y down to 1e-13, of logits around 20: the gradient is right relative to its own tiny size."""
    z = torch.tensor([20.0, 20.0 + gap, 19.0, 17.5])
    single, scores = one_position(z, 1)
    (1 + scores.label_prob - scores.runner_up_prob).sum().backward()
    p = z.double().softmax(0)
    rest = p[[0, 2, 3]].sum()  # 1 - p_y without cancellation
    closed = p * (p[0] - p[1])
    closed[1] = p[1] * (rest + p[0])
    closed[0] = -p[0] * (1 + p[1] - p[0])
    torch.testing.assert_close(single.grad.double(), closed, rtol=3e-6, atol=0)
    torch.testing.assert_close(scores.label_logprob.double(), torch.log1p(-rest).view(1), rtol=3e-6, atol=0)


def test_extreme_and_infinite_logits_stay_finite():
    for y in range(3):
        z, scores = one_position(torch.tensor([300.0, 0.0, -300.0]), y)
        (scores.label_prob - scores.runner_up_prob + scores.label_logprob).sum().backward()
        assert torch.isfinite(z.grad).all()
    z, scores = one_position(torch.tensor([3.0, 0.0, -torch.inf]), 0)
    (scores.label_prob - scores.runner_up_prob).sum().backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("y", range(4))
def test_ties_take_the_first_and_never_the_label(y):
    z, scores = one_position(torch.zeros(4), y)
    assert scores.runner_up.item() == 0.0
    assert scores.spread.item() == pytest.approx(math.log(3))
    scores.runner_up.sum().backward()
    first = 1 if y == 0 else 0
    assert z.grad.nonzero().flatten().tolist() == [first]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    length=st.integers(2, 8),
    vocab=st.integers(2, 30),
    extra=st.integers(1, 4),
)
def test_padding_and_row_order_change_nothing(seed, rows, length, vocab, extra):
    logits, labels = batch(seed, rows, length, vocab)
    plain = scores_from_logits(logits, labels, need=slow.EXTRAS)
    generator = torch.Generator().manual_seed(seed + 1)
    padded = scores_from_logits(
        torch.cat([logits, torch.randn(rows, extra, vocab, generator=generator) * 50], dim=1),
        torch.cat([labels, torch.full((rows, extra), -100)], dim=1),
        need=slow.EXTRAS,
    )
    order = torch.randperm(rows, generator=generator)
    permuted = scores_from_logits(logits[order], labels[order], need=slow.EXTRAS)
    where = torch.cat([(plain.sequence == row).nonzero().flatten() for row in order])
    for name in slow.FIELDS:
        torch.testing.assert_close(getattr(padded, name), getattr(plain, name), rtol=0, atol=0)
        torch.testing.assert_close(getattr(permuted, name), getattr(plain, name)[where], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened_first(dtype):
    logits, labels = batch(1, dtype=dtype)
    scores = scores_from_logits(logits, labels, need=slow.EXTRAS)
    expected = slow.scores(logits, labels)
    for name in slow.FIELDS:
        assert getattr(scores, name).dtype == torch.float32
        torch.testing.assert_close(getattr(scores, name).double(), expected[name], rtol=1e-6, atol=2e-6)


def test_sums_per_sequence_count_rows_without_supervised_tokens_as_zero():
    logits, labels = batch(3)
    labels[1] = -100
    scores = scores_from_logits(logits, labels)
    sums = scores.per_sequence(scores.label_logprob)
    assert sums[1] == 0
    torch.testing.assert_close(sums[0], scores.label_logprob[scores.sequence == 0].sum())


def test_nothing_supervised_keeps_the_graph():
    logits, labels = batch(0)
    logits.requires_grad_()
    scores = scores_from_logits(logits, torch.full_like(labels, -100), need=slow.EXTRAS)
    assert len(scores) == 0
    sum(getattr(scores, name).sum() for name in slow.FIELDS).backward()
    assert not logits.grad.any()


def test_extras_are_filled_only_where_needed():
    scores = scores_from_logits(*batch())
    assert scores.mean_logit is None
    assert scores.expected_other is None
    with pytest.raises(InputError, match=r"'mean_logits' is not an optional score.\nDid you mean 'mean_logit'?"):
        scores_from_logits(*batch(), need=("mean_logits",))


def test_labels_of_another_batch_are_refused():
    logits, labels = batch()
    with pytest.raises(InputError, match=r"labels have shape \[3, 5\], but the model's output has \[3, 6\]"):
        scores_from_logits(logits, labels[:, 1:])


def test_scores_cannot_be_changed():
    scores = scores_from_logits(*batch())
    assert isinstance(scores, TokenScores)
    with pytest.raises(AttributeError):
        scores.target = None
