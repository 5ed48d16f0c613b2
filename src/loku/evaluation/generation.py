"""Greedy answers: what a model says when it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loku.evaluation.modes import end_ids, evaluating
from loku.models import context_length

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
) -> list[Generation]:
    """Continue prompts (token ids) greedily and return the continuations in the prompts' order.

    `max_length` counts prompt and continuation together (TOFU: 200), `max_new_tokens` the continuation, for all rows
    or for each; the smaller wins, every row may have at least one new token, and the limits are each row's own, so
    that neighbours in a batch change nothing. Sampling settings and penalties of the model's own generation
    configuration are set aside meanwhile.
    """
    limits = _limits(model, prompts, max_length, max_new_tokens)
    stops = end_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(model.parameters()).device
    context = context_length(model)
    answers: dict[int, Generation] = {}
    with torch.no_grad(), evaluating(model), _greedy(model, pad_id, stops):
        for batch in _batches([len(prompt) for prompt in prompts], limits, batch_rows, batch_tokens, context):
            width = max(len(prompts[row]) for row in batch)
            rows = [[pad_id] * (width - len(prompts[row])) + list(prompts[row]) for row in batch]
            mask = [[0] * (width - len(prompts[row])) + [1] * len(prompts[row]) for row in batch]
            output = model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=max(limits[row] for row in batch),
            )
            for row, ids in zip(batch, output[:, width:].tolist(), strict=True):
                kept = _until_end(ids[: limits[row]], stops)
                answers[row] = Generation(tuple(kept), tokenizer.decode(kept, skip_special_tokens=True).strip())
            if progress is not None:
                progress(len(batch))
    return [answers[row] for row in range(len(prompts))]


def _limits(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_length: int | None,
    max_new_tokens: int | Sequence[int] | None,
) -> list[int]:
    """Return how many new tokens each row may have."""
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
