"""What a run shows and what it does not, in plain language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loku.report.artefacts import at, section
from loku.report.figures import (
    Value,
    beyond_note,
    beyond_retain_only,
    forget_quality_allowed,
    summaries_of,
    value_of,
    values_of,
)
from loku.report.numerals import figure


@dataclass(frozen=True)
class Verdict:
    """The verdict of a results file; `tone` is good, part, bad or none and never stands without the words."""

    level: str
    sentence: str
    rests_on: str
    tone: str


# How the page marks the levels that the evaluation gives; any other level is shown unmarked.
TONES = {
    "indistinguishable": "good",
    "suppressed": "part",
    "distinguishable": "part",
    "not suppressed": "bad",
    "damaged": "bad",
}


def verdict(results: Mapping[str, Any] | None) -> Verdict:
    """Return the verdict of the unlearned model's results."""
    level = at(results, "verdict", "level")
    if not isinstance(level, str) or not level:
        return Verdict("No verdict", "The results hold no verdict.", "", "none")
    sentence, basis = at(results, "verdict", "sentence"), at(results, "verdict", "rests_on")
    return Verdict(
        level[:1].upper() + level[1:],
        sentence if isinstance(sentence, str) else "",
        basis if isinstance(basis, str) else "",
        TONES.get(level.lower(), "none"),
    )


def explanation(results: Mapping[str, Mapping[str, Any]], *, evaluated: str = "unlearned") -> list[str]:
    """Return sentences for somebody who knows none of the metrics."""
    sentences = []
    for name, start in (("forget", "Asked about what had to go"), ("retain", "Asked about what had to stay")):
        text = _sentence(start, values_of(results, name, "probability"), f"the {evaluated} model")
        if text:
            sentences.append(text)
    utility = summaries_of(results, "model_utility")
    if "unlearned" in utility and "target" in utility:
        sentences.append(
            f"Its usefulness over all kept knowledge went from {figure(utility['target'].mean, 2)} to "
            f"{figure(utility['unlearned'].mean, 2)}."
        )
    repetition = value_of(results.get("unlearned"), "forget", "repetition")
    if repetition and repetition.mean > 0.3:
        sentences.append(
            f"Its answers to the forget questions repeat themselves ({figure(repetition.mean, 2)} of their "
            "4-token sequences): it does not answer like a model that never knew, it stammers."
        )
    if "retain_only" in results:
        sentences.append(
            "The aim is not zero. A model that never saw the forget set still guesses some of it, so the aim is the "
            "retain-only column; a figure far below it is a mark of damage, and itself betrays that something was "
            "removed."
        )
    beyond = beyond_retain_only(results)
    if beyond:
        sentences.append(beyond_note(beyond))
    return sentences


def _sentence(start: str, values: Mapping[str, Value], model: str) -> str:
    parts = [
        f"{who} gives the right answer a probability of {figure(values[role].mean, 2)} per token"
        if position == 0
        else f"{who} {figure(values[role].mean, 2)}"
        for position, (role, who) in enumerate(
            (role, who)
            for role, who in (
                ("target", "the model before unlearning"),
                ("unlearned", model),
                ("retain_only", "a model that never saw the forget set"),
            )
            if role in values
        )
    ]
    if not parts:
        return ""
    joined = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"{start}, {joined}."


def not_claimed(
    run: Mapping[str, Any] | None, results: Mapping[str, Mapping[str, Any]], attacks: Mapping[str, Any] | None = None
) -> list[str]:
    """Return what a reader must not conclude."""
    points = [
        "These figures are empirical evidence from the questions that were asked. They are no proof and no guarantee "
        "that the information was deleted from the weights.",
    ]
    if not section(attacks, "attacks"):
        points.append(
            "Attempts to bring the knowledge back (fine-tuning on a few facts, other wordings, rounding the weights) "
            "were not part of this evaluation."
        )
    points.append(release_note(run))
    if "retain_only" not in results:
        points.append(
            "No retain-only model was measured, so nothing here says that the model cannot be told from one that "
            "never saw the forget set."
        )
    return points


def release_note(run: Mapping[str, Any] | None) -> str:
    """Say what may be released: an adapter can be removed, so it is the merged model."""
    if at(run, "method", "tune") == "full":
        return (
            "The model folder holds the changed weights themselves; it is what is released to outsiders. "
            "The target model still knows everything."
        )
    return (
        "An adapter can be removed, and the base model underneath still knows everything. What is released to "
        "outsiders is the merged model (`loku export`), never the base model with the adapter."
    )


def missing_pieces(
    run: Mapping[str, Any] | None, results: Mapping[str, Mapping[str, Any]], *, has_texts: bool, has_curves: bool
) -> list[str]:
    """Return a sentence for every piece that the folder does not hold."""
    notes = []
    if "unlearned" not in results:
        notes.append("The unlearned model was not evaluated: there is no results.json. `loku evaluate` writes it.")
    if run is not None and "target" not in results:
        notes.append("The target was not evaluated before unlearning, so nothing can be compared with it.")
    if "retain_only" not in results:
        notes.append(
            "No retain-only results: the level that the forget set should come to is not known. "
            "Give a retain-only model, or its results, as the reference."
        )
    if run is None:
        notes.append("There is no run.json: this is an evaluation, and training, importance and costs are not known.")
    elif not has_curves:
        notes.append("There is no metrics.jsonl: the training curves are not known.")
    if not has_texts:
        notes.append("Texts were not kept, so no answers are shown. Evaluate with `--keep-text` to keep them.")
    unlearned = results.get("unlearned")
    warnings = at(unlearned, "warnings")
    notes += [f"Evaluation: {text}" for text in warnings] if isinstance(warnings, list) else []
    if summaries_of(results, "forget_quality") and not forget_quality_allowed(unlearned):
        notes.append(
            "Forget quality was measured but is not shown: without utility and fluency beside it a broken model "
            "would look good."
        )
    return notes
