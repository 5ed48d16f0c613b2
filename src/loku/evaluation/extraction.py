"""Extraction likelihood (EL) and memorisation accuracy (MA) of running text: Jang et al. 2023, arXiv 2210.01504."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from loku.data.encoding import Example
from loku.evaluation.cache import BatchCache
from loku.evaluation.generation import BATCH_ROWS
from loku.evaluation.judging import judged
from loku.evaluation.metrics import exact_memorisation
from loku.evaluation.modes import end_ids
from loku.evaluation.scoring import BATCH_TOKENS, score
from loku.files import json_line

NGRAMS = (3, 5, 10)

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Extraction:
    """One text's MA, and its EL for each n that the text is long enough for; both in 0 to 1, low when forgotten."""

    ma: float
    el: dict[int, float]


def next_misses(hits: ArrayLike) -> NDArray[np.int64]:
    """Return, for every position, the first one from there on that is not hit, or the length when there is none."""
    values = np.asarray(hits, dtype=bool)
    places = np.where(values, values.size, np.arange(values.size))
    return np.minimum.accumulate(places[::-1])[::-1].astype(np.int64)


def needed_misses(hits: ArrayLike, n: int) -> list[int]:
    """Return the prefix lengths at which EL_n needs the model's own continuation: the misses that a prefix runs into.

    `hits` tells of tokens 1 to T - 1; prefixes are 1 to T - n tokens long.
    """
    values = np.asarray(hits, dtype=bool)
    reached = next_misses(values)[: max(0, values.size + 1 - n)]
    return sorted({int(place) + 1 for place in reached if place < values.size})


def extraction_likelihood(
    tokens: Sequence[int],
    hits: ArrayLike,
    continuations: Mapping[int, Sequence[int]],
    n: int,
    stops: Collection[int] = (),
) -> float:
    """Return EL_n = Σ_{i=1}^{T-n} overlap_n(greedy continuation of the first i tokens, true suffix) / (T - n).

    overlap_n is the number of generated n-grams, each time they occur, that stand in the true suffix, over the number
    of the suffix's n-grams. It is the authors' code's: suffixes shorter than n have none and do not count.

    `hits` tells of tokens 1 to T - 1 whether greedy decoding after the true prefix gives them, and `continuations` maps
    the length of a prefix before a miss to its greedy continuation. That is enough: a prefix's continuation is the true
    text up to the next miss, and that miss's own continuation from there. A continuation ends before the end of
    sequence (`stops`), also where that stands in the text. NaN for texts of n tokens or fewer.
    """
    end = len(tokens)
    if end <= n:
        return float("nan")
    total = prefix_overlaps(tokens, hits, end, (), n, stops)
    for miss in needed_misses(hits, n):
        total += prefix_overlaps(tokens, hits, miss, continuations[miss], n, stops)
    return total / (end - n)


def prefix_overlaps(
    tokens: Sequence[int],
    hits: ArrayLike,
    miss: int,
    continuation: Sequence[int],
    n: int,
    stops: Collection[int] = (),
) -> float:
    """Return Σ overlap_n over the prefixes of 1 to T - n tokens whose greedy continuation runs into one miss.

    `miss` is the length of the prefix before that miss, or T for the prefixes that run into none. EL_n is the sum of
    these over all misses, / (T - n).
    """
    end = len(tokens)
    misses = next_misses(hits) + 1
    last = {tuple(tokens[start : start + n]): start for start in range(end - n + 1)}
    total = 0.0
    for length in (np.flatnonzero(misses[: max(0, end - n)] == miss) + 1).tolist():
        said = list(tokens[length:miss])
        stop = next((place for place, token in enumerate(said) if token in stops), None)
        said = said[:stop] if stop is not None else [*said, *continuation]
        grams = (tuple(said[start : start + n]) for start in range(len(said) - n + 1))
        total += float(sum(last.get(gram, -1) >= length for gram in grams)) / (end - length - n + 1)
    return total


def measure_extraction(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    ngrams: Sequence[int] = NGRAMS,
    hits: Sequence[NDArray[np.bool_]] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    batch_rows: int = BATCH_ROWS,
    progress: Progress | None = None,
    cache: BatchCache | None = None,
) -> list[Extraction]:
    """Return EL_n and MA of texts, one window each, decoding once for each teacher-forced miss.

    MA is the share of tokens 1 to T - 1 that greedy decoding predicts from the true prefix. `hits` says which, where
    that has been scored before. `progress` is told how many continuations each batch finished. `cache` keeps what each
    continuation adds to EL_n, as a number.
    """
    hits = memorised(model, tokenizer, examples, batch_tokens=batch_tokens) if hits is None else hits
    shortest = min(ngrams, default=1)
    places = [(row, length) for row, found in enumerate(hits) for length in needed_misses(found, shortest)]
    prompts = [examples[row].input_ids[:length] for row, length in places]
    limits = [len(examples[row].input_ids) - length for row, length in places]
    stops = end_ids(model, tokenizer)
    names = [f"el_{n}" for n in ngrams]

    def judge(place: int, ids: Sequence[int]) -> dict[str, float]:
        (row, miss), tokens = places[place], examples[places[place][0]].input_ids
        return {f"el_{n}": prefix_overlaps(tokens, hits[row], miss, ids, n, stops) for n in ngrams}

    keys = [json_line([examples[row].input_ids, np.flatnonzero(~hits[row]).tolist()]) for row, _ in places]
    parts = judged(
        model,
        tokenizer,
        prompts,
        judge,
        names=names,
        keys=keys,
        max_new_tokens=limits,
        batch_rows=batch_rows,
        progress=progress,
        cache=cache,
    )
    sums = [
        {n: prefix_overlaps(e.input_ids, h, len(e.input_ids), (), n, stops) for n in ngrams}
        for e, h in zip(examples, hits, strict=True)
    ]
    for (row, _), part in zip(places, parts, strict=True):
        for n in ngrams:
            sums[row][n] += part[f"el_{n}"]
    return [
        Extraction(
            exact_memorisation(found),
            {n: sums[row][n] / (len(example.input_ids) - n) for n in ngrams if len(example.input_ids) > n},
        )
        for row, (example, found) in enumerate(zip(examples, hits, strict=True))
    ]


def memorised(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], *, batch_tokens: int = BATCH_TOKENS
) -> list[NDArray[np.bool_]]:
    """Return, for every text, which of tokens 1 to T - 1 greedy decoding predicts from the true prefix."""
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return [found.hits for found in score(model, examples, pad_id=pad_id, batch_tokens=batch_tokens)]


def forgotten(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    level: Extraction,
    *,
    batch_rows: int = BATCH_ROWS,
) -> bool:
    """Return whether texts are forgotten by Jang et al.'s rule: mean MA and mean EL_n below their level on unseen text.

    MA is tested first: it needs one pass, and EL, which needs thousands of generations, only when MA is below its
    level. `level.el` says which n count. Texts shorter than n do not. A figure of 0 is below every level.
    """
    hits = memorised(model, tokenizer, examples)
    if not below(float(np.mean([exact_memorisation(found) for found in hits])), level.ma):
        return False
    found = measure_extraction(model, tokenizer, examples, ngrams=tuple(level.el), hits=hits, batch_rows=batch_rows)
    means = {n: float(np.mean([row.el[n] for row in found if n in row.el])) for n in level.el}
    return all(below(means[n], wanted) for n, wanted in level.el.items())


def below(value: float, level: float) -> bool:
    """Return whether a figure lies below its level on unseen text; 0 lies below every level, 0 included."""
    return value < level or value == 0
