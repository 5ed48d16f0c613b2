"""Evidence after a run: target, unlearned and retain-only model measured on the same rows, results, card and report."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from loku.adapters.anchor import target_model
from loku.adapters.folded import folded
from loku.assessment_rows import AssessmentRows
from loku.config import ExportOptions, UnlearnOptions
from loku.data.prompts import resolve_template
from loku.data.sources import RecordSet, load_records
from loku.errors import InputError
from loku.evaluation.assembly import describe_template
from loku.evaluation.measuring import check_measurable
from loku.evaluation.own import evaluate_own
from loku.evaluation.reference import Reference, check_reference, load_reference
from loku.evaluation.results import Results, read_results, write_results
from loku.files import replace_file
from loku.job import Job, UnlearnResult
from loku.models import load_config, load_model, load_tokenizer, weights_sha256
from loku.progress import console, progress, say
from loku.record import write_record
from loku.report.artefacts import ROLES
from loku.report.card import write_model_card
from loku.report.figures import beyond_note, beyond_retain_only
from loku.report.html import write_report
from loku.runs import RunFolder
from loku.watch_plan import plan_watch

# What the summary table shows: heading, set, metric.
COLUMNS = (
    ("forget probability", "forget", "probability"),
    ("forget ROUGE-L", "forget", "rougeL_recall"),
    ("forget exact match", "forget", "exact_match"),
    ("retain exact match", "retain", "exact_match"),
    ("general exact match", "general", "exact_match"),
    ("forget repetition", "forget", "repetition"),
)
GZIP = b"\x1f\x8b"  # how a gzipped file begins
MOVED = 0.02  # change of a mean forget score that a merge into the stored type must not exceed unnoticed


def check_rows(rows: AssessmentRows, job: Job, options: UnlearnOptions) -> None:
    """Raise InputError, before any work, when rows or the retain-only reference do not fit.

    Every row to be measured must leave an answer within --max-length. Results must have been measured on the same
    forget rows; a retain-only model must share the target's vocabulary.
    """
    if plan_watch(job, options, rows) is None and not options.evaluate:
        return
    given = {
        "forget": job.forget,
        "retain": rows.retain or job.retain,
        "holdout": rows.holdout,
        "general": rows.general,
    }
    sets = {name: list(found)[: options.eval_rows] for name, found in given.items() if found is not None}
    check_measurable(job.model, job.tokenizer, job.encoder, sets)
    if rows.retain_only_model is not None:
        load_config(rows.retain_only_model, trust_remote_code=options.trust_remote_code, option="--retain-only-model")
        theirs = load_tokenizer(rows.retain_only_model, trust_remote_code=options.trust_remote_code)
        if theirs.get_vocab() != job.tokenizer.get_vocab():
            raise InputError(
                f"--retain-only-model '{rows.retain_only_model}' has another vocabulary than the target model.",
                "Train both from the same model and tokenizer (`loku finetune --tokenizer-data` for new models).",
            )
    if rows.reference is not None:
        check_reference(rows.reference, sets["forget"], job.forget.sha256, option="--retain-only-model")


def assess(
    result: UnlearnResult, job: Job, run: RunFolder, options: UnlearnOptions, rows: AssessmentRows | None = None
) -> dict[str, Results]:
    """Measure before, after and retain-only on the same rows; write results, model card and report; finish the run."""
    rows = rows or AssessmentRows()
    measured: dict[str, Results] = {}
    if options.evaluate:
        with run.timed("evaluation"):
            measured = _measure(result, job, run, options, rows)
    run.record["seconds"]["total"] = round(sum(v for k, v in run.record["seconds"].items() if k != "total"), 3)
    run.update(status="finished")
    record = write_record(run.path, job.forget)
    write_model_card(
        result.adapter,
        run=run.record,
        results=measured["unlearned"].to_json() if measured else None,
        target=measured["target"].to_json() if "target" in measured else None,
        retain_only=measured["retain_only"].to_json() if "retain_only" in measured else None,
        kind="model" if options.tune == "full" else "adapter",
        base_model=options.model or "unknown",
        record="../record.json",
    )
    if measured:
        print_table(measured)
        verdict = measured["unlearned"].verdict
        if verdict:
            say("verdict:", f" {verdict['level']}. {verdict['sentence']}")
        for warning in measured["unlearned"].warnings:
            print(f"warning: {warning}", file=sys.stderr)
        console.print(f"report: {write_report([run.path], run.path / 'report.html')}")
    console.print(f"record: {record} (to hand over; keep {record.with_suffix('.salt').name} to yourself)")
    adapter = run.record["adapter"]
    if adapter["rank"] is not None:
        console.print(f"adapter: {result.adapter} (ordinary LoRA of rank {adapter['rank']} on the untouched base)")
        console.print("An adapter can be removed: release the merged model to outsiders (`loku export`).")
    else:
        console.print(f"model: {result.adapter}")
    return measured


def _measure(
    result: UnlearnResult, job: Job, run: RunFolder, options: UnlearnOptions, rows: AssessmentRows
) -> dict[str, Results]:
    """Measure and write each model's results in turn: the verdict rests on the reference's file as it lies there."""
    measured: dict[str, Results] = {}

    def measure(role: str, model: Any, **more: Any) -> Results:
        with progress(f"measuring {name_of(role, options)}") as update, folded(model, keep=True):
            return evaluate_own(
                model,
                job.tokenizer,
                forget=job.forget,
                retain=rows.retain or job.retain,
                holdout=rows.holdout,
                general=rows.general,
                max_rows=options.eval_rows,
                template=job.template,
                max_length=options.max_length,
                max_new_tokens=options.max_new_tokens,
                keep_text=options.keep_text,
                seed=options.seed,
                progress=update,
                **more,
            )

    base, digest = options.model or "in memory", run.record["model"]["sha256"]
    reference = rows.reference
    if rows.target is not None:
        measured["target"] = rows.target
    elif options.tune == "lora":
        with target_model(result.model):
            measured["target"] = measure(
                "target", result.model, model_name=base, model_sha256=run.record["model"]["sha256"]
            )
    elif options.model:  # the weights in memory were trained: the target is read again
        target = load_model(
            options.model, dtype="float32", device=options.device, trust_remote_code=options.trust_remote_code
        )
        measured["target"] = measure("target", target, model_name=base, model_sha256=digest)
        del target
    if reference is not None and reference.results is not None:  # an official log holds figures of the forget set alone
        measured["retain_only"] = reference.results
        reference = _copy_reference(reference, run.path)
    elif rows.retain_only_model:
        retain_only = load_model(
            rows.retain_only_model,
            dtype=options.dtype,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
        wanted = {"forget": job.forget, "retain": rows.retain or job.retain} | {
            "holdout": rows.holdout, "general": rows.general,
        }  # fmt: skip
        known = measured_before(rows.retain_only_model, retain_only, wanted, job, options)
        if known is None:
            digest = weights_sha256(retain_only)
            measured["retain_only"] = measure(
                "retain_only", retain_only, model_name=rows.retain_only_model, model_sha256=digest
            )
            reference = load_reference(write_results(measured["retain_only"], run.path, role="retain_only"))
        else:
            assert known.results is not None
            console.print(f"the retain-only model was measured before on these rows: {known.path}")
            measured["retain_only"] = known.results
            reference = _copy_reference(known, run.path)
        del retain_only
    measured["unlearned"] = measure(
        "unlearned",
        result.model,
        model_name=f"{base} after {options.method}",
        reference=reference,
        target=measured.get("target"),
    )
    if "target" in measured:
        write_results(measured["target"], run.path, role="target")
    write_results(measured["unlearned"], run.path)
    return measured


def measured_before(
    folder: str, model: Any, wanted: Mapping[str, RecordSet | None], job: Job, options: UnlearnOptions
) -> Reference | None:
    """Return the results.json in a retain-only model's folder when measuring it again would give the same.

    That is when it is of these weights, rows and settings. Texts are not taken over: with --keep-text None.
    """
    file = Path(folder) / "results.json"
    if options.keep_text or not file.is_file():
        return None
    try:
        found = read_results(file)
    except InputError:
        return None  # what somebody else put there is no reason to fail
    counts = {name: min(len(rows), options.eval_rows) for name, rows in wanted.items() if rows is not None}
    same = (
        found.suite == "own"
        and found.adapter is None
        and {name: item.get("sha256") for name, item in found.data.items()}
        == {name: rows.sha256 for name, rows in wanted.items() if rows is not None}
        and {name: item.rows for name, item in found.sets.items()} == counts
        and found.settings.get("max_length") == options.max_length
        and found.settings.get("max_new_tokens") == options.max_new_tokens
        and found.settings.get("template") == describe_template(job.template)
        and found.model.get("sha256") == weights_sha256(model)
    )
    return load_reference(file) if same else None


def _copy_reference(reference: Reference, folder: Path) -> Reference:
    """Put the reference's results into a run folder byte by byte, so that its hash is that of the copy, too."""
    assert reference.results is not None
    copy = folder / "results.retain_only.json"
    content = reference.path.read_bytes() if reference.path is not None and reference.path.is_file() else GZIP
    if content.startswith(GZIP):  # packed, in memory, or gone by now: there are no bytes that another reader would take
        return load_reference(write_results(reference.results, folder, role="retain_only"))
    replace_file(copy, lambda temporary: Path(temporary).write_bytes(content))
    return load_reference(copy)


