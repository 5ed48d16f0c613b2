"""What both suites share: preparing data and reference, and putting measured rows together into Results."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from loku.data.encoding import Encoder
from loku.data.prompts import Template, resolve_template
from loku.data.records import Record
from loku.data.sources import RecordSet, Rows
from loku.errors import InputError
from loku.evaluation.extras import add_extras, check_reference_model
from loku.evaluation.measuring import Effort, Progress, measure, set_results, texts
from loku.evaluation.membership import REFERENCE_ATTACK, attack_aucs, distances, priv_leak, reference_auc
from loku.evaluation.reference import Reference, check_reference, load_reference, reference_quality
from loku.evaluation.results import Results, SetResults, read_results
from loku.evaluation.verdict import verdict
from loku.runs import versions


@dataclass(frozen=True)
class Prepared:
    """Checked input of an evaluation: rows by set, and the models to compare with."""

    record_sets: Mapping[str, RecordSet]
    records: dict[str, list[Record]]
    reference: Reference | None
    target: Results | None
    warnings: list[str]


def prepare(
    record_sets: Mapping[str, RecordSet],
    *,
    max_rows: int | None,
    reference: str | Path | Results | Reference | None,
    target: str | Path | Results | None,
) -> Prepared:
    """Cut the sets to `max_rows` and check them against the reference, before any work starts."""
    if max_rows is not None and max_rows < 1:
        raise InputError(f"--max-rows {max_rows} leaves no rows to measure.", "Give 1 or more.")
    records = {name: list(found)[:max_rows] for name, found in record_sets.items()}
    for name, rows in records.items():
        if not rows:
            raise InputError(
                f"The {name} set '{record_sets[name].name}' has no rows.", "Give a set with at least one row."
            )
    found, warnings = None, []
    if reference is not None:
        if "forget" not in records:
            raise InputError(
                "--reference was given, but the forget set is not among the evaluated sets.",
                "Evaluate the forget set as well, or leave --reference out.",
            )
        found = load_reference(reference)
        warnings = check_reference(found, records["forget"], record_sets["forget"].sha256)
        if not _same_holdout(found, record_sets, records):
            warnings.append(
                f"The retain-only model '{found.name}' was measured on other holdout rows than these: membership is "
                "not compared with it."
            )
    before = target if target is None or isinstance(target, Results) else read_target(target)
    if before is not None and "forget" in records:
        theirs = before.data.get("forget", {}).get("sha256")
        if theirs is not None and theirs != record_sets["forget"].sha256:
            raise InputError(
                f"--target '{before.model.get('name')}' was measured on other forget data.",
                "Evaluate the target on the same forget set, and give that results.json.",
            )
    return Prepared(record_sets, records, found, before, warnings)


def _same_holdout(
    reference: Reference, record_sets: Mapping[str, RecordSet], records: Mapping[str, Sequence[Record]]
) -> bool:
    """Return whether a reference was measured on these holdout rows, so far as that is known."""
    if reference.results is None or "holdout" not in records or "holdout" not in reference.results.sets:
        return True
    theirs = reference.results.data.get("holdout", {}).get("sha256")
    rows = sorted(int(row["index"]) for row in reference.results.sets["holdout"].per_example)
    mine = sorted(record.index for record in records["holdout"])
    return theirs in (None, record_sets["holdout"].sha256) and rows in ([], mine)


def read_target(path: str | Path) -> Results:
    """Read the target's results: a file, an evaluation's folder, or that of an unlearning run."""
    folder = Path(path)
    if not folder.is_dir():
        return read_results(folder)
    own = folder / "results.target.json"
    return read_results(own if own.is_file() else folder / "results.json")


def evaluate_prepared(
    model: nn.Module,
    tokenizer: Any,
    prepared: Prepared,
    *,
    suite: str,
    template: Template | None,
    max_length: int,
    effort: Effort,
    normalised_sets: Sequence[str] = (),
    settings: Mapping[str, Any],
    keep_text: bool,
    seed: int,
    model_name: str | None,
    model_sha256: str | None,
    progress: Progress | None,
    extras: Sequence[str] = (),
    reference_model: nn.Module | None = None,
) -> Results:
    """Measure the prepared sets. The suite adds its own summary before `conclude` gives the verdict."""
    start = time.monotonic()
    if reference_model is not None:
        check_reference_model(model, reference_model)
    if template is None:
        template = resolve_template(tokenizer, _model_folder(model))
    encoder = Encoder(tokenizer, template, max_length=max_length)
    measured = measure(model, tokenizer, encoder, prepared.records, effort=effort, progress=progress)
    add_extras(
        model, tokenizer, template, measured, extras=extras, reference_model=reference_model, effort=effort, seed=seed
    )
    sets = {
        name: set_results(rows, forget=name == "forget", normalised=name in normalised_sets, seed=seed)
        for name, rows in measured.items()
    }
    return Results(
        suite=suite,
        model=describe_model(model, model_name, model_sha256),
        data={
            name: {"name": found.name, "sha256": found.sha256, "rows": len(prepared.records[name])}
            for name, found in prepared.record_sets.items()
        },
        settings=dict(settings) | {"max_length": max_length, "seed": seed, "template": describe_template(template)},
        sets=sets,
        summary={},
        reference=None if prepared.reference is None else prepared.reference.to_json(),
        warnings=list(prepared.warnings),
        versions=versions(),
        seconds=round(time.monotonic() - start, 3),
        texts=[row for name, rows in measured.items() for row in texts(name, rows)] if keep_text else [],
    )


@dataclass(frozen=True)
class Identity:
    """What a results file says of the model, and the seed of the intervals."""

    name: str | None = None
    sha256: str | None = None
    seed: int = 42


def suite_results(
    model: nn.Module,
    suite: str,
    identity: Identity,
    *,
    started: float,
    data: Mapping[str, RecordSet | Rows],
    rows: Mapping[str, int],
    settings: Mapping[str, Any],
    sets: dict[str, SetResults],
    summary: dict[str, float],
    warnings: Sequence[str] = (),
    texts: Sequence[dict[str, Any]] = (),
) -> Results:
    """Return the Results of a benchmark's own suite, without a verdict: its figures speak in their own terms.

    `started` is the monotonic time of the start; `rows` says how many of each set's rows were measured.
    """
    return Results(
        suite=suite,
        model=describe_model(model, identity.name, identity.sha256),
        data={name: {"name": found.name, "sha256": found.sha256, "rows": rows[name]} for name, found in data.items()},
        settings=dict(settings) | {"seed": identity.seed},
        sets=sets,
        summary={name: value for name, value in summary.items() if math.isfinite(value)},
        warnings=list(warnings),
        versions=versions(),
        seconds=round(time.monotonic() - started, 3),
        texts=list(texts),
    )


def conclude(results: Results, prepared: Prepared) -> Results:
    """Add membership figures where there is a holdout set, forget quality where there is a reference, the verdict."""
    if "forget" in results.sets and "holdout" in results.sets:
        known = prepared.reference
        if known is not None and not _same_holdout(known, prepared.record_sets, prepared.records):
            known = None
        results.summary |= membership(results.sets["forget"], results.sets["holdout"], known)
    if "forget" in results.sets:
        ratios = [row["truth_ratio"] for row in results.sets["forget"].per_example if "truth_ratio" in row]
        quality = reference_quality(prepared.reference, ratios)
        if quality is not None:
            results.summary["forget_quality"] = quality.p
            results.summary["ks_statistic"] = quality.statistic
            results.summary["forget_quality_rows"] = quality.rows
        elif prepared.reference is not None:
            results.warnings.append(
                "Forget quality was not measured: it needs perturbed answers on the forget set, here and in the "
                "reference."
            )
    found = verdict(results, target=prepared.target, reference=prepared.reference)
    results.verdict = None if found is None else found.to_json()
    return results


def membership(forget: SetResults, holdout: SetResults, reference: Reference | None = None) -> dict[str, float]:
    """Return the AUC of every membership attack and, with a reference, what they are to be compared with.

    That is each attack's distance from the retain-only model's AUC, MUSE's PrivLeak in per cent (by Min-40 %), and,
    when the reference is a results file of the same rows, the reference attack.
    """
    found = attack_aucs(forget.per_example, holdout.per_example)
    if reference is None:
        return found
    theirs = dict(reference.summary or {})
    found |= distances(found, theirs)
    if "mia_auc_min_k" in theirs and "mia_auc_min_k" in found:
        leak = priv_leak(found["mia_auc_min_k"], theirs["mia_auc_min_k"])
        if math.isfinite(leak):
            found["priv_leak"] = leak
    if reference.results is not None:
        rows = [
            reference.results.sets[name].per_example for name in ("forget", "holdout") if name in reference.results.sets
        ]
        if len(rows) == 2:
            by_reference = reference_auc(forget.per_example, holdout.per_example, *rows)
            if by_reference is not None:
                found[REFERENCE_ATTACK] = by_reference
    return found


def utility_parts(sets: Mapping[str, SetResults], names: Sequence[str], *, arithmetic: bool = False) -> list[float]:
    """Return the numbers that model utility is the harmonic mean of: those of the named sets that exist."""
    ratio = "truth_ratio_arithmetic" if arithmetic else "truth_ratio"
    found = (
        sets[name].mean(metric) for name in names if name in sets for metric in ("probability", "rougeL_recall", ratio)
    )
    return [value for value in found if value is not None]


def describe_model(model: nn.Module, name: str | None = None, sha256: str | None = None) -> dict[str, Any]:
    """Return what a results file says about a model."""
    parameter = next(model.parameters())
    return {
        "name": name or getattr(model.config, "name_or_path", "") or "model in memory",
        "sha256": sha256,
        "dtype": str(getattr(model, "dtype", parameter.dtype)).removeprefix("torch."),
        "parameters": sum(item.numel() for item in model.parameters()),
    }


def _model_folder(model: nn.Module) -> str | None:
    name = getattr(model.config, "name_or_path", "") or ""
    return name if Path(name).is_dir() else None


def describe_template(template: Template) -> dict[str, Any]:
    """Return what a results file says about a prompt template."""
    return {"kind": type(template).__name__} | dataclasses.asdict(template)
