"""Forget losses by name. All are minimised; each takes logits and labels and returns a scalar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from loku.losses.hinge import inverted_hinge
from loku.losses.positions import mean, sequence_logprobs, supervised, token_logprobs


def grad_ascent(
    logits: Float[Tensor, "batch seq vocab"],
    labels: Int[Tensor, "batch seq"],
    *,
    num_items: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """Ascend the cross entropy: the mean log-probability (nats) of the supervised tokens. Unbounded below.

    Alone it is GA; with the retain loss `nll` it is GradDiff. Source: Maini et al., "TOFU", 2024 (arXiv 2401.06121).
    """
    return mean(token_logprobs(supervised(logits, labels)), num_items)


def npo(
    logits: Float[Tensor, "batch seq vocab"],
    labels: Int[Tensor, "batch seq"],
    reference: Float[Tensor, " batch"],
    *,
    beta: float = 0.1,
    num_items: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """Negative Preference Optimisation: gradient ascent that fades as a sequence is forgotten.

        loss = -(2 / beta) * mean over sequences of  log sigmoid(-beta * (log p(y|x) - log p_ref(y|x)))

    with log-probabilities summed over the supervised tokens. `reference` holds log p_ref, computed once on the
    target model (`reference_logprobs`). beta -> 0 gives gradient ascent. Bounded below by 0.

    Source: Zhang et al., "Negative Preference Optimization", 2024 (arXiv 2404.05868), equation 3.
    """
    log_ratio = sequence_logprobs(logits, labels) - reference
    return mean(-2 / beta * F.logsigmoid(-beta * log_ratio), num_items)


@dataclass(frozen=True)
class ForgetLoss:
    """A forget loss and what the trainer must know to call it.

    `unit` is what the loss averages over. With `needs_reference` it takes the target model's summed log-probability
    of each sequence as third argument; `options` are the keyword options a user may set.
    """

    function: Callable[..., Tensor]
    unit: Literal["token", "sequence"] = "token"
    needs_reference: bool = False
    options: tuple[str, ...] = ()


FORGET_LOSSES: dict[str, ForgetLoss] = {
    "ihl": ForgetLoss(inverted_hinge),
    "grad_ascent": ForgetLoss(grad_ascent),
    "npo": ForgetLoss(npo, unit="sequence", needs_reference=True, options=("beta",)),
}
