"""The next word of a passage, as LAMBADA asks for it (Paperno et al. 2016, arXiv 1606.06031), on rows of one's own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import nn

from loku.data.encoding import Encoder, Example
from loku.data.prompts import TagTemplate
from loku.data.records import Record
from loku.data.sources import RecordSet
from loku.errors import InputError
from loku.evaluation.probing import plain_set
from loku.evaluation.results import SetResults
from loku.evaluation.scoring import BATCH_TOKENS, SequenceScore, score
from loku.models import check_fits


def measure_cloze(
    model: nn.Module,
    tokenizer: Any,
    rows: RecordSet,
    *,
    max_length: int,
    seed: int = 42,
    batch_tokens: int = BATCH_TOKENS,
) -> SetResults:
    """Return `accuracy`: the share of rows that the model gets right.

    Rows with `perturbed_answer`, wrong words, are right when none of them is as probable as the completion, the sum
    over its tokens (lm-eval's `acc`); a model that reads nothing gets what the words' frequency and length give. Rows
    without are right when all of the completion's tokens are the model's first choice (teacher-forced, which is the
    same as greedy decoding here: up to the first miss both read the same tokens). The end of sequence does not count.
    `probability` is exp(mean log p) of the completion's tokens.

    Raises InputError for rows that are not prompt/completion, and for prompts that leave no room for the completion.
    """
    encoder = Encoder(tokenizer, TagTemplate(), max_length=max_length)
    examples, owners = [], []
    for place, row in enumerate(rows):
        for words in (row, *(replace(row, answer=wrong) for wrong in row.perturbed_answers)):
            examples.append(_encoded(encoder, words, rows.name, max_length))
            owners.append(place)
    check_fits(model, tokenizer, max(len(example.input_ids) for example in examples))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    scores = score(model, examples, pad_id=pad_id, eos_ids=(tokenizer.eos_token_id,), batch_tokens=batch_tokens)
    found: list[list[SequenceScore]] = [[] for _ in rows]
    for place, one in zip(owners, scores, strict=True):
        found[place].append(one)
    numbers = []
    for right, *wrong in found:
        said, *others = [one.logprobs[one.answer] for one in (right, *wrong)]
        hit = all(said.sum() > other.sum() for other in others) if wrong else bool(right.answer_hits.all())
        numbers.append({"index": right.index, "accuracy": float(hit), "probability": math.exp(float(said.mean()))})
    return plain_set(numbers, ("accuracy", "probability"), seed)


def _encoded(encoder: Encoder, row: Record, name: str, max_length: int) -> Example:
    if not row.verbatim:
        raise InputError(
            f"Row {row.index} of '{name}' is no cloze.", "Give rows of prompt/completion: passage, next word."
        )
    example = encoder.encode(row, "The cloze rows:")[0]
    if len(example.input_ids) >= max_length:
        raise InputError(f"Row {row.index} of '{name}' is longer than {max_length} tokens.", "Raise max_length.")
    return example
