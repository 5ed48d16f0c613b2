"""`loku evaluate`: a model or an adapter on a suite, or official TOFU logs, from options to results on disk."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from loku.assessment import print_table
from loku.config import EvaluateOptions
from loku.data.prompts import ChatTemplate, TagTemplate, resolve_template
from loku.data.sources import RecordSet, load_records
from loku.errors import InputError
from loku.evaluation.cache import BatchCache
from loku.evaluation.logs import evaluate_logs
from loku.evaluation.own import evaluate_own
from loku.evaluation.results import Results, read_results, write_results
from loku.evaluation.sharing import is_first, several_processes
from loku.evaluation.tofu import evaluate_tofu, load_sets
from loku.files import check_output_folder, json_text, read_object, sha256_file, sha256_json, write_text
from loku.finished import CACHE, evaluation_request, finished_results, remember
from loku.models import check_model_source, load_adapter, load_model, load_tokenizer, weights_sha256
from loku.progress import console, progress

OWN_MAX_LENGTH, TOFU_MAX_LENGTH = 500, 200  # tokens; TOFU's counts the prompt
LOG_RESULTS = "results_from_logs.json"
LOG_COLUMNS = {
    "probability": "probability",
    "ROUGE-L": "rougeL_recall",
    "truth ratio": "truth_ratio",
    "(arithmetic)": "truth_ratio_arithmetic",
}
NOTHING_LOST = "Choose another folder: nothing there is overwritten."
RUNS = ("unlearn", "demo")  # commands whose folders hold a results.json of their own


def evaluate_from_options(options: EvaluateOptions) -> dict[str, Any]:
    """Run `loku evaluate` on a model: measure, write results.json, print. Returns the content of results.json.

    A folder that holds the results of the same call answers at once, and an interrupted evaluation goes on from the
    scores in its cache. Under torchrun the processes share the work, and the first one writes and speaks.

    Raises InputError before anything is measured, also when the folder holds a run or the results of something else.
    """
    check_model_source(options.model)
    if options.retain_logs:
        raise InputError("--retain-logs was given without --from-logs.", "Use --reference for a model's reference.")
    if options.suite == "own" and not options.forget:
        raise InputError("--forget is missing.", "Suite own measures your rows; or choose --suite tofu.")
    if not options.output and not options.json:
        raise InputError("--output is missing.", "Give a folder for results.json, or --json to print it.")
    if options.output:
        check_no_run(options.output)
    sets = _sets(options)
    request = evaluation_request(options, sets) if options.output and options.cache else None
    known = finished_results(options.output, request) if options.output else None
    with several_processes():
        results = known or _measured(options, sets, request)
        if is_first():
            _show(results, options, again=known is not None)
    return results.to_json()


def _measured(options: EvaluateOptions, sets: Mapping[str, RecordSet], request: str | None) -> Results:
    """Load the model, measure it, and write the results."""
    name = str(options.model)
    tokenizer = load_tokenizer(name, trust_remote_code=options.trust_remote_code)
    template = resolve_template(tokenizer, name, options.prompt_template)
    model = load_model(
        name,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        quantised=True,
    )
    digest = weights_sha256(model)
    adapter: dict[str, str | None] = {}
    if options.adapter:
        model = load_adapter(model, options.adapter)
        adapter = {"name": options.adapter, "sha256": _adapter_sha256(Path(options.adapter))}
    if options.output:
        data = {name: found.sha256 for name, found in sets.items()}
        check_same_evaluation(options.output, options.suite, digest, adapter.get("sha256"), data)
    cache = None
    if options.output and options.cache:
        key = sha256_json([digest, _adapter_files(options.adapter), str(model.dtype)])
        cache = BatchCache(Path(options.output) / CACHE / "batches", key, keep_text=options.keep_text)
    results = _run_suite(model, tokenizer, template, sets, options, digest, cache)
    results.adapter = adapter or None
    if options.output and is_first():
        write_results(results, options.output)
        remember(options.output, request)
    return results


def _show(results: Results, options: EvaluateOptions, *, again: bool) -> None:
    """Print what was measured, unless one JSON object was asked for, and the warnings in any case."""
    if options.output and not options.json:
        said = "the same was measured before: results are in" if again else "results written to"
        console.print(f"{said} {Path(options.output) / 'results.json'}")
    if not options.json:
        print_table({"model": results})
        if results.verdict:
            console.print(f"[bold]verdict:[/bold] {results.verdict['level']}. {results.verdict['sentence']}")
    for warning in results.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _sets(options: EvaluateOptions) -> dict[str, RecordSet]:
    """Read the rows to measure, by set."""
    if options.suite == "tofu":
        chosen = tuple(part.strip() for part in options.sets.split(","))
        return load_sets(options.forget_split, options.data_dir, chosen)
    given = {name: getattr(options, name) for name in ("forget", "retain", "holdout", "general")}
    return {
        name: load_records(source, option=f"--{name}", data_dir=options.data_dir)
        for name, source in given.items()
        if source
    }


def _adapter_sha256(folder: Path) -> str | None:
    """Return the hash of an adapter's weights, in whichever of PEFT's two files they are."""
    files = (folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    return next((sha256_file(file) for file in files if file.is_file()), None)


def _adapter_files(folder: str | None) -> list[str | None]:
    """Return hashes of an adapter's weights and of its configuration, which says how much they count."""
    if folder is None:
        return []
    return [_adapter_sha256(Path(folder)), sha256_file(Path(folder) / "adapter_config.json")]


