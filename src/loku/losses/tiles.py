"""The vocabulary in tiles: their size, their logits, and products of half-precision weights with float32 results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def keeps_half(states: Tensor, weight: Tensor) -> bool:
    """Whether products of states and weights are made in half precision without rounding: on a GPU, of one type.

    Products of two half-precision numbers are exact in float32, and a GPU adds them up there. A CPU does not.
    """
    return states.is_cuda and weight.dtype in HALF and states.dtype == weight.dtype


def multiply(left: Float[Tensor, "n k"], right: Float[Tensor, "k m"], *, out: Float[Tensor, "n m"]) -> None:
    """Write left right into `out`; of half-precision factors into a float32 `out`, added up in float32."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_product(
    total: Float[Tensor, "n d"], left: Float[Tensor, "n tile"], rows: Float[Tensor, "tile d"]
) -> Float[Tensor, "n d"]:
    """Add left rows to `total` in place. Half-precision rows are not widened: `left` is split into two halves instead.

    left = high + low with high the nearest number in half precision: what is lost is 2^-18 (bfloat16) or 2^-22 of it.
    """
    if rows.dtype == total.dtype:
        return total.addmm_(left, rows)
    high = left.to(rows.dtype)
    low = (left - high).to(rows.dtype)
    product = torch.empty_like(total)
    for part in (high, low):
        multiply(part, rows, out=product)
        total += product
    return total


def default_tile(d: int, dtype: torch.dtype = torch.float32, device: str = "cpu", tokens: int = 0) -> int:
    """Return the columns per tile for hidden size d and a type of weights: the fastest, or the leaner of equals.

    On CPU a tile of W should still be in the cache for the second product; below 512 columns the products themselves
    slow down. A half-precision tile is widened into a buffer of its own, which is kept to 4 MB. On a GPU every tile
    costs the start of some fifteen kernels, half a millisecond, whatever its size: there the buffers take what 256 MiB
    hold for that many supervised `tokens`. Measured by benchmarks/head.py.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if device != "cpu":
        return max(2**26 // max(tokens, d if half else 1), 4096)
    most, least = (512, 256) if half else (2048, 512)
    return min(max(2**20 // d, least), most)


@dataclass
class Tile:
    """Columns start:stop of the logits; `slope` is dz/dr where there is a soft cap."""

    start: int
    stop: int
    weight: Float[Tensor, "tile d"]  # in half precision with `narrow`
    logits: Float[Tensor, "tokens tile"]
    slope: Float[Tensor, "tokens tile"] | None


def tiles(
    h: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, tile: int, narrow: bool
) -> Iterator[Tile]:
    """Yield the logits tile by tile, each in the same buffers: a tile is valid until the next one.

    With `narrow` the hidden states h are those of the weights' own type, widened, and the product is made in it.
    """
    vocab, d = weight.shape
    columns = min(tile, vocab)
    logits = h.new_empty(h.shape[0] * columns)
    slopes = torch.empty_like(logits) if softcap is not None else None
    widened = h.new_empty(columns, d) if weight.dtype != h.dtype and not narrow else None
    own = h.to(weight.dtype) if narrow else h
    for start in range(0, vocab, columns):
        stop = min(start + columns, vocab)
        rows = weight[start:stop]
        if widened is not None:
            rows = widened[: stop - start].copy_(rows)
        shape = (h.shape[0], stop - start)
        z = logits[: shape[0] * shape[1]].view(shape)
        multiply(own, rows.T, out=z)
        if bias is not None:
            z += bias[start:stop]
        slope = None
        if softcap is not None and slopes is not None:
            z.div_(softcap).tanh_()
            slope = slopes[: shape[0] * shape[1]].view(shape)
            torch.mul(z, z, out=slope).neg_().add_(1)
            z.mul_(softcap)
        yield Tile(start, stop, rows, z, slope)


def by_tile(tokens: Int[Tensor, " tokens"], vocab: int, tile: int) -> tuple[Int[Tensor, " some"], ...]:
    """Return, for each tile, the positions whose token lies in it."""
    columns = min(tile, vocab)
    counts = torch.bincount(tokens // columns, minlength=-(-vocab // columns))
    return tokens.argsort().split(counts.tolist())
