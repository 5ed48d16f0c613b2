"""Evidence after a run: target, unlearned and retain-only model measured on the same rows, results, card and report."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from loku.adapters.anchor import target_model
from loku.config import EvaluateOptions, ExportOptions, UnlearnOptions
from loku.data.prompts import ChatTemplate, TagTemplate, resolve_template
from loku.data.sources import RecordSet, load_records
from loku.errors import InputError
from loku.evaluation.logs import evaluate_logs
from loku.evaluation.own import evaluate_own
from loku.evaluation.reference import check_reference, load_reference
from loku.evaluation.results import Results, read_results, write_results
from loku.evaluation.tofu import evaluate_tofu
from loku.job import Job, UnlearnResult
from loku.models import check_model_source, load_adapter, load_model, load_tokenizer, weights_sha256
from loku.progress import console, progress
from loku.report.card import write_model_card
from loku.report.html import write_report
from loku.runs import RunFolder

# What the summary table shows: heading, set, metric.
COLUMNS = (
    ("forget probability", "forget", "probability"),
    ("forget ROUGE-L", "forget", "rougeL_recall"),
    ("forget exact match", "forget", "exact_match"),
    ("retain exact match", "retain", "exact_match"),
    ("general exact match", "general", "exact_match"),
    ("forget repetition", "forget", "repetition"),
)
OWN_MAX_LENGTH, TOFU_MAX_LENGTH = 500, 200  # tokens; TOFU's counts the prompt
MOVED = 0.02  # change of a mean forget score that a merge into the stored type must not exceed unnoticed


@dataclass(frozen=True)
class AssessmentRows:
    """Rows and references beyond forget and retain, read before any work starts."""

    retain: RecordSet | None = None  # where other rows are to be measured than those trained on
    holdout: RecordSet | None = None
    general: RecordSet | None = None
    target: Results | None = None
    retain_only: Results | None = None
    retain_only_model: str | None = None


def load_assessment_rows(options: UnlearnOptions) -> AssessmentRows:
    """Read the holdout and general rows and the retain-only model's results (or check that it is a model)."""
    results, model = None, None
    given = options.retain_only_model
    if given and given.endswith(".json"):
        results = load_reference(given).results
    elif given:
        model = check_model_source(given, option="--retain-only-model")
    return AssessmentRows(
        holdout=_records(options.holdout, "--holdout", options),
        general=_records(options.general, "--general", options),
        retain_only=results,
        retain_only_model=model,
    )


def check_rows(rows: AssessmentRows, job: Job, options: UnlearnOptions) -> None:
    """Raise InputError, before any work, when the retain-only reference does not fit.

    Results must have been measured on the same forget rows; a model must share the target's vocabulary.
    """
    if rows.retain_only_model is not None:
        theirs = load_tokenizer(rows.retain_only_model, trust_remote_code=options.trust_remote_code)
        if theirs.get_vocab() != job.tokenizer.get_vocab():
            raise InputError(
                f"--retain-only-model '{rows.retain_only_model}' has another vocabulary than the target model.",
                "Train both from the same model and tokenizer (`loku finetune --tokenizer-data` for new models).",
            )
    if options.evaluate and rows.retain_only is not None:
        records = list(job.forget)[: options.eval_rows]
        check_reference(load_reference(rows.retain_only), records, job.forget.sha256, option="--retain-only-model")


def _records(source: str | None, option: str, options: Any) -> RecordSet | None:
    return load_records(source, option=option, data_dir=options.data_dir) if source else None


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
    write_model_card(
        result.adapter,
        run=run.record,
        results=measured["unlearned"].to_json() if measured else None,
        target=measured["target"].to_json() if "target" in measured else None,
        retain_only=measured["retain_only"].to_json() if "retain_only" in measured else None,
        kind="model" if options.tune == "full" else "adapter",
        base_model=options.model or "unknown",
    )
    if measured:
        print_table(measured)
        verdict = measured["unlearned"].verdict
        if verdict:
            console.print(f"[bold]verdict:[/bold] {verdict['level']}. {verdict['sentence']}")
        console.print(f"report: {write_report([run.path], run.path / 'report.html')}")
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
    measured: dict[str, Results] = {}

    def measure(role: str, model: Any, **more: Any) -> Results:
        with progress(f"measuring {name_of(role, options)}") as update:
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
    if rows.retain_only is not None:
        measured["retain_only"] = rows.retain_only
    elif rows.retain_only_model:
        reference = load_model(
            rows.retain_only_model,
            dtype=options.dtype,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
        measured["retain_only"] = measure("retain_only", reference, model_name=rows.retain_only_model)
        del reference
    measured["unlearned"] = measure(
        "unlearned",
        result.model,
        model_name=f"{base} after {options.method}",
        reference=measured.get("retain_only"),
        target=measured.get("target"),
    )
    for role, found in measured.items():
        write_results(found, run.path, role=None if role == "unlearned" else role)
    return measured


def name_of(role: str, options: UnlearnOptions) -> str:
    """Return how a person calls a model of the run."""
    return f"the model after {options.method}" if role == "unlearned" else f"the {role.replace('_', '-')} model"


def print_table(measured: Mapping[str, Results]) -> None:
    """Print the main figures of several models side by side."""
    table = Table("", *measured, box=None, pad_edge=False)
    for heading, name, metric in COLUMNS:
        values = [found.mean(name, metric) for found in measured.values()]
        if any(value is not None for value in values):
            table.add_row(heading, *(_shown(value) for value in values))
    for heading, key in (("model utility", "model_utility"), ("forget quality (p)", "forget_quality")):
        values = [found.summary.get(key) for found in measured.values()]
        if any(value is not None for value in values):
            table.add_row(heading, *(_shown(value) for value in values))
    console.print(table)


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2g}" if 0 < value < 0.005 else f"{value:.3f}"


