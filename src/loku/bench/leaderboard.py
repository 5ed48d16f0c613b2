"""The leaderboard: every arm's means and spread over seeds between target and retain-only, as Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loku.bench.figures import value_of
from loku.bench.recipe import RETAIN_ONLY, TARGET, Recipe
from loku.bench.robustness import NOTE as UNDER_ATTACK
from loku.bench.robustness import robustness_columns, robustness_rows
from loku.bench.rows import Row, markdown
from loku.bench.store import Record
from loku.bench.tuning import distance, steps_taken
from loku.files import write_text

# Columns, by heading: figures of the evaluation. Others are added by `columns_of`.
FIGURES = {
    "forget prob.": "forget.probability",
    "forget ROUGE-L": "forget.rougeL_recall",
    "forget acc.": "forget.exact_match",
    "forget memorised": "forget.exact_memorisation",
    "truth ratio": "forget.truth_ratio",
    "forget repetition": "forget.repetition",
    "retain prob.": "retain.probability",
    "retain acc.": "retain.exact_match",
    "general acc.": "general.exact_match",
    "utility": "model_utility",
    "forget quality": "forget_quality",
    "EL10": "forget.el_10",
    "MA": "forget.ma",
    "unseen EL10": "level_el_10",
    "unseen MA": "level_ma",
    "forgotten": "forgotten",
    "cloze acc.": "cloze.accuracy",
    "perplexity": "validation.perplexity",
    "forget regurgitation": "forget.regurgitation",
    "forget knowledge": "forget.knowledge",
    "retain regurgitation": "retain.regurgitation",
    "retain knowledge": "retain.knowledge",
    "task aggregate": "task_aggregate",
    "MIA score": "mia_score",
    "verbatim forget": "verbmem_forget",
    "knowledge forget": "knowmem_forget",
    "knowledge retain": "knowmem_retain",
    "PrivLeak": "priv_leak",
}
OWN_UTILITY = "utility"
NOTE = (
    "Mean ± standard deviation over seeds {seeds}. The aim in every column is the retain-only row, not zero: a figure "
    "beyond it is no virtue. `distance` is the mean absolute difference from the retain-only model of the same seed, "
    "over the figures that lie between 0 and 1; it is 1 for a run that diverged, which has no other figures."
)


def leaderboard_rows(models: Sequence[Record], runs: Sequence[Record], arms: Sequence[str]) -> list[Row]:
    """Return the table's rows: target, the arms in the recipe's order, other retain-only models, retain-only."""
    found = {record["seed"]: record["models"] for record in models}
    rows = []
    for name, role in ((TARGET, "target"), (RETAIN_ONLY, "retain_only")):
        records = [(seed, {"figures": m[name]["figures"]} | m[name]) for seed, m in found.items() if name in m]
        if records:
            rows.append(_row(name, role, records, found))
    noise = [
        (seed, dict(m[name])) for seed, m in found.items() for name in m if name not in (TARGET, RETAIN_ONLY)
    ]  # fmt: skip
    others = [_row(f"{RETAIN_ONLY}, other seeds", "noise", noise, found)] if noise else []
    for arm in arms:
        records = [(record["seed"], record) for record in runs if record["arm"] == arm]
        if records:
            others.append(_row(arm, "unlearned", records, found))
    target = [row for row in rows if row.role == "target"]
    return [*target, *others[bool(noise) :], *others[: bool(noise)], *(row for row in rows if row.role != "target")]


def _row(label: str, role: str, records: Sequence[tuple[int, Record]], models: Mapping[int, Any]) -> Row:
    values: dict[str, list[float]] = {}

    def add(column: str, value: float | None) -> None:
        if value is not None:
            values.setdefault(column, []).append(value)

    for seed, record in records:
        figures = record.get("figures")
        for column, name in FIGURES.items():
            add(column, value_of(figures, name))
        if value_of(figures, FIGURES["utility"]) is None:  # tdec and lume have one of their own
            add("utility", value_of(figures, OWN_UTILITY))
        reference = models.get(seed, {}).get(RETAIN_ONLY, {}).get("figures")
        if reference is not None and role != "retain_only":
            add("distance", distance(figures, reference))
        for column, value in _relearned(record.get("relearning")).items():
            add(column, value)
        if role == "unlearned" and not record.get("error"):
            add("steps", steps_taken(record))
            add("seconds", record["seconds"].get("all"))
            peak = record.get("peak_memory_bytes")  # left out of runs that are also other runs' beginning
            add("peak MB", None if peak is None else peak / 1e6)
    return Row(label, role, values, sum(bool(record.get("error")) for _, record in records))


def _relearned(curve: Mapping[str, Any] | None) -> dict[str, float]:
    """Return what the attack brought back of the rest of the forget set: accuracy before and after."""
    if not curve:
        return {}
    found = {}
    for column, metric in (("relearned rest, acc.", "exact_match"), ("relearned rest, prob.", "probability")):
        values = curve.get("means", {}).get("rest", {}).get(metric)
        if values:
            found[column] = float(values[-1])
    return found


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Return the columns that at least one row has, in order."""
    order = [*FIGURES, "distance", "relearned rest, acc.", "relearned rest, prob.", "steps", "seconds", "peak MB"]
    return [column for column in order if any(column in row.values for row in rows)]


def write_leaderboard(
    recipe: Recipe, models: Sequence[Record], runs: Sequence[Record], choices: Mapping[str, Any], root: Path
) -> Path:
    """Write leaderboard.md and leaderboard.html, and return the latter's path."""
    from loku.report.bench import Section, write_bench_page

    arms = [arm.name for arm in recipe.arms]
    rows, attacked = leaderboard_rows(models, runs, arms), robustness_rows(models, runs, arms)
    note = NOTE.format(seeds=", ".join(map(str, recipe.seeds)))
    text = [f"# {recipe.title}", "", note, "", markdown(rows, columns_of(rows))]
    robustness = Section(attacked, robustness_columns(attacked), UNDER_ATTACK) if attacked else None
    if robustness is not None:
        text += ["", "## Robustness", "", UNDER_ATTACK, "", markdown(attacked, robustness.columns)]
    tuned = [f"- {name}: {_point(choice['point'])}" for name, choice in choices.items() if choice["scores"]]
    if recipe.tuning.source:
        text += ["", f"Settings as chosen in {recipe.tuning.source}."]
    if tuned:
        text += ["", f"Chosen on seeds {', '.join(map(str, recipe.tuning.seeds))} (rule: {recipe.tuning.choose}):", ""]
        text += tuned
    write_text(root / "leaderboard.md", "\n".join(text) + "\n")
    figures = Section(rows, columns_of(rows), note)
    return write_bench_page(
        recipe.title, figures, choices, root / "leaderboard.html", robustness=robustness, source=recipe.tuning.source
    )


def _point(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in point.items())
