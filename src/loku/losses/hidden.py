"""Losses on hidden states: RMU's misdirection on the forget set, and staying put on the retain set."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loku.losses.positions import mean


def control_direction(size: int, seed: int) -> Float[Tensor, " hidden"]:
    """Return RMU's random unit vector: uniform entries, normalised, from an own seed."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.rand(size, generator=generator)
    return direction / direction.norm()


def rmu(
    hidden: Float[Tensor, "tokens hidden"],
    direction: Float[Tensor, " hidden"],
    *,
    coefficient: float = 2.0,
    weights: Float[Tensor, " tokens"] | None = None,
    num_items: Tensor | float | None = None,
) -> Float[Tensor, ""]:
    """Push one layer's hidden states on forget tokens to c * u, a fixed random direction (RMU).

        loss = mean over supervised tokens of  mean_j (h_j - c u_j)^2

    A token is weighted the same whichever sequence it stands in (released code divides across examples).

    Source: Li et al., "The WMDP Benchmark", ICML 2024 (arXiv 2403.03218). Published: layer 7, c = 6.5, retain weight
    1200 on Zephyr-7B; c = 2 for TOFU in open-unlearning.
    """
    return mean((hidden - coefficient * direction).square().mean(dim=-1), num_items, weights)


def hidden_distance(
    hidden: Float[Tensor, "tokens hidden"],
    reference_hidden: Float[Tensor, "tokens hidden"],
    *,
    weights: Float[Tensor, " tokens"] | None = None,
    num_items: Tensor | float | None = None,
) -> Float[Tensor, ""]:
    """Keep one layer's hidden states where the target model has them: mean over tokens of mean_j (h_j - h_ref,j)^2.

    Source: Li et al., "The WMDP Benchmark", ICML 2024 (arXiv 2403.03218), the retain term of RMU.
    """
    return mean((hidden - reference_hidden).square().mean(dim=-1), num_items, weights)
