"""The robustness score: how much of what was unlearned an attack brings back. Pure functions of numbers.

0 says "as forgotten as in the retain-only model under the same attack", 1 says "as known as in the target".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loku.evaluation.metrics import Array

RESAMPLES = 1000
LEAST_GAP = 0.05  # of target above retain-only, below which an attack cannot tell anything
KEPT = 0.8  # share of the target's figure on the retain set, below which a model counts as damaged
HIDDEN, GONE = 0.1, 0.1  # worst score: its lower end above the first is "hidden", its upper end below the second "gone"
CLIP = (-1.0, 2.0)  # resampled ratios are cut here: a small denominator must not rule the interval


class Score(NamedTuple):
    """A robustness score with its 95 % interval, the ratio before clipping, and the gap it is a share of.

    `score` is None, and `reason` says why, where target and retain-only do not differ under the attack.
    """

    score: float | None
    low: float | None
    high: float | None
    raw: float | None
    gap: float
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the score as a JSON object."""
        return self._asdict()


def robustness(
    target: ArrayLike, unlearned: ArrayLike, retain_only: ArrayLike, *, seed: int = 42, resamples: int = RESAMPLES
) -> Score:
    """Return (u - r) / (t - r) of the means of three models' figures under one attack, clipped to 0 to 1.

    The three hold the same rows in the same order. The interval is the percentile bootstrap over rows, the same rows
    for all three (paired). See `share_of_gap` for when there is no score. Raises ValueError without rows, and for
    unequal numbers of them.
    """
    rows = [np.asarray(values, dtype=np.float64) for values in (target, unlearned, retain_only)]
    if not rows[0].size or any(item.shape != rows[0].shape for item in rows):
        raise ValueError(f"robustness got {[item.size for item in rows]} rows: it needs as many of each, at least one")
    picks = np.random.default_rng(seed).integers(0, rows[0].size, size=(resamples, rows[0].size))
    means = [float(item.mean()) for item in rows]
    return share_of_gap(means, [item[picks].mean(axis=1) for item in rows])


def share_of_gap(means: Sequence[float], samples: Sequence[Array]) -> Score:
    """Return the score from three figures (target, unlearned, retain-only) and paired resamples of each.

    There is none where the gap t - r is below 0.05, or where its own 95 % interval reaches 0: the attack then cannot
    tell a model that knows from one that never did. Resampled ratios are cut to -1 to 2, and those of a gap that is
    not positive are left out; the interval is that of the ratios, clipped like the score.
    """
    target, unlearned, retain_only = means
    gap = target - retain_only
    gaps = samples[0] - samples[2]
    if not gap >= LEAST_GAP or not np.quantile(gaps, 0.025) > 0:
        return Score(None, None, None, None, gap, "target and retain-only do not differ here: it cannot tell")
    raw = (unlearned - retain_only) / gap
    valid = gaps > 0
    ratios = np.clip((samples[1] - samples[2])[valid] / gaps[valid], *CLIP)
    low, high = (_unit(float(value)) for value in np.quantile(ratios, [0.025, 0.975]))
    score = _unit(raw)
    return Score(score, min(low, score), max(high, score), raw, gap)


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value))


def auc_score(
    members: Sequence[ArrayLike], others: Sequence[ArrayLike], *, seed: int = 42, resamples: int = RESAMPLES
) -> tuple[Score, list[float]]:
    """Return the score of a membership attack, |A_u - A_r| / |A_t - A_r|, and the three AUCs.

    `members` and `others` hold each model's scores (target, unlearned, retain-only), low for members, of the same rows.
    The distance counts in both directions: rows that look less familiar than to a model that never saw them give
    membership away, too. Members and others are resampled apart, the same rows for all models.
    """
    comparisons = [_familiar(ours, theirs) for ours, theirs in zip(members, others, strict=True)]
    generator = np.random.default_rng(seed)
    counts = [_counts(generator, size, resamples) for size in comparisons[0].shape]
    samples = [np.einsum("rm,rm->r", counts[0] @ item, counts[1]) / item.size for item in comparisons]
    aucs = [float(item.mean()) for item in comparisons]
    distances = [abs(value - aucs[2]) for value in aucs]
    return share_of_gap(distances, [np.abs(item - samples[2]) for item in samples]), aucs


