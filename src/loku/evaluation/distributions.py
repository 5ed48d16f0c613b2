"""What a model's next-token distributions say of given labels, in blocks of positions: never all logits at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from loku.losses.lm_head import HeadSpec
from loku.losses.positions import widest

LOGITS = 2**26  # logits in float32 at a time (256 MiB)
LOGITS_CPU = 2**22  # on CPU a block should stay in the cache (16 MiB), but matrix products want LEAST_ROWS
LEAST_ROWS = 128
STRIP_CPU = 2**17  # logits that go through all element-wise steps before the next ones, on CPU
BLOCK = 64


class LabelStatistics(NamedTuple):
    """Of each label y, with p the distribution that is to predict it: log p_y, whether y is argmax p (the first of
    equals), mean and variance of log p_v with v drawn from p; nats and nats squared. The mean is minus the entropy.
    """

    logprobs: Float[Tensor, " labels"]
    hits: Float[Tensor, " labels"]
    means: Float[Tensor, " labels"]
    variances: Float[Tensor, " labels"]


def label_statistics(
    states: Float[Tensor, "positions d"],
    head: HeadSpec | None,
    sources: Int[Tensor, " labels"],
    labels: Int[Tensor, " labels"],
) -> LabelStatistics:
    """Return the statistics of labels, each predicted from the position `sources` names (sorted ascending).

    Several labels may share a position: its distribution is computed once. `states` are what enters the head, or the
    logits themselves where `head` is None. Blocks of positions become logits in turn, in the head's own type as in the
    model, and are widened to float32 (float64 stays) before anything else. With e_v = exp(z_v - z_max) and S = sum e_v

        mean = sum e_v (z_v - z_max) / S - log S        variance = sum e_v (log p_v - mean)^2 / S
    """
    found = [
        torch.stack(_block(logits, sources[start:stop] - first, labels[start:stop]))
        for logits, first, start, stop in _blocks(states, head, sources)
    ]
    empty = states.new_zeros(4, 0, dtype=widest(states))
    logprobs, hits, means, variances = torch.cat([empty, *found], dim=1)
    return LabelStatistics(logprobs, hits, means, variances)


def _blocks(
    states: Float[Tensor, "positions d"], head: HeadSpec | None, sources: Int[Tensor, " labels"]
) -> Iterator[tuple[Float[Tensor, "rows vocab"], int, int, int]]:
    """Yield the logits of a block of positions, its first position, and which labels are predicted there."""
    logits_of, vocab = _logits(head, states)
    on_cpu = states.device.type == "cpu"
    rows = max(LEAST_ROWS, LOGITS_CPU // vocab) if on_cpu else max(1, LOGITS // vocab)
    for first in range(0, states.shape[0], rows):
        strip = max(1, STRIP_CPU // vocab) if on_cpu else rows
        block = logits_of(states[first : first + rows])
        bounds = torch.arange(first, first + block.shape[0] + strip, strip, device=sources.device)
        bounds.clamp_(max=first + block.shape[0])
        edges = torch.searchsorted(sources, bounds).tolist()
        yield from zip(block.split(strip), bounds.tolist(), edges, edges[1:], strict=False)


def _logits(head: HeadSpec | None, states: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """Return how positions become float32 logits that may be written to, and the size of the vocabulary."""
    wide = widest(states)
    if head is None:
        return lambda piece: piece.to(wide, copy=True), states.shape[1]
    weight, bias = head.module.weight, head.module.bias

    def logits(piece: Tensor) -> Tensor:
        z = F.linear(piece.to(weight.dtype), weight, bias)
        return (z if head.softcap is None else z.div_(head.softcap).tanh_().mul_(head.softcap)).to(wide)

    return logits, weight.shape[0]


def _block(
    z: Float[Tensor, "rows vocab"], rows: Int[Tensor, " labels"], labels: Int[Tensor, " labels"]
) -> list[Tensor]:
    """Return the four statistics; the logits are overwritten."""
    target = z[rows, labels]
    peak, choice = _largest(z)
    z.sub_(peak.unsqueeze(1))
    # exp of less is nothing next to 1, but slow (denormals); and an impossible token must not make 0 * inf.
    z.clamp_(min=0.75 * math.log(torch.finfo(z.dtype).tiny))
    e = z.exp()
    total = e.sum(dim=1)
    centre = torch.linalg.vecdot(e, z) / total
    z.sub_(centre.unsqueeze(1))
    variance = torch.linalg.vecdot(e.mul_(z), z) / total
    normaliser = total.log()
    return [
        (target - peak[rows]) - normaliser[rows],
        (choice[rows] == labels).to(z.dtype),
        (centre - normaliser)[rows],
        variance[rows],
    ]


def _largest(z: Float[Tensor, "rows vocab"]) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Return each row's maximum and where it first occurs. By blocks: torch's own costs several times more on CPU."""
    whole = z.shape[1] // BLOCK * BLOCK
    maxima = z[:, :whole].unflatten(1, (-1, BLOCK)).amax(dim=2)
    if whole < z.shape[1]:
        maxima = torch.cat([maxima, z[:, whole:].amax(dim=1, keepdim=True)], dim=1)
    start = maxima.argmax(dim=1, keepdim=True) * BLOCK
    columns = (start + torch.arange(BLOCK, device=z.device)).clamp(max=z.shape[1] - 1)
    peak, place = z.gather(1, columns).max(dim=1)
    return peak, columns.gather(1, place.unsqueeze(1)).squeeze(1)
