"""The Inverted Hinge Loss of LoKU."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loku.losses.positions import mean, supervised


def inverted_hinge(
    logits: Float[Tensor, "batch seq vocab"],
    labels: Int[Tensor, "batch seq"],
    *,
    num_items: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """Push the unwanted token's probability down and the runner-up's up (Inverted Hinge Loss, IHL).

    With p = softmax(logits) at a supervised position, y its token and v* = argmax_{v != y} p_v:

        loss = mean over supervised tokens of  1 + p_y - p_{v*}        (dimensionless, between 0 and 2)

    Unlike gradient ascent the loss is bounded and its push on y fades as p_y -> 0: the gradient with respect to
    z_y is p_y (1 - p_y + p_{v*}). It does not vanish there, though: it goes on sharpening v*, whose gradient is
    -p_{v*} (1 + p_y - p_{v*}). No gradient flows through the choice of v*.

    `labels` are -100 where a token is not supervised and are shifted here, as in transformers; padding does not
    count. `num_items` replaces the number of tokens in the mean (gradient accumulation).

    Source: Cha, Cho, Hwang and Lee, "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs", ICLR
    2025 (arXiv 2408.06621), the IHL equation.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
        >>> inverted_hinge(logits, torch.tensor([[-100, 1]]))
        tensor(1.)
    """
    positions = supervised(logits, labels)
    probabilities = positions.logits.softmax(dim=-1)
    target = positions.targets.unsqueeze(1)
    runner_up = positions.logits.detach().scatter(1, target, -torch.inf).argmax(dim=1, keepdim=True)
    p_target = probabilities.gather(1, target).squeeze(1)
    p_runner_up = probabilities.gather(1, runner_up).squeeze(1)
    return mean(1 + p_target - p_runner_up, num_items)
