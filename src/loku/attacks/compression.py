"""Compression: weights rounded to few bits or pruned by magnitude, and back. Small updates may fall below the step.

Only the linear layers are changed, the head is left alone, as quantisation libraries do. The stored weights are never
written: the layers are given changed copies for a while. An adapter is merged first (`loku export`): what is
compressed in practice is the merged model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loku.attacks.relearning import linear_layers
from loku.errors import InputError, suggestion

GROUP = 64  # weights that share a scale, along the input; bitsandbytes' block size
QUANTISERS = ("int8", "int4", "nf4")

# The 16 levels of NF4 (Dettmers et al. 2023, QLoRA, appendix E): quantiles of a normal distribution, 0 among them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

Change = Callable[[Tensor], Tensor]


def round_to_bits(W: Float[Tensor, "out in"], bits: int, group: int = GROUP) -> Float[Tensor, "out in"]:
    """Round each group of `group` weights along the input to the nearest of 2^bits - 1 evenly spaced values.

    With the step s = max |w| / (2^(bits-1) - 1) of its group a weight becomes s · round(w / s). A last group may be
    shorter; a group of zeros stays zero. Computed in float32, returned in the weights' own type.
    """
    levels = 2 ** (bits - 1) - 1
    groups = _grouped(W, group)
    step = groups.abs().amax(dim=-1, keepdim=True) / levels
    rounded = torch.where(step > 0, (groups / step).round() * step, groups)
    return _ungrouped(rounded, W)


def round_to_nf4(W: Float[Tensor, "out in"], group: int = GROUP) -> Float[Tensor, "out in"]:
    """Round each group of weights, divided by its largest magnitude, to the nearest NF4 level.

    As `round_to_bits`, but with the 16 uneven levels of QLoRA and scales in float32 (no double quantisation).
    """
    groups = _grouped(W, group)
    scale = groups.abs().amax(dim=-1, keepdim=True)
    levels = torch.tensor(NF4, device=W.device)
    middles = (levels[1:] + levels[:-1]) / 2
    unit = torch.where(scale > 0, groups / scale, groups)
    return _ungrouped(levels[torch.bucketize(unit, middles)] * scale, W)


def _grouped(W: Tensor, group: int) -> Tensor:
    """Return weights as float32 groups (out, groups, group), the last one filled up with zeros."""
    missing = -W.shape[1] % group
    return nn.functional.pad(W.float(), (0, missing)).unflatten(1, (-1, group))


def _ungrouped(groups: Tensor, like: Tensor) -> Tensor:
    return groups.flatten(1)[:, : like.shape[1]].to(like.dtype)


def prune_smallest(W: Float[Tensor, "out in"], rate: float) -> Float[Tensor, "out in"]:
    """Set the floor(rate · n) weights of smallest magnitude of a matrix to zero."""
    count = int(rate * W.numel())
    pruned = W.clone(memory_format=torch.contiguous_format)  # Conv1D's weight comes transposed
    pruned.view(-1)[W.abs().reshape(-1).topk(count, largest=False).indices] = 0
    return pruned


def bitsandbytes_nf4(W: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Round by bitsandbytes itself, blocks of 64 along the flattened matrix. Needs the library on a device it knows."""
    from bitsandbytes import functional  # type: ignore[import-not-found]

    packed, state = functional.quantize_4bit(W.contiguous(), blocksize=GROUP, quant_type="nf4")
    unpacked: Tensor = functional.dequantize_4bit(packed, state)
    return unpacked.to(W.dtype).view_as(W)


def quantiser(kind: str, device: torch.device | None = None) -> tuple[Change, str]:
    """Return a rounding of weights by name, and who does it: bitsandbytes where it runs, else this module.

    Raises InputError for an unknown name.
    """
    if kind not in QUANTISERS:
        raise InputError(f"The quantisation '{kind}' is not known.", suggestion(kind, QUANTISERS))
    if kind != "nf4":
        bits = int(kind.removeprefix("int"))
        return lambda W: round_to_bits(W, bits), f"round to nearest, groups of {GROUP}"
    try:
        bitsandbytes_nf4(torch.ones(1, GROUP, device=device))
    except Exception:  # not installed, or without a kernel for this device: it raises what it likes
        return round_to_nf4, f"the built-in NF4 levels, groups of {GROUP}"
    return bitsandbytes_nf4, "bitsandbytes"


@contextmanager
def changed_weights(model: nn.Module, change: Change) -> Iterator[nn.Module]:
    """Give a model whose linear layers hold changed copies of their weights, and the stored ones back afterwards.

    `change` gets each weight as (out, in). Raises InputError for quantised weights, and for a model with an adapter.
    """
    layers = linear_layers(model)
    if any(isinstance(layer, LoraLayer) for layer in layers):
        raise InputError("The model carries an adapter.", "Merge it first: what is compressed is the merged model.")
    weights: list[tuple[nn.Parameter, bool]] = [
        (layer.weight, isinstance(layer, Conv1D)) for layer in layers if isinstance(layer.weight, nn.Parameter)
    ]
    if not all(item.is_floating_point() for item, _ in weights):
        raise InputError("The model is quantised already.", "Give the floating-point model.")
    stored = [(item, item.data) for item, _ in weights]
    try:
        with torch.no_grad():
            for item, transposed in weights:
                item.data = change(item.data.T).T.contiguous() if transposed else change(item.data)
        yield model
    finally:
        for item, data in stored:
            item.data = data
