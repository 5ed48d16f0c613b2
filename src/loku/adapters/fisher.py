"""Sums of squared per-example weight gradients, tile by tile: what Fisher importance is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

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

    def take(self, name: str, like: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Return a float32 buffer of that shape with whatever stands in it."""
        device, (rows, columns) = like.device, like.shape
        found = self._buffers.get((name, device))
        if found is None or found.numel() < rows * columns:
            found = self._buffers[name, device] = torch.empty(rows * columns, device=device)
        return found[: rows * columns].view(rows, columns)


def add_squares(total: Float[Tensor, "rows in"], seen: Seen, rows: slice, scratch: Scratch) -> None:
    """Add sum_b (G_b[:, rows]^T A_b)^2 to `total`, for the inputs A_b and output gradients G_b of each example b."""
    product = scratch.take("product", total)
    for inputs, gradient, _ in seen.examples():
        torch.mm(gradient[:, rows].T, inputs, out=product)
        total.addcmul_(product, product)


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
        for rows in tiles(total.shape[0], total.shape[1], total.device):
            add_squares(total[rows], seen, rows, self.scratch)


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
        for rows in tiles(inverse.shape[0], inverse.shape[1], inverse.device):
            tile = inverse[rows]
            squares = self.scratch.take("squares", tile).zero_()
            add_squares(squares, seen, rows, self.scratch)
            self.tensors[f"{name}.forget"][rows] += squares.sum(1)
            squares.mul_(tile)
            self.tensors[f"{name}.relative"][rows] += squares.sum(1)
            self.tensors[f"{name}.columns"] += squares.sum(0)


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
