"""What the tests of attacks share: models with adapters, trained in a second, and their folders."""

from __future__ import annotations

import torch

from loku.adapters.anchor import attach
from loku.adapters.initialisers import Factors
from loku.adapters.layers import target_layers


def anchored(model, seed=0):
    """A model with an adapter that was moved, and its anchor."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    layers = target_layers(model)
    for name, layer in layers.items():
        out, wide = layer.weight.shape
        A, B = torch.randn(2, wide, generator=generator) * 0.1, torch.randn(out, 2, generator=generator) * 0.1
        factors[name] = Factors(A, B, 0.5)
    peft = attach(model, layers, factors, rank=2, alpha=4.0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".default." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return peft
