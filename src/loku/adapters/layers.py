"""Which layers an adapter attaches to, and their weights in one orientation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loku.errors import InputError, suggestion

ALL_LINEAR = "all-linear"

# GPT-2's Conv1D counts as linear too: it has the same attributes, with the weight transposed.
Layers = Mapping[str, nn.Linear]


def is_transposed(layer: nn.Linear) -> bool:
    """Whether the layer stores its weight as (in, out): GPT-2's Conv1D."""
    return isinstance(layer, Conv1D)


def weight(layer: nn.Linear) -> Float[Tensor, "out in"]:
    """Return the layer's weight as (out, in), a view without gradient."""
    stored = layer.weight.detach()
    return stored.T if is_transposed(layer) else stored


def target_layers(model: PreTrainedModel, targets: str = ALL_LINEAR) -> dict[str, nn.Linear]:
    """Return the layers to adapt, by full name, in the model's order.

    `targets` is "all-linear" (every linear layer but the output head) or a comma-separated list of layer names such
    as "q_proj,v_proj"; a name matches a whole last part or dotted suffix of the full name.

    Raises InputError when nothing matches, when the head is asked for, or when a weight is quantised.
    """
    head = model.get_output_embeddings()
    linear = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head
    }
    if not linear:
        raise InputError(
            f"{type(model).__name__} has no linear layers besides its output head.",
            "Use --tune full, or a model whose blocks are made of linear layers.",
        )
    chosen = linear
    if targets != ALL_LINEAR:
        chosen = _matching(linear, [part.strip() for part in targets.split(",")], head_name=_name_of(model, head))
    for name, layer in chosen.items():
        stored = layer.weight
        if not stored.is_floating_point():
            raise InputError(
                f"The layer '{name}' of this model is quantised ({type(layer).__name__}).",
                "Load the model in floating point (bfloat16 or float32): importance and FILA need the real weights.",
            )
    return chosen


def _matching(linear: Layers, parts: list[str], head_name: str | None) -> dict[str, nn.Linear]:
    valid = sorted({name.rsplit(".", 1)[-1] for name in linear})
    for part in parts:
        if head_name is not None and _matches(head_name, part):
            raise InputError(
                f"--targets '{part}' names the output head.",
                f"Leave it out: the head is tied to or shared with the vocabulary. Layers to choose from: {valid}.",
            )
        if not any(_matches(name, part) for name in linear):
            raise InputError(f"--targets '{part}' matches no linear layer of this model.", suggestion(part, valid))
    return {name: layer for name, layer in linear.items() if any(_matches(name, part) for part in parts)}


def _matches(name: str, part: str) -> bool:
    return name == part or name.endswith("." + part)


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def shortest_targets(model: PreTrainedModel, layers: Layers) -> list[str]:
    """Return the shortest list of PEFT `target_modules` that selects exactly these layers.

    Last name parts ("q_proj") where they are unambiguous, full names otherwise.
    """
    short = sorted({name.rsplit(".", 1)[-1] for name in layers})
    selected = {name for name, _ in model.named_modules() if any(_matches(name, part) for part in short)}
    return short if selected == set(layers) else sorted(layers)


def check_rank(layers: Layers, rank: int) -> None:
    """Raise InputError when the rank exceeds what some layer's weight can have."""
    if rank < 1:
        raise InputError(f"--rank {rank} is not positive.", "Give a rank of at least 1; 16 is a good start.")
    name, smallest = min(((name, min(weight(layer).shape)) for name, layer in layers.items()), key=lambda pair: pair[1])
    if rank > smallest:
        raise InputError(
            f"--rank {rank} is above the size of the layer '{name}' ({smallest}).",
            f"Choose a rank of at most {smallest}, or leave that layer out with --targets.",
        )


def parameter_share(model: nn.Module) -> tuple[int, float]:
    """Return how many parameters are trainable, and their share of the base model's parameters."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapter = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    base = sum(p.numel() for p in model.parameters()) - adapter
    return trainable, trainable / max(base, 1)


def as_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or unchanged when it already is float32 or float64."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
