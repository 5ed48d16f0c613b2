"""From what attacks measured on three models to figures side by side, robustness scores and the worst case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loku.attacks.membership import membership_scores
from loku.attacks.robustness import Score, damage, headline, robustness
from loku.attacks.suite import ROLES
from loku.evaluation.metrics import bootstrap

NO_REFERENCE = Score(None, None, None, None, 0.0, "there is no retain-only model to compare with")
MEMORISED = 0.5  # exact matches of the target on the forget set from which on exact match is the figure to score by
LABELS = ("index",)

Results = Mapping[str, Mapping[str, Any]]  # by attack: its family and, under "roles", its result on each model


def summarise(results: Results, *, seed: int = 42) -> dict[str, Any]:
    """Return the summary of finished attacks: figures, scores and the headline.

    Scored is exact match (for prompts: whether the fact is found in the answer) where the target gives at least half
    of the forget rows word for word, else ROUGE-L recall; a probe is scored on the layer that reads the target best,
    the lens by its depth, membership by its distance in AUC. Adapter attacks need the adapter as a file of its own, so
    they are no part of the headline, which is about the merged model. Attacks that miss a model have no score.
    """
    plain = results.get("none", {}).get("roles", {})
    exact = _means(plain.get("target", {}).get("rows", ())).get("exact_match", 0.0) >= MEMORISED
    attacks = {name: _attack(name, found, plain, exact, seed) for name, found in results.items()}
    broken = damage(_kept(attacks.get("none", {}).get("beside", {}), exact))
    knowledge, member = {}, {}
    for name, found in attacks.items():
        for label, score in found.get("membership", {}).items():
            member[f"{name}: {label}"] = Score(**score["score"])
        if "score" in found and found["family"] != "adapter":
            knowledge[name] = Score(**found["score"])
    return {
        "metric": "exact_match" if exact else "rougeL_recall",
        "damaged": broken,
        "headline": headline(knowledge, member, broken).to_json(),
        "attacks": attacks,
    }


def _attack(name: str, found: Mapping[str, Any], plain: Mapping[str, Any], exact: bool, seed: int) -> dict[str, Any]:
    """Return one attack's figures, scores, and what stands beside them."""
    roles = dict(found["roles"])
    if found["family"] == "adapter":  # other models have no adapter: theirs are the plain figures
        roles = {role: plain[role] for role in ROLES if role in plain and role != "unlearned"} | roles
    rows = {role: roles[role]["rows"] for role in ROLES if role in roles}
    beside = {role: roles[role].get("beside") or plain.get(role, {}).get("beside", {}) for role in rows}
    summary: dict[str, Any] = {"family": found["family"], "beside": beside}
    summary["damaged"] = damage(_kept(beside, exact))
    if found["family"] == "membership":
        return summary | _membership(roles, seed)
    summary["figures"] = {role: _figures(own, seed) for role, own in rows.items()}
    scores = _scores(rows, seed)
    metric = _metric(found["family"], rows, exact)
    return summary | {
        "metric": metric,
        "rows": len(_common(rows)),
        "score": scores.get(metric, NO_REFERENCE).to_json(),
        "scores": {label: score.to_json() for label, score in scores.items()},
    }


def _metric(family: str, rows: Mapping[str, Sequence[Mapping[str, float]]], exact: bool) -> str:
    """Return the figure that an attack is scored by."""
    if family == "lens":
        return "depth"
    if family == "probe":
        means = _means(rows.get("target") or next(iter(rows.values())))
        return max(means, key=lambda name: means[name])
    if not exact:
        return "rougeL_recall"
    return "found" if family in ("prompts", "sampling") else "exact_match"


def _kept(beside: Mapping[str, Mapping[str, float]], exact: bool) -> dict[str, float]:
    """Return each role's figure on the retain set, where it is known."""
    names = ("retain_exact_match", "retain_found") if exact else ("retain_rougeL_recall",)
    return {role: own[name] for role, own in beside.items() for name in names if name in own}


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every figure that all rows have."""
    names = [name for name in (rows[0] if rows else ()) if name not in LABELS and all(name in row for row in rows)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}


def _figures(rows: Sequence[Mapping[str, float]], seed: int) -> dict[str, dict[str, float]]:
    return {name: bootstrap([row[name] for row in rows], seed=seed)._asdict() for name in _means(rows)}


def _common(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> list[float]:
    """Return the indices of the rows that all models have, in the first one's order."""
    first, *others = rows.values()
    known = [{row["index"] for row in own} for own in others]
    return [row["index"] for row in first if all(row["index"] in own for own in known)]


def _scores(rows: Mapping[str, Sequence[Mapping[str, float]]], seed: int) -> dict[str, Score]:
    """Return the score of every figure, over the rows that all three models have."""
    if set(rows) != set(ROLES):
        return {}
    order = _common(rows)
    matched = [{row["index"]: row for row in rows[role]} for role in ROLES]
    names = [name for name in _means(rows["target"]) if name != "repetition"]
    return {
        name: robustness(*([own[index][name] for index in order] for own in matched), seed=seed)
        for name in names
        if order and all(name in own[index] for own in matched for index in order)
    }


def _membership(roles: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Return every membership attack's AUC by role, and its score."""
    if set(roles) != set(ROLES):
        return {"membership": {}}
    found = membership_scores(
        {role: roles[role]["rows"] for role in ROLES}, {role: roles[role]["others"] for role in ROLES}, seed=seed
    )
    return {"membership": {name: {"auc": aucs, "score": score.to_json()} for name, (score, aucs) in found.items()}}
