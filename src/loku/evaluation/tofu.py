"""The TOFU suite (Maini et al. 2024, arXiv 2401.06121): four sets, three metrics, model utility, forget quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from loku.data.prompts import Template
from loku.data.sources import RecordSet, load_records
from loku.errors import InputError, suggestion
from loku.evaluation.assembly import conclude, evaluate_prepared, prepare, utility_parts
from loku.evaluation.cache import BatchCache
from loku.evaluation.logs import NORMALISED_SETS, UTILITY_SETS
from loku.evaluation.measuring import Effort, Progress
from loku.evaluation.metrics import harmonic_mean
from loku.evaluation.reference import Reference
from loku.evaluation.results import Results

TOFU_SETS = ("forget", "retain", "real_authors", "world_facts")
MORE_SETS = ("holdout",)  # for membership inference; never trained on, by TOFU's authors too
FORGET_SPLITS = ("forget01", "forget05", "forget10")
MAX_ROWS = 300  # the official ds_size
MAX_LENGTH = 200  # the official limit of prompt and answer together, in tokens


def tofu_sources(forget_split: str = "forget10") -> dict[str, str]:
    """Return the official source of each set."""
    return {
        "forget": f"tofu/{forget_split}_perturbed",
        "retain": "tofu/retain_perturbed",
        "real_authors": "tofu/real_authors_perturbed",
        "world_facts": "tofu/world_facts_perturbed",
    }


def evaluate_tofu(
    model: nn.Module,
    tokenizer: Any,
    *,
    forget_split: str = "forget10",
    data_dir: str | Path | None = None,
    sets: Sequence[str] = TOFU_SETS,
    sources: Mapping[str, str | RecordSet] | None = None,
    max_rows: int | None = MAX_ROWS,
    template: Template | None = None,
    max_length: int = MAX_LENGTH,
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
    """Measure a model as the official TOFU evaluation does, on any of its four sets, and membership on holdout rows.

    Probability is exp(-mean NLL per token), on real authors and world facts p / (p + Σ p_false); ROUGE-L recall is that
    of the greedy answer; the truth ratio divides the mean probability of the perturbed answers by the paraphrased
    one's (by the answer's own where there is no paraphrase). `model_utility` is the harmonic mean of the nine numbers
    of the three other sets, with the geometric truth ratio (`model_utility_arithmetic`: the other), and exists only
    when all three were measured. `forget_quality` needs `reference`: the retain-only model's results or official log.

    With the holdout set come the AUCs of the membership attacks and, with a reference that has them, their distances
    from its AUCs, `priv_leak` and the reference attack. `extras` and `reference_model` ask for what costs more: see
    `loku.evaluation.extras.add_extras`.

    `sources` replaces a set's official source by another, such as "tofu/forget10_perturbed[0:20]". `max_length`
    counts prompt and answer together, for scoring as for generation.

    Raises InputError for unknown sets or splits, rows without perturbed answers, and a reference measured on other
    forget rows.
    """
    prepared = prepare(
        load_sets(forget_split, data_dir, sets, sources), max_rows=max_rows, reference=reference, target=target
    )
    for name, rows in prepared.records.items():
        bare = next((row for row in rows if not row.perturbed_answers and name not in MORE_SETS), None)
        if bare is not None:
            raise InputError(
                f"Row {bare.index} of the {name} set '{prepared.record_sets[name].name}' has no perturbed_answer.",
                "The TOFU suite needs it: give a *_perturbed set, or evaluate with --suite own.",
            )
    results = evaluate_prepared(
        model,
        tokenizer,
        prepared,
        suite="tofu",
        template=template,
        max_length=max_length,
        effort=Effort(max_length, max_new_tokens, batch_tokens=batch_tokens, batch_rows=batch_rows, cache=cache),
        normalised_sets=NORMALISED_SETS,
        settings={"forget_split": forget_split, "max_rows": max_rows, "max_new_tokens": max_new_tokens},
        keep_text=keep_text,
        seed=seed,
        model_name=model_name,
        model_sha256=model_sha256,
        progress=progress,
        extras=extras,
        reference_model=reference_model,
    )
    if all(name in results.sets for name in UTILITY_SETS):
        results.summary["model_utility"] = harmonic_mean(utility_parts(results.sets, UTILITY_SETS))
        results.summary["model_utility_arithmetic"] = harmonic_mean(
            utility_parts(results.sets, UTILITY_SETS, arithmetic=True)
        )
    return conclude(results, prepared)


def load_sets(
    forget_split: str = "forget10",
    data_dir: str | Path | None = None,
    sets: Sequence[str] = TOFU_SETS,
    sources: Mapping[str, str | RecordSet] | None = None,
) -> dict[str, RecordSet]:
    """Load the chosen sets in their usual order. Raises InputError for unknown sets or splits."""
    sources = sources or {}
    if not sets:
        raise InputError("--sets names no set.", f"Valid names are: {', '.join(TOFU_SETS + MORE_SETS)}.")
    for name in (*sets, *sources):
        if name not in TOFU_SETS + MORE_SETS:
            raise InputError(f"'{name}' is not a set of TOFU.", suggestion(name, TOFU_SETS + MORE_SETS))
    if "forget" not in sources and "forget" in sets and forget_split not in FORGET_SPLITS:
        raise InputError(
            f"--forget-split '{forget_split}' is not a forget set of TOFU.", suggestion(forget_split, FORGET_SPLITS)
        )
    holdout = {"holdout": f"tofu/{forget_split.replace('forget', 'holdout')}"}
    chosen = {**tofu_sources(forget_split), **holdout, **sources}
    return {name: _record_set(chosen[name], name, data_dir) for name in TOFU_SETS + MORE_SETS if name in sets}


def _record_set(source: str | RecordSet, name: str, data_dir: str | Path | None) -> RecordSet:
    return source if isinstance(source, RecordSet) else load_records(source, option=f"--{name}", data_dir=data_dir)
