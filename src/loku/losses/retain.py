"""Token-level retain losses. All are minimised; each returns a mean over supervised tokens."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from loku.losses.positions import Supervised, mean
from loku.losses.scores import TokenScores


def nll(scores: TokenScores, *, num_items: Tensor | float | None = None) -> Float[Tensor, ""]:
    """Token cross entropy: the mean negative log-likelihood (nats) of the supervised tokens."""
    return mean(-scores.label_logprob, num_items, scores.weights)


def kl(
    positions: Supervised,
    reference_logits: Float[Tensor, "tokens vocab"],
    *,
    weights: Float[Tensor, " tokens"] | None = None,
    num_items: Tensor | float | None = None,
) -> Float[Tensor, ""]:
    """Stay close to the target model: mean over supervised tokens of KL(p_ref || p), in nats.

    Prompt and padding do not count (released code averages over them).

    Source: Maini et al., "TOFU", 2024 (arXiv 2401.06121), KL minimisation.
    """
    reference = reference_logits.log_softmax(dim=-1)
    ours = positions.logits.log_softmax(dim=-1)
    return mean((reference.exp() * (reference - ours)).sum(dim=-1), num_items, weights)
