"""Several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from loku.report import charts
from loku.report.artefacts import ROLES, RunFolder, at, number, section
from loku.report.figures import (
    METRICS,
    NO_VIRTUE,
    beyond_retain_only,
    forget_quality_allowed,
    metric_info,
    set_names,
    set_title,
    summary_of,
    value_of,
)
from loku.report.numerals import count, duration, figure, memory, percent
from loku.report.scatter import Point, scatter
from loku.report.seeds import paired_rows, seed_groups, settings_of, spread_text
from loku.report.words import release_note, verdict

# (set, metric) of the table's columns; those that no run has are left out.
FORGET = ("probability", "rougeL_recall", "exact_match", "truth_ratio", "extraction_strength")
KEEP = ("probability", "rougeL_recall", "exact_match", "perplexity")


@dataclass(frozen=True)
class Row:
    """One model of the comparison."""

    label: str
    role: str
    folder: str
    cells: list[str]
    seeds: int = 0  # how many it stands for, where it is more than one


def comparison(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Return what the template of the comparison page shows."""
    labels = run_labels(runs)
    references = {role: next((run.results[role] for run in runs if role in run.results), None) for role in ROLES}
    models: list[tuple[str, str, str, Mapping[str, Any]]] = []
    if references["target"]:
        models.append(("Target", "target", "", references["target"]))
    singles = [
        (label, "unlearned", run.name, run.results.get("unlearned", {}))
        for label, run in zip(labels, runs, strict=True)
    ]
    models += singles
    if references["retain_only"]:
        models.append(("Retain-only", "retain_only", "", references["retain_only"]))
    columns = _columns([result for *_, result in models])
    rows = [_row([model], columns) for model in models if model[1] != "unlearned"]
    groups = [_row([singles[place] for place in places], columns) for places in seed_groups(runs)]
    start = 1 if references["target"] else 0
    rows[start:start] = groups
    forget = at(runs[0].run, "data", "forget", "name")
    return {
        "title": f"{len(runs)} runs compared" + (f": unlearning {forget}" if forget else ""),
        "head": _head(columns),
        "columns": [_column_label(*column[1:]) for column in columns],
        "starts": [i == 0 or columns[i][0] != columns[i - 1][0] for i in range(len(columns))],
        "rows": rows,
        "beyond": [
            (label, ", ".join(less))
            for label, run in zip(labels, runs, strict=True)
            if (less := beyond_retain_only({"retain_only": references["retain_only"] or {}, **run.results}))
        ],
        "no_virtue": NO_VIRTUE,
        "verdicts": [(label, found) for label, *_, result in singles if (found := verdict(result))],
        "paired": paired_rows(runs),
        "scatter": scatter_chart(models),
        "truth": truth_multiples(runs, labels, references),
        "cost_head": ["Time", "of it training", "of it importance", "Peak memory", "Steps", "Trainable"],
        "costs": [(label, _costs(run.run)) for label, run in zip(labels, runs, strict=True)],
        "settings": setting_differences(runs),
        "labels": labels,
        "warnings": _warnings(runs, labels),
        "release_note": release_note(runs[0].run),
    }


Model = tuple[str, str, str, Mapping[str, Any]]


def _row(models: Sequence[Model], columns: Sequence[tuple[str, str, str]]) -> Row:
    """Return the table's row of one model, or of the runs that differ in their seed alone."""
    label, role, folder, result = models[0]
    if len(models) == 1:
        return Row(label, role, folder, [_cell(result, *column[1:]) for column in columns])
    cells = []
    for _, name, metric in columns:
        hidden = metric == "forget_quality" and not all(forget_quality_allowed(found) for *_, found in models)
        values = [None if hidden else _mean(found, name, metric) for *_, found in models]
        cells.append(spread_text(values, logarithm=metric == "forget_quality"))
    method = label.removesuffix(f" ({folder})")
    return Row(f"{method}, {len(models)} seeds", role, folder, cells, len(models))


def run_labels(runs: Sequence[RunFolder]) -> list[str]:
    """Name each run by its method, and by its folder where that is not enough."""
    names = [str(at(run.run, "method", "name") or run.name) for run in runs]
    return [
        name if names.count(name) == 1 or name == run.name else f"{name} ({run.name})"
        for name, run in zip(names, runs, strict=True)
    ]


