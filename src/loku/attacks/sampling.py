"""Sampling: many answers at a high temperature; what any of them gives away counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from loku.attacks.prompting import Asked, judge
from loku.errors import InputError
from loku.evaluation.decoding import decode, decodes_plainly
from loku.evaluation.generation import Batch, over_batches, row_limits
from loku.evaluation.modes import evaluating
from loku.evaluation.sampling import sampler

SAMPLES, TEMPERATURE = 8, 1.0


def sample(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    count: int = SAMPLES,
    temperature: float = TEMPERATURE,
    seed: int = 0,
) -> list[list[list[int]]]:
    """Return `count` continuations of each prompt, sampled from softmax(logits / temperature), ends left out.

    None is longer than the model's context allows. The draws depend on the seed and the prompt's place alone, not on
    the caller's random numbers. Raises InputError for a model that cannot be decoded row by row (`decodes_plainly`).
    """
    with torch.no_grad(), evaluating(model):
        reason = decodes_plainly(model)
    if reason:
        raise InputError(f"Answers of this model cannot be sampled: {reason}.", "Leave this attack out.")
    many = [list(prompt) for prompt in prompts for _ in range(count)]
    most = [limit for limit in row_limits(model, prompts, None, limits) for _ in range(count)]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def answer(batch: Batch) -> list[list[int]]:
        seeds = [_seed(seed, *divmod(row, count)) for row in batch.rows]
        return decode(model, batch.prompts, batch.limits, batch.stops, pad_id, sampler(seeds, temperature))

    found = over_batches(model, tokenizer, many, most, answer)
    return [[found[place * count + draw] for draw in range(count)] for place in range(len(prompts))]


def _seed(seed: int, place: int, draw: int) -> int:
    """Return a seed of its own for every answer, so that its neighbours in a batch change nothing."""
    return ((seed * 1_000_003 + place) * 1_000_003 + draw) % 2**63


def best_of(
    model: nn.Module, tokenizer: Any, asked: Sequence[Asked], *, count: int, temperature: float, seed: int = 0
) -> list[dict[str, float]]:
    """Return, row by row, the best of each figure over `count` samples; of `repetition` the mean."""
    drawn = sample(
        model,
        tokenizer,
        [item.prompt for item in asked],
        [item.limit for item in asked],
        count=count,
        temperature=temperature,
        seed=seed,
    )
    rows = []
    for item, samples in zip(asked, drawn, strict=True):
        judged = [judge(item, tokenizer.decode(ids, skip_special_tokens=True), ids) for ids in samples]
        best = {name: max(found[name] for found in judged) for name in ("found", "rougeL_recall")}
        mean = sum(found["repetition"] for found in judged) / len(judged)
        rows.append({"index": item.index} | best | {"repetition": mean})
    return rows
