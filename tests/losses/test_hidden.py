"""Losses on hidden states, against their float64 definitions."""

from __future__ import annotations

import pytest
import torch

from loku.losses.hidden import control_direction, hidden_distance, rmu


@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients(weighted):
    generator = torch.Generator().manual_seed(0)
    states, reference = torch.randn(2, 5, 8, generator=generator)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0]) if weighted else None
    direction = control_direction(8, seed=3)
    w = weights.double() if weighted else torch.ones(5, dtype=torch.float64)

    def slow_rmu(h):
        return sum(w[t] * ((h[t] - 1.5 * direction.double()) ** 2).mean() for t in range(5)) / w.sum()

    def slow_distance(h):
        return sum(w[t] * ((h[t] - reference[t].double()) ** 2).mean() for t in range(5)) / w.sum()

    for fast, slow in (
        (lambda h: rmu(h, direction, coefficient=1.5, weights=weights), slow_rmu),
        (lambda h: hidden_distance(h, reference, weights=weights), slow_distance),
    ):
        ours, theirs = states.clone().requires_grad_(), states.double().requires_grad_()
        value, expected = fast(ours), slow(theirs)
        value.backward()
        expected.backward()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-7)


def test_a_token_counts_the_same_in_whatever_sequence_it_stands():
    states = torch.randn(6, 4)
    direction = control_direction(4, seed=0)
    whole = rmu(states, direction)
    parts = rmu(states[:1], direction, num_items=6) + rmu(states[1:], direction, num_items=6)
    torch.testing.assert_close(whole, parts)


def test_the_direction_is_a_unit_vector_of_its_own_seed():
    before = torch.get_rng_state()
    one, same, other = control_direction(16, 1), control_direction(16, 1), control_direction(16, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.norm().item() == pytest.approx(1.0)
