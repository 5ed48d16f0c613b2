"""Sampled answers: what comes out in many tries, where greedy decoding says it once or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loku.errors import InputError
from loku.evaluation.cache import BatchCache
from loku.evaluation.decoding import Choice, decode, decodes_plainly
from loku.evaluation.generation import BATCH_ROWS, Batch, over_batches, row_limits
from loku.evaluation.metrics import rougeL_recall
from loku.evaluation.modes import evaluating

SAMPLES, TEMPERATURE = 16, 1.0
NAME = "rougeL_recall"


def sampler(seeds: Sequence[int], temperature: float) -> Choice:
    """Return a `choose` for `decode` that draws from softmax(logits / temperature), a seed for each prompt.

    argmax of logits / temperature + Gumbel noise is such a draw. The noise is the prompt's own, so that neighbours in a
    batch change nothing.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(logits: Tensor, rows: Sequence[int]) -> Tensor:
        uniform = torch.stack(
            [torch.rand(logits.shape[-1], generator=generators[row], dtype=torch.float64) for row in rows]
        )
        gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        return (logits.double().cpu() / temperature + gumbel).argmax(dim=-1).to(logits.device)

    return choose


def sampled_recall(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    references: Sequence[str],
    *,
    max_new_tokens: Sequence[int],
    samples: int = SAMPLES,
    temperature: float = TEMPERATURE,
    seed: int = 42,
    batch_rows: int = BATCH_ROWS,
    cache: BatchCache | None = None,
) -> list[list[float]]:
    """Return, for each prompt, the ROUGE-L recall of every one of its sampled answers against its reference.

    Plain sampling, without top-k or top-p. Answers depend on the seed, the prompt's place and the sample's number, and
    on nothing else but rounding. The processes share the batches; `cache` keeps the numbers. Raises InputError for a
    model that our decoding cannot run.
    """
    with evaluating(model):
        reason = decodes_plainly(model) if prompts else None
    if reason is not None:
        raise InputError(f"--extras sampling cannot sample from this model: {reason}.", "Leave sampling out.")
    many = [list(prompt) for prompt in prompts for _ in range(samples)]
    limits = [limit for limit in row_limits(model, prompts, None, max_new_tokens) for _ in range(samples)]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def answer(batch: Batch) -> list[float]:
        seeds = [(seed * 1_000_003 + row) % 2**63 for row in batch.rows]
        wanted = [references[row // samples] for row in batch.rows]
        content = (batch.prompts, batch.limits, batch.stops, wanted, seeds, temperature)
        known = None if cache is None else cache.numbers("sampled", len(wanted), (NAME,), *content)
        if known is None:
            said = decode(model, batch.prompts, batch.limits, batch.stops, pad_id, choose=sampler(seeds, temperature))
            texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]
            known = [{NAME: rougeL_recall(text, right)} for text, right in zip(texts, wanted, strict=True)]
            if cache is not None:
                cache.put_numbers("sampled", known, (NAME,), *content)
        return [row[NAME] for row in known]

    found = over_batches(model, tokenizer, many, limits, answer, batch_rows=batch_rows)
    return [[found[row * samples + n] for n in range(samples)] for row in range(len(prompts))]
