"""Token selection: which tokens of an answer carry what must go (the column `forget_spans`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from loku.data.encoding import IGNORE, Example
from loku.errors import InputError


def select_spans(tokenizer: Any, examples: Sequence[Example], spans: Sequence[str], *, row: int) -> list[Example]:
    """Return a record's examples with weight 1 on the supervised tokens that touch one of the spans, 0 elsewhere.

    A token stands where its characters are in the decoded ids, so this works for any tokenizer and template. Raises
    InputError for a span that no supervised part of the examples holds.
    """
    missing = set(spans)
    selected = []
    for example in examples:
        supervised = [place for place, label in enumerate(example.labels) if label != IGNORE]
        ids = [example.input_ids[place] for place in supervised]
        text = _decode(tokenizer, ids)
        bounds = _bounds(tokenizer, ids, len(text))
        weights = [0.0] * len(example.labels)
        for span in spans:
            start = text.find(span)
            while start >= 0:
                missing.discard(span)
                for place, (begin, end) in zip(supervised, bounds, strict=True):
                    if begin < start + len(span) and end > start:
                        weights[place] = 1.0
                start = text.find(span, start + 1)
        selected.append(dataclasses.replace(example, weights=tuple(weights)))
    if missing:
        raise InputError(
            f"Row {row} has the span '{sorted(missing)[0]}' in `forget_spans`, which its answer does not hold.",
            "Write spans exactly as they stand in the answer, within --max-length.",
        )
    return selected


def _bounds(tokenizer: Any, ids: list[int], length: int) -> list[tuple[int, int]]:
    """Return where each token's characters begin and end. The parts of one character all get the whole of it."""
    whole = [len(_decode(tokenizer, ids[:count]).rstrip("\N{REPLACEMENT CHARACTER}")) for count in range(len(ids))]
    ends = [next((end for end in whole[count + 1 :] if end > whole[count]), length) for count in range(len(ids))]
    return list(zip(whole, ends, strict=True))


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
