"""VILA's importance: the variance of the gradients of small random adapter factors, in place of whole weights."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from loku.adapters.backward import Seen, Taps, backward, frozen, plan_batches
from loku.adapters.fisher import tiles
from loku.adapters.importance import (
    BATCH,
    OFFICIAL_BATCH,
    OFFICIAL_EPS,
    Importance,
    LayerImportance,
    Mode,
    check_finite,
    relative_eps,
)
from loku.adapters.layers import Layers, weight
from loku.adapters.partial import sum_over_processes, world
from loku.data.encoding import Example

SIGMA = 0.05
OFFICIAL_PASSES = 10


@dataclass(frozen=True)
class Moments:
    """Variances of the gradients of one layer's factors A and B over a set of examples."""

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]


def estimate_variance(
    model: PreTrainedModel,
    layers: Layers,
    forget: Sequence[Example],
    retain: Sequence[Example],
    *,
    pad_id: int,
    rank: int,
    scaling: float,
    mode: Mode = "default",
    sigma: float = SIGMA,
    passes: int | None = None,
    eps: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Importance:
    """Estimate importance as VILA does, from factors A, B of rank r drawn from N(0, sigma^2).

    With g_i the gradient of example i's mean token cross entropy with respect to A or B, c_i its supervised tokens and
    E the mean weighted with c_i,

        F_A = E[g_A^2] - E[g_A]^2      F_B = E[g_B^2] - E[g_B]^2      F_W = F_B F_A
        R = F_W(forget) / (F_W(retain) + eps)                         relative[o] = sum_j R[o, j]

    so no gradient of a whole weight is needed: g_B = s G^T (X A^T) and g_A = s (G B)^T X for a layer's inputs X, output
    gradient G and LoRA scaling s. Default: one gradient per example of the target model itself, one pass, eps = 0.01
    of the layer's mean F_W(retain); B A is not added to the weights, as the anchor cancels a start elsewhere. R then
    does not depend on `sigma`: the factors' scale cancels.
    `official` is the released recipe: the model carries s B A while it is measured, gradients are batch means over 10
    passes (`passes`) with retain partners drawn anew, F is divided by the token count twice, eps = 1e-5.

    Source: VILA (Kim et al. 2025, arXiv 2508.21300); `official` follows the authors' released code.
    """
    official = mode == "official"
    size = batch_size or (OFFICIAL_BATCH if official else BATCH)
    factors = {name: _draw(layer, rank, sigma, zlib.crc32(f"{seed}:{name}".encode())) for name, layer in layers.items()}
    sides = {"forget": plan_batches(forget, size, sort=not official)}
    if official:
        sides = {"forget": sides["forget"] * (passes or OFFICIAL_PASSES)}
        choice = random.Random(seed)
        sides["retain"] = [choice.sample(list(retain), min(len(batch), len(retain))) for batch in sides["forget"]]
    else:
        sides["retain"] = plan_batches(retain, size, sort=True)
    total = sum(len(batch) for batches in sides.values() for batch in batches)
    done = 0

    def change(name: str, inputs: Tensor) -> Tensor:
        A, B = factors[name]
        return scaling * (inputs @ A.to(inputs).T) @ B.to(inputs).T

    moments: dict[str, dict[str, Moments]] = {}
    rank_here, processes = world()
    with frozen(model, train=official):
        for side, batches in sides.items():
            consume = _Sums(factors, scaling)
            tokens = 0
            with Taps(layers, consume, whole=official, change=change if official else None) as taps:
                for batch in batches[rank_here::processes]:
                    tokens += backward(model, batch, taps, pad_id=pad_id)
                    done += len(batch) * processes
                    if progress is not None:
                        progress(min(done, total), total)
            count = torch.tensor(tokens, device=model.device)
            sum_over_processes([count, *consume.tensors.values()])
            moments[side] = consume.variances(layers, max(int(count), 1), twice=official)
    result = {name: _importance(moments["forget"][name], moments["retain"][name], mode, eps) for name in layers}
    for name, layer in result.items():
        check_finite(name, layer.relative)
    return Importance(result, dict(provenance or {}))


def _draw(layer: torch.nn.Linear, rank: int, sigma: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = weight(layer).shape
    A = sigma * torch.randn(rank, in_features, generator=generator)
    B = sigma * torch.randn(out_features, rank, generator=generator)
    return A.to(layer.weight.device), B.to(layer.weight.device)


class _Sums:
    """Adds up sum_i c_i g_i and sum_i c_i g_i^2 of both factors of each layer."""

    def __init__(self, factors: Mapping[str, tuple[Tensor, Tensor]], scaling: float) -> None:
        self.factors = factors
        self.scaling = scaling
        self.tensors = {
            f"{name}.{part}{power}": torch.zeros_like(factor)
            for name, pair in factors.items()
            for part, factor in zip("AB", pair, strict=True)
            for power in (1, 2)
        }

    def __call__(self, name: str, seen: Seen) -> None:
        """Add one layer's part of a batch."""
        A, B = self.factors[name]
        for inputs, gradient, count in seen.examples():
            g_a = self.scaling * (gradient @ B).T @ inputs
            g_b = self.scaling * gradient.T @ (inputs @ A.T)
            for part, g in (("A", g_a), ("B", g_b)):  # sqrt(c) g
                self.tensors[f"{name}.{part}1"].add_(g, alpha=count**0.5)
                self.tensors[f"{name}.{part}2"].addcmul_(g, g)

    def variances(self, layers: Layers, tokens: int, *, twice: bool) -> dict[str, Moments]:
        """Return E[g^2] - E[g]^2 of each factor, divided by the tokens once more when `twice` (the released code)."""

        def variance(key: str) -> Tensor:
            first, second = self.tensors[f"{key}1"].double() / tokens, self.tensors[f"{key}2"].double() / tokens
            found = (second - first.square()).clamp(min=0)
            return found / tokens if twice else found

        return {name: Moments(variance(f"{name}.A"), variance(f"{name}.B")) for name in layers}


def _importance(forget: Moments, retain: Moments, mode: Mode, eps: float | None) -> LayerImportance:
    """Return row and column sums of R. F_W is formed in float64, tile by tile: it is a product of squares, and tiny."""
    mean = float((retain.B.sum(0) @ retain.A.sum(1)) / (len(retain.B) * retain.A.shape[1]))
    eps = eps if eps is not None else OFFICIAL_EPS if mode == "official" else relative_eps(mean, torch.float64)
    relative, columns = retain.B.new_zeros(len(retain.B)), retain.A.new_zeros(retain.A.shape[1])
    below = 0
    for rows in tiles(len(relative), len(columns), relative.device):
        F_r = retain.B[rows] @ retain.A
        below += int((F_r < eps).count_nonzero())
        R = (forget.B[rows] @ forget.A) / F_r.add_(eps)
        relative[rows] = R.sum(1)
        columns += R.sum(0)
    return LayerImportance(
        relative=relative.float().cpu(),
        forget=(forget.B @ forget.A.sum(1)).float().cpu(),
        retain=(retain.B @ retain.A.sum(1)).float().cpu(),
        columns=columns.float().cpu(),
        eps=eps,
        share_below_eps=below / (len(relative) * len(columns)),
    )
