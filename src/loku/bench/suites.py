"""What a recipe's models are measured by, where it says `measure: {suite: ...}`.

    tofu  all of TOFU, the forget split being the one that `unlearn: {forget: tofu/...}` names
    muse  all of MUSE, of `measure: {corpus: news}` or books
tdec  EL_n and MA of the forget rows and of unseen text (`unlearn: {holdout: ...}`), perplexity on
      `measure: {validation: ...}`, next words of `measure: {cloze: ...}`
lume  the twelve task values on the recipe's forget and retain rows, the membership score of
      `measure: {members: ..., nonmembers: ...}`
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loku.config import UnlearnOptions
from loku.data.encoding import Encoder
from loku.data.prompts import TagTemplate, resolve_template
from loku.data.sources import RecordSet, load_records, load_rows
from loku.evaluation.assembly import Identity
from loku.evaluation.cloze import measure_cloze
from loku.evaluation.lume import COLUMNS, DOCUMENT, evaluate_lume
from loku.evaluation.measuring import Measured, set_results
from loku.evaluation.muse import evaluate_muse, load_muse
from loku.evaluation.results import Results, SetResults, read_results
from loku.evaluation.scoring import score
from loku.evaluation.tdec import evaluate_tdec
from loku.evaluation.tofu import FORGET_SPLITS, evaluate_tofu
from loku.models import context_length

# What both suites put into the summary for the tuning rule `level`: of two settings that forget, which kept more?
UTILITY = "utility"


def measure_suite(
    measured_by: Mapping[str, Any],
    model: Any,
    tokenizer: Any,
    sources: Mapping[str, str],
    options: UnlearnOptions,
    *,
    model_name: str,
    target: Path | None = None,
    reference: Path | None = None,
) -> Results:
    """Measure a model by the suite that a recipe's `measure` names.

    `sources` are its rows by name; `target` and `reference` are results files of the target and retain-only models.
    """
    suite = measured_by["suite"]
    if suite == "lume":
        return measure_lume(model, tokenizer, sources, options, model_name=model_name)
    if suite == "tdec":
        return measure_tdec(model, tokenizer, sources, options, model_name=model_name, target=target)
    if suite == "muse":
        data, warnings = load_muse(measured_by.get("corpus", "news"), options.data_dir)
        return evaluate_muse(
            model, tokenizer, data, corpus=measured_by.get("corpus", "news"), max_rows=options.eval_rows,
            reference=None if reference is None else read_results(reference), warnings=warnings,
            identity=Identity(model_name, seed=options.seed),
        )  # fmt: skip
    split = next((name for name in FORGET_SPLITS if name in str(options.forget)), FORGET_SPLITS[-1])
    return evaluate_tofu(
        model, tokenizer, forget_split=split, data_dir=options.data_dir, max_rows=options.eval_rows,
        sources={"forget": sources["forget"]}, seed=options.seed, model_name=model_name,
        template=resolve_template(tokenizer, options.model, options.prompt_template),
        reference=reference, target=target,
    )  # fmt: skip


def measure_tdec(
    model: Any,
    tokenizer: Any,
    sources: Mapping[str, str],
    options: UnlearnOptions,
    *,
    model_name: str,
    target: Path | None = None,
) -> Results:
    """Measure a model as LoKU's table of TDEC does.

    `utility` is ours, for the tuning: the target's perplexity on the validation text over the model's, at most 1. Cloze
    accuracy is no part of it: of small models it hardly lies above what the words' frequency gives.
    """
    rows = {name: _records(source, name, options) for name, source in sources.items() if name != "retain"}
    before = read_results(target) if target is not None else None
    identity = Identity(model_name, seed=options.seed)
    results = evaluate_tdec(
        model,
        tokenizer,
        data=rows["forget"],
        # The level is the target's, so it alone is asked for the unseen text: EL decodes once for every miss.
        holdout=rows.get("holdout") if before is None else None,
        max_rows=options.eval_rows,
        max_length=options.max_length,
        target=before,
        identity=identity,
    )
    if "validation" in rows:
        results.sets["validation"] = perplexity_of(
            model, tokenizer, rows["validation"], max_length=options.max_length, seed=options.seed
        )
    if "cloze" in rows:
        results.sets["cloze"] = measure_cloze(
            # Whole passages, as far as the model reads: a cut one would lack the word that is asked for.
            model, tokenizer, rows["cloze"], max_length=context_length(model) or options.max_length, seed=options.seed,
        )  # fmt: skip
    results.summary[UTILITY] = utility(results, before or results)
    return results


def perplexity_of(model: Any, tokenizer: Any, rows: RecordSet, *, max_length: int, seed: int) -> SetResults:
    """Return the figures of texts that are scored and not continued, perplexity = exp(sum NLL / sum tokens) of them."""
    encoder = Encoder(tokenizer, TagTemplate(), max_length=max_length)
    windows = [encoder.encode(row) for row in rows]
    scores = iter(score(model, [window for own in windows for window in own], pad_id=tokenizer.pad_token_id))
    measured = [Measured(row, "", [], [next(scores) for _ in own]) for row, own in zip(rows, windows, strict=True)]
    return set_results(measured, seed=seed)


def utility(results: Results, target: Results) -> float:
    """Return min(1, the target's perplexity / the model's), or 1 where none was measured."""
    ours, theirs = (found.mean("validation", "perplexity") for found in (results, target))
    return min(1.0, theirs / ours) if ours and theirs else 1.0


def measure_lume(
    model: Any, tokenizer: Any, sources: Mapping[str, str], options: UnlearnOptions, *, model_name: str
) -> Results:
    """Measure a model by LUME's own script; `utility` is the mean of the six values of the retain set."""
    more: dict[str, Any] = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    for name, columns in (("forget", COLUMNS), ("retain", COLUMNS), ("members", DOCUMENT), ("nonmembers", DOCUMENT)):
        if name in sources:
            more[name] = load_rows(sources[name], columns, option=name, data_dir=options.data_dir)
    results = evaluate_lume(
        model,
        tokenizer,
        max_rows=options.eval_rows,
        max_length=options.max_length,
        identity=Identity(model_name, seed=options.seed),
        **more,
    )
    kept = [value for name, value in results.summary.items() if name.startswith("retain_task")]
    results.summary[UTILITY] = sum(kept) / len(kept) if kept else 0.0
    return results


def _records(source: str, name: str, options: UnlearnOptions) -> Any:
    return load_records(source, option=name, data_dir=options.data_dir)
