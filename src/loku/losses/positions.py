"""The positions a loss looks at: supervised tokens, aligned with the logits that predict them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORE = -100


class Selection(NamedTuple):
    """Where a batch is supervised: `mask` marks the positions that predict `targets`, in the order of the batch."""

    mask: Bool[Tensor, "batch seq-1"]
    targets: Int[Tensor, " tokens"]
    sequence: Int[Tensor, " tokens"]


def select(labels: Int[Tensor, "batch seq"]) -> Selection:
    """Find the supervised positions: labels are shifted as in transformers, those that are -100 do not count."""
    targets = labels[:, 1:]
    mask = targets != IGNORE
    sequence = torch.arange(labels.shape[0], device=labels.device).unsqueeze(1).expand_as(targets)
    return Selection(mask, targets[mask], sequence[mask])


def widest(*tensors: Tensor | None) -> torch.dtype:
    """Return the type scores are computed in: float32, or float64 if any tensor has it."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


class Supervised(NamedTuple):
    """The supervised positions of a batch, flattened; prompt and padding are gone.

    `logits` (float32) are those that predict `targets`; `sequence` is the row of the batch a position comes from.
    """

    logits: Float[Tensor, "tokens vocab"]
    targets: Int[Tensor, " tokens"]
    sequence: Int[Tensor, " tokens"]


def supervised(logits: Float[Tensor, "batch seq vocab"], labels: Int[Tensor, "batch seq"]) -> Supervised:
    """Select the positions whose next token is supervised (label not -100) and take their logits to float32.

    Half-precision logits are widened before any softmax: rounding decides which token is the runner-up.
    """
    chosen = select(labels)
    return Supervised(logits[:, :-1][chosen.mask].to(widest(logits)), chosen.targets, chosen.sequence)


def count_tokens(labels: Int[Tensor, "batch seq"]) -> Int[Tensor, ""]:
    """Return the number of supervised positions: labels that some logit predicts."""
    return (labels[:, 1:] != IGNORE).sum()


def mean(
    values: Float[Tensor, " items"],
    num_items: Tensor | float | None = None,
    weights: Float[Tensor, " items"] | None = None,
) -> Float[Tensor, ""]:
    """Return the weighted sum of the values over `num_items`, or over the sum of their weights (1 each by default).

    With gradient accumulation `num_items` counts the items of all micro-batches, so that splitting a batch changes
    nothing but rounding. A batch without items has mean 0, not NaN.
    """
    if weights is not None:
        values = values * weights
    if num_items is None:
        num_items = max(float(values.numel() if weights is None else weights.sum()), 1e-12) if values.numel() else 1
    return values.sum() / num_items
