"""Figures that cost more than the usual passes, on request: gradient norms, MEMO, and a second model's opinion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from loku.data.encoding import IGNORE, Example
from loku.data.prompts import Template
from loku.errors import InputError, suggestion
from loku.evaluation.gradients import gradient_norms
from loku.evaluation.measuring import LEAST_NEW_TOKENS, TEXT_NEW_TOKENS, Effort, Measured
from loku.evaluation.memo import memo_scores
from loku.evaluation.sampling import sampled_recall
from loku.evaluation.scoring import score
from loku.models import check_fits, weights_sha256

EXTRAS = ("gradient_norm", "memo", "sampling")


def parse_extras(text: str) -> tuple[str, ...]:
    """Return the extras that a comma-separated option names. Raises InputError for an unknown one."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name not in EXTRAS:
            raise InputError(f"--extras '{name}' is not known.", suggestion(name, EXTRAS))
    return names


def check_reference_model(model: nn.Module, reference: nn.Module) -> None:
    """Raise InputError unless two models share their vocabulary: ids of one are given to the other."""
    ours, theirs = (_vocabulary(item) for item in (model, reference))
    if ours != theirs:
        raise InputError(
            f"--reference-model has a vocabulary of {theirs} tokens, the model one of {ours}.",
            "Give a reference model with the same tokenizer.",
        )


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def add_extras(
    model: nn.Module,
    tokenizer: Any,
    template: Template,
    measured: Mapping[str, Sequence[Measured]],
    *,
    extras: Sequence[str] = (),
    reference_model: nn.Module | None = None,
    effort: Effort,
    seed: int = 42,
) -> None:
    """Put the asked-for figures into measured rows.

    `gradient_norm` goes to forget and holdout rows (windows of running text are averaged), `memo_precision` and
    `memo_recall` to forget rows; `sampling` gives forget rows `sampled_rougeL_max` and `sampled_rougeL_mean`, ROUGE-L
    recall over 16 answers sampled at temperature 1 (windows of running text are averaged). With a reference model every
    row gets `output_nll`: the mean NLL per token, in nats, of what the model generated, under the reference model and
    after the same prompt. An empty answer has none.
    """
    if "gradient_norm" in extras:
        chosen = [row for name in ("forget", "holdout") for row in measured.get(name, ())]
        examples = [example for row in chosen for example in row.examples]
        answers = [part.answer for row in chosen for part in row.answer]
        norms = iter(gradient_norms(model, examples, answers, cache=effort.cache))
        for row in chosen:
            row.more["gradient_norm"] = sum(next(norms) for _ in row.examples) / len(row.examples)
    if "memo" in extras:
        rows = measured.get("forget", ())
        records = [row.record for row in rows]
        found = memo_scores(model, tokenizer, template, records, batch_rows=effort.batch_rows, cache=effort.cache)
        for row, memo in zip(rows, found, strict=True):
            if memo is not None:
                row.more |= {"memo_precision": memo.precision, "memo_recall": memo.recall}
    if "sampling" in extras:
        _add_samples(model, tokenizer, measured.get("forget", ()), effort, seed)
    if reference_model is not None:
        everything = [row for rows in measured.values() for row in rows]
        _add_output_nll(reference_model, tokenizer, everything, effort)


def _add_samples(model: nn.Module, tokenizer: Any, rows: Sequence[Measured], effort: Effort, seed: int) -> None:
    parts = [(row, part) for row in rows for part in range(len(row.prompts))]
    limits = [
        TEXT_NEW_TOKENS if row.record.is_text else max(LEAST_NEW_TOKENS, 2 * row.answer[0].tokens + 8)
        for row, _ in parts
    ]
    if effort.max_new_tokens is not None:
        limits = [min(limit, effort.max_new_tokens) for limit in limits]
    found = sampled_recall(
        model,
        tokenizer,
        [row.prompts[part] for row, part in parts],
        [row.references[part if row.record.is_text else 0] for row, part in parts],
        max_new_tokens=limits,
        seed=seed,
        batch_rows=effort.batch_rows,
        cache=effort.cache,
    )
    for (row, _), values in zip(parts, found, strict=True):
        for name, value in (("max", max(values)), ("mean", sum(values) / len(values))):
            key = f"sampled_rougeL_{name}"
            row.more[key] = row.more.get(key, 0.0) + value / len(row.prompts)


def _add_output_nll(reference: nn.Module, tokenizer: Any, rows: Sequence[Measured], effort: Effort) -> None:
    examples, owners = [], []
    for row in rows:
        for prompt, answer in zip(row.prompts, row.generations, strict=True):
            if answer.ids:
                examples.append(_continued(row.record.index, prompt, answer.ids))
                owners.append(row)
    check_fits(reference, tokenizer, max((len(example.input_ids) for example in examples), default=0))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    cache = effort.cache
    if cache is not None:  # these are the other model's scores
        cache = replace(cache, key=f"{weights_sha256(reference)} {reference.dtype}")
    scores = score(reference, examples, pad_id=pad_id, batch_tokens=effort.batch_tokens, cache=cache)
    sums: dict[int, tuple[float, int]] = {}
    for row, found in zip(owners, scores, strict=True):
        nll, tokens = sums.get(id(row), (0.0, 0))
        sums[id(row)] = (nll + found.nll, tokens + found.tokens)
        row.more["output_nll"] = sums[id(row)][0] / sums[id(row)][1]


def _continued(index: int, prompt: Sequence[int], answer: Sequence[int]) -> Example:
    """Return a prompt with a generated answer as an example whose answer alone is scored."""
    labels = [IGNORE] * len(prompt) + list(answer)
    return Example(index, [*prompt, *answer], labels, len(prompt), len(prompt))
