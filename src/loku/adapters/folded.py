"""An adapted layer as one product: base weight, adapter and anchor are added up once for each pass, and left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loku.adapters.anchor import ANCHOR, TRAINED, lora_layers
from loku.adapters.layers import weight

KEPT_BYTES = 2**31  # most that sums which are kept may take


@contextmanager
def folded(model: nn.Module, *, keep: bool = False) -> Iterator[None]:
    """Run the adapted layers of a model in fewer products while the context lasts.

    PEFT computes W x + s B (A x), and with an anchor s (-B0) (A0 x), too: five products and six passes over the output
    where two products do. With D = s [B, -B0] and C = [A ; A0] a layer is

        y  = (W + D C) x        where there are more tokens than the sum W + D C costs: in out / (in + out)
        y  = W x + D (C x)      otherwise
        dx = (W + D C)^T dy,    dA = s (B^T dy) x^T,    dB = s dy (A x)^T

    The sum lives as long as one product; the base weight is read and never written, and nothing is kept but x. With
    `keep`, for measuring, passes without gradients keep the sums while the context lasts, unless those of all layers
    take more than `KEPT_BYTES`; the weights must not change meanwhile. Only layers in float32 or float64 are folded: in
    half precision the sum would swallow small updates. Whatever else an adapter may be (DoRA, dropout, a bias, other
    adapters, merged, off) runs as PEFT has it.
    """
    with ExitStack() as stack:
        if isinstance(model, PeftModel):
            layers = [layer for layer in lora_layers(model).values() if type(layer) is LoraLinear]
            size = sum(layer.get_base_layer().weight.nbytes for layer in layers)
            for layer in layers:
                if "forward" not in vars(layer):
                    layer.forward = _forward(layer, layer.forward, keep=keep and size <= KEPT_BYTES)
                    stack.callback(delattr, layer, "forward")
        yield


def _forward(layer: Any, original: Callable[..., Tensor], *, keep: bool) -> Callable[..., Tensor]:
    kept: list[Tensor] = []
    summed: list[str] = []  # the adapters whose sum is kept

    def forward(x: Tensor, *args: Any, **more: Any) -> Tensor:
        names = layer.active_adapters
        if kept and not (args or more) and names == summed and _may_use(kept[0], layer, x):
            return F.linear(x, kept[0], layer.get_base_layer().bias)
        if args or more or not _is_plain(layer, names, x):
            return original(x, *args, **more)
        A, B = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
        fixed = (layer.lora_A[ANCHOR].weight, layer.lora_B[ANCHOR].weight) if ANCHOR in names else (None, None)
        base = layer.get_base_layer()
        if keep and not torch.is_grad_enabled():
            if not kept or names != summed:
                C, D = _stacked(A, B, fixed[0], fixed[1], layer.scaling[TRAINED])
                kept[:], summed[:] = [torch.addmm(weight(base), D, C)], names
            return F.linear(x, kept[0], base.bias)
        return _Folded.apply(x, A, B, *fixed, weight(base), base.bias, layer.scaling[TRAINED])

    return forward


def _may_use(sum_of_layer: Tensor, layer: Any, x: Tensor) -> bool:
    """Whether a layer that was plain when its sum was kept still is: what costs a look at every adapter cannot change.

    Decoding calls every layer once a token: there the whole of `_is_plain` shows in a profile.
    """
    return not (
        torch.is_grad_enabled()
        or layer.disable_adapters
        or layer.merged
        or x.dtype != sum_of_layer.dtype
        or torch.is_autocast_enabled(x.device.type)
    )


def _is_plain(layer: Any, names: list[str], x: Tensor) -> bool:
    base = layer.get_base_layer()
    own = [base.weight] if base.bias is None else [base.weight, base.bias]
    return not (
        layer.disable_adapters
        or layer.merged
        or TRAINED not in names
        or set(names) - {TRAINED, ANCHOR}
        or x.dtype not in (torch.float32, torch.float64)
        or torch.is_autocast_enabled(x.device.type)
        or any(parameter.requires_grad or parameter.dtype != x.dtype for parameter in own)
        or hasattr(base, "_hf_hook")
        or not all(_is_plain_adapter(layer, name, x) for name in names)
    )


def _is_plain_adapter(layer: Any, name: str, x: Tensor) -> bool:
    A, B = layer.lora_A[name], layer.lora_B[name]
    return (
        A.weight.dtype == B.weight.dtype == x.dtype
        and B.bias is None
        and name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.scaling[name] == layer.scaling[TRAINED]
        and (name == TRAINED or not (A.weight.requires_grad or B.weight.requires_grad))
    )


class _Folded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "*tokens in"],
        A: Float[Tensor, "rank in"],
        B: Float[Tensor, "out rank"],
        A0: Float[Tensor, "rank in"] | None,
        B0: Float[Tensor, "out rank"] | None,
        W: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        scaling: float,
    ) -> Float[Tensor, "*tokens out"]:
        ctx.save_for_backward(x, A, B, A0, B0, W)
        ctx.scaling = scaling
        rows, columns = W.shape
        ctx.summed = x.shape[:-1].numel() * (rows + columns) >= rows * columns
        C, D = _stacked(A, B, A0, B0, scaling)
        if ctx.summed:
            return F.linear(x, torch.addmm(W, D, C), bias)
        y = F.linear(x, W, bias)
        flat = y.view(-1, rows)
        flat.addmm_(x.reshape(-1, columns) @ C.T, D.T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, A0, B0, W = ctx.saved_tensors
        flat, dy = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, W.shape[0])
        dx = dA = dB = None
        if ctx.needs_input_grad[0]:
            C, D = _stacked(A, B, A0, B0, ctx.scaling)
            dx = dy @ torch.addmm(W, D, C) if ctx.summed else (dy @ W).addmm_(dy @ D, C)
            dx = dx.view(x.shape)
        if ctx.needs_input_grad[1]:
            dA = (dy @ B).mul_(ctx.scaling).T @ flat
        if ctx.needs_input_grad[2]:
            dB = dy.T @ (flat @ A.T).mul_(ctx.scaling)
        return dx, dA, dB, None, None, None, None, None


def _stacked(A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    if A0 is None or B0 is None:
        return A, B * scaling
    return torch.cat([A, A0]), torch.cat([B, B0], dim=1).mul_(scaling)
