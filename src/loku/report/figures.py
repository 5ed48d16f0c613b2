"""The figures of up to three models side by side, and what each row says in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loku.report.artefacts import ROLES, at, number, section
from loku.report.numerals import figure, percent


@dataclass(frozen=True)
class Metric:
    """How a metric is named and explained; `unit` says that it lies between 0 and 1."""

    label: str
    meaning: str
    unit: bool = True
    fluency: bool = False


METRICS = {
    "probability": Metric("Answer probability", "how likely the model finds the right answer, per token"),
    "rougeL_recall": Metric("ROUGE-L recall", "share of the right answer's words in what it generates"),
    "rougeL_f1": Metric("ROUGE-L F1", "the same words, counted against the length of both"),
    "exact_match": Metric("Exact match", "share of generated answers that are word for word right"),
    "truth_ratio": Metric("Truth ratio", "wrong answers against the right one; to be compared with the other columns"),
    "truth_ratio_arithmetic": Metric("Truth ratio, arithmetic", "the same with an arithmetic mean of wrong answers"),
    "truth_ratio_probability": Metric(
        "Truth ratio, as a probability", "the right answer's share beside a typical wrong one; 0.5 tells nothing"
    ),
    "exact_memorisation": Metric("Exact memorisation", "share of answer tokens predicted from the true beginning"),
    "extraction_strength": Metric("Extraction strength", "share of the answer that completes itself from its start"),
    "extraction_strength_floor": Metric(
        "Extraction strength, with a floor", "the variant of open-unlearning, which never reaches 0"
    ),
    "refusal_rate": Metric("Refusals", "share of answers that refuse; on what had to stay, over-refusal"),
    "perplexity": Metric("Perplexity", "surprise at the right text; 1 is none", unit=False),
    "repetition": Metric("Repetition", "share of repeated 4-token sequences in what it generates", fluency=True),
    "token_entropy": Metric("Token entropy", "variety of what it generates, in bits", unit=False, fluency=True),
    "fluency": Metric("Fluency", "readability of the generated answers", fluency=True),
}

SETS = {
    "forget": ("Forget set", "what had to go"),
    "retain": ("Retain set", "what had to stay"),
    "general": ("General", "what any model should still do"),
    "real_authors": ("Real authors", "neighbouring knowledge"),
    "world_facts": ("World facts", "general knowledge"),
    "holdout": ("Holdout set", "the same kind of text, never trained on"),
}

# The rows of the main table; every other figure stands in the full table.
MAIN = ("probability", "rougeL_recall", "exact_match", "truth_ratio", "exact_memorisation", "extraction_strength")
SMALL_GAP = 0.02
CLEAR_GAP = 0.05  # the verdict's: smaller differences from the retain-only model count as none


@dataclass(frozen=True)
class Value:
    """A mean with its 95 % interval, where one was measured."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        """The mean as text."""
        return figure(self.mean)

    @property
    def interval(self) -> str | None:
        """The interval as text."""
        if self.low is None or self.high is None:
            return None
        return f"{figure(self.low)}\N{EN DASH}{figure(self.high)}"


@dataclass(frozen=True)
class Row:
    """One figure of each model, with a sentence that reads it; `unit` asks for a strip from 0 to 1."""

    label: str
    meaning: str
    values: dict[str, Value]
    reading: str = ""
    arrow: str = ""
    unit: bool = True


@dataclass(frozen=True)
class Group:
    """Rows that are read together; `aim` says where the unlearned model should come to lie."""

    title: str
    subtitle: str
    aim: str
    rows: list[Row]


def value_of(results: Mapping[str, Any] | None, name: str, metric: str) -> Value | None:
    """Return a set's metric from a results file, or None."""
    entry = at(results, "sets", name, "metrics", metric)
    mean = number(at(entry, "mean")) if isinstance(entry, Mapping) else number(entry)
    return None if mean is None else Value(mean, number(at(entry, "low")), number(at(entry, "high")))


def summary_of(results: Mapping[str, Any] | None, key: str) -> Value | None:
    """Return one summary figure, or None."""
    mean = number(at(results, "summary", key))
    return None if mean is None else Value(mean)


def values_of(results: Mapping[str, Mapping[str, Any]], name: str, metric: str) -> dict[str, Value]:
    """Return a set's metric for every model that has it, in the order of ROLES."""
    found = {role: value_of(results.get(role), name, metric) for role in ROLES}
    return {role: value for role, value in found.items() if value is not None}


def summaries_of(results: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Value]:
    """Return a summary figure for every model that has it, in the order of ROLES."""
    found = {role: summary_of(results.get(role), key) for role in ROLES}
    return {role: value for role, value in found.items() if value is not None}


