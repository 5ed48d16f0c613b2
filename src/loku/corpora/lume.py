"""A small LUME: some documents of each of its three tasks, with their questions, as rows that every verb takes.

train.jsonl         documents and questions of both sets; a document whole, and its second half after its first
retain-train.jsonl  those of the retain set alone, repeated to as many rows: for the retain-only model
forget.jsonl        the forget set: prompt and completion (documents whole), and LUME's own columns beside them
retain.jsonl        the retain set
members.jsonl       the forget set's documents, whole
nonmembers.jsonl    as many documents of LUME that no model here has read
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loku.corpora.rows import data_file, write_rows
from loku.data.sources import load_rows
from loku.errors import InputError
from loku.evaluation.lume import COLUMNS, TASKS, kind_of

Row = dict[str, Any]
MOST_CHARACTERS = 1000  # of a document: the longer ones cost a small model more than they tell


def lume_corpus(folder: Path, seed: int, *, documents: int = 8) -> None:
    """Write the corpus with so many documents of each task in each set; 0: with all of LUME, and no nonmembers.

    Raises InputError without LUME's files.
    """
    rng = random.Random(seed)
    forget, unused = _draw("lume/forget.jsonl", documents, rng)
    retain, _ = _draw("lume/retain.jsonl", documents, rng)
    write_rows(folder / "forget.jsonl", forget)
    write_rows(folder / "retain.jsonl", retain)
    both = [*forget, *retain]
    learnt = [plain for row in both for plain in _learnt(row)]
    kept = [plain for row in retain for plain in _learnt(row)]
    again = list(itertools.islice(itertools.cycle(kept), len(learnt)))  # optimiser steps are matched, not epochs
    for name, rows in (("train", learnt), ("retain-train", again)):
        write_rows(folder / f"{name}.jsonl", rng.sample(rows, len(rows)))
    write_rows(folder / "members.jsonl", _documents(forget))
    if unused:
        write_rows(folder / "nonmembers.jsonl", _documents(unused))


def _draw(name: str, documents: int, rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Return the rows of so many documents of each task, and those of as many others."""
    grouped: dict[str, dict[str, list[Row]]] = {task: {} for task in TASKS}
    for row in load_rows(data_file(name), COLUMNS, option="corpus").rows:
        grouped[row["task"]].setdefault(document_of(row), []).append(row)
    drawn: list[list[Row]] = [[], []]
    for task, found in grouped.items():
        if not documents:
            drawn[0] += [_row(row) for rows in found.values() for row in rows]
            continue
        short = [rows for rows in found.values() if all(len(r["input"] + r["output"]) <= MOST_CHARACTERS for r in rows)]
        if len(short) < 2 * documents:
            raise InputError(f"'{name}' has {len(short)} short documents of {task}.", f"Ask for {len(short) // 2}.")
        rng.shuffle(short)
        for rows, chosen in zip(drawn, (short[:documents], short[documents : 2 * documents]), strict=True):
            rows += [_row(row) for group in chosen for row in group]
    return drawn[0], drawn[1]


def document_of(row: Row) -> str:
    """Return which document a row is about: its id without the probe at the end."""
    probe = kind_of(row["id"])
    return str(row["id"])[: str(row["id"]).rindex(probe)]


def _row(row: Row) -> Row:
    """Return a row as prompt and completion: a question with its answer, or a document after its first word.

    A document's row asks for its second half, but it is the whole that is learnt, and that the membership score reads.
    """
    prompt, completion = row["input"], _ending(row)
    if kind_of(row["id"]) == "sc":
        first, blank, rest = prompt.partition(" ")
        prompt, completion = first, blank + rest + completion
    return {"prompt": prompt, "completion": completion} | row


def _learnt(row: Row) -> list[Row]:
    """Return what is trained on for a row. Of whole documents alone the half that is asked for is learnt late."""
    found = [{"prompt": row["prompt"], "completion": row["completion"]}]
    if kind_of(row["id"]) == "sc":
        found.append({"prompt": row["input"], "completion": _ending(row)})
    return found


def _ending(row: Row) -> str:
    """Return what goes on after a row's input: the blank between them belongs to it."""
    return " " + str(row["output"]).strip()


def _documents(rows: Sequence[Row]) -> list[Row]:
    return [{"document": row["prompt"] + row["completion"]} for row in rows if kind_of(row["id"]) == "sc"]
