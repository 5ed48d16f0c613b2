"""The penalty on what an adapter puts into the output directions that the retain rows use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn

from loku.adapters.anchor import TRAINED, lora_layers
from loku.errors import InputError


def orthogonality(
    B: Mapping[str, Float[Tensor, "out rank"]], subspaces: Mapping[str, Float[Tensor, "out found"]]
) -> Float[Tensor, ""]:
    """Penalise the parts of the factors B within the directions P of their layers.

        sum over layers of ||B^T P||_F^2

    Source: ReGLU (Xiao et al. 2026, arXiv 2604.17396), weighted there with 0.5.
    """
    return torch.stack([(factor.T @ subspaces[name].to(factor)).square().sum() for name, factor in B.items()]).sum()


@dataclass
class Orthogonality:
    """`weight` times the penalty of a model's trained adapter; without a weight it costs nothing."""

    weight: float
    subspaces: dict[str, Tensor]

    @classmethod
    def checked(cls, model: nn.Module, weight: float, subspaces: Mapping[str, Tensor] | None) -> Orthogonality:
        """Return the penalty. Raises InputError when it has a weight, but not the directions of every adapted layer."""
        if weight and not (isinstance(model, PeftModel) and set(subspaces or {}) == set(lora_layers(model))):
            raise InputError(
                f"orthogonality={weight:g} needs an adapted model and the retain rows' directions of its layers.",
                "Pass subspaces={name: retain_subspace(outputs)}; see loku.adapters.activations.",
            )
        return cls(weight, dict(subspaces or {}))

    def __bool__(self) -> bool:
        return self.weight > 0

    def __call__(self, model: nn.Module) -> Float[Tensor, ""]:
        """Return the weighted penalty."""
        factors = {name: layer.lora_B[TRAINED].weight for name, layer in lora_layers(model).items()}
        return self.weight * orthogonality(factors, self.subspaces)
