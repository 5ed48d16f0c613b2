"""What losses need to know of each supervised token, independent of how the logits were made."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from loku.errors import InputError, suggestion
from loku.losses.positions import select, widest

Extra = Literal["mean_logit", "expected_other"]


@dataclass(frozen=True)
class TokenScores:
    """Scores of the supervised positions of a batch: z are a position's logits, y its label, p = softmax(z).

        target          z_y
        runner_up       z_m with m = argmax_{v != y} z_v; no gradient through the choice
        spread          log sum_{v != y} exp(z_v - z_m), at least 0
        mean_logit      mean over the vocabulary of z_v                       (only where it was asked for)
        expected_other  sum_{v != y} q_v z_v, q = softmax over v != y, no gradient through q        (likewise)
        weights         how much each position counts in a loss; None means 1 each

    All are float32 (float64 for float64 logits) and differentiable. `sequence` is the row of the batch that a position
    comes from. `spread` is kept in place of a log-sum-exp because it is small: the rounding of a sum such as
    z_m + spread at z_m = 30 is already 1e-6, and 1 - p_y of a memorised token is far smaller than that. Everything
    below is formed from differences, so that value and gradient stay exact to rounding when p_y is close to 1.
    """

    target: Float[Tensor, " tokens"]
    runner_up: Float[Tensor, " tokens"]
    spread: Float[Tensor, " tokens"]
    targets: Int[Tensor, " tokens"]
    sequence: Int[Tensor, " tokens"]
    batch_size: int
    vocab_size: int
    mean_logit: Float[Tensor, " tokens"] | None = None
    expected_other: Float[Tensor, " tokens"] | None = None
    weights: Float[Tensor, " tokens"] | None = None

    def __len__(self) -> int:
        """Return the number of supervised positions."""
        return self.targets.numel()

    @property
    def label_log_odds(self) -> Float[Tensor, " tokens"]:
        """log p_y / (1 - p_y) = z_y - log sum_{v != y} exp z_v."""
        return (self.target - self.runner_up) - self.spread

    @property
    def label_logprob(self) -> Float[Tensor, " tokens"]:
        """log p_y in nats; exact for memorised tokens, where z_y - logsumexp(z) would round to 0."""
        return F.logsigmoid(self.label_log_odds)

    @property
    def runner_up_logprob(self) -> Float[Tensor, " tokens"]:
        """log p_m in nats: the runner-up's share of the other tokens, times 1 - p_y."""
        return F.logsigmoid(-self.label_log_odds) - self.spread

    @property
    def label_prob(self) -> Float[Tensor, " tokens"]:
        """p_y. Its gradient holds 1 - p_y as such, not as a difference from 1."""
        return self.label_logprob.exp()

    @property
    def runner_up_prob(self) -> Float[Tensor, " tokens"]:
        """p_m."""
        return self.runner_up_logprob.exp()

    @property
    def logsumexp_other(self) -> Float[Tensor, " tokens"]:
        """log sum_{v != y} exp z_v."""
        return self.runner_up + self.spread

    @property
    def logsumexp(self) -> Float[Tensor, " tokens"]:
        """log sum_v exp z_v."""
        return torch.logaddexp(self.target, self.logsumexp_other)

    @property
    def largest(self) -> Float[Tensor, " tokens"]:
        """max_v z_v."""
        return torch.maximum(self.target, self.runner_up)

    def per_sequence(self, values: Float[Tensor, " tokens"]) -> Float[Tensor, " batch"]:
        """Return the sum of `values` over the positions of each row of the batch (0 for a row without any)."""
        return values.new_zeros(self.batch_size).index_add(0, self.sequence, values)


def check_extras(need: Collection[Extra]) -> None:
    """Raise InputError unless every name in `need` is an optional field of TokenScores."""
    for name in need:
        if name not in get_args(Extra):
            raise InputError(f"'{name}' is not an optional score.", suggestion(name, get_args(Extra)))


def scores_from_logits(
    logits: Float[Tensor, "batch seq vocab"],
    labels: Int[Tensor, "batch seq"],
    *,
    need: Collection[Extra] = (),
) -> TokenScores:
    """Score the supervised positions of a batch from its logits: the plain path, by automatic differentiation.

    Half-precision logits are widened before anything else: rounding decides which token is the runner-up. `need` names
    the optional fields to fill.

    Example:
        >>> scores = scores_from_logits(torch.tensor([[[0.0, 1.0, 3.0], [0.0, 0.0, 0.0]]]), torch.tensor([[-100, 1]]))
        >>> scores.target, scores.runner_up
        (tensor([1.]), tensor([3.]))
    """
    check_extras(need)
    chosen = select(labels)
    z = chosen.pick(logits).to(widest(logits))
    label = chosen.targets.unsqueeze(1)
    choice = z.detach().scatter(1, label, -torch.inf).argmax(dim=1, keepdim=True)
    runner_up = z.gather(1, choice)
    others = (z - runner_up).scatter(1, label, -torch.inf)
    expected = None
    if "expected_other" in need:
        expected = (others.detach().softmax(dim=1) * z).sum(dim=1)
    return TokenScores(
        target=z.gather(1, label).squeeze(1),
        runner_up=runner_up.squeeze(1),
        spread=others.logsumexp(dim=1),
        targets=chosen.targets,
        sequence=chosen.sequence,
        batch_size=labels.shape[0],
        vocab_size=logits.shape[-1],
        mean_logit=z.mean(dim=1) if "mean_logit" in need else None,
        expected_other=expected,
    )