def name_of(role: str, options: UnlearnOptions) -> str:
    """Return how a person calls a model of the run."""
    return f"the model after {options.method}" if role == "unlearned" else f"the {role.replace('_', '-')} model"


def print_table(measured: Mapping[str, Results]) -> None:
    """Print the main figures of several models side by side, and where less than retain-only is known."""
    measured = in_order(measured)
    table = Table("", *(name.replace("_", "-") for name in measured), box=None, pad_edge=False)
    for heading, name, metric in COLUMNS:
        values = [found.mean(name, metric) for found in measured.values()]
        if any(value is not None for value in values):
            table.add_row(heading, *(_shown(value) for value in values))
    for heading, key in (("model utility", "model_utility"), ("forget quality (p)", "forget_quality")):
        values = [found.summary.get(key) for found in measured.values()]
        if any(value is not None for value in values):
            table.add_row(heading, *(_shown(value) for value in values))
    console.print(table)
    note = no_virtue(measured)
    if note:
        console.print(note)


def in_order(measured: Mapping[str, Results]) -> dict[str, Results]:
    """Return models in the order in which every table has them: target, unlearned, retain-only."""
    last = len(ROLES)
    places = {role: place for place, role in enumerate(ROLES)} | {"model": list(ROLES).index("unlearned")}
    return dict(sorted(measured.items(), key=lambda item: places.get(item[0], last)))