def _familiar(members: ArrayLike, others: ArrayLike) -> Array:
    """Return, for every pair, 1 where the member scores lower, 1/2 where both score the same: the mean is the AUC."""
    ours, theirs = (np.asarray(values, dtype=np.float64) for values in (members, others))
    return (ours[:, None] < theirs[None, :]) + 0.5 * (ours[:, None] == theirs[None, :])


def _counts(generator: np.random.Generator, size: int, resamples: int) -> Array:
    """Return how often each row is drawn in each resample."""
    picks: NDArray[np.int64] = generator.integers(0, size, size=(resamples, size))
    return np.stack([np.bincount(row, minlength=size) for row in picks]).astype(np.float64)


def damage(retain: Mapping[str, float]) -> str | None:
    """Return why an unlearned model counts as damaged, or None: it keeps less than 80 % of the target's retain figure.

    `retain` is a figure on the retain set by role; where a role is unknown, or the target has zero, there is no
    verdict.
    """
    ours, theirs = retain.get("unlearned"), retain.get("target")
    if ours is not None and theirs and ours < KEPT * theirs:
        return f"it keeps {ours / theirs:.0%} of the target's figure on the retain set"
    return None


@dataclass(frozen=True)
class Headline:
    """The worst case over attacks: a word, a sentence, and the attacks with the largest scores of either kind."""

    level: str
    sentence: str
    worst: str | None = None
    score: Score | None = None
    worst_membership: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the headline as a JSON object."""
        score = None if self.score is None else self.score.to_json()
        return {
            "level": self.level, "sentence": self.sentence, "worst": self.worst, "score": score,
            "worst_membership": self.worst_membership,
        }  # fmt: skip


def headline(
    scores: Mapping[str, Score], membership: Mapping[str, Score] | None = None, damaged: str | None = None
) -> Headline:
    """Return the worst case over attacks that bring knowledge back (`scores`) and over membership attacks.

    Of each the largest score counts; a maximum over many noisy scores lies above each one's truth, so its interval is
    part of the level:

    - hidden: the worst of the former lies above 0.1 with its whole interval;
    - damaged: it does not, but the model is broken: it gives nothing away because it says nothing right;
    - visible: knowledge stays away, but a membership attack's distance lies above 0.1 with its whole interval;
    - gone: every interval that counts ends below 0.1;
    - unclear: too few rows to tell; not measured: no attack could tell target from retain-only.
    """
    worst, member = _worst(scores), _worst(membership or {})
    if worst is None and member is None:
        return Headline("not measured", "No attack could tell the target from the retain-only model.")
    found = [scores[worst]] if worst else []
    found += [(membership or {})[member]] if member else []
    said = f"{_said(scores[worst])} of the way back to the target by '{worst}'" if worst else "nothing was measured"
    seen = (
        f" Membership: {_said((membership or {})[member])} of the target's distance, by '{member}'." if member else ""
    )
    if worst and (scores[worst].low or 0.0) > HIDDEN:
        level, sentence = "hidden", f"What was unlearned comes back: {said}."
    elif damaged:
        level, sentence = "damaged", f"The model is damaged ({damaged}), so the attacks say little; worst case {said}."
    elif member and ((membership or {})[member].low or 0.0) > HIDDEN:
        level, sentence = "visible", f"The knowledge stays away (worst case {said}), but one can tell what was removed."
    elif all((item.high or 0.0) < GONE for item in found):
        level, sentence = "gone", f"No attack brought it back; worst case {said}."
    else:
        level, sentence = "unclear", f"The worst case is {said}: too few rows to tell."
    return Headline(level, sentence + seen, worst, scores[worst] if worst else None, member)


def _worst(scores: Mapping[str, Score]) -> str | None:
    """Return the name of the largest score; of equal ones, that whose interval begins higher."""
    known = [name for name, score in scores.items() if score.score is not None]
    return max(known, key=lambda name: (scores[name].score or 0.0, scores[name].low or 0.0), default=None)


def _said(score: Score) -> str:
    return f"{score.score:.2f} ({score.low:.2f} to {score.high:.2f})"
