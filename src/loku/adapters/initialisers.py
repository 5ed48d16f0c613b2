"""Initialisers: how a layer's adapter (A0, B0) is chosen before training."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from loku.adapters.activations import ROWS, LayerActivations, forget_subspace
from loku.adapters.factorise import released_svd, truncated_svd
from loku.adapters.importance import Importance, LayerImportance
from loku.adapters.layers import Layers, as_float32, weight
from loku.adapters.variance import OFFICIAL_PASSES, SIGMA
from loku.errors import InputError, suggestion


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
    column_weights: Float[Tensor, " in"] | None = None,
    *,
    rank: int,
    scaling: float,
    seed: int = 0,
) -> Factors:
    """Start from the low-rank approximation of W that is best for the rows that carry the forget set (FILA).

    Minimises sum_ij w_i v_j (W - scaling * B A)_ij^2 over rank-r products, v = 1 without `column_weights`. With
    D = diag(sqrt(w)), E = diag(sqrt(v)) and the truncated SVD D W E = U S V^T:

        A0 = (S / scaling)^(1/2) V^T E^-1     = (S * scaling)^(-1/2) U^T D W
        B0 = D^-1 U (S / scaling)^(1/2)       = W E V (S * scaling)^(-1/2)

    The second forms need no inverse of a weight, so rows and columns of (almost) no weight stay harmless. The weights
    are divided by their mean first: their scale would move size between A0 and B0 and so change the learning rate
    without changing B0 A0. Where no weight is positive all are 1, which is PiSSA.

    With both weights this is the two-sided form: element weights R_ij are replaced by their best rank-one approximation
    (row sum)_i (column sum)_j / (sum of all), best in the generalised Kullback-Leibler divergence, as the row weights
    alone are the best that is constant along rows.

    Source: LoKU (arXiv 2408.06621), FILA; the two-sided form is this project's.
    """
    W = as_float32(W)
    D = _normalised(row_weights.to(W)).sqrt().unsqueeze(1)
    weighted = D * W
    E = None
    if column_weights is not None:
        E = _normalised(column_weights.to(W)).sqrt()
        weighted = weighted * E
    U, S, Vh = truncated_svd(weighted, rank, seed=seed)
    # Directions without energy (rank-deficient W) get a zero column instead of 0 / 0.
    negligible = S.max() * torch.finfo(S.dtype).eps >= S
    inverse = (S * scaling).rsqrt().masked_fill(negligible, 0.0)
    if E is None:
        A = (S / scaling).sqrt().unsqueeze(1) * Vh
        B = (W @ Vh.T) * inverse
    else:
        A = inverse.unsqueeze(1) * (U.T @ (D * W))
        B = (W @ (E.unsqueeze(1) * Vh.T)) * inverse
    return Factors(A.contiguous(), B.contiguous(), _energy(S, weighted))


def fila_official(
    W: Float[Tensor, "out in"], row_weights: Float[Tensor, " out"], *, rank: int, scaling: float, seed: int = 0
) -> Factors:
    """Start as the released FILA does: weights as they are, a sketch of exactly r vectors, D^-1 = 1 / (sqrt(w) + 1e-5).

    Source: the released code of LoKU (arXiv 2408.06621).
    """
    W = as_float32(W)
    D = row_weights.to(W).sqrt().unsqueeze(1)
    weighted = D * W
    U, S, Vh = released_svd(weighted, rank, seed)
    root = (S / scaling).sqrt()
    return Factors((root.unsqueeze(1) * Vh).contiguous(), (U * root / (D + 1e-5)).contiguous(), _energy(S, weighted))


def pissa(W: Float[Tensor, "out in"], *, rank: int, scaling: float, seed: int = 0) -> Factors:
    """Start from the r largest singular triples of W: FILA with equal weights.

    Source: Meng, Wang and Zhang, "PiSSA", 2024 (arXiv 2404.02948).
    """
    return fila(W, torch.ones(W.shape[0], device=W.device), rank=rank, scaling=scaling, seed=seed)


def lora(W: Float[Tensor, "out in"], *, rank: int, seed: int = 0) -> Factors:
    """Start as plain LoRA does: A0 Kaiming-uniform with a = sqrt(5), B0 = 0, so that the product is zero.

    Source: Hu et al., "LoRA", 2021 (arXiv 2106.09685), with PEFT's choice of A0.
    """
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = W.shape
    bound = 1 / math.sqrt(in_features)  # kaiming_uniform_ with a = sqrt(5)
    A = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator).to(W.device)
    return Factors(A, torch.zeros(out_features, rank, device=W.device), 0.0)


def reglu(
    W: Float[Tensor, "out in"],
    activations: LayerActivations,
    *,
    rank: int,
    scaling: float,
    beta: float = 0.7,
    seed: int = 0,
) -> Factors:
    """Start in the output directions that the forget rows use most and the retain rows least (ReGLU).

    With Q from `forget_subspace`: B0 = Q and A0 = Q^T W / scaling, so that scaling * B0 A0 = Q Q^T W under any scaling
    (the released code leaves the scaling out). Where fewer than r directions hold more of the forget set than of the
    retain set, the rest starts as plain LoRA.

    Source: ReGLU (Xiao et al. 2026, arXiv 2604.17396); beta 0.7 on TOFU, 0.5 on WMDP.
    """
    W = as_float32(W)
    Q = forget_subspace(activations, rank, beta=beta).to(W)
    A, B, _ = lora(W, rank=rank, seed=seed)
    found, projected = Q.shape[1], Q.T @ W
    A[:found], B[:, :found] = projected / scaling, Q
    return Factors(A, B, _energy(projected.flatten(), W))


def _normalised(weights: Tensor) -> Tensor:
    mean = weights.mean(dtype=torch.float64)
    return (weights / mean).to(weights.dtype) if mean > 0 else torch.ones_like(weights)


def _energy(S: Tensor, whole: Tensor) -> float:
    return min(float(S.square().sum() / whole.square().sum().clamp(min=torch.finfo(S.dtype).tiny)), 1.0)


@dataclass(frozen=True)
class Situation:
    """What an initialiser may look at for one layer. What it did not ask for is None."""

    W: Float[Tensor, "out in"]
    rank: int
    scaling: float
    seed: int
    importance: LayerImportance | None
    activations: LayerActivations | None
    options: Mapping[str, Any]

    def common(self) -> dict[str, Any]:
        """Return the arguments that most initialisers share."""
        return {"rank": self.rank, "scaling": self.scaling, "seed": self.seed}

    @property
    def measured(self) -> LayerImportance:
        """The importance, of an initialiser that needs it."""
        assert self.importance is not None
        return self.importance


class Number(NamedTuple):
    """An option of an initialiser: its default, and the range that it may lie in."""

    default: float
    least: float
    most: float = math.inf


@dataclass(frozen=True)
class Initialiser:
    """A way to choose (A0, B0), what it needs to have measured, and its own options.

    `needs`: "fisher" (`estimate_importance`), "variance" (`estimate_variance`), "activations" (`pooled_outputs`) or
    None. With `official` they are measured as released.
    """

    choose: Callable[[Situation], Factors]
    needs: Literal["fisher", "variance", "activations"] | None = None
    official: bool = False
    options: Mapping[str, Number] = field(default_factory=dict)

    def values(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return every option's value. Raises InputError for options that do not exist or lie out of range."""
        for name, value in (given or {}).items():
            if name not in self.options:
                remedy = suggestion(name, self.options) if self.options else "It has none."
                raise InputError(f"The initialiser has no option '{name}'.", remedy)
            _, least, most = self.options[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                limits = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
                raise InputError(f"The initialiser's option '{name}' is {value!r}.", f"Give a number {limits}.")
        kinds = {name: type(option.default) for name, option in self.options.items()}
        return {name: kinds[name]((given or {}).get(name, option.default)) for name, option in self.options.items()}


INITIALISERS: dict[str, Initialiser] = {
    "fila": Initialiser(lambda at: fila(at.W, at.measured.relative, **at.common()), "fisher"),
    "fila-official": Initialiser(lambda at: fila_official(at.W, at.measured.relative, **at.common()), "fisher", True),
    "fila-two-sided": Initialiser(
        lambda at: fila(at.W, at.measured.relative, at.measured.columns, **at.common()), "fisher"
    ),
    "vila": Initialiser(lambda at: fila(at.W, at.measured.relative, **at.common()), "variance"),
    "vila-official": Initialiser(
        lambda at: fila_official(at.W, at.measured.relative, **at.common()),
        "variance",
        True,
        {"sigma": Number(SIGMA, 1e-8), "passes": Number(OFFICIAL_PASSES, 1)},
    ),
    "reglu": Initialiser(
        lambda at: reglu(at.W, _activations(at), beta=at.options["beta"], **at.common()),
        "activations",
        options={"beta": Number(0.7, 0, 1), "rows": Number(ROWS, 1)},
    ),
    "pissa": Initialiser(lambda at: pissa(at.W, **at.common())),
    "lora": Initialiser(lambda at: lora(at.W, rank=at.rank, seed=at.seed)),
}


def _activations(at: Situation) -> LayerActivations:
    assert at.activations is not None
    return at.activations


def initialiser_of(init: str | Initialiser) -> Initialiser:
    """Return the initialiser of that name. Raises InputError for names that do not exist."""
    if isinstance(init, Initialiser):
        return init
    if init not in INITIALISERS:
        raise InputError(f"--init '{init}' is not an initialiser.", suggestion(init, INITIALISERS))
    return INITIALISERS[init]


def initial_factors(
    layers: Layers,
    init: str | Initialiser,
    *,
    rank: int,
    scaling: float,
    importance: Importance | None = None,
    activations: Mapping[str, LayerActivations] | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Factors]:
    """Choose (A0, B0) for every layer by an initialiser, given by name or as one of your own.

    `importance` or `activations` must hold every layer where the initialiser needs them. Each layer has its own seed,
    so that one layer's factors do not depend on which others are adapted.
    """
    initialiser = initialiser_of(init)
    values = initialiser.values(options)
    factors = {}
    for name, layer in layers.items():
        at = Situation(
            weight(layer),
            rank,
            scaling,
            zlib.crc32(f"{seed}:{name}".encode()),
            importance.layers.get(name) if importance is not None else None,
            activations.get(name) if activations is not None else None,
            values,
        )
        missing = at.activations if initialiser.needs == "activations" else at.importance
        if initialiser.needs is not None and missing is None:
            what = "activations" if initialiser.needs == "activations" else "importance"
            remedy = (
                "Collect them for the same layers first (`pooled_outputs`)."
                if what == "activations"
                else "Estimate it for the same layers first (`loku importance` with the same --targets)."
            )
            raise InputError(f"The initialiser '{init}' has no {what} for the layer '{name}'.", remedy)
        factors[name] = initialiser.choose(at)
    return factors
