"""The positions a loss looks at: supervised tokens, aligned with the logits that predict them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

IGNORE = -100


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
    targets = labels[:, 1:]
    mask = targets != IGNORE
    sequence = torch.arange(labels.shape[0], device=labels.device).unsqueeze(1).expand_as(targets)
    return Supervised(logits[:, :-1][mask].float(), targets[mask], sequence[mask])


def token_logprobs(positions: Supervised) -> Float[Tensor, " tokens"]:
    """Return log p(target) for each supervised position, in nats."""
    return -F.cross_entropy(positions.logits, positions.targets, reduction="none")


def sequence_logprobs(
    logits: Float[Tensor, "batch seq vocab"], labels: Int[Tensor, "batch seq"]
) -> Float[Tensor, " batch"]:
    """Return the summed log-probability of each row's supervised tokens, in nats (0 for a row without any)."""
    positions = supervised(logits, labels)
    sums = torch.zeros(labels.shape[0], dtype=torch.float32, device=logits.device)
    return sums.index_add(0, positions.sequence, token_logprobs(positions))


def count_tokens(labels: Int[Tensor, "batch seq"]) -> Int[Tensor, ""]:
    """Return the number of supervised positions: labels that some logit predicts."""
    return (labels[:, 1:] != IGNORE).sum()


def mean(values: Float[Tensor, " items"], num_items: Tensor | int | None) -> Float[Tensor, ""]:
    """Return the sum of the values over `num_items`, or over their own number.

    With gradient accumulation `num_items` counts the items of all micro-batches, so that splitting a batch changes
    nothing but rounding. A batch without items has mean 0, not NaN.
    """
    if num_items is None:
        num_items = max(values.numel(), 1)
    return values.sum() / num_items
