"""Rows of any supported format as one type: `Record`."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from loku.errors import InputError


@dataclass(frozen=True)
class Record:
    """One thing the model can know: a question with its answer, a completion, a chat, or a text.

    Exactly one of three forms is filled:

    - `question` and `answer` (TOFU), rendered with the model's prompt template; with `verbatim` the two strings are
      used as they are (TRL's `prompt`/`completion`);
    - `messages`, a conversation rendered with the tokenizer's own chat template (TRL's conversational
      `prompt`/`completion` becomes one);
    - `text`, every token of which is supervised.

    `index` is the row's position in its source, and the only identity that results refer to.
    """

    index: int
    question: str | None = None
    answer: str | None = None
    verbatim: bool = False
    messages: tuple[tuple[str, str], ...] = ()  # (role, content) pairs
    text: str | None = None
    paraphrased_question: str | None = None
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()
    alternates: tuple[str, ...] = ()
    forget_spans: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether the row is running text, without a question."""
        return self.text is not None


FORMATS = "question/answer, prompt/completion, text, or messages"
REQUIRED = ("question", "answer", "prompt", "completion", "text", "messages")
OPTIONAL = ("paraphrased_question", "paraphrased_answer", "perturbed_answer", "alternate", "forget_spans")
# Columns that may hold several texts, and the fields they fill.
LISTS = {"perturbed_answer": "perturbed_answers", "alternate": "alternates", "forget_spans": "forget_spans"}


def parse_rows(rows: Iterable[Mapping[str, Any]], source: str) -> list[Record]:
    """Return rows of any supported format as records; `source` names them in errors.

    Columns beyond those of the format are ignored, unless they look like an optional one that is misspelt. Raises
    InputError for an empty source, missing or misspelt columns, empty or non-text values, and rows of different
    formats.
    """
    records: list[Record] = []
    first_format = None
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(f"{source}: row {index} is not an object with columns.", f"Give rows of {FORMATS}.")
        kind = _format(row, index, source)
        first_format = first_format or kind
        if kind != first_format:
            raise InputError(
                f"{source}: row {index} is {kind}, but the rows before it are {first_format}.",
                "Give one format per source.",
            )
        _check_optional(row, index, source)
        records.append(_PARSERS[kind](row, index, source))
    if not records:
        raise InputError(f"{source} holds no rows.", f"Give at least one row of {FORMATS}.")
    return records


def _format(row: Mapping[str, Any], index: int, source: str) -> str:
    columns = {name for name, value in row.items() if value is not None}
    for kind in _PARSERS:
        if set(kind.split("/")) <= columns:
            return kind
    for column in sorted(columns, key=str):
        near = difflib.get_close_matches(str(column).lower(), REQUIRED, n=1, cutoff=0.7)
        if near and column not in REQUIRED:
            raise InputError(
                f"{source}: row {index} has the column '{column}', which is not known.",
                f"Did you mean '{near[0]}'? Rows are {FORMATS}.",
            )
    listed = ", ".join(sorted(map(str, columns))) or "none"
    raise InputError(
        f"{source}: row {index} has no supported format (its columns: {listed}).",
        f"Name the columns {FORMATS}.",
    )


def _check_optional(row: Mapping[str, Any], index: int, source: str) -> None:
    """Raise InputError for a column that is nearly an optional one: ignored silently, its metrics would be missed."""
    for column, value in row.items():
        near = _near_optional(str(column)) if value is not None else None
        if near:
            raise InputError(
                f"{source}: row {index} has the column '{column}', which is not known.",
                f"Did you mean '{near}'? Rename it, or give the column that you do not need another name.",
            )


@cache
def _near_optional(column: str) -> str | None:
    """Return the optional column that a name which is none must be meant for, or None for an unrelated one."""
    if column in OPTIONAL or column in REQUIRED:
        return None
    near = difflib.get_close_matches(column.lower(), OPTIONAL, n=1, cutoff=0.9)
    return near[0] if near else None


