"""Sequence-level losses: preference optimisation without, or with, an answer to prefer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from loku.losses.positions import mean
from loku.losses.scores import TokenScores


def sequence_sums(scores: TokenScores) -> Float[Tensor, " batch"]:
    """Return the summed log-probability (nats) of each row's supervised tokens, weighted where there are weights."""
    values = scores.label_logprob if scores.weights is None else scores.label_logprob * scores.weights
    return scores.per_sequence(values)


def sequence_lengths(scores: TokenScores) -> Float[Tensor, " batch"]:
    """Return the number (or the weights' sum) of each row's supervised tokens."""
    values = torch.ones_like(scores.target) if scores.weights is None else scores.weights
    return scores.per_sequence(values.detach())


def npo(
    scores: TokenScores,
    reference: Float[Tensor, " batch"],
    *,
    beta: float = 0.1,
    num_items: Tensor | float | None = None,
) -> Float[Tensor, ""]:
    """Negative Preference Optimisation: gradient ascent that fades as a sequence is forgotten.

        loss = -(2 / beta) * mean over sequences of  log sigmoid(-beta * (log p(y|x) - log p_ref(y|x)))

    with log-probabilities summed over the supervised tokens. `reference` holds log p_ref, computed once on the
    target model. beta -> 0 gives gradient ascent. Bounded below by 0.

    Source: Zhang et al., "Negative Preference Optimization", 2024 (arXiv 2404.05868), equation 3.
    """
    log_ratio = sequence_sums(scores) - reference
    return mean(-2 / beta * F.logsigmoid(-beta * log_ratio), num_items)


def simnpo(
    scores: TokenScores, *, beta: float = 4.5, delta: float = 0.0, num_items: Tensor | float | None = None
) -> Float[Tensor, ""]:
    """NPO without a reference, normalised by length.

        loss = -(2 / beta) * mean over sequences of  log sigmoid(-beta * (log p(y|x) / |y| + delta))

    Source: Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning", 2024
    (arXiv 2410.07163). Published for TOFU: beta 2.5 with forget weight 0.1375 (forget05), beta 4.5 with 0.125
    (forget10), lr 1e-5, delta 0.
    """
    mean_logprob = sequence_sums(scores) / sequence_lengths(scores).clamp(min=1e-6)
    return mean(-2 / beta * F.logsigmoid(-beta * (mean_logprob + delta)), num_items)


def dpo(
    scores: TokenScores,
    reference: Float[Tensor, " batch"],
    alternate: TokenScores,
    alternate_reference: Float[Tensor, " batch"],
    *,
    beta: float = 0.1,
    num_items: Tensor | float | None = None,
) -> Float[Tensor, ""]:
    """Direct Preference Optimisation of another answer over the unwanted one.

        loss = -(2 / beta) * mean over sequences of  log sigmoid(beta * (r(alternate) - r(answer)))
        r(y) = log p(y|x) - log p_ref(y|x), summed over the supervised tokens

    The alternate is a refusal (Maini et al. 2024) or the model's own plausible other answer (AltPO: Mekala et al.,
    "Alternate Preference Optimization for Unlearning Factual Knowledge in Large Language Models", 2024, arXiv
    2409.13474). The factor 2 / beta follows NPO, so that weights compare.

    Source: Rafailov et al., 2023 (arXiv 2305.18290), as used by Zhang et al. 2024 (arXiv 2404.05868).
    """
    wanted = sequence_sums(alternate) - alternate_reference
    unwanted = sequence_sums(scores) - reference
    return mean(-2 / beta * F.logsigmoid(beta * (wanted - unwanted)), num_items)


def idk(alternate: TokenScores, *, num_items: Tensor | float | None = None) -> Float[Tensor, ""]:
    """Learn to say something else: the mean negative log-likelihood (nats) of the alternate answer's tokens.

    With refusals as alternates this is IDK. Source: Maini et al., "TOFU", 2024 (arXiv 2401.06121).
    """
    return mean(-alternate.label_logprob, num_items, alternate.weights)


def answer_preservation(
    scores: TokenScores, alternate: TokenScores, *, beta: float = 0.1, num_items: Tensor | float | None = None
) -> Float[Tensor, ""]:
    """Prefer the answer over a refusal on retain prompts, so that refusing does not spill over (AP).

        loss = -(1 / beta) * mean over sequences of  log sigmoid(beta * (log p(y|x) - log p(refusal|x)))

    Source: Yuan et al., "A Closer Look at Machine Unlearning for Large Language Models", ICLR 2025 (arXiv 2410.08109).
    """
    margin = sequence_sums(scores) - sequence_sums(alternate)
    return mean(-1 / beta * F.logsigmoid(beta * margin), num_items)
