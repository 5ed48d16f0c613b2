"""Every loss against its float64 reference: values, gradients, masks, padding, weights, micro-batches, dtypes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loss_reference as slow
from loku.losses import forget, hinge, preference, retain
from loku.losses.positions import count_tokens, supervised
from loku.losses.scores import scores_from_logits
from loku.losses.table import FORGET_LOSSES, RETAIN_LOSSES

REFERENCE = torch.tensor([-4.0, -9.0, -2.5, -6.0])
OTHER_REFERENCE = torch.tensor([-3.0, -1.0, -7.5, -2.0])


def batch(seed=0, rows=3, length=6, vocab=7, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, length, vocab, generator=generator) * scale).to(dtype)
    labels = torch.randint(0, vocab, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.4] = -100
    labels[:, 1] = torch.randint(0, vocab, (rows,), generator=generator)  # every row has a supervised token
    return logits, labels


def teacher(logits):
    generator = torch.Generator().manual_seed(99)
    return torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype) * 2


def others(logits, labels):
    """Another answer to each row's prompt, made of the row's own logits so that gradients flow through both."""
    return logits.flip(-1) * 0.5, labels.roll(1, 0)


def on_scores(function, *needs, **options):
    """Call a loss of scores on logits and labels, with references, alternates and options filled in."""

    def call(z, y, *, num_items=None, weights=None, rows=slice(None)):
        fields = ("mean_logit", "expected_other")
        scores = dataclasses.replace(scores_from_logits(z, y, need=fields), weights=weights)
        arguments = {"scores": scores}
        if "reference" in needs:
            arguments["reference"] = REFERENCE[: len(y)][rows] if rows != slice(None) else REFERENCE[: len(y)]
        if "alternate" in needs:
            arguments["alternate"] = scores_from_logits(*others(z, y))
        if "alternate_reference" in needs:
            arguments["alternate_reference"] = OTHER_REFERENCE[: len(y)]
        return function(*(arguments[need] for need in needs), num_items=num_items, **options)

    return call


def on_teacher(function, **options):
    def call(z, y, *, num_items=None, weights=None):
        reference = supervised(teacher(z), y).logits
        return function(supervised(z, y), reference, num_items=num_items, weights=weights, **options)

    return call


CASES = {
    "ihl": (on_scores(hinge.ihl, "scores"), slow.ihl),
    "ihl, stopped": (on_scores(hinge.ihl, "scores", stop=0.3), lambda z, y: slow.ihl(z, y, stop=0.3)),
    "ihl, weighted": (on_scores(hinge.ihl, "scores", beta=0.5), lambda z, y: slow.ihl(z, y, beta=0.5)),
    "grad_ascent": (on_scores(forget.grad_ascent, "scores"), slow.grad_ascent),
    "nll": (on_scores(retain.nll, "scores"), slow.nll),
    "wga": (on_scores(forget.wga, "scores", beta=0.7), lambda z, y: slow.wga(z, y, 0.7)),
    "satimp": (on_scores(forget.satimp, "scores"), lambda z, y: slow.satimp(z, y, 5.0, 1.0)),
    "ce_u": (on_scores(forget.ce_u, "scores"), lambda z, y: slow.ce_u(z, y, True)),
    "ce_u, whole": (on_scores(forget.ce_u, "scores", skip_first=False), lambda z, y: slow.ce_u(z, y, False)),
    "max_entropy": (on_scores(forget.max_entropy, "scores"), slow.max_entropy),
    "pdu": (on_scores(forget.pdu, "scores"), slow.pdu),
    "undial": (on_teacher(forget.undial, beta=3.0), lambda z, y: slow.undial(z, y, teacher(z), 3.0)),
    "kl": (on_teacher(retain.kl), lambda z, y: slow.kl(z, y, teacher(z))),
    "npo": (
        on_scores(preference.npo, "scores", "reference", beta=0.3),
        lambda z, y: slow.npo(z, y, REFERENCE[: len(y)], 0.3),
    ),
    "simnpo": (
        on_scores(preference.simnpo, "scores", beta=2.5, delta=0.5),
        lambda z, y: slow.simnpo(z, y, 2.5, 0.5),
    ),
    "dpo": (
        on_scores(preference.dpo, "scores", "reference", "alternate", "alternate_reference", beta=0.2),
        lambda z, y: slow.dpo(z, y, REFERENCE[: len(y)], *others(z, y), OTHER_REFERENCE[: len(y)], 0.2),
    ),
    "idk": (on_scores(preference.idk, "alternate"), lambda z, y: slow.idk(*others(z, y))),
    "ap": (
        on_scores(preference.answer_preservation, "scores", "alternate", beta=0.2),
        lambda z, y: slow.answer_preservation(z, y, *others(z, y), 0.2),
    ),
}
TOKEN_LEVEL = [name for name in CASES if name.split(",")[0] not in ("npo", "simnpo", "dpo", "ap", "idk")]
OF_ROWS_ALONE = [name for name in CASES if name not in ("npo", "dpo", "ap", "idk", "undial", "kl")]


def test_the_cases_cover_every_named_loss():
    on_hidden_states = {"rmu", "hidden"}  # tests/losses/test_hidden.py
    assert {name.split(",")[0] for name in CASES} == (set(FORGET_LOSSES) | set(RETAIN_LOSSES)) - on_hidden_states


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_agree_with_float64(name, seed):
    fast, reference = CASES[name]
    logits, labels = batch(seed)
    fast_logits = logits.clone().requires_grad_()
    slow_logits = logits.double().requires_grad_()
    value, expected = fast(fast_logits, labels), reference(slow_logits, labels)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(fast_logits.grad.double(), slow_logits.grad, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("seed", range(5))
def test_ihl_gradient_is_the_closed_form(seed):
    logits, labels = batch(seed)
    logits.requires_grad_()
    hinge.inverted_hinge(logits, labels).backward()
    torch.testing.assert_close(logits.grad.double(), slow.ihl_gradient(logits.detach(), labels), rtol=1e-5, atol=1e-7)


@settings(max_examples=25, deadline=None)
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
    if name not in ("undial", "kl"):  # their teacher is drawn for a shape
        padding = torch.randn(rows, extra, vocab, generator=generator) * 50
        padded = torch.cat([logits, padding], dim=1)
        padded_labels = torch.cat([labels, torch.full((rows, extra), -100)], dim=1)
        torch.testing.assert_close(fast(padded, padded_labels), fast(logits, labels), rtol=1e-6, atol=1e-6)
    if name in OF_ROWS_ALONE:  # the others' references belong to a row
        order = torch.randperm(rows, generator=generator)
        torch.testing.assert_close(fast(logits[order], labels[order]), fast(logits, labels), rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in TOKEN_LEVEL if name in OF_ROWS_ALONE])
def test_micro_batches_add_up_to_the_batch(name):
    fast, _ = CASES[name]
    logits, labels = batch(3, rows=4, length=8)
    total = count_tokens(labels)
    parts = sum(fast(logits[i : i + 1], labels[i : i + 1], num_items=total) for i in range(4))
    torch.testing.assert_close(parts, fast(logits, labels), rtol=1e-6, atol=1e-6)


def test_micro_batches_add_up_over_sequences():
    logits, labels = batch(3)
    whole = scores_from_logits(logits, labels)
    parts = [scores_from_logits(logits[i : i + 1], labels[i : i + 1]) for i in range(3)]
    added = sum(preference.npo(part, REFERENCE[i : i + 1], num_items=3) for i, part in enumerate(parts))
    torch.testing.assert_close(added, preference.npo(whole, REFERENCE[:3]), rtol=1e-6, atol=1e-6)
    added = sum(preference.simnpo(part, num_items=3) for part in parts)
    torch.testing.assert_close(added, preference.simnpo(whole), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("dpo", "ap", "idk", "ce_u")])
def test_a_token_of_weight_zero_is_as_if_not_supervised(name):
    fast, _ = CASES[name]
    logits, labels = batch(5, rows=3, length=8)
    keep = torch.rand(labels.shape, generator=torch.Generator().manual_seed(5)) < 0.6
    keep[:, 1] = True
    selected = labels.masked_fill(~keep, -100)
    mask = labels[:, 1:] != -100
    weights = keep[:, 1:][mask].float()
    torch.testing.assert_close(fast(logits, labels, weights=weights), fast(logits, selected), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_token_weights_make_a_weighted_mean(name):
    fast, _ = CASES[name]
    logits, labels = batch(6, rows=1, length=3)
    labels = torch.tensor([[-100, 2, 5]])
    both = fast(logits, labels, weights=torch.tensor([3.0, 1.0]))
    first = fast(logits, labels, weights=torch.tensor([1.0, 0.0]))
    second = fast(logits, labels, weights=torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(both, 0.75 * first + 0.25 * second, rtol=2e-6, atol=1e-6)


def test_ihl_is_bounded_and_right_at_its_ends():
    certain = torch.tensor([[[50.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    assert hinge.inverted_hinge(certain, torch.tensor([[-100, 0]])).item() == pytest.approx(2.0)
    assert hinge.inverted_hinge(certain, torch.tensor([[-100, 1]])).item() == pytest.approx(0.0, abs=1e-6)


def test_ihl_gradient_survives_a_memorised_token_and_infinite_logits():
    logits = torch.tensor([[[300.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]]], requires_grad=True)
    hinge.inverted_hinge(logits, torch.tensor([[-100, 0]])).backward()
    assert torch.isfinite(logits.grad).all()


def test_a_stopped_token_no_longer_sharpens_the_runner_up():
    logits = torch.tensor([[[-3.0, 2.0, 1.0], [0.0, 0.0, 0.0]]])
    labels = torch.tensor([[-100, 0]])

    def gradient(**options):
        z = logits.clone().requires_grad_()
        scores = scores_from_logits(z, labels)
        level = options.pop("level", None)
        value = hinge.ihl(scores, level, **options)
        value.backward()
        return value.detach(), z.grad[0, 0]

    value, plain = gradient()
    for stopped in (gradient(stop=0.1), gradient(level=torch.tensor([-1.0]))):
        torch.testing.assert_close(stopped[0], value)  # the value stays
        assert plain[1] < -0.1  # descent raises the runner-up ...
        assert abs(stopped[1][1]) < 0.01  # ... and leaves it alone once stopped, but for p_y's own share
        assert stopped[1][0] > 0  # the unwanted token still falls
    torch.testing.assert_close(gradient(stop=1e-4)[1], plain)
    torch.testing.assert_close(gradient(level=torch.tensor([-9.0]))[1], plain)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("undial", "kl")])
def test_half_precision_logits_are_widened_first(name):
    fast, reference = CASES[name]
    logits, labels = batch(1, dtype=torch.bfloat16)
    if name in ("dpo", "ap", "idk"):  # the other answers are made from the logits, in their type
        logits = logits.float()
    value = fast(logits, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), reference(logits.double(), labels), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_without_supervised_tokens_gives_no_nan(name):
    fast, _ = CASES[name]
    logits, labels = batch(0)
    logits.requires_grad_()
    value = fast(logits, torch.full_like(labels, -100))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


def test_npo_tends_to_gradient_ascent_for_small_beta():
    logits, labels = batch(2)
    first, second = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    reference = preference.sequence_sums(scores_from_logits(logits, labels))
    preference.npo(scores_from_logits(first, labels), reference, beta=1e-4).backward()
    (preference.sequence_sums(scores_from_logits(second, labels)).sum() / len(labels)).backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-3, atol=1e-6)


def test_wga_without_exponent_is_gradient_ascent():
    logits, labels = batch(4)
    scores = scores_from_logits(logits, labels)
    torch.testing.assert_close(forget.wga(scores, beta=0.0), forget.grad_ascent(scores))
    torch.testing.assert_close(forget.satimp(scores, beta1=1.0, beta2=0.0), forget.wga(scores, beta=1.0))


def test_options_of_a_loss_are_read_off_its_signature():
    assert FORGET_LOSSES["npo"].options == {"beta": 0.1}
    assert FORGET_LOSSES["satimp"].options == {"beta1": 5.0, "beta2": 1.0}
    assert FORGET_LOSSES["undial"].options == {"beta": 10.0}
    assert FORGET_LOSSES["undial"].takes_weights
    assert not FORGET_LOSSES["ihl"].takes_weights
