"""Initialisers: how a layer's adapter (A0, B0) is chosen before training."""

from __future__ import annotations

import math
import zlib
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from loku.adapters.importance import Importance
from loku.adapters.layers import Layers, as_float32, weight
from loku.errors import InputError, suggestion

EXACT_LIMIT = 2048  # the smaller side of a weight up to which the full SVD is affordable
OVERSAMPLING = 16
POWER_ITERATIONS = 4


class Factors(NamedTuple):
    """An adapter's starting point: the layer computes W x + scaling * B (A x). Both float32.

    `energy` is the share of the (weighted) squared Frobenius norm of W that the product holds.
    """

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    energy: float


def fila(
    W: Float[Tensor, "out in"],
    row_weights: Float[Tensor, " out"],
    *,
    rank: int,
    scaling: float,
    official: bool = False,
    seed: int = 0,
) -> Factors:
    """Start from the low-rank approximation of W that is best for the rows that carry the forget set (FILA).

    Minimises sum_i w_i ||W_i - scaling * (B A)_i||^2 over rank-r products. With D = diag(sqrt(w)) and the truncated
    SVD D W = U S V^T:

        A0 = (S / scaling)^(1/2) V^T          B0 = D^-1 U (S / scaling)^(1/2) = W V (S * scaling)^(-1/2)

    The second form of B0 needs no inverse of w, so rows of (almost) no weight stay harmless. The row weights are
    divided by their mean first: their scale would move size between A0 and B0 and so change the learning rate
    without changing B0 A0. The SVD is exact up to 2048 on the smaller side, else randomised with 16 extra vectors and
    4 power iterations from an own seed.

    `official` is the released recipe: no normalisation, torch.svd_lowrank with exactly r vectors and 2 iterations,
    and D^-1 taken as 1 / (sqrt(w) + 1e-5).

    Source: LoKU (arXiv 2408.06621), FILA; `official` follows the authors' released code.
    """
    W = as_float32(W)
    w = row_weights.to(W)
    if not official:
        mean = w.mean()
        # Without any importance at all every row counts the same, which is PiSSA.
        w = w / mean if mean > 0 else torch.ones_like(w)
    D = w.sqrt().unsqueeze(1)
    weighted = D * W
    U, S, Vh = _official_svd(weighted, rank, seed) if official else truncated_svd(weighted, rank, seed=seed)
    root = (S / scaling).sqrt()
    A = root.unsqueeze(1) * Vh
    if official:
        B = U * root / (D + 1e-5)
    else:
        # Directions without energy (rank-deficient W) get a zero column instead of 0 / 0.
        negligible = S.max() * torch.finfo(S.dtype).eps >= S
        inverse = (S * scaling).rsqrt().masked_fill(negligible, 0.0)
        B = (W @ Vh.T) * inverse
    energy = float(S.square().sum() / weighted.square().sum().clamp(min=torch.finfo(S.dtype).tiny))
    return Factors(A.contiguous(), B.contiguous(), min(energy, 1.0))


def lora(W: Float[Tensor, "out in"], *, rank: int, seed: int = 0) -> Factors:
    """Start as plain LoRA does: A0 Kaiming-uniform with a = sqrt(5), B0 = 0, so that the product is zero.

    Source: Hu et al., "LoRA", 2021 (arXiv 2106.09685), with PEFT's choice of A0.
    """
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = W.shape
    bound = 1 / math.sqrt(in_features)  # kaiming_uniform_ with a = sqrt(5)
    A = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator).to(W.device)
    return Factors(A, torch.zeros(out_features, rank, device=W.device), 0.0)


def truncated_svd(
    matrix: Float[Tensor, "out in"],
    rank: int,
    *,
    seed: int = 0,
    method: Literal["auto", "exact", "randomised"] = "auto",
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"], Float[Tensor, "rank in"]]:
    """Return the r largest singular triples U, S, V^T of a matrix.

    `auto` is exact while the smaller side is at most 2048. The randomised form is subspace iteration with r + 16
    vectors, 4 iterations and its own generator, so that a result depends on nothing but its seed.

    Source: Halko, Martinsson and Tropp, "Finding structure with randomness", 2011 (algorithms 4.4 and 5.1).
    """
    if method == "auto":
        method = "exact" if min(matrix.shape) <= EXACT_LIMIT else "randomised"
    if method == "exact":
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    columns = min(rank + OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(matrix.shape[1], columns, generator=generator).to(matrix)
    Q, _ = torch.linalg.qr(matrix @ sketch)
    for _ in range(POWER_ITERATIONS):
        Q, _ = torch.linalg.qr(matrix.T @ Q)
        Q, _ = torch.linalg.qr(matrix @ Q)
    U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return (Q @ U)[:, :rank], S[:rank], Vh[:rank]


def _official_svd(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(matrix, q=rank, niter=2)
    return U, S, V.T


INITIALISERS = ("fila", "fila-official", "lora")


def initial_factors(
    layers: Layers,
    init: str,
    *,
    rank: int,
    scaling: float,
    importance: Importance | None = None,
    seed: int = 0,
) -> dict[str, Factors]:
    """Choose (A0, B0) for every layer by the named initialiser. FILA needs the importance of every layer.

    Each layer has its own seed, so that one layer's factors do not depend on which others are adapted.
    """
    if init not in INITIALISERS:
        raise InputError(f"--init '{init}' is not an initialiser.", suggestion(init, INITIALISERS))
    factors = {}
    for name, layer in layers.items():
        layer_seed = zlib.crc32(f"{seed}:{name}".encode())
        if init == "lora":
            factors[name] = lora(weight(layer), rank=rank, seed=layer_seed)
            continue
        if importance is None or name not in importance.layers:
            raise InputError(
                f"The initialiser '{init}' has no importance for the layer '{name}'.",
                "Estimate it for the same layers first (`loku importance` with the same --targets).",
            )
        rows = importance.layers[name].relative.to(layer.weight.device)
        official = init == "fila-official"
        factors[name] = fila(weight(layer), rows, rank=rank, scaling=scaling, official=official, seed=layer_seed)
    return factors
