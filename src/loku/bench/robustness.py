"""What attacks brought back of each arm, over seeds: the worst of each family, levels, and every attack by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from loku.attacks.suite import FAMILIES, ROLES
from loku.bench.recipe import RETAIN_ONLY
from loku.bench.rows import Row, spread
from loku.bench.store import Record

NOTE = (
    "How much of what was unlearned comes back under attack: 0 is as forgotten as in the retain-only model under the "
    "same attack, 1 as well known as in the target; `none` is the model as it is. "
    "Each cell is the worst attack of a family, mean ± standard "
    "deviation over seeds; `-`: target and retain-only model do not differ, so the attack cannot tell (in brackets: on "
    "how many seeds it could, if not on all). `worst` is the largest score of a run but membership's, which says how "
    "well one can tell that something was removed, and the adapter's, which needs the adapter as a file of its own. "
    "`retain` is the figure on the retain set without attack, `damaged` the runs that keep less than 80 % of the "
    "target's: a broken model gives nothing away."
)
WORST, RETAIN, DAMAGED, LEVELS = "worst", "retain", "damaged", "levels"
OTHERS = f"{RETAIN_ONLY}, other seeds"
KEPT = ("retain_exact_match", "retain_found", "retain_rougeL_recall")

Found = Mapping[str, Any]


def scores_of(found: Found) -> Iterator[tuple[str, str, float]]:
    """Return family, name and score of every attack that could tell; membership's by the attack of its family."""
    for name, attack in found["attacks"].items():
        for label, own in attack.get("membership", {}).items():
            if own["score"]["score"] is not None:
                yield attack["family"], f"{name}: {label}", float(own["score"]["score"])
        score = attack.get("score", {}).get("score")
        if score is not None:
            yield attack["family"], name, float(score)


def worst_of_families(found: Found) -> dict[str, float]:
    """Return the largest score of each family that could tell anything."""
    worst: dict[str, float] = {}
    for family, _, score in scores_of(found):
        worst[family] = max(score, worst.get(family, 0.0))
    return worst


def retained(found: Found) -> float | None:
    """Return the unlearned model's own figure on the retain set, of the kind that the attacks are scored by."""
    beside = found["attacks"].get("none", {}).get("beside", {})
    order = KEPT if found["metric"] == "exact_match" else KEPT[::-1]
    return next((float(beside[name]) for name in order if name in beside), None)


def attacked_by_row(models: Sequence[Record], runs: Sequence[Record], arms: Sequence[str]) -> dict[str, list[Found]]:
    """Return what the attacks found by row of the table: the arms in order, then the noise floor's models."""
    rows = {arm: [run["attacks"] for run in runs if run["arm"] == arm and run.get("attacks")] for arm in arms}
    rows[OTHERS] = [found for record in models for found in record.get("attacks", {}).values()]
    return {label: found for label, found in rows.items() if found}


def robustness_rows(models: Sequence[Record], runs: Sequence[Record], arms: Sequence[str]) -> list[Row]:
    """Return the table's rows, none where nothing was attacked; an arm's diverged runs are counted beside its name."""
    rows = []
    for label, found in attacked_by_row(models, runs, arms).items():
        role = "noise" if label == OTHERS else "unlearned"
        diverged = sum(bool(run.get("error")) for run in runs if run["arm"] == label)
        rows.append(_row(label, role, found, diverged))
    return rows


def _row(label: str, role: str, runs: Sequence[Found], diverged: int) -> Row:
    values: dict[str, list[float]] = {}
    for found in runs:
        score = (found["headline"].get("score") or {}).get("score")
        kept = retained(found)
        for column, value in (worst_of_families(found) | {WORST: score, RETAIN: kept}).items():
            if value is not None:
                values.setdefault(column, []).append(value)
    texts = {
        family: f"{spread(own)} ({len(own)})" for family, own in values.items() if family in FAMILIES
        and len(own) < len(runs)
    }  # fmt: skip
    levels = Counter(found["headline"]["level"] for found in runs)
    broken = sum(bool(found["damaged"]) for found in runs)
    texts |= {LEVELS: ", ".join(f"{level} {count}" for level, count in levels.most_common()), DAMAGED: str(broken)}
    return Row(label, role, values, diverged, texts)


def robustness_columns(rows: Sequence[Row]) -> list[str]:
    """Return the columns that at least one row has, the verdicts first."""
    found = [column for column in (WORST, RETAIN, *FAMILIES) if any(row.values.get(column) for row in rows)]
    return [LEVELS, DAMAGED, *found] if rows else []


def attack_lines(models: Sequence[Record], runs: Sequence[Record], arms: Sequence[str]) -> list[list[str]]:
    """Return a line for every single attack but membership's and the adapter's, over all arms and seeds.

    Its name, how often it could tell, the means of its figure on target and retain-only model, the mean score of the
    arms, and the arm that gives most away with its mean score.
    """
    attacked = {arm: found for arm, found in attacked_by_row(models, runs, arms).items() if arm != OTHERS}
    every = [found for own in attacked.values() for found in own]
    families = {name: own["family"] for found in every for name, own in found["attacks"].items() if "score" in own}
    names = sorted(families, key=lambda name: (FAMILIES.index(families[name]), name))
    lines = []
    for name in names:
        own = [found["attacks"][name] for found in every if name in found["attacks"]]
        scores = {arm: _scores(found, name) for arm, found in attacked.items()}
        means = {arm: mean(values) for arm, values in scores.items() if values}
        known = [value for values in scores.values() for value in values]
        most = max(means, key=lambda arm: means[arm], default=None)
        figures = [[item["means"][role] for item in own if role in item["means"]] for role in (ROLES[0], ROLES[2])]
        lines.append([
            name, f"{len(known)} of {len(own)}", *(f"{mean(values):.2f}" if values else "-" for values in figures),
            f"{mean(means.values()):.2f}" if means else "-", f"{most} ({means[most]:.2f})" if most else "-",
        ])  # fmt: skip
    return lines


def _scores(runs: Sequence[Found], name: str) -> list[float]:
    found = [run["attacks"].get(name, {}).get("score", {}).get("score") for run in runs]
    return [value for value in found if value is not None]
