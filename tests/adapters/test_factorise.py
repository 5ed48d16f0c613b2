"""Singular triples: against the exact optimum, on decaying and on flat spectra, odd shapes and ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loku.adapters.factorise import block_krylov, released_svd, truncated_svd


def decaying(rows, columns, seed=0):
    """A head of power-law singular values on a Gaussian bulk, rows scaled unevenly: what D W looks like."""
    generator = torch.Generator().manual_seed(seed)
    bulk = torch.randn(rows, columns, generator=generator)
    head = min(64, rows, columns)
    U = torch.linalg.qr(torch.randn(rows, head, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(columns, head, generator=generator)).Q
    S = 4 * (rows**0.5 + columns**0.5) * torch.arange(1, head + 1) ** -0.7
    return (bulk + (U * S) @ V.T) * torch.exp(0.5 * torch.randn(rows, 1, generator=generator))


def captured(matrix, triples):
    """The energy that the subspace holds, ||U^T M||^2, in float64."""
    return float((triples[0].double().T @ matrix.double()).square().sum())


@pytest.mark.parametrize("shape", [(300, 300), (700, 200), (200, 700)])
def test_krylov_captures_what_the_optimum_does_on_a_decaying_spectrum(shape):
    matrix = decaying(*shape)
    best = float(torch.linalg.svdvals(matrix.double())[:16].square().sum())
    assert captured(matrix, block_krylov(matrix, 16)) >= 0.99 * best
    assert captured(matrix, released_svd(matrix, 16, 0)) < 0.98 * best


def test_krylov_of_a_flat_spectrum_is_better_than_the_released_sketch():
    matrix = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    best = float(torch.linalg.svdvals(matrix.double())[:16].square().sum())
    assert captured(matrix, block_krylov(matrix, 16)) >= 0.98 * best > captured(matrix, released_svd(matrix, 16, 0))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 60), columns=st.integers(1, 60), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_krylov_gives_singular_triples(rows, columns, rank, seed):
    rank = min(rank, rows, columns)
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    U, S, Vh = block_krylov(matrix, rank, seed=seed)
    assert (U.shape, S.shape, Vh.shape) == ((rows, rank), (rank,), (rank, columns))
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(U.T @ U, eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(Vh @ Vh.T, eye, rtol=0, atol=1e-10)
    exact = torch.linalg.svdvals(matrix)[:rank]
    assert float((S / exact).max()) <= 1 + 1e-10
    assert S.square().sum() >= 0.9 * exact.square().sum()
    if min(rows, columns) <= 5 * max(rank, 8):  # the space is everything
        torch.testing.assert_close(S, exact)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_krylov_of_small_ranks_captures_a_decaying_spectrum_too(rank):
    matrix = decaying(400, 300)
    best = float(torch.linalg.svdvals(matrix.double())[:rank].square().sum())
    assert captured(matrix, block_krylov(matrix, rank)) >= 0.99 * best


def test_krylov_survives_matrices_of_little_rank():
    for matrix in (torch.zeros(50, 40), torch.randn(50, 2) @ torch.randn(2, 40), torch.eye(50)[:, :40]):
        U, S, Vh = block_krylov(matrix, 6)
        assert all(torch.isfinite(part).all() for part in (U, S, Vh))
        torch.testing.assert_close(S, torch.linalg.svdvals(matrix)[:6], rtol=1e-4, atol=1e-4)


def test_a_seed_is_all_that_krylov_depends_on():
    matrix = decaying(200, 150)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one = block_krylov(matrix, 8, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(one, block_krylov(matrix, 8, seed=3), strict=True))
    assert not torch.equal(one[0], block_krylov(matrix, 8, seed=4)[0])
    released_svd(matrix, 8, 0)
    assert torch.random.initial_seed() == 2


def test_small_matrices_are_factorised_exactly(monkeypatch):
    matrix = decaying(120, 90)
    expected = torch.linalg.svd(matrix, full_matrices=False)
    U, S, Vh = truncated_svd(matrix, 8)
    torch.testing.assert_close((U * S) @ Vh, (expected.U[:, :8] * expected.S[:8]) @ expected.Vh[:8])
    monkeypatch.setattr("loku.adapters.factorise.EXACT_LIMIT", 64)
    assert not torch.equal(truncated_svd(matrix, 8)[1], S)
    assert torch.equal(truncated_svd(matrix, 18)[1], expected.S[:18])  # its Krylov space would be everything
    assert not torch.equal(truncated_svd(matrix, 8, method="krylov")[1], S)
