"""Greedy continuations of which only numbers are kept: no text outlives its batch, and a batch is decoded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from loku.evaluation.cache import BatchCache
from loku.evaluation.generation import BATCH_ROWS, Batch, over_batches, row_limits

Judge = Callable[[int, Sequence[int]], dict[str, float]]


def judged(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    judge: Judge,
    *,
    names: Sequence[str],
    keys: Sequence[str],
    max_new_tokens: int | Sequence[int],
    batch_rows: int = BATCH_ROWS,
    progress: Callable[[int], None] | None = None,
    cache: BatchCache | None = None,
) -> list[dict[str, float]]:
    """Continue prompts (token ids) greedily; return what `judge` makes of each, in the prompts' order.

    `judge` gets a prompt's place and the ids of its continuation, without the end of sequence, and returns numbers
    under some of `names`. `keys` says, for each prompt, what decides its judgement besides the continuation (a
    reference answer, say): batches are found again in `cache` by it. Limits as in `generate`; the processes share the
    batches.
    """

    def answer(batch: Batch) -> list[dict[str, float]]:
        content = (batch.prompts, batch.limits, batch.stops, [keys[row] for row in batch.rows])
        found = None if cache is None else cache.numbers("judged", len(batch.rows), names, *content)
        if found is None:
            found = [judge(row, ids) for row, ids in zip(batch.rows, batch.decode(), strict=True)]
            if cache is not None:
                cache.put_numbers("judged", found, names, *content)
        return found

    limits = row_limits(model, prompts, None, max_new_tokens)
    found = over_batches(model, tokenizer, prompts, limits, answer, batch_rows=batch_rows, progress=progress)
    return [found[row] for row in range(len(prompts))]
