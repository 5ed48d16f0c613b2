"""Every loss against its float64 reference: values, gradients, masks, padding, micro-batches, dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loss_reference as slow
from loku.losses.forget import FORGET_LOSSES, grad_ascent, npo
from loku.losses.hinge import inverted_hinge
from loku.losses.positions import count_tokens, sequence_logprobs
from loku.losses.retain import RETAIN_LOSSES, nll


def batch(seed=0, rows=3, length=6, vocab=7, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, length, vocab, generator=generator) * scale).to(dtype)
    labels = torch.randint(0, vocab, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.4] = -100
    labels[:, 1] = torch.randint(0, vocab, (rows,), generator=generator)  # every row has a supervised token
    return logits, labels


REFERENCE = torch.tensor([-4.0, -9.0, -2.5])

CASES = {
    "ihl": (inverted_hinge, slow.ihl),
    "grad_ascent": (grad_ascent, slow.grad_ascent),
    "nll": (nll, slow.nll),
    "npo": (
        lambda z, y, **k: npo(z, y, REFERENCE[: len(y)], beta=0.3, **k),
        lambda z, y: slow.npo(z, y, REFERENCE[: len(y)], 0.3),
    ),
}


def test_the_cases_cover_every_named_loss():
    assert set(CASES) == set(FORGET_LOSSES) | set(RETAIN_LOSSES)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(5))
def test_value_and_gradient_agree_with_float64(name, seed):
    fast, reference = CASES[name]
    logits, labels = batch(seed)
    fast_logits = logits.clone().requires_grad_()
    slow_logits = logits.double().requires_grad_()
    value, expected = fast(fast_logits, labels), reference(slow_logits, labels)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(fast_logits.grad.double(), slow_logits.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_ihl_gradient_is_the_closed_form(seed):
    logits, labels = batch(seed)
    logits.requires_grad_()
    inverted_hinge(logits, labels).backward()
    torch.testing.assert_close(logits.grad.double(), slow.ihl_gradient(logits.detach(), labels), rtol=1e-5, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    length=st.integers(2, 9),
    vocab=st.integers(2, 40),
    extra=st.integers(1, 5),
)
@pytest.mark.parametrize("name", CASES)
def test_padding_and_row_order_change_nothing(name, seed, rows, length, vocab, extra):
    fast, _ = CASES[name]
    logits, labels = batch(seed, rows, length, vocab)
    generator = torch.Generator().manual_seed(seed + 1)
    padding = torch.randn(rows, extra, vocab, generator=generator) * 50
    padded = torch.cat([logits, padding], dim=1)
    padded_labels = torch.cat([labels, torch.full((rows, extra), -100)], dim=1)
    torch.testing.assert_close(fast(padded, padded_labels), fast(logits, labels), rtol=1e-6, atol=1e-6)
    if name != "npo":  # its reference belongs to a row
        order = torch.randperm(rows, generator=generator)
        torch.testing.assert_close(fast(logits[order], labels[order]), fast(logits, labels), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ihl", "grad_ascent", "nll"])
def test_micro_batches_add_up_to_the_batch(name):
    fast, _ = CASES[name]
    logits, labels = batch(3, rows=4, length=8)
    total = count_tokens(labels)
    parts = sum(fast(logits[i : i + 1], labels[i : i + 1], num_items=total) for i in range(4))
    torch.testing.assert_close(parts, fast(logits, labels), rtol=1e-6, atol=1e-6)


def test_npo_micro_batches_add_up_over_sequences():
    logits, labels = batch(3)
    parts = sum(npo(logits[i : i + 1], labels[i : i + 1], REFERENCE[i : i + 1], num_items=3) for i in range(3))
    torch.testing.assert_close(parts, npo(logits, labels, REFERENCE), rtol=1e-6, atol=1e-6)


def test_ihl_is_bounded_and_right_at_its_ends():
    certain = torch.tensor([[[50.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    assert inverted_hinge(certain, torch.tensor([[-100, 0]])).item() == pytest.approx(2.0)
    assert inverted_hinge(certain, torch.tensor([[-100, 1]])).item() == pytest.approx(0.0, abs=1e-6)


def test_ihl_gradient_survives_a_memorised_token_and_infinite_logits():
    logits = torch.tensor([[[300.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]]], requires_grad=True)
    inverted_hinge(logits, torch.tensor([[-100, 0]])).backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", CASES)
def test_half_precision_logits_are_widened_first(name):
    fast, reference = CASES[name]
    logits, labels = batch(1, dtype=torch.bfloat16)
    value = fast(logits, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), reference(logits.double(), labels), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_without_supervised_tokens_gives_no_nan(name):
    fast, _ = CASES[name]
    logits, labels = batch(0)
    assert torch.isfinite(fast(logits, torch.full_like(labels, -100)))


def test_npo_tends_to_gradient_ascent_for_small_beta():
    logits, labels = batch(2)
    first, second = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    npo(first, labels, sequence_logprobs(logits, labels), beta=1e-4).backward()
    (sequence_logprobs(second, labels).sum() / len(labels)).backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-3, atol=1e-6)
