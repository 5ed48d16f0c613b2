"""How the forget and the retain gradient meet: projections of one off the other, and a dual weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = Sequence[Tensor]


def dot(first: Gradients, second: Gradients) -> Tensor:
    """Return the inner product over all parameters, in float64."""
    parts = [torch.sum(a.double() * b.double()) for a, b in zip(first, second, strict=True)]
    return torch.stack(parts).sum()


def _without(gradients: Gradients, direction: Gradients) -> list[Tensor]:
    """Remove from gradients what points against a direction: g - min(<g, d>, 0) / |d|^2 * d."""
    square = dot(direction, direction)
    against = dot(gradients, direction).clamp(max=0)
    scale = torch.where(square > 0, against / square.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return [g - scale.to(g.dtype) * d for g, d in zip(gradients, direction, strict=True)]


def gru(forget: Gradients, retain: Gradients) -> list[Tensor]:
    """Let forgetting not work against keeping: project the forget gradient where the two conflict, then add.

    With <g_f, g_r> < 0, g_f becomes g_f - (<g_f, g_r> / |g_r|^2) g_r; g_r stays.

    Source: Wang et al., "GRU: Mitigating the Trade-off between Unlearning and Retention for LLMs", ICML 2025 (arXiv
    2503.09117).
    """
    return [f + r for f, r in zip(_without(forget, retain), retain, strict=True)]


def pcgrad(forget: Gradients, retain: Gradients) -> list[Tensor]:
    """Project each of two conflicting gradients off the other, then add.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020 (arXiv 2001.06782).
    """
    return [f + r for f, r in zip(_without(forget, retain), _without(retain, forget), strict=True)]


COMBINERS = {"gru": gru, "pcgrad": pcgrad}


def dual_step(weight: float, retain_loss: float, *, bound: float, rate: float) -> float:
    """Return the retain weight after a step of dual ascent on the constraint  retain loss <= bound.

        weight <- max(0, weight + rate * (retain_loss - bound))

    Source: Entesari et al., "Constrained Entropic Unlearning", 2025 (arXiv 2506.05314).
    """
    return max(0.0, weight + rate * (retain_loss - bound))
