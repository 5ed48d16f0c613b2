"""MEMO (Gu et al. 2024, "MEOW", arXiv 2409.11844): how much of the rest comes back from ever longer beginnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from loku.data.prompts import TagTemplate, Template, render_chat
from loku.data.records import Record
from loku.evaluation.cache import BatchCache
from loku.evaluation.generation import BATCH_ROWS
from loku.evaluation.judging import judged
from loku.evaluation.metrics import rouge

STEP = 5  # characters between cuts
NEW_TOKENS = 200
MODES = ("suffix", "prefix")


class Memo(NamedTuple):
    """Means over cuts of ROUGE-1 against what had been cut off; 0 where nothing was said."""

    precision: float
    recall: float


def memo_cuts(question: str, answer: str, *, mode: str = "suffix", step: int = STEP) -> list[tuple[str, str, str]]:
    """Return (question, beginning of the answer, rest) for cuts at 1, 1 + step, ... characters, as the authors' code.

    "suffix" cuts the answer; "prefix" cuts the question, and the rest is what is left of it and the answer. A text of
    one character has no cut.
    """
    if mode == "suffix":
        return [(question, answer[:cut], answer[cut:]) for cut in range(1, len(answer), step)]
    if mode == "prefix":
        return [(question[:cut], "", f"{question[cut:]} {answer}") for cut in range(1, len(question), step)]
    raise ValueError(f"memo_cuts got mode '{mode}': it takes one of {', '.join(MODES)}")


def memo_scores(
    model: nn.Module,
    tokenizer: Any,
    template: Template,
    records: Sequence[Record],
    *,
    mode: str = "suffix",
    step: int = STEP,
    max_new_tokens: int = NEW_TOKENS,
    batch_rows: int = BATCH_ROWS,
    cache: BatchCache | None = None,
) -> list[Memo | None]:
    """Return each question's MEMO scores; None for running text, for conversations, and for answers without a cut.

    The model continues greedily, by at most 200 tokens, the rendered question with the beginning of the answer
    ("suffix"), or the bare beginning of the question ("prefix"). The published score is the precision: in the authors'
    code the cut-off text takes the part of the reference, and precision is read. Stemming is on, as there.
    """
    prompts, rests, owners = [], [], []
    for owner, record in enumerate(records):
        if record.question is None or record.answer is None:
            continue
        for question, beginning, rest in memo_cuts(record.question, record.answer, mode=mode, step=step):
            text, special = (question, True) if mode == "prefix" else _rendered(tokenizer, template, record)
            prompts.append(list(tokenizer(text + beginning, add_special_tokens=special)["input_ids"]))
            rests.append(rest)
            owners.append(owner)

    def judge(place: int, ids: Sequence[int]) -> dict[str, float]:
        said = tokenizer.decode(list(ids), skip_special_tokens=True).strip()
        score = rouge(said, rests[place], "rouge1")
        return {"precision": score.precision, "recall": score.recall}

    found: list[list[tuple[float, float]]] = [[] for _ in records]
    numbers = judged(
        model,
        tokenizer,
        prompts,
        judge,
        names=Memo._fields,
        keys=rests,
        max_new_tokens=max_new_tokens,
        batch_rows=batch_rows,
        cache=cache,
    )
    for owner, number in zip(owners, numbers, strict=True):
        found[owner].append((number["precision"], number["recall"]))
    return [Memo(*(sum(part) / len(part) for part in zip(*parts, strict=True))) if parts else None for parts in found]


def _rendered(tokenizer: Any, template: Template, record: Record) -> tuple[str, bool]:
    """Return everything before a record's answer as text, and whether the tokenizer adds its special tokens to it."""
    question = record.question or ""
    if record.verbatim:
        return question, True
    if isinstance(template, TagTemplate):
        return template.prompt(question), True
    where = f"row {record.index}"
    return render_chat(tokenizer, template.messages(question), generation=True, where=where), False