def no_virtue(measured: Mapping[str, Results]) -> str | None:
    """Say which forget figures lie beyond the retain-only model's, which is no virtue; None where none does."""
    ours = measured.get("unlearned") or measured.get("model")
    if ours is None or "retain_only" not in measured:
        return None
    found = beyond_retain_only({"unlearned": ours.to_json(), "retain_only": measured["retain_only"].to_json()})
    return beyond_note(found) if found else None


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2g}" if 0 < value < 0.005 else f"{value:.3f}"


def rescore_merged(merged: Path, options: ExportOptions) -> None:
    """Measure the forget set again on the merged model, in the type it is stored in, and warn when it moved.

    Rows and settings are those of the run's own evaluation. Half precision can swallow small updates.
    """
    run = Path(options.run or "")
    if not ((run / "results.json").is_file() and (run / "config.yaml").is_file()):
        console.print("not scored again: the run folder holds no results (give a run folder to compare)")
        return
    import yaml

    before = read_results(run / "results.json")
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    if not settings["forget"]:
        console.print("not scored again: the run's forget rows were given in memory")
        return
    try:
        forget = load_records(settings["forget"], option="--forget", data_dir=options.data_dir or settings["data_dir"])
    except InputError as error:  # the model is written: rows that are gone by now are no reason to fail
        console.print(f"not scored again: {error.given}")
        return
    model = load_model(str(merged), trust_remote_code=options.trust_remote_code)
    tokenizer = load_tokenizer(str(merged), trust_remote_code=options.trust_remote_code)
    with progress("scoring the merged model") as update:
        after = evaluate_own(
            model,
            tokenizer,
            forget=forget,
            max_rows=settings["eval_rows"],
            template=resolve_template(tokenizer, merged),
            max_length=settings["max_length"],
            max_new_tokens=settings["max_new_tokens"],
            model_name=str(merged),
            progress=update,
        )
    moved = []
    alone = set(before.sets) == {"forget"} or settings["max_new_tokens"] is not None
    for metric in ("probability", "rougeL_recall", "extraction_strength"):
        if metric == "rougeL_recall" and not alone:
            continue  # how long answers may be followed from the other sets as well
        old, new = before.mean("forget", metric), after.mean("forget", metric)
        if old is None or new is None:
            continue
        console.print(f"forget {metric}: {old:.4f} as trained, {new:.4f} merged in {str(model.dtype)[6:]}")
        if abs(new - old) > MOVED:
            moved.append(metric)
    if moved:
        print(
            f"warning: merging moved the forget scores ({', '.join(moved)}) by more than {MOVED}: the stored type "
            "swallows part of the update. Export with --dtype float32, or train with a larger rate.",
            file=sys.stderr,
        )
