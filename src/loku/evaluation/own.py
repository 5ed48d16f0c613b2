"""The suite for rows of one's own: every metric that the rows allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from loku.data.prompts import Template
from loku.data.sources import RecordSet
from loku.evaluation import metrics
from loku.evaluation.assembly import conclude, evaluate_prepared, prepare, utility_parts
from loku.evaluation.cache import BatchCache
from loku.evaluation.measuring import Effort, Progress
from loku.evaluation.reference import Reference
from loku.evaluation.results import Results

UTILITY_SETS = ("retain", "general")


def evaluate_own(
    model: nn.Module,
    tokenizer: Any,
    *,
    forget: RecordSet,
    retain: RecordSet | None = None,
    holdout: RecordSet | None = None,
    general: RecordSet | None = None,
    max_rows: int | None = None,
    template: Template | None = None,
    max_length: int = 500,
    max_new_tokens: int | None = None,
    batch_tokens: int = Effort.batch_tokens,
    batch_rows: int = Effort.batch_rows,
    cache: BatchCache | None = None,
    keep_text: bool = False,
    reference: str | Path | Results | Reference | None = None,
    target: str | Path | Results | None = None,
    seed: int = 42,
    model_name: str | None = None,
    model_sha256: str | None = None,
    progress: Progress | None = None,
    extras: Sequence[str] = (),
    reference_model: nn.Module | None = None,
) -> Results:
    """Measure a model on rows of any format: what it still knows, what it kept, and how it speaks.

    Every set has probability exp(-mean NLL per token), perplexity exp(Σ NLL / Σ tokens), ROUGE-L recall and exact
    match of the greedy answer (exact match also accepts `paraphrased_answer`), exact memorisation and extraction
    strength (teacher-forced, answer tokens without the end of sequence), and how answers are made: `repetition`
    (share of repeated 4-grams of generated tokens), `token_entropy` (bits, of the generated answer's own token
    frequencies) and `predictive_entropy` (nats, of the model's distribution at the right answer's tokens).

    More appears when the data exist: truth ratios with `perturbed_answer`; `paraphrase_exact_match` with
    `paraphrased_question`; the AUCs of the membership attacks with a holdout set, with a reference also their distances
    from its AUCs, `priv_leak` and the reference attack; `forget_quality` with a reference and perturbed answers.
    `model_utility` is the harmonic mean, over the retain and general sets, of probability, ROUGE-L recall and
    max(0, 1 - R); the retain set's `refusal_rate` is over-refusal. `extras` and `reference_model` ask for what costs
    more: see `loku.evaluation.extras.add_extras`.

    A row of running text is scored whole, window by window; its prompt is the first half of the window, of which at
    most 50 tokens of the continuation are generated and compared. Other answers may be as long as `max_new_tokens`, by
    default max(16, 2 x the longest reference answer + 8) tokens.

    Raises InputError for empty sets and for a reference measured on other forget rows.
    """
    given = {"forget": forget, "retain": retain, "general": general, "holdout": holdout}
    prepared = prepare(
        {name: found for name, found in given.items() if found is not None},
        max_rows=max_rows,
        reference=reference,
        target=target,
    )
    results = evaluate_prepared(
        model,
        tokenizer,
        prepared,
        suite="own",
        template=template,
        max_length=max_length,
        effort=Effort(
            None, max_new_tokens, fit_answers=True, batch_tokens=batch_tokens, batch_rows=batch_rows, cache=cache
        ),
        settings={"max_rows": max_rows, "max_new_tokens": max_new_tokens},
        keep_text=keep_text,
        seed=seed,
        model_name=model_name,
        model_sha256=model_sha256,
        progress=progress,
        extras=extras,
        reference_model=reference_model,
    )
    parts = utility_parts(results.sets, UTILITY_SETS)
    if parts:
        results.summary["model_utility"] = metrics.harmonic_mean(parts)
        results.summary["model_utility_arithmetic"] = metrics.harmonic_mean(
            utility_parts(results.sets, UTILITY_SETS, arithmetic=True)
        )
    if "retain" in results.sets:
        results.summary["retain_perplexity"] = results.sets["retain"].metrics["perplexity"].mean
    return conclude(results, prepared)
