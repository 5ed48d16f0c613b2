"""Token selection: which tokens of an answer carry what must go (the column `forget_spans`)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from loku.data.encoding import IGNORE, Example
from loku.errors import InputError


def select_spans(tokenizer: Any, examples: Sequence[Example], spans: Sequence[str], *, row: int) -> list[Example]:
    """Return a record's examples with weight 1 on the supervised tokens that touch one of the spans, 0 elsewhere.

    A token stands where its characters are in the decoded ids, so this works for any tokenizer and template. Raises
    InputError for a span that no supervised part of the examples holds.
    """
    weights = [[0.0] * len(example.labels) for example in examples]
    places = [
        [(number, place) for place, label in enumerate(example.labels) if label != IGNORE]
        for number, example in enumerate(examples)
    ]
    reach = max(len(tokenizer(span)["input_ids"]) for span in spans) + 2
    edges = [one[-reach:] + other[:reach] for one, other in itertools.pairwise(places)]  # a text's windows go on
    found: set[str] = set()
    for part in (*places, *edges):
        ids = [examples[number].input_ids[place] for number, place in part]
        text = _decode(tokenizer, ids)
        bounds = _bounds(tokenizer, ids, len(text))
        for span in spans:
            start = text.find(span)
            while start >= 0:
                found.add(span)
                for (number, place), (begin, end) in zip(part, bounds, strict=True):
                    if begin < start + len(span) and end > start:
                        weights[number][place] = 1.0
                start = text.find(span, start + 1)
    missing = sorted(set(spans) - found)
    if missing:
        raise InputError(
            f"Row {row} has the span '{missing[0]}' in `forget_spans`, which its answer does not hold.",
            "Write spans exactly as they stand in the answer, within --max-length.",
        )
    return [dataclasses.replace(e, weights=tuple(w)) for e, w in zip(examples, weights, strict=True)]


def _bounds(tokenizer: Any, ids: list[int], length: int) -> list[tuple[int, int]]:
    """Return where each token's characters begin and end. The parts of one character all get the whole of it."""
    whole = [len(_decode(tokenizer, ids[:count]).rstrip("\N{REPLACEMENT CHARACTER}")) for count in range(len(ids))]
    ends = [next((end for end in whole[count + 1 :] if end > whole[count]), length) for count in range(len(ids))]
    return list(zip(whole, ends, strict=True))


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