def _columns(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Return (group, set, metric) of every column that some model has.

    Utility, fluency and forget quality stand first and together: the last means nothing without the others.
    """
    fluency = [("forget", metric) for metric, info in METRICS.items() if info.fluency]
    together = [("", "model_utility"), *fluency, ("", "forget_quality"), ("", "mia_auc")]
    wanted = [("Read together", *column) for column in together]
    wanted += [(set_title("forget"), "forget", metric) for metric in FORGET]
    others = [name for name in set_names({str(i): result for i, result in enumerate(results)}) if name != "forget"]
    wanted += [(set_title(name), name, metric) for name in others for metric in KEEP]
    return [column for column in wanted if any(_cell(result, *column[1:]) != _NONE for result in results)]


_NONE = figure(None)


def _cell(result: Mapping[str, Any], name: str, metric: str) -> str:
    if name:
        value = value_of(result, name, metric)
    elif metric == "forget_quality" and not forget_quality_allowed(result):
        value = None
    else:
        value = summary_of(result, metric)
    return value.text if value else _NONE


def _column_label(name: str, metric: str) -> str:
    summaries = {"model_utility": "Utility", "forget_quality": "Forget quality p", "mia_auc": "Membership AUC"}
    short = {"probability": "Probability", "rougeL_recall": "ROUGE\N{NON-BREAKING HYPHEN}L"}
    return summaries[metric] if not name else short.get(metric) or metric_info(metric).label


def _head(columns: Sequence[tuple[str, str, str]]) -> list[tuple[str, int]]:
    """Return (group, number of columns) from left to right."""
    return [(group, len(list(members))) for group, members in groupby(column[0] for column in columns)]


def scatter_chart(models: Sequence[tuple[str, str, str, Mapping[str, Any]]]) -> charts.Chart | None:
    """Draw forgetting against utility, with the first pair of figures that every unlearned model has."""
    runs = [result for _, role, _, result in models if role == "unlearned"]
    utilities = [
        ("", "model_utility"),
        ("retain", "probability"),
        ("retain", "rougeL_recall"),
        ("retain", "exact_match"),
    ]
    knowledge = [("forget", "probability"), ("forget", "rougeL_recall"), ("forget", "exact_memorisation")]
    x = next((c for c in utilities if all(_mean(run, *c) is not None for run in runs)), None)
    y = next((c for c in knowledge if all(_mean(run, *c) is not None for run in runs)), None)
    if not x or not y:
        return None
    points = []
    for label, role, _, result in models:
        utility, forget = _mean(result, *x), _mean(result, *y)
        if utility is not None and forget is not None:
            points.append(Point(label, utility, forget, role))
    return scatter(points, "scatter", _axis(*x), _axis(*y))


def _mean(result: Mapping[str, Any], name: str, metric: str) -> float | None:
    value = value_of(result, name, metric) if name else summary_of(result, metric)
    return value.mean if value else None


def _axis(name: str, metric: str) -> str:
    label = metric_info(metric).label
    label = label if label.startswith("ROUGE") else label.lower()
    return f"{label} on the {name} set" if name else "model utility"


def truth_multiples(
    runs: Sequence[RunFolder], labels: Sequence[str], references: Mapping[str, Mapping[str, Any] | None]
) -> list[tuple[str, charts.Chart]]:
    """Draw every run's truth ratios over the target's and the retain-only model's, in small charts."""
    panels = []
    for label, run in zip(labels, runs, strict=True):
        results = {role: run.results.get(role) or references[role] for role in ROLES}
        samples = charts.truth_samples({role: result for role, result in results.items() if result})
        if "unlearned" in samples and "unlearned" in run.results:
            panels.append((label, samples))
    if not panels:
        return []
    limits = charts.ratio_limits([value for _, samples in panels for sample in samples.values() for value in sample])
    return [
        (label, charts.truth_ratios(samples, f"truth-{i}", width=230, height=140, limits=limits, brief=True))
        for i, (label, samples) in enumerate(panels)
    ]


def _costs(run: Mapping[str, Any] | None) -> list[str]:
    seconds = section(run, "seconds")
    return [
        duration(number(seconds.get("total"))),
        duration(number(seconds.get("training"))),
        duration(number(seconds.get("importance"))),
        memory(number(at(run, "peak_memory_bytes"))),
        count(number(at(run, "steps"))),
        percent(number(at(run, "trainable", "share"))),
    ]


def setting_differences(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """Return the settings in which the runs differ, with each run's value."""
    settings = [settings_of(run) for run in runs]
    names = list(dict.fromkeys(name for setting in settings for name in setting))
    rows = [(name, [setting.get(name, _NONE) for setting in settings]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _warnings(runs: Sequence[RunFolder], labels: Sequence[str]) -> list[str]:
    """Say what makes the runs hard to compare, and what is missing."""
    notes = []
    checks = (
        ("target model", ("model", "sha256")),
        ("forget set", ("data", "forget", "sha256")),
        ("retain set", ("data", "retain", "sha256")),
    )
    for what, keys in checks:
        found = {at(run.run, *keys) for run in runs} - {None}
        if len(found) > 1:
            notes.append(f"The runs do not share one {what}: their figures are not comparable as they stand.")
    for role, what in (("target", "target"), ("retain_only", "retain-only model")):
        models = {at(run.results.get(role), "model", "sha256") for run in runs} - {None}
        if len(models) > 1:
            notes.append(f"The runs were compared with different models as {what}: its row is the first one's.")
    suites = {at(run.results.get("unlearned"), "suite") for run in runs} - {None}
    if len(suites) > 1:
        notes.append("The runs were evaluated with different suites: " + ", ".join(sorted(map(str, suites))) + ".")
    for label, run in zip(labels, runs, strict=True):
        if "unlearned" not in run.results:
            notes.append(f"{label}: there is no results.json, so the run was not evaluated.")
        if run.run is None:
            notes.append(f"{label}: there is no run.json, so its costs and settings are not known.")
        notes += [f"{label}: {problem}" for problem in run.problems]
    for role, what in (("target", "target"), ("retain_only", "retain-only model")):
        if not any(role in run.results for run in runs):
            notes.append(f"No run holds results of the {what}, so its row is missing.")
    hidden = [label for label, run in zip(labels, runs, strict=True) if _hides_quality(run.results.get("unlearned"))]
    if hidden:
        notes.append(
            "Forget quality is not shown without utility and fluency beside it; they are missing for "
            + ", ".join(hidden)
            + "."
        )
    return notes


def _hides_quality(result: Mapping[str, Any] | None) -> bool:
    return bool(summary_of(result, "forget_quality")) and not forget_quality_allowed(result)
