"""How two gradients meet: conflicts removed, agreement untouched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loku.losses.combine import dot, dual_step, gru, pcgrad


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients]).double()


def pair(seed, conflict):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (5,), (2, 2, 2)]
    forget = [torch.randn(shape, generator=generator) for shape in shapes]
    retain = [torch.randn(shape, generator=generator) for shape in shapes]
    if (dot(forget, retain) < 0) != conflict:
        forget = [-g for g in forget]
    return forget, retain


def slow_projection(g, d):
    return g - (g @ d) / (d @ d) * d if g @ d < 0 else g


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 100_000), conflict=st.booleans())
def test_against_the_formula(seed, conflict):
    forget, retain = pair(seed, conflict)
    f, r = flat(forget), flat(retain)
    torch.testing.assert_close(flat(gru(forget, retain)), slow_projection(f, r) + r, rtol=1e-5, atol=1e-5)
    expected = slow_projection(f, r) + slow_projection(r, f)
    torch.testing.assert_close(flat(pcgrad(forget, retain)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("combine", [gru, pcgrad])
def test_without_conflict_it_is_the_sum(combine):
    forget, retain = pair(0, conflict=False)
    torch.testing.assert_close(flat(combine(forget, retain)), flat(forget) + flat(retain), rtol=1e-6, atol=1e-6)


def test_gru_never_works_against_the_retain_gradient():
    forget, retain = pair(1, conflict=True)
    step = gru(forget, retain)
    assert dot(step, retain) >= dot(retain, retain) - 1e-4
    assert dot(forget, retain) < 0


@pytest.mark.parametrize("combine", [gru, pcgrad])
def test_a_zero_gradient_gives_no_nan(combine):
    forget, retain = pair(2, conflict=True)
    zero = [torch.zeros_like(g) for g in retain]
    torch.testing.assert_close(flat(combine(forget, zero)), flat(forget))
    torch.testing.assert_close(flat(combine(zero, retain)), flat(retain))


def test_the_dual_weight_rises_above_the_bound_and_never_below_zero():
    assert dual_step(1.0, 2.0, bound=1.5, rate=0.5) == pytest.approx(1.25)
    assert dual_step(1.0, 1.0, bound=1.5, rate=0.5) == pytest.approx(0.75)
    assert dual_step(0.1, 0.0, bound=1.5, rate=1.0) == 0.0
