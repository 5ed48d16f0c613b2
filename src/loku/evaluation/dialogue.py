"""Dialogue F1: the words that a model's reply shares with the reference reply, as ParlAI counts them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from loku.data.sources import Rows, load_rows
from loku.errors import InputError
from loku.evaluation.cache import BatchCache
from loku.evaluation.generation import BATCH_ROWS
from loku.evaluation.measuring import Progress
from loku.evaluation.probing import Probe, ask, example_text, plain_set
from loku.evaluation.results import SetResults

NEW_TOKENS = 128
SPEAKERS = ("User 1", "User 2")
WANTED = "Give rows with `context` (one turn, or a list of turns) and `reply`, or with all turns as a list in `text`."
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalised_words(text: str) -> list[str]:
    """Return a text's words in lower case, without ASCII punctuation and without the articles a, an, the."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def unigram_f1(reply: str, reference: str) -> float:
    """Return F1 = 2 P R / (P + R) of the words of a reply, P = c / |reply|, R = c / |reference|.

    c counts common words, each as often as both have it. Words are those of `normalised_words`, as in ParlAI's F1
    (Miller et al. 2017, arXiv 1705.06476). Without a common word, and so for an empty reply or reference, 0.
    """
    ours, theirs = normalised_words(reply), normalised_words(reference)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2.0 * common / (len(ours) + len(theirs)) if common else 0.0


def load_dialogues(source: str | Path, *, option: str = "--utility") -> Rows:
    """Load rows as {"context": [turns], "reply": text}. Raises InputError for rows that are no dialogue."""
    found = load_rows(source, (), option=option)
    rows = []
    for index, row in enumerate(found.rows):
        turns = _turns(row)
        if turns is None:
            raise InputError(f"{option} '{source}': row {index} is no dialogue.", WANTED)
        rows.append({"context": turns[:-1], "reply": turns[-1]})
    return Rows(found.name, tuple(rows), found.sha256)


def _turns(row: Mapping[str, Any]) -> list[str] | None:
    """Return a dialogue's turns, the reply last; None for something else."""
    context = row.get("context")
    turns = row.get("text")
    if context is not None:
        before = [context] if isinstance(context, str) else context
        turns = [*before, row.get("reply")] if isinstance(before, list) and before else None
    usable = isinstance(turns, list) and len(turns) > 1 and all(isinstance(turn, str) and turn for turn in turns)
    return turns if usable else None


def dialogue_prompt(turns: Sequence[str]) -> str:
    """Return the turns as lines of two users in turn, and the name of the one who speaks next.

    The layout is that of Jang et al. 2023 (arXiv 2210.01504); turns stand as they are, where their code first mends
    case and punctuation.
    """
    lines = [f"{SPEAKERS[place % 2]}: {turn}\n" for place, turn in enumerate(turns)]
    return "".join(lines) + f"{SPEAKERS[len(turns) % 2]}:"


def first_line(text: str) -> str:
    """Return a reply up to the end of its first line that is not empty: the next turn is none of it."""
    return text.strip().split("\n", maxsplit=1)[0]


def measure_dialogues(
    model: nn.Module,
    tokenizer: Any,
    sets: Mapping[str, Rows],
    *,
    max_rows: int | None = None,
    max_new_tokens: int = NEW_TOKENS,
    batch_rows: int = BATCH_ROWS,
    keep_text: bool = False,
    seed: int = 42,
    progress: Progress | None = None,
    cache: BatchCache | None = None,
) -> tuple[dict[str, SetResults], list[dict[str, Any]]]:
    """Return each set's `f1`, of the first line of a greedy reply against the reference reply, and texts where kept.

    Raises InputError when a dialogue is longer than what the model reads.
    """
    chosen = {name: found.rows[:max_rows] for name, found in sets.items()}
    probes = {
        name: [
            Probe(dialogue_prompt(row["context"]), partial(_value, row["reply"]), row["reply"], max_new_tokens)
            for row in rows
        ]
        for name, rows in chosen.items()
    }
    answers = ask(
        model,
        tokenizer,
        probes,
        ("f1",),
        keep_text=keep_text,
        batch_rows=batch_rows,
        progress=progress,
        cache=cache,
    )
    found, texts = {}, []
    for name, (numbers, said) in answers.items():
        found[name] = plain_set([{"index": index} | row for index, row in enumerate(numbers)], ("f1",), seed)
        pairs = enumerate(zip(chosen[name], said, strict=True)) if keep_text else ()
        for index, (row, text) in pairs:
            asked = dialogue_prompt(row["context"])
            texts.append(example_text(name, index, asked, row["reply"], first_line(text)))
    return found, texts


def _value(reference: str, text: str) -> dict[str, float]:
    return {"f1": unigram_f1(first_line(text), reference)}
