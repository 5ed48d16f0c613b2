"""The largest singular triples of a matrix: exact where that is affordable, by block Krylov otherwise."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

EXACT_LIMIT = 256  # the smaller side of a matrix up to which the full SVD costs a few milliseconds
KRYLOV_ITERATIONS = 4
LEAST_BLOCK = 8  # a block of one or two columns can miss a tenth of a flat spectrum's energy

Triples = tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"], Float[Tensor, "rank in"]]


def truncated_svd(
    matrix: Float[Tensor, "out in"],
    rank: int,
    *,
    seed: int = 0,
    method: Literal["auto", "exact", "krylov"] = "auto",
) -> Triples:
    """Return the r largest singular triples U, S, V^T of a matrix.

    `auto` is exact while the smaller side is at most 256, or where a Krylov space would span all of it anyway.
    """
    smaller = min(matrix.shape)
    if method == "auto":
        exact = smaller <= max(EXACT_LIMIT, max(rank, LEAST_BLOCK) * (KRYLOV_ITERATIONS + 1))
        method = "exact" if exact else "krylov"
    if method == "krylov":
        return block_krylov(matrix, rank, seed=seed)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]


def block_krylov(
    matrix: Float[Tensor, "out in"], rank: int, *, iterations: int = KRYLOV_ITERATIONS, seed: int = 0
) -> Triples:
    """Approximate the r largest singular triples within a block Krylov space.

    For the shorter side's orientation M (m <= n) and a Gaussian block O of r columns (at least 8), the space is

        span[M O, (M M^T) M O, ..., (M M^T)^it M O]          with orthonormal basis Q, in blocks

    and U, S, V^T is the SVD of Q Q^T M, cut to r. The blocks are made orthogonal to all earlier ones as they come
    (block Lanczos, twice, as rounding demands), so that M^T Q is there already when Q is complete: 2 it + 2 products
    with r columns in all. The result depends on nothing but the seed.

    Source: Musco and Musco, "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value
    Decomposition", 2015 (arXiv 1504.05477), algorithm 2.
    """
    transposed = matrix.shape[0] > matrix.shape[1]
    M = matrix.T if transposed else matrix
    m, n = M.shape
    width = min(max(rank, LEAST_BLOCK), m)
    columns = min(width * (iterations + 1), m)
    generator = torch.Generator().manual_seed(seed)
    block = M @ torch.randn(n, width, generator=generator).to(M)
    Q, image = M.new_empty(m, columns), M.new_empty(n, columns)  # image = M^T Q
    done = 0
    while done < columns:
        place = slice(done, min(done + block.shape[1], columns))
        Q[:, place] = _next_block(Q[:, :done], block[:, : columns - done], generator)
        torch.mm(M.T, Q[:, place], out=image[:, place])
        done = place.stop
        if done < columns:
            block = M @ image[:, place]
    right, R = torch.linalg.qr(image)
    U, S, Vh = torch.linalg.svd(R.T)
    left, right = Q @ U[:, :rank], right @ Vh[:rank].T
    return (right, S[:rank], left.T) if transposed else (left, S[:rank], right.T)


def _next_block(
    Q: Float[Tensor, "m done"], block: Float[Tensor, "m r"], generator: torch.Generator
) -> Float[Tensor, "m r"]:
    """Return an orthonormal basis of a block, orthogonal to Q; new random directions where it adds none to Q."""
    size = block.norm(dim=0).max()
    for _ in range(2 if Q.shape[1] else 0):  # once is not enough in floating point, twice is
        block = block - Q @ (Q.T @ block)
    found, R = torch.linalg.qr(block)
    spent = R.diagonal().abs() <= size * 10 * torch.finfo(block.dtype).eps
    if spent.any():
        block = torch.where(spent, torch.randn(block.shape, generator=generator).to(block), found)
        found = torch.linalg.qr(block - Q @ (Q.T @ block)).Q
    return found


def released_svd(matrix: Float[Tensor, "out in"], rank: int, seed: int) -> Triples:
    """Return what the released recipe takes: a sketch of exactly r vectors, two power iterations, a global seed."""
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(matrix, q=rank, niter=2)
    return U, S, V.T