def _text(row: Mapping[str, Any], column: str, index: int, source: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise InputError(
            f"{source}: row {index} has {type(value).__name__} in '{column}', not text.", "Give text in every row."
        )
    if not value.strip():
        raise InputError(f"{source}: row {index} has an empty '{column}'.", "Fill it in, or leave the row out.")
    return value


def _texts(value: Any) -> Any:
    """Return a list of texts: as it is, of one text, or of what a CSV has as text, such as "['a', 'b']"."""
    if not isinstance(value, str):
        return value
    if value.strip().startswith("[") and value.strip().endswith("]"):
        try:
            found = ast.literal_eval(value.strip())  # literals alone: nothing in it is run
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # what a parser may say of odd text
            return [value]
        if found and isinstance(found, list) and all(isinstance(item, str) for item in found):
            return found
    return [value]


def _optional(row: Mapping[str, Any], index: int, source: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for column in OPTIONAL:
        value = row.get(column)
        if value is None or (isinstance(value, str) and not value.strip()):  # a blank cell: CSV knows no other absence
            continue
        if column in LISTS:
            answers = _texts(value)
            if not isinstance(answers, Sequence) or not all(
                isinstance(answer, str) and answer.strip() for answer in answers
            ):
                raise InputError(
                    f"{source}: row {index} has something else than texts in '{column}'.",
                    "Give a list of texts.",
                )
            found[LISTS[column]] = tuple(answers)
        else:
            found[column] = _text(row, column, index, source)
    return found


def _parse_qa(row: Mapping[str, Any], index: int, source: str) -> Record:
    question, answer = _text(row, "question", index, source), _text(row, "answer", index, source)
    return Record(index, question, answer, **_optional(row, index, source))


def _parse_completion(row: Mapping[str, Any], index: int, source: str) -> Record:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt, completion = _text(row, "prompt", index, source), _text(row, "completion", index, source)
        return Record(index, prompt, completion, verbatim=True, **_optional(row, index, source))
    turns = _turns(prompt, index, source) + _turns(completion, index, source)
    return _conversation(turns, row, index, source)


def _parse_messages(row: Mapping[str, Any], index: int, source: str) -> Record:
    return _conversation(_turns(row["messages"], index, source), row, index, source)


def _conversation(turns: tuple[tuple[str, str], ...], row: Mapping[str, Any], index: int, source: str) -> Record:
    if not any(role == "assistant" for role, _ in turns):
        raise InputError(
            f"{source}: row {index} has no assistant turn.", "Give one: it is what is learnt or forgotten."
        )
    return Record(index, messages=turns, **_optional(row, index, source))


def _turns(value: Any, index: int, source: str) -> tuple[tuple[str, str], ...]:
    remedy = "Give a list of objects with 'role' and 'content'."
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise InputError(f"{source}: row {index} has no list of messages.", remedy)
    for turn in value:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise InputError(f"{source}: row {index} has a message without role or content.", remedy)
    return tuple((turn["role"], turn["content"]) for turn in value)


def _parse_text(row: Mapping[str, Any], index: int, source: str) -> Record:
    spans = _optional({"forget_spans": row.get("forget_spans")}, index, source)  # the only one that a text can have
    return Record(index, text=_text(row, "text", index, source), **spans)


_PARSERS: dict[str, Callable[[Mapping[str, Any], int, str], Record]] = {
    "question/answer": _parse_qa,
    "prompt/completion": _parse_completion,
    "messages": _parse_messages,
    "text": _parse_text,
}


def content(record: Record) -> str:
    """Return what a record says, lower-cased and with single blanks: two rows that say the same are the same."""
    parts = [record.question, record.answer, record.text, *(text for _, text in record.messages)]
    return " \n ".join(" ".join(part.lower().split()) for part in parts if part)


def check_disjoint(forget: Iterable[Record], retain: Iterable[Record]) -> None:
    """Raise InputError when a forget row also stands in the retain set. The error names rows, never their text."""
    kept = {content(record): record.index for record in retain}
    shared = [(record.index, kept[content(record)]) for record in forget if content(record) in kept]
    if shared:
        shown = ", ".join(f"{a} (retain row {b})" for a, b in shared[:5]) + (", ..." if len(shared) > 5 else "")
        raise InputError(
            f"{len(shared)} forget rows also stand in the retain set: forget row {shown}.",
            "Take them out of the retain rows: what must go cannot also stay.",
        )
