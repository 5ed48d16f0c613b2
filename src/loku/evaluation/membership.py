"""Membership inference: can forget rows still be told from rows that the model never saw?

Every attack gives each row one score, low for a likely member, and is judged by its AUC. The aim is the retain-only
model's AUC, not 0.5: forget and holdout rows need not be alike. Pure functions of numbers and texts.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from loku.evaluation.metrics import Array

SHARE = 0.4  # of the tokens, in the Min-k attacks; open-unlearning's for TOFU, and MUSE's
VARIANCE_FLOOR = 1e-6

# The attacks: name in the summary, and the row's number that is the score.
ATTACKS = {
    "mia_auc": "nll",
    "mia_auc_zlib": "zlib",
    "mia_auc_min_k": "min_k",
    "mia_auc_min_k_plus_plus": "min_k_plus_plus",
    "mia_auc_gradient_norm": "gradient_norm",
}
REFERENCE_ATTACK = "mia_auc_reference"

Rows = Sequence[Mapping[str, float]]


def zlib_score(mean_nll: float, text: str) -> float:
    """Return mean NLL per token over the bytes of the zlib-compressed text (Carlini et al. 2021), in nats per byte."""
    return mean_nll / len(zlib.compress(text.encode("utf-8", errors="replace")))


def _lowest(values: Array, share: float) -> float:
    """Return minus the mean of the lowest `share` of values, at least one; NaN without any."""
    return float(-np.sort(values)[: max(1, int(share * values.size))].mean()) if values.size else float("nan")


def min_k(logprobs: ArrayLike, share: float = SHARE) -> float:
    """Return the Min-k score of one sequence: minus the mean of its lowest `share` of token log-probabilities, in nats.

    Shi et al. 2024. At least one token counts (MUSE's own code has no score for a text of 1 or 2 tokens); NaN without
    any.
    """
    return _lowest(np.asarray(logprobs, dtype=np.float64), share)


def min_k_plus_plus(logprobs: ArrayLike, means: ArrayLike, variances: ArrayLike, share: float = SHARE) -> float:
    """Return the Min-k++ score of one sequence: `min_k` of (log p - mu) / sigma.

    mu and sigma² are mean and variance of log p under the model's own next-token distribution at that position, the
    variance floored at 1e-6 as in open-unlearning (Zhang et al. 2024, arXiv 2404.02936). NaN without any token.
    """
    sigma = np.sqrt(np.maximum(np.asarray(variances, dtype=np.float64), VARIANCE_FLOOR))
    centred = np.asarray(logprobs, dtype=np.float64) - np.asarray(means, dtype=np.float64)
    return _lowest(centred / sigma, share)


def membership_auc(member_scores: ArrayLike, other_scores: ArrayLike) -> float:
    """Return the AUC of telling members (forget) from others (holdout) by a score that is low for members.

    It is P(member < other) + P(equal) / 2: 1 when every forget row looks more familiar than every holdout row, the
    orientation of open-unlearning. Compare it with the retain-only model's AUC, not with 0.5.
    """
    from sklearn.metrics import roc_auc_score

    members, others = np.asarray(member_scores, dtype=np.float64), np.asarray(other_scores, dtype=np.float64)
    labels = np.concatenate([np.ones(members.size), np.zeros(others.size)])
    return float(roc_auc_score(labels, -np.concatenate([members, others])))


def priv_leak(auc: float, reference_auc: float) -> float:
    """Return MUSE's PrivLeak, 100 (A - A_ref) / A_ref, in per cent, with A = 1 - AUC as MUSE orients it.

    0 is ideal, -100 a model that still gives membership away, above 0 one that has been pushed too far. NaN when the
    reference itself separates the sets perfectly (A_ref = 0).
    """
    ours, theirs = 1.0 - auc, 1.0 - reference_auc
    return 100.0 * (ours - theirs) / theirs if theirs else float("nan")


def attack_aucs(members: Rows, others: Rows) -> dict[str, float]:
    """Return the AUC of every attack whose score all rows of both sets have."""
    if not members or not others:
        return {}
    return {
        name: membership_auc([row[score] for row in members], [row[score] for row in others])
        for name, score in ATTACKS.items()
        if all(score in row for row in (*members, *others))
    }


def reference_auc(members: Rows, others: Rows, reference_members: Rows, reference_others: Rows) -> float | None:
    """Return the AUC of the reference attack, whose score is mean NLL minus the reference model's, matched by index.

    None unless the reference measured exactly the same rows of both sets.
    """
    scores = []
    for ours, theirs in ((members, reference_members), (others, reference_others)):
        known = {row["index"]: row["nll"] for row in theirs}
        if not ours or {row["index"] for row in ours} != set(known):
            return None
        scores.append([row["nll"] - known[row["index"]] for row in ours])
    return membership_auc(*scores)


def distances(aucs: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    """Return |AUC - the retain-only model's AUC| for every attack that both have, as `<attack>_distance`: 0 is ideal.

    The reference attack has no such distance: of the reference itself it is 0.5 by definition.
    """
    return {f"{name}_distance": abs(value - reference[name]) for name, value in aucs.items() if name in reference}
