"""Retain losses by name. All are minimised; each takes logits and labels and returns a scalar."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor

from loku.losses.positions import mean, supervised, token_logprobs


def nll(
    logits: Float[Tensor, "batch seq vocab"],
    labels: Int[Tensor, "batch seq"],
    *,
    num_items: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """Token cross entropy: the mean negative log-likelihood (nats) of the supervised tokens."""
    return mean(-token_logprobs(supervised(logits, labels)), num_items)


RETAIN_LOSSES: dict[str, Callable[..., Tensor]] = {"nll": nll}
