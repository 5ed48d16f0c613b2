"""The positions a loss looks at: supervised tokens, aligned with the outputs that predict them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loku.errors import InputError

IGNORE = -100


@dataclass(frozen=True)
class Selection:
    """The supervised positions of a batch, in its order: `index` are those that predict `targets`, rows end to end."""

    index: Int[Tensor, " tokens"]
    targets: Int[Tensor, " tokens"]
    sequence: Int[Tensor, " tokens"]
    shape: tuple[int, int]  # rows, and their length (0 where the places are not those of padded rows)

    def pick(self, values: Float[Tensor, "batch seq d"]) -> Float[Tensor, "tokens d"]:
        """Return the values at the positions. The gradient is one zero tensor, filled in: no copies per slice."""
        if values.shape[:2] != self.shape:
            raise InputError(
                f"The labels have shape {list(self.shape)}, but the model's output has {list(values.shape[:2])}.",
                "Give the labels of the same batch, one for each position.",
            )
        return values.flatten(0, 1).index_select(0, self.index)


def select(labels: Int[Tensor, "batch seq"]) -> Selection:
    """Find the supervised positions: labels are shifted as in transformers, those that are -100 do not count."""
    sequence, position = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    rows, length = labels.shape
    return Selection(sequence * length + position, labels[sequence, position + 1], sequence, (rows, length))


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
    return Supervised(chosen.pick(logits).to(widest(logits)), chosen.targets, chosen.sequence)


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
