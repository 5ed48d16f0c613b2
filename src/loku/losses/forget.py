"""Token-level forget losses. All are minimised; each takes the scores of the supervised tokens and returns a scalar.

Every loss averages over supervised tokens. Where the scores carry token weights, the mean is weighted by them.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from loku.losses.positions import Supervised, mean
from loku.losses.scores import TokenScores


def grad_ascent(scores: TokenScores, *, num_items: Tensor | float | None = None) -> Float[Tensor, ""]:
    """Ascend the cross entropy: the mean log-probability (nats) of the supervised tokens. Unbounded below.

    Alone it is GA; with the retain loss `nll` it is GradDiff. Source: Maini et al., "TOFU", 2024 (arXiv 2401.06121).
    """
    return mean(scores.label_logprob, num_items, scores.weights)


def wga(scores: TokenScores, *, beta: float = 1.0, num_items: Tensor | float | None = None) -> Float[Tensor, ""]:
    """Weighted gradient ascent: a token's push is its own probability, so what is forgotten is left alone.

        loss = mean over supervised tokens of  sg(p_y)^beta * log p_y                                    (nats)

    sg stops the gradient. beta = 0 is gradient ascent.

    Source: Wang et al., "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond", ICLR 2025
    (arXiv 2502.19301).
    """
    logprob = scores.label_logprob
    return mean((beta * logprob.detach()).exp() * logprob, num_items, scores.weights)


def satimp(
    scores: TokenScores, *, beta1: float = 5.0, beta2: float = 1.0, num_items: Tensor | float | None = None
) -> Float[Tensor, ""]:
    """Ascend with weights for saturation and importance: strongest on tokens that are likely but not certain.

        loss = mean over supervised tokens of  sg(p_y)^beta1 * sg(1 - p_y)^beta2 * log p_y               (nats)

    Source: Yang et al., "Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning", ICML 2025 (arXiv
    2505.11953).
    """
    logprob = scores.label_logprob
    certain = logprob.detach()
    weight = (beta1 * certain).exp() * (-torch.expm1(certain)).clamp(min=0) ** beta2
    return mean(weight * logprob, num_items, scores.weights)


def ce_u(scores: TokenScores, *, skip_first: bool = True, num_items: Tensor | float | None = None) -> Float[Tensor, ""]:
    """Cross entropy to the model's own distribution without the unwanted token (CE-U). Bounded gradient.

        loss = mean over supervised tokens of  -sum_{v != y} q_v log p_v,   q = sg(softmax of the logits without y)

    Its gradient with respect to z_v is p_v - q_v. `skip_first` leaves out the first supervised token of each
    sequence, as published.

    Source: Yang, "CE-U: Cross Entropy Unlearning", 2025 (arXiv 2503.01224).
    """
    assert scores.expected_other is not None
    values = scores.logsumexp - scores.expected_other
    if skip_first:
        first = torch.ones_like(scores.sequence, dtype=torch.bool)
        first[1:] = scores.sequence[1:] != scores.sequence[:-1]
        values = values.masked_fill(first, 0.0)
    return mean(values, num_items, scores.weights)


def max_entropy(scores: TokenScores, *, num_items: Tensor | float | None = None) -> Float[Tensor, ""]:
    """Flatten the predictions: KL(uniform || p) over all tokens of the forget sequences, question included (ME).

        loss = mean over tokens of  logsumexp(z) - mean_v z_v - log V                              (nats, >= 0)

    Source: Yuan et al., "A Closer Look at Machine Unlearning for Large Language Models", ICLR 2025 (arXiv
    2410.08109). Published with forget weight 0.1.
    """
    assert scores.mean_logit is not None
    return mean(scores.logsumexp - scores.mean_logit - math.log(scores.vocab_size), num_items, scores.weights)


def pdu(scores: TokenScores, *, num_items: Tensor | float | None = None) -> Float[Tensor, ""]:
    """Flatten the logits: the squared distance of the largest logit from the mean one (PDU's forget loss).

        loss = mean over supervised tokens of  (max_v z_v - mean_v z_v)^2                         (logits squared)

    Published with the retain loss as a constraint (`combine="primal-dual"`).

    Source: Entesari et al., "Constrained Entropic Unlearning: A Primal-Dual Framework for Large Language Models",
    2025 (arXiv 2506.05314).
    """
    assert scores.mean_logit is not None
    return mean((scores.largest - scores.mean_logit) ** 2, num_items, scores.weights)


def undial(
    positions: Supervised,
    reference_logits: Float[Tensor, "tokens vocab"],
    *,
    beta: float = 10.0,
    weights: Float[Tensor, " tokens"] | None = None,
    num_items: Tensor | float | None = None,
) -> Float[Tensor, ""]:
    """Distil the target model into itself with the unwanted logit lowered by beta (UNDIAL).

        loss = mean over supervised tokens of  CE(softmax(z_ref - beta * onehot(y)), softmax(z))         (nats)

    Source: Dong et al., "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language
    Models", NAACL 2025 (arXiv 2402.10052). Published with LoRA of rank 8, lr 1e-4, beta in {3, 10, 30}.
    """
    place = positions.targets.unsqueeze(1)
    lowered = reference_logits.scatter_add(1, place, torch.full_like(place, -beta, dtype=reference_logits.dtype))
    teacher = lowered.softmax(dim=-1)
    return mean(-(teacher * positions.logits.log_softmax(dim=-1)).sum(dim=-1), num_items, weights)
