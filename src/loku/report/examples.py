"""Example answers: which are shown, and which of their words come from the right answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loku.report.artefacts import ROLES, at, number
from loku.report.figures import set_names, set_title

SPREAD = 3  # examples taken at even distances through a set
WORST = 2  # examples that speak most against the run
LISTED = 60  # examples in the full list of a set; a report of thousands of texts serves nobody
SHARED = ("the", "and", "was", "were", "for", "with", "that", "this", "from", "his", "her", "has", "are", "its")


@dataclass(frozen=True)
class Answer:
    """One model's generation, cut into pieces (text, is a word of the right answer)."""

    role: str
    pieces: list[tuple[str, bool]]


@dataclass(frozen=True)
class Example:
    """A question, the right answer, and what each model said."""

    index: int | str
    question: str
    reference: str
    answers: list[Answer]
    why: str = ""


@dataclass(frozen=True)
class ExampleSet:
    """The examples of one set: a few chosen by a stated rule, and the list."""

    name: str
    title: str
    rule: str
    chosen: list[Example]
    others: list[Example]
    total: int


def mark_words(
    generation: str, reference: str, question: str, common: Collection[str] = SHARED
) -> list[tuple[str, bool]]:
    """Cut a generation into pieces; words of the right answer that are neither asked nor common are marked."""
    known = {*_words(question), *common}
    telling = {word for word in _words(reference) if word not in known and (len(word) > 2 or word.isdigit())}
    pieces: list[tuple[str, bool]] = []
    for piece in re.split(r"(\w+)", generation):
        if piece:
            marked = piece.casefold() in telling
            if pieces and not marked and not pieces[-1][1]:
                pieces[-1] = (pieces[-1][0] + piece, False)
            else:
                pieces.append((piece, marked))
    return pieces


def common_words(references: Collection[str]) -> set[str]:
    """Return the words that a quarter of a set's answers share: they belong to the wording, not to a fact."""
    counts = Counter(word for reference in references for word in set(_words(reference)))
    return set(SHARED) | {word for word, times in counts.items() if times >= max(3, len(references) / 4)}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def example_sets(
    examples: Mapping[str, Sequence[Mapping[str, Any]]], results: Mapping[str, Mapping[str, Any]]
) -> list[ExampleSet]:
    """Return the examples of every set that has texts, forget set first."""
    texts: dict[str, dict[Any, dict[str, Mapping[str, Any]]]] = {}
    for role in ROLES:
        for row in examples.get(role, ()):
            texts.setdefault(str(row.get("set")), {}).setdefault(_key(row.get("index")), {})[role] = row
    order = [name for name in set_names(results) if name in texts]
    return [
        _example_set(name, texts[name], results) for name in [*order, *(name for name in texts if name not in order)]
    ]


def _key(index: object) -> int | str:
    return index if isinstance(index, int) else str(index)


def _example_set(
    name: str, rows: Mapping[Any, Mapping[str, Mapping[str, Any]]], results: Mapping[str, Mapping[str, Any]]
) -> ExampleSet:
    indices = list(rows)
    scores = {role: _scores(results.get(role), name) for role in ROLES}
    amount = min(SPREAD, len(indices))
    spread = [indices[position * len(indices) // amount] for position in range(amount)]
    after, before = scores["unlearned"], scores["target"]
    rule = "chosen at even distances through the set"
    if name == "forget" and after:
        worst = sorted((i for i in indices if i in after), key=lambda i: -after[i])
        why = "still known best"
        rule += f", and the {WORST} that the unlearned model still knows best"
    elif name != "forget" and after and before:
        worst = sorted((i for i in indices if i in after and i in before), key=lambda i: after[i] - before[i])
        why = "lost most"
        rule += f", and the {WORST} that lost most"
    else:
        worst, why = [], ""
    worst = [i for i in worst if i not in spread][:WORST]
    common = common_words({_text(next(iter(row.values())).get("answer")) for row in rows.values()})
    return ExampleSet(
        name=name,
        title=set_title(name),
        rule=rule,
        chosen=[_example(i, rows[i], common) for i in spread] + [_example(i, rows[i], common, why) for i in worst],
        others=[_example(i, rows[i], common) for i in indices if i not in spread and i not in worst][:LISTED],
        total=len(indices),
    )


def _scores(results: Mapping[str, Any] | None, name: str) -> dict[Any, float]:
    """Return the answer probability of every example (ROUGE-L recall where there is none)."""
    rows = at(results, "sets", name, "per_example")
    if not isinstance(rows, list):
        return {}
    for metric in ("probability", "rougeL_recall"):
        found = {_key(at(row, "index")): number(at(row, metric)) for row in rows}
        scores = {index: score for index, score in found.items() if score is not None}
        if scores:
            return scores
    return {}


def _example(
    index: int | str, rows: Mapping[str, Mapping[str, Any]], common: Collection[str], why: str = ""
) -> Example:
    first = next(iter(rows.values()))
    question, reference = _text(first.get("question")), _text(first.get("answer"))
    answers = [
        Answer(role, mark_words(_text(rows[role].get("generation")), reference, question, common))
        for role in ROLES
        if role in rows
    ]
    return Example(index, question, reference, answers, why)


def _text(value: object) -> str:
    return "" if value is None else str(value)