def check_no_run(output: str) -> None:
    """Raise InputError when results cannot be written to a folder, or would replace those of an unlearning run."""
    record = check_output_folder(output, "Give a folder for results.json.") / "run.json"
    command = read_object(record, "Choose another folder.").get("command") if record.is_file() else None
    if command in RUNS:
        raise InputError(f"--output '{output}' holds a run of `loku {command}` with its own results.", NOTHING_LOST)


def check_same_evaluation(output: str, suite: str, model: str, adapter: str | None, data: Mapping[str, str]) -> None:
    """Raise InputError when a folder holds results of something else; models, adapters and rows count by their hash.

    The same evaluation may be repeated, with other settings too.
    """
    file = Path(output) / "results.json"
    if not file.is_file():
        return
    found = read_results(file)
    pairs = {
        "suite": (found.suite, suite),
        "model": (found.model.get("sha256"), model),
        "adapter": ((found.adapter or {}).get("sha256"), adapter),
        "data": ({name: item.get("sha256") for name, item in found.data.items()}, dict(data)),
    }
    other = [name for name, (there, here) in pairs.items() if there != here]
    if other:
        raise InputError(
            f"--output '{output}' holds results of something else (other {', '.join(other)}).", NOTHING_LOST
        )


def _run_suite(
    model: Any,
    tokenizer: Any,
    template: TagTemplate | ChatTemplate,
    sets: Mapping[str, RecordSet],
    options: EvaluateOptions,
    digest: str,
    cache: BatchCache | None,
) -> Results:
    common: dict[str, Any] = {
        "max_rows": options.max_rows,
        "max_new_tokens": options.max_new_tokens,
        "template": template,
        "keep_text": options.keep_text,
        "reference": options.reference,
        "target": options.target,
        "seed": options.seed,
        "model_name": options.model,
        "model_sha256": digest,
        "cache": cache,
    }
    with progress("measuring") as update:
        if options.suite == "tofu":
            return evaluate_tofu(
                model,
                tokenizer,
                max_length=options.max_length or TOFU_MAX_LENGTH,
                forget_split=options.forget_split,
                sets=tuple(sets),
                sources=sets,
                progress=update,
                **common,
            )
        return evaluate_own(
            model,
            tokenizer,
            forget=sets["forget"],
            retain=sets.get("retain"),
            holdout=sets.get("holdout"),
            general=sets.get("general"),
            max_length=options.max_length or OWN_MAX_LENGTH,
            progress=update,
            **common,
        )


def evaluate_logs_from_options(options: EvaluateOptions) -> dict[str, Any]:
    """Run `loku evaluate --from-logs`: figures of official TOFU logs, no model needed.

    With --output the JSON object is also written there. Raises InputError for logs that cannot be used, and when the
    folder holds the figures of other logs.
    """
    assert options.from_logs is not None
    folder = check_output_folder(options.output, f"Give a folder for {LOG_RESULTS}.") if options.output else None
    outcome = evaluate_logs(options.from_logs, retain_logs=options.retain_logs)
    for warning in outcome["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if folder is not None:
        file, text = folder / LOG_RESULTS, json_text(outcome)
        if file.exists() and file.read_bytes() != text.encode():
            raise InputError(f"--output '{folder}' holds the figures of other logs.", NOTHING_LOST)
        write_text(file, text)
    if not options.json:
        _print_logs(outcome)
        if folder is not None:
            console.print(f"results written to {folder / LOG_RESULTS}")
    return outcome


def _print_logs(outcome: Mapping[str, Any]) -> None:
    """Print the figures of every set, and what follows from them."""
    table = Table("", "rows", *LOG_COLUMNS, box=None, pad_edge=False)
    for name, values in outcome["sets"].items():
        table.add_row(name, str(values["rows"]), *(f"{values[key]:.4f}" for key in LOG_COLUMNS.values()))
    console.print(table)
    for key, value in outcome.items():
        if isinstance(value, int | float):
            console.print(f"{key}: {value:.6g}")
