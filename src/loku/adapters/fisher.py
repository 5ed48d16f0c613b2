"""Sums of squared per-example weight gradients, tile by tile: what Fisher importance is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from loku.adapters.backward import Seen
from loku.adapters.layers import Layers, weight
from loku.errors import InputError

# Elements of a tile of rows: with its product buffer it stays in a core's cache between the examples of a batch.
TILE = 2**17
GIB = 2**30


def tiles(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of a matrix's rows, of about `TILE` elements each; a GPU takes the whole matrix at once."""
    step = rows if device.type != "cpu" else max(TILE // columns, 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass
class Scratch:
    """Buffers that are used again for every layer and batch."""

    _buffers: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)

    def take(self, name: str, rows: int, columns: int, device: torch.device) -> Float[Tensor, "rows columns"]:
        """Return a float32 buffer with whatever stands in it."""
        found = self._buffers.get((name, device))
        if found is None or found.numel() < rows * columns:
            found = self._buffers[name, device] = torch.empty(rows * columns, device=device)
        return found[: rows * columns].view(rows, columns)


def summed_squares(
    seen: Seen, shape: torch.Size, scratch: Scratch, total: Float[Tensor, "out in"] | None = None
) -> Iterator[tuple[slice, Float[Tensor, "rows in"]]]:
    """Yield sum_b (G_b^T A_b)^2 tile by tile of rows, for the inputs A_b and output gradients G_b of each example b.

    The squares are added to `total`, or to zeros in a buffer that is valid until the next tile.
    """
    pairs = [(gradient.T, inputs) for inputs, gradient, _ in seen.examples()]
    device = seen.inputs.device
    for rows in tiles(shape[0], shape[1], device):
        product = scratch.take("product", rows.stop - rows.start, shape[1], device)
        if total is not None:
            tile = total[rows]
        else:
            tile = scratch.take("squares", rows.stop - rows.start, shape[1], device).zero_()
        for gradient, inputs in pairs:
            torch.mm(gradient[rows], inputs, out=product)
            tile.addcmul_(product, product)
        yield rows, tile


class RetainPass:
    """Adds up the whole matrix sum_i c_i g_i^2 of each layer."""

    def __init__(self, layers: Layers, scratch: Scratch) -> None:
        self.scratch = scratch
        self.tensors = {
            name: torch.zeros(weight(layer).shape, device=layer.weight.device) for name, layer in layers.items()
        }

    def __call__(self, name: str, seen: Seen) -> None:
        """Add one layer's part of a batch."""
        total = self.tensors[name]
        for _ in summed_squares(seen, total.shape, self.scratch, total):
            pass


class ForgetPass:
    """Adds up row and column sums of F_f / (F_r + eps), and row sums of F_f: both are linear in F_f.

    `inverse` holds 1 / (F_r + eps), the one matrix a layer that is stored.
    """

    def __init__(self, inverse: Mapping[str, Float[Tensor, "out in"]], scratch: Scratch) -> None:
        self.inverse = inverse
        self.scratch = scratch
        self.tensors: dict[str, Tensor] = {}
        for name, matrix in inverse.items():
            self.tensors[f"{name}.forget"] = matrix.new_zeros(matrix.shape[0])
            self.tensors[f"{name}.relative"] = matrix.new_zeros(matrix.shape[0])
            self.tensors[f"{name}.columns"] = matrix.new_zeros(matrix.shape[1])

    def __call__(self, name: str, seen: Seen) -> None:
        """Add one layer's part of a batch."""
        inverse = self.inverse[name]
        for rows, squares in summed_squares(seen, inverse.shape, self.scratch):
            self.tensors[f"{name}.forget"][rows] += squares.sum(1)
            squares.mul_(inverse[rows])
            self.tensors[f"{name}.relative"][rows] += squares.sum(1)
            self.tensors[f"{name}.columns"] += squares.sum(0)


class Inverted(NamedTuple):
    """What is left of a layer's F_r once it has become 1 / (F_r + eps)."""

    rows: Float[Tensor, " out"]  # row sums of F_r
    eps: float
    share_below_eps: float


def invert(fisher: Float[Tensor, "out in"], eps_of: Callable[[float], float]) -> Inverted:
    """Turn F_r into 1 / (F_r + eps) in place, tile by tile; `eps_of` gives eps for the mean of F_r."""
    places = list(tiles(fisher.shape[0], fisher.shape[1], fisher.device))
    sums = torch.cat([fisher[rows].sum(1) for rows in places])
    eps = eps_of(float(sums.sum(dtype=torch.float64)) / fisher.numel())
    below = 0
    for rows in places:
        tile = fisher[rows]
        below += int((tile < eps).count_nonzero())
        tile.add_(eps).reciprocal_()
    return Inverted(sums, eps, below / fisher.numel())


def layer_groups(layers: Layers, memory: float | None) -> list[dict[str, torch.nn.Linear]]:
    """Split layers into groups whose float32 accumulators take at most `memory` GiB; None is one group.

    Each group costs two more passes over the data, which go no deeper than the group's first layer. Groups are made
    from the last layer backwards, in the model's order.
    """
    if memory is None:
        return [dict(layers)]
    sizes = {name: 4 * layer.weight.numel() / GIB for name, layer in layers.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    if sizes[largest] > memory:
        raise InputError(
            f"--importance-memory {memory:g} GiB is too small for the layer '{largest}' ({sizes[largest]:.3g} GiB).",
            f"Give at least {sizes[largest]:.3g}, or leave the layer out with --targets.",
        )
    groups: list[dict[str, torch.nn.Linear]] = []
    room = 0.0
    for name in reversed(list(layers)):
        if not groups or sizes[name] > room:
            groups.append({})
            room = memory
        groups[-1] = {name: layers[name], **groups[-1]}
        room -= sizes[name]
    return groups