def evaluate_from_options(options: EvaluateOptions) -> dict[str, Any]:
    """Run `loku evaluate` on a model: measure, write results.json, print. Returns the content of results.json."""
    check_model_source(options.model)
    if options.retain_logs:
        raise InputError("--retain-logs was given without --from-logs.", "Use --reference for a model's reference.")
    if options.suite == "own" and not options.forget:
        raise InputError("--forget is missing.", "Suite own measures your rows; or choose --suite tofu.")
    if not options.output and not options.json:
        raise InputError("--output is missing.", "Give a folder for results.json, or --json to print it.")
    if options.output and Path(options.output).is_file():
        raise InputError(f"--output '{options.output}' is a file.", "Give a folder for results.json.")
    own = {
        name: _records(getattr(options, name), f"--{name}", options)
        for name in ("forget", "retain", "holdout", "general")
    }
    name = str(options.model)
    tokenizer = load_tokenizer(name, trust_remote_code=options.trust_remote_code)
    template = resolve_template(tokenizer, name, options.prompt_template)
    model = load_model(name, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code)
    digest = weights_sha256(model)
    if options.adapter:
        model = load_adapter(model, options.adapter)
    results = _run_suite(model, tokenizer, template, own, options, digest)
    if options.adapter:
        from loku.files import sha256_file

        weights = Path(options.adapter) / "adapter_model.safetensors"
        results.adapter = {"name": options.adapter, "sha256": sha256_file(weights)}
    if options.output:
        path = write_results(results, options.output)
        if not options.json:
            console.print(f"results written to {path}")
    if not options.json:
        print_table({"model": results})
        if results.verdict:
            console.print(f"[bold]verdict:[/bold] {results.verdict['level']}. {results.verdict['sentence']}")
    for warning in results.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return results.to_json()


def _run_suite(
    model: Any,
    tokenizer: Any,
    template: TagTemplate | ChatTemplate,
    own: Mapping[str, RecordSet | None],
    options: EvaluateOptions,
    digest: str,
) -> Results:
    common: dict[str, Any] = {
        "max_rows": options.max_rows,
        "template": template,
        "keep_text": options.keep_text,
        "reference": options.reference,
        "target": options.target,
        "seed": options.seed,
        "model_name": options.model,
        "model_sha256": digest,
    }
    with progress("measuring") as update:
        if options.suite == "tofu":
            sets = tuple(part.strip() for part in options.sets.split(","))
            return evaluate_tofu(
                model,
                tokenizer,
                max_length=options.max_length or TOFU_MAX_LENGTH,
                max_new_tokens=options.max_new_tokens,
                forget_split=options.forget_split,
                data_dir=options.data_dir,
                sets=sets,
                progress=update,
                **common,
            )
        forget = own["forget"]
        assert forget is not None
        rest: dict[str, Any] = {name: found for name, found in own.items() if name != "forget"}
        return evaluate_own(
            model,
            tokenizer,
            forget=forget,
            max_length=options.max_length or OWN_MAX_LENGTH,
            max_new_tokens=options.max_new_tokens,
            progress=update,
            **rest,
            **common,
        )


def evaluate_logs_from_options(options: EvaluateOptions) -> dict[str, Any]:
    """Run `loku evaluate --from-logs`: figures of official TOFU logs, no model needed."""
    assert options.from_logs is not None
    outcome = evaluate_logs(options.from_logs, retain_logs=options.retain_logs)
    for warning in outcome.get("warnings", []):
        print(f"warning: {warning}", file=sys.stderr)
    if not options.json:
        for key, value in outcome.items():
            if isinstance(value, int | float):
                console.print(f"{key}: {value:.6g}")
    return outcome


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
            template=resolve_template(tokenizer, merged, settings["prompt_template"]),
            max_length=settings["max_length"],
            max_new_tokens=settings["max_new_tokens"],
            model_name=str(merged),
            progress=update,
        )
    moved = []
    for metric in ("probability", "rougeL_recall", "extraction_strength"):
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