def set_names(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the evaluated sets: known ones in their order, then the others."""
    present = {name for result in results.values() for name in section(result, "sets")}
    return [name for name in SETS if name in present] + sorted(present - set(SETS))


def metric_names(results: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    """Return a set's metrics: known ones in their order, then the others."""
    present = {metric for result in results.values() for metric in section(result, "sets", name, "metrics")}
    return [metric for metric in METRICS if metric in present] + sorted(present - set(METRICS))


def metric_info(metric: str) -> Metric:
    """Return what is known about a metric; an unknown one is shown under its own name."""
    return METRICS.get(metric) or Metric(metric.replace("_", " ").capitalize(), "", unit=False)


def set_title(name: str) -> str:
    """Return a set's name for readers."""
    return SETS[name][0] if name in SETS else name.replace("_", " ").capitalize()


def read_forgetting(values: Mapping[str, Value]) -> tuple[str, str]:
    """Return (arrow, sentence) for a figure that should come to the retain-only level.

    The share of the way is (target - unlearned) / (target - retain-only); above 1 the model lies past the aim.
    """
    target, unlearned, aim = (values.get(role) for role in ROLES)
    if unlearned is None:
        return "", ""
    return _arrow(target, unlearned), _distance(target, unlearned, aim)


LESS_IS_FORGOTTEN = ("probability", "rougeL_recall", "exact_match", "exact_memorisation", "extraction_strength")


def beyond_retain_only(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the forget figures by which the unlearned model knows less than the retain-only one, each with both.

    Less means what it means in the verdict: intervals apart, and the means by more than a trifle.
    """
    found = []
    for metric in LESS_IS_FORGOTTEN:
        ours, aim = (value_of(results.get(role), "forget", metric) for role in ("unlearned", "retain_only"))
        if ours is None or aim is None or aim.mean - ours.mean <= CLEAR_GAP:
            continue
        if ours.high is None or aim.low is None or ours.high < aim.low:
            label = METRICS[metric].label
            name = label if label.startswith("ROUGE") else label.lower()
            found.append(f"{name} {figure(ours.mean, 2)} (retain-only {figure(aim.mean, 2)})")
    return found


NO_VIRTUE = (
    "A model that never saw the forget set still guesses some of it; knowing less betrays the removal, or is damage."
)


def beyond_note(found: Sequence[str]) -> str:
    """Return the sentences about figures beyond the retain-only model's."""
    return f"Better than retain-only is no virtue here: {', '.join(found)}. {NO_VIRTUE}"


def _distance(target: Value | None, unlearned: Value, aim: Value | None) -> str:
    if aim is None:
        return "The retain-only level was not measured."
    away = figure(abs(unlearned.mean - aim.mean))
    inside = unlearned.low is not None and unlearned.high is not None and unlearned.low <= aim.mean <= unlearned.high
    if inside or abs(unlearned.mean - aim.mean) < SMALL_GAP / 2:
        text = "At the retain-only level (inside the interval)." if inside else "At the retain-only level."
    elif target is None:
        text = f"{'Above' if unlearned.mean > aim.mean else 'Below'} the retain-only level by {away}."
    elif abs(target.mean - aim.mean) < SMALL_GAP:
        text = f"Target and retain-only hardly differ here; unlearned is {away} away from both."
    else:
        way = (target.mean - unlearned.mean) / (target.mean - aim.mean)
        if way < 0:
            text = "Moved away from the retain-only level."
        elif way < 0.05:
            text = "Hardly moved."
        elif way > 1:
            text = f"Past the retain-only level by {away}, which is no virtue."
        else:
            text = f"{percent(way)} of the way to the retain-only level."
    return text


def read_keeping(values: Mapping[str, Value], *, higher_is_better: bool = True) -> tuple[str, str]:
    """Return (arrow, sentence) for a figure that should stay where the target has it."""
    target, unlearned = values.get("target"), values.get("unlearned")
    if unlearned is None:
        return "", ""
    arrow = _arrow(target, unlearned)
    if target is None:
        return arrow, "The target was not measured."
    if target.mean == 0:
        return arrow, "The target has zero here."
    ratio = unlearned.mean / target.mean
    if not higher_is_better:
        return arrow, f"{figure(ratio, 2)} times the target's."
    return arrow, f"{percent(ratio)} of the target's."


def _arrow(before: Value | None, after: Value) -> str:
    if before is None or abs(after.mean - before.mean) < 0.005:
        return ""
    return "\N{DOWNWARDS ARROW}" if after.mean < before.mean else "\N{UPWARDS ARROW}"


def key_figures(results: Mapping[str, Mapping[str, Any]]) -> list[Group]:
    """Return the main table: forgetting, fluency, keeping, and the figures over all sets."""
    groups = []
    for name in set_names(results):
        metrics = metric_names(results, name)
        forgetting = name == "forget"
        chosen = [m for m in metrics if m in MAIN] + [m for m in metrics if m == "perplexity" and not forgetting]
        rows = [_row(results, name, metric, forgetting=forgetting) for metric in chosen]
        title, subtitle = SETS.get(name, (set_title(name), ""))
        aim = "should come to the retain-only level, not to zero" if forgetting else "should stay at the target's level"
        groups.append(Group(title, subtitle, aim, rows))
        fluent = [_row(results, name, metric, forgetting=True) for metric in metrics if metric_info(metric).fluency]
        if forgetting and fluent:
            groups.append(Group("Fluency", "on the forget questions", "should be like the retain-only model's", fluent))
    groups.append(overall(results))
    return _explain_once([group for group in groups if group.rows])


def _explain_once(groups: list[Group]) -> list[Group]:
    """Keep a metric's explanation only where it first stands: the table is read from the top."""
    seen: set[str] = set()
    for group in groups:
        for position, row in enumerate(group.rows):
            if row.label in seen:
                group.rows[position] = replace(row, meaning="")
            seen.add(row.label)
    return groups


def _row(results: Mapping[str, Mapping[str, Any]], name: str, metric: str, *, forgetting: bool) -> Row:
    values, info = values_of(results, name, metric), metric_info(metric)
    if forgetting:
        arrow, reading = read_forgetting(values)
    else:
        arrow, reading = read_keeping(values, higher_is_better=metric != "perplexity")
    return Row(info.label, info.meaning, values, reading, arrow, info.unit)


def overall(results: Mapping[str, Mapping[str, Any]]) -> Group:
    """Return the figures over all sets; forget quality only where utility and fluency stand beside it."""
    rows = []
    utility = summaries_of(results, "model_utility")
    if utility:
        arrow, reading = read_keeping(utility)
        meaning = "harmonic mean over the sets that had to stay"
        rows.append(Row("Model utility", meaning, utility, reading, arrow))
    audit = summaries_of(results, "mia_auc")
    if audit:
        arrow, reading = read_forgetting(audit)
        meaning = "can forget rows be told from holdout rows? Compare with retain-only, not with 0.5"
        rows.append(Row("Membership AUC", meaning, audit, reading, arrow))
    quality = summaries_of(results, "forget_quality")
    if quality and forget_quality_allowed(results.get("unlearned")):
        count = number(at(results.get("unlearned"), "summary", "forget_quality_rows"))
        distance = summary_of(results.get("unlearned"), "ks_statistic")
        reading = "".join(
            [
                "Read only together with utility and fluency: a broken model can score high.",
                f" KS distance {distance.text}" if distance else "",
                f" on {count:.0f} questions." if distance and count else "." if distance else "",
            ]
        )
        meaning = "p-value: truth ratios like the retain-only model's?"
        rows.append(Row("Forget quality", meaning, quality, reading))
    return Group("Overall", "over all sets", "read together", rows)


def forget_quality_allowed(results: Mapping[str, Any] | None) -> bool:
    """Say whether utility and fluency stand beside the forget quality.

    The p-value rewards destruction: a model that answers gibberish can reach a high one, so it is never shown alone.
    """
    useful = summary_of(results, "model_utility") or any(
        value_of(results, "retain", metric) for metric in ("probability", "rougeL_recall", "perplexity")
    )
    fluent = any(metric.fluency and value_of(results, "forget", name) for name, metric in METRICS.items())
    return bool(useful) and fluent


def all_figures(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, dict[str, Value]]]:
    """Return every figure of every set and over all sets, for the full table."""
    rows = [
        (set_title(name), metric, values)
        for name in set_names(results)
        for metric in metric_names(results, name)
        if (values := values_of(results, name, metric))
    ]
    hidden = () if forget_quality_allowed(results.get("unlearned")) else ("forget_quality", "ks_statistic")
    keys = list(dict.fromkeys(key for result in results.values() for key in section(result, "summary")))
    over_all = [("Overall", key, summaries_of(results, key)) for key in keys if key not in hidden]
    return rows + [row for row in over_all if row[2]]


def glance(results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Return the three or four figures for the head of the report."""
    rows = []
    for name, label in (("forget", "Forgetting"), ("retain", "Keeping")):
        metric = next((m for m in MAIN if values_of(results, name, m)), None)
        if metric:
            row = _row(results, name, metric, forgetting=name == "forget")
            what = f"{row.label.lower().replace('rouge', 'ROUGE')} on the {name} set"
            rows.append(Row(label, what, row.values, row.reading, row.arrow, row.unit))
    summary = next((row for row in overall(results).rows if row.label == "Model utility"), None)
    if summary:
        rows.append(
            Row("Usefulness", "model utility over all kept sets", summary.values, summary.reading, summary.arrow)
        )
    for metric, info in METRICS.items():
        if info.fluency and (values := values_of(results, "forget", metric)):
            arrow, reading = read_forgetting(values)
            what = f"{info.label.lower()} on the forget questions"
            rows.append(Row("Fluency", what, values, reading, arrow, info.unit))
            break
    return rows
