"""Greedy answers: what a model says when it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from loku.data.encoding import IGNORE, Example
from loku.evaluation.cache import BatchCache
from loku.evaluation.decoding import decode, decodes_plainly
from loku.evaluation.modes import end_ids, evaluating
from loku.evaluation.sharing import gathered, own_share
from loku.models import context_length

Found = TypeVar("Found")

BATCH_ROWS = 64
BATCH_TOKENS = 32_768  # padded prompt and answer tokens held in the key-value cache at once


@dataclass(frozen=True)
class Generation:
    """A greedy continuation: its ids without the end of sequence, and its text without special tokens."""

    ids: tuple[int, ...]
    text: str


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_length: int | None = None,
    max_new_tokens: int | Sequence[int] | None = None,
    batch_rows: int = BATCH_ROWS,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
    known: Sequence[Sequence[int]] | None = None,
    cache: BatchCache | None = None,
) -> list[Generation]:
    """Continue prompts (token ids) greedily and return the continuations in the prompts' order.

    `max_length` counts prompt and continuation together (TOFU: 200), `max_new_tokens` the continuation, for all rows
    or for each; the smaller wins, every row may have at least one new token, and the limits are each row's own, so
    that neighbours in a batch change nothing. Sampling settings and penalties of the model's own generation
    configuration are set aside meanwhile.

    `known` holds, for each prompt, ids that its greedy continuation is known to begin with (`known_start`): they are
    read, not decoded, and a row whose known ids end it is not decoded at all. What is said is the same, unless two
    tokens are equally likely to within rounding. Where torch.distributed is initialised, the processes share the
    batches and all of them return all continuations. Batches that `cache` holds are not decoded again.
    """
    limits = row_limits(model, prompts, max_length, max_new_tokens)
    stops = end_ids(model, tokenizer)
    starts = [list(ids)[:limit] for ids, limit in zip(known or [()] * len(prompts), limits, strict=True)]
    answers = {row: _until_end(ids, stops) for row, ids in enumerate(starts)}
    open_rows = [row for row, ids in enumerate(starts) if len(answers[row]) == len(ids) < limits[row]]
    if progress is not None and len(open_rows) < len(prompts):
        progress(len(prompts) - len(open_rows))
    begun = [[*prompts[row], *starts[row]] for row in open_rows]
    left = [limits[row] - len(starts[row]) for row in open_rows]

    def continued(batch: Batch) -> list[list[int]]:
        ids = None if cache is None else cache.continuations(batch.prompts, batch.limits, stops)
        if ids is None:
            ids = batch.decode()
            if cache is not None:
                cache.put_continuations(batch.prompts, batch.limits, stops, ids)
        return ids

    found = over_batches(
        model,
        tokenizer,
        begun,
        left,
        continued,
        batch_rows=batch_rows,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    for place, more in found.items():
        answers[open_rows[place]] += more
    return [
        Generation(tuple(answers[row]), tokenizer.decode(answers[row], skip_special_tokens=True).strip())
        for row in range(len(prompts))
    ]


@dataclass(frozen=True)
class Batch:
    """Prompts that are continued together: their places in the list, and what continues them when it is called."""

    rows: list[int]
    prompts: list[list[int]]
    limits: list[int]
    stops: list[int]
    decode: Callable[[], list[list[int]]]


def over_batches(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    answer: Callable[[Batch], Sequence[Found]],
    *,
    batch_rows: int = BATCH_ROWS,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> dict[int, Found]:
    """Return what `answer` makes of every prompt, batch by batch; the processes share the batches, and all get all."""
    stops = end_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batches = list(_batches(list(map(len, prompts)), limits, batch_rows, batch_tokens, context_length(model)))
    found: dict[int, Found] = {}
    with torch.no_grad(), evaluating(model):
        continue_batch = decode if not batches or decodes_plainly(model) is None else _by_generate
        for batch in own_share(batches):
            rows, allowed = [list(prompts[place]) for place in batch], [limits[place] for place in batch]
            work = partial(continue_batch, model, rows, allowed, stops, pad_id)
            found |= zip(batch, answer(Batch(batch, rows, allowed, stops, work)), strict=True)
            if progress is not None:
                progress(len(batch))
    own = len(found)
    found = gathered(found)
    if progress is not None and len(found) > own:
        progress(len(found) - own)
    return found


def known_start(example: Example, hits: Sequence[bool] | NDArray[np.bool_], start: int) -> list[int]:
    """Return what is known of the greedy continuation of an example's first `start` ids, from its scores.

    `hits` says which supervised tokens are the model's first choice. Up to the first that is not, or that was not
    scored, the greedy continuation is the example's own text.
    """
    choices = iter(hits)
    is_hit = [label != IGNORE and bool(next(choices)) for label in [IGNORE, *example.labels[1:]]]
    stop = next((place for place in range(start, len(is_hit)) if not is_hit[place]), len(is_hit))
    return example.input_ids[start:stop]


def _by_generate(
    model: nn.Module, prompts: Sequence[Sequence[int]], limits: Sequence[int], stops: Sequence[int], pad_id: int
) -> list[list[int]]:
    """Continue a batch as `decode` does, by transformers' own loop: for models whose cache works otherwise."""
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    rows = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with _greedy(model, pad_id, list(stops)):
        output = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max(limits),
        )
    return [_until_end(ids[:limit], stops) for ids, limit in zip(output[:, width:].tolist(), limits, strict=True)]


def row_limits(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_length: int | None,
    max_new_tokens: int | Sequence[int] | None,
) -> list[int]:
    """Return how many new tokens each row may have: at least one, whatever the limits."""
    if max_length is None and max_new_tokens is None:
        raise ValueError("generate got no limit: give max_length or max_new_tokens")
    per_row = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int | None) else max_new_tokens
    context = context_length(model)
    limits = []
    for prompt, own in zip(prompts, per_row, strict=True):
        if not prompt:
            raise ValueError("generate got an empty prompt: it needs at least one token")
        bounds = [total - len(prompt) for total in (max_length, context) if total is not None]
        limits.append(max(1, min(bounds + ([] if own is None else [own]))))
    return limits


def _batches(
    lengths: Sequence[int], limits: Sequence[int], batch_rows: int, batch_tokens: int, context: int | None
) -> Iterator[list[int]]:
    """Yield rows longest first; a batch's longest prompt plus its longest answer must fit into the context."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda item: (-lengths[item], limits[item])):
        if batch:
            total = lengths[batch[0]] + max(limits[row], *(limits[other] for other in batch))
            crowded = len(batch) >= batch_rows or (len(batch) + 1) * total > batch_tokens
            if crowded or (context is not None and total > context):
                yield batch
                batch = []
        batch.append(row)
    if batch:
        yield batch


def _until_end(ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in stops:
            return list(ids[:place])
    return list(ids)


@contextmanager
def _greedy(model: nn.Module, pad_id: int, stops: list[int]) -> Iterator[None]:
    """Give the model a plain greedy configuration for a while.

    Handing one to `generate` is not enough: it is filled up from the model's own, whose repetition penalty or
    temperature would change the answers. Wrappers (PEFT) keep a copy of their own, so all of them are replaced.
    """
    from transformers import GenerationConfig

    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    before = [module.generation_config for module in owners]
    plain = GenerationConfig(do_sample=False, num_beams=1, pad_token_id=pad_id, eos_token_id=stops or None)
    for module in owners:
        module.generation_config = plain
    try:
        yield
    finally:
        for module, configuration in zip(owners, before, strict=True):
            module.generation_config = configuration
