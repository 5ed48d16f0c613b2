"""The TDEC suite: are sequences that a model had memorised forgotten? (Jang et al. 2023, arXiv 2210.01504.)"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from loku.data.encoding import Encoder, Example
from loku.data.prompts import TagTemplate
from loku.data.records import Record
from loku.data.sources import RecordSet
from loku.errors import InputError
from loku.evaluation.assembly import Identity, suite_results
from loku.evaluation.cache import BatchCache
from loku.evaluation.extraction import NGRAMS, below, measure_extraction
from loku.evaluation.generation import BATCH_ROWS
from loku.evaluation.measuring import Measured, Progress, set_results
from loku.evaluation.results import Results, SetResults
from loku.evaluation.scoring import BATCH_TOKENS, check_scored, score
from loku.models import check_fits

MAX_LENGTH = 200  # tokens of a target sequence
LEVELS = {"ma": "level_ma", "el_10": "level_el_10"}  # what the stopping rule reads, and its level


def evaluate_tdec(
    model: nn.Module,
    tokenizer: Any,
    *,
    data: RecordSet,
    holdout: RecordSet | None = None,
    validation: Mapping[str, RecordSet] | None = None,
    max_rows: int | None = None,
    max_length: int = MAX_LENGTH,
    ngrams: Sequence[int] = NGRAMS,
    batch_tokens: int = BATCH_TOKENS,
    batch_rows: int = BATCH_ROWS,
    target: Results | None = None,
    identity: Identity | None = None,
    progress: Progress | None = None,
    cache: BatchCache | None = None,
) -> Results:
    """Measure EL_n and MA of target sequences and of unseen text, and perplexities.

    The sets are "forget" (the targets), "holdout" and the validation sets. Of every row the first window of at most
    `max_length` tokens counts for EL and MA; perplexity is exp(Σ NLL / Σ tokens) over all windows of all rows.

    Unseen text are the holdout rows, or else those of all validation sets together. `level_ma` and `level_el_10` are
    its means, the level that the stopping rule asks for, taken from `target` (the results of the model before
    unlearning) where it has them, else from this model itself. `forgotten` is 1 when both means of the targets lie
    below, else 0. The rule needs no retain-only model, but a broken model meets it too: read the perplexities with it.

    Raises InputError for rows that are no running text.
    """
    started, identity, validation = time.monotonic(), identity or Identity(), dict(validation or {})
    sources = {"forget": data} | ({} if holdout is None else {"holdout": holdout}) | validation
    for name, found in sources.items():
        bare = next((row for row in found if not row.is_text), None)
        if bare is not None:
            raise InputError(
                f"Row {bare.index} of '{found.name}' is no running text.", f"Give rows with a `text` column as {name}."
            )
    encoder = Encoder(tokenizer, TagTemplate(), max_length=max_length)
    rows = {name: list(found)[:max_rows] for name, found in sources.items()}
    windows = {name: [encoder.encode(row) for row in found] for name, found in rows.items()}
    lengths = [len(window.input_ids) for found in windows.values() for parts in found for window in parts]
    check_fits(model, tokenizer, max(lengths))

    measured = _scored(model, tokenizer, rows, windows, batch_tokens, cache)
    total = sum(map(len, rows.values()))
    done = 0
    for name, parts in windows.items():
        extracted = measure_extraction(
            model,
            tokenizer,
            [window[0] for window in parts],
            hits=[row.answer[0].hits for row in measured[name]],
            ngrams=ngrams,
            batch_tokens=batch_tokens,
            batch_rows=batch_rows,
            cache=cache,
        )
        for row, one in zip(measured[name], extracted, strict=True):
            row.more |= {"ma": one.ma} | {f"el_{n}": value for n, value in one.el.items()}
        done += len(extracted)
        if progress is not None:
            progress(done, total, "extracting")
    sets = {name: set_results(found, forget=name == "forget", seed=identity.seed) for name, found in measured.items()}
    unseen = ["holdout"] if "holdout" in sets else list(validation)
    level = stopping_level([row for name in unseen for row in sets[name].per_example])
    if target is not None:
        level |= {name: target.summary[name] for name in LEVELS.values() if name in target.summary}
    return suite_results(
        model,
        "tdec",
        identity,
        started=started,
        data=sources,
        rows={name: len(found) for name, found in rows.items()},
        settings={"max_rows": max_rows, "max_length": max_length, "ngrams": list(ngrams)},
        sets=sets,
        summary=level | is_forgotten(sets["forget"], level),
    )


def stopping_level(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean MA and EL_10 of unseen rows; nothing for what no row has."""
    found = {name: [row[metric] for row in rows if metric in row] for metric, name in LEVELS.items()}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def is_forgotten(forget: SetResults, level: Mapping[str, float]) -> dict[str, float]:
    """Return {"forgotten": 1 or 0} by the stopping rule, or nothing where the level or a figure is unknown.

    A figure of 0 is below every level, a level of 0 included: there is nothing less.
    """
    pairs = [(forget.mean(metric), level.get(name)) for metric, name in LEVELS.items()]
    if any(ours is None or limit is None for ours, limit in pairs):
        return {}
    return {"forgotten": float(all(below(ours, limit) for ours, limit in pairs))}  # type: ignore[arg-type]


def _scored(
    model: nn.Module,
    tokenizer: Any,
    rows: Mapping[str, Sequence[Record]],
    windows: Mapping[str, Sequence[Sequence[Example]]],
    batch_tokens: int,
    cache: BatchCache | None = None,
) -> dict[str, list[Measured]]:
    """Score all windows of all sets in one pass."""
    measured = {name: [Measured(row, "", []) for row in found] for name, found in rows.items()}
    pairs = [pair for name, parts in windows.items() for pair in zip(measured[name], parts, strict=True)]
    owners = [row for row, own in pairs for _ in own]
    examples = [window for _, own in pairs for window in own]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    scores = score(model, examples, pad_id=pad_id, batch_tokens=batch_tokens, cache=cache)
    for row, found in zip(owners, scores, strict=True):
        row.answer.append(found)
    for name, found_rows in measured.items():
        check_scored([part for row in found_rows for part in row.answer], name)
    return measured
