"""FILA and LoRA factors against float64 references, and the pitfalls seen at small size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import tiny_model
from loku.adapters.importance import Importance
from loku.adapters.initialisers import fila, initial_factors, lora, truncated_svd
from loku.adapters.layers import target_layers
from loku.errors import InputError


def weight(rows=24, columns=16, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def weighted_error(W, w, product):
    return float((w.double().unsqueeze(1) * (W.double() - product.double()).square()).sum())


def optimum(W, w, rank):
    """The smallest possible weighted error: the squared tail singular values of diag(sqrt w) W."""
    S = torch.linalg.svdvals(w.double().sqrt().unsqueeze(1) * W.double())
    return float(S[rank:].square().sum())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 20),
    columns=st.integers(2, 20),
    rank=st.integers(1, 8),
    seed=st.integers(0, 999),
    scaling=st.sampled_from([0.5, 2.0]),
)
def test_fila_reaches_the_optimal_weighted_error(rows, columns, rank, seed, scaling):
    rank = min(rank, rows, columns)
    W, w = weight(rows, columns, seed), torch.rand(rows, generator=torch.Generator().manual_seed(seed)) * 5 + 0.01
    A, B, energy = fila(W, w, rank=rank, scaling=scaling)
    best = optimum(W, w, rank)
    total = weighted_error(W, w, torch.zeros_like(W))
    assert weighted_error(W, w, scaling * B @ A) == pytest.approx(best, rel=1e-3, abs=1e-4 * total)
    assert energy == pytest.approx(1 - best / total, abs=1e-4)


def test_fila_equals_the_closed_form_in_float64():
    W, w, rank, s = weight().double(), torch.rand(24, dtype=torch.float64) + 0.1, 4, 2.0
    A, B, _ = fila(W, w, rank=rank, scaling=s)
    normal = w / w.mean()
    U, S, Vh = torch.linalg.svd(normal.sqrt().unsqueeze(1) * W, full_matrices=False)
    root = (S[:rank] / s).sqrt()
    expected = (normal.rsqrt().unsqueeze(1) * U[:, :rank] * root) @ (root.unsqueeze(1) * Vh[:rank])
    torch.testing.assert_close(B @ A, expected)


def test_the_scale_of_the_weights_does_not_matter():
    W, w = weight(), torch.rand(24) + 0.1
    A, B, _ = fila(W, w, rank=4, scaling=2.0)
    for factor in (1e-10, 1e10):
        A2, B2, _ = fila(W, w * factor, rank=4, scaling=2.0)
        torch.testing.assert_close(A2.abs(), A.abs(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(B2.abs(), B.abs(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("w", [torch.zeros(24), torch.cat([torch.zeros(20), torch.ones(4)])])
def test_rows_without_weight_are_harmless(w):
    A, B, energy = fila(weight(), w, rank=6, scaling=2.0)
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()
    assert B.norm() < 10
    assert 0 <= energy <= 1


def test_a_rank_deficient_weight_gives_finite_factors():
    W = weight(24, 2) @ weight(2, 16, seed=1)
    A, B, energy = fila(W, torch.ones(24), rank=8, scaling=2.0)
    torch.testing.assert_close(2.0 * B @ A, W, rtol=1e-4, atol=1e-4)
    assert energy == pytest.approx(1.0)


def test_half_precision_weights_are_factorised_in_float32():
    A, B, _ = fila(weight().bfloat16(), torch.ones(24), rank=16, scaling=2.0)
    assert A.dtype == B.dtype == torch.float32
    torch.testing.assert_close(2.0 * B @ A, weight().bfloat16().float(), rtol=1e-4, atol=1e-4)


def test_official_follows_the_released_recipe():
    W, w, rank, s = weight(), torch.rand(24) * 100, 4, 2.0
    A, B, _ = fila(W, w, rank=rank, scaling=s, official=True, seed=3)
    D = w.sqrt()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        U, S, V = torch.svd_lowrank(torch.diag(D) @ W, q=rank, niter=2)
    torch.testing.assert_close(A, torch.diag((S / s).sqrt()) @ V.T)
    torch.testing.assert_close(B, torch.diag(1 / (D + 1e-5)) @ U @ torch.diag((S / s).sqrt()))


def test_lora_starts_at_zero_with_kaiming_uniform():
    A, B, energy = lora(weight(24, 64), rank=8, seed=1)
    assert A.shape == (8, 64)
    assert B.shape == (24, 8)
    assert not B.any()
    assert energy == 0
    assert A.abs().max() <= 1 / 8
    assert A.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (30, 30)])
def test_the_randomised_svd_captures_a_decaying_spectrum(shape):
    U, _, Vh = torch.linalg.svd(weight(*shape).double(), full_matrices=False)
    S = 0.8 ** torch.arange(min(shape), dtype=torch.float64)
    matrix = (U * S) @ Vh
    _, exact, _ = truncated_svd(matrix, 8, method="exact")
    u, s, vh = truncated_svd(matrix, 8, seed=5, method="randomised")
    assert float(s.square().sum() / exact.square().sum()) > 0.9999
    torch.testing.assert_close((u * s) @ vh, (U[:, :8] * S[:8]) @ Vh[:8], rtol=0, atol=1e-3)
    again = truncated_svd(matrix, 8, seed=5, method="randomised")
    assert torch.equal(again[0], u)


def test_unknown_initialisers_and_missing_importance_are_refused():
    layers = target_layers(tiny_model(), "q_proj")
    with pytest.raises(InputError, match=r"--init 'filla' is not an initialiser\.\nDid you mean 'fila'\?"):
        initial_factors(layers, "filla", rank=4, scaling=2.0)
    for importance in (None, Importance({}, {})):
        with pytest.raises(InputError, match=r"'fila' has no importance for the layer '.*q_proj'\.\nEstimate it for"):
            initial_factors(layers, "fila", rank=4, scaling=2.0, importance=importance)
