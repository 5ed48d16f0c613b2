"""The Inverted Hinge Loss of LoKU."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loku.losses.positions import mean
from loku.losses.scores import TokenScores, scores_from_logits


def ihl(
    scores: TokenScores,
    level: Float[Tensor, " tokens"] | None = None,
    *,
    stop: float = 0.0,
    beta: float = 0.0,
    num_items: Tensor | float | None = None,
) -> Float[Tensor, ""]:
    """Push the unwanted token's probability down and the runner-up's up (Inverted Hinge Loss, IHL).

    With p = softmax(z) at a supervised position, y its token and v* = argmax_{v != y} p_v:

        loss = mean over supervised tokens of  1 + p_y - p_{v*}        (dimensionless, between 0 and 2)

    Unlike gradient ascent the loss is bounded and its push on y fades as p_y -> 0: the gradient with respect to
    z_y is p_y (1 - p_y + p_{v*}). It does not vanish there, though: it goes on sharpening v*, whose gradient is
    -p_{v*} (1 + p_y - p_{v*}), until the model is certain of a substitute. No gradient flows through the choice of v*.

    The stop mask ends that, and is off by default: where p_y has fallen below `stop`, or below `level` (the token's
    log-probability, in nats, under a model that should not be undercut, such as one that never saw the forget set),
    the runner-up's term keeps its value but has no gradient. With `beta` above 0 each token is weighted by
    sg(p_y)^beta, as in WGA, so that both pushes fade together (sg stops the gradient).

    Source: Cha, Cho, Hwang and Lee, "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs", ICLR
    2025 (arXiv 2408.06621), the IHL equation. Stop mask and weights are ours.
    """
    label, runner_up = scores.label_prob, scores.runner_up_prob
    if stop or level is not None:
        stopped = label < stop
        if level is not None:
            stopped |= scores.label_logprob < level
        runner_up = torch.where(stopped, runner_up.detach(), runner_up)
    values = 1 + label - runner_up
    if beta:
        values = label.detach() ** beta * values
    return mean(values, num_items, scores.weights)


def inverted_hinge(
    logits: Float[Tensor, "batch seq vocab"],
    labels: Int[Tensor, "batch seq"],
    *,
    num_items: Tensor | float | None = None,
) -> Float[Tensor, ""]:
    """Return the Inverted Hinge Loss (`ihl`) of plain logits and labels.

    `labels` are -100 where a token is not supervised and are shifted here, as in transformers; padding does not
    count. Probabilities are float32 whatever the logits' type. `num_items` replaces the number of tokens in the mean
    (gradient accumulation).

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
        >>> inverted_hinge(logits, torch.tensor([[-100, 1]]))
        tensor(1.)
    """
    return ihl(scores_from_logits(logits, labels), num_items=num_items)
