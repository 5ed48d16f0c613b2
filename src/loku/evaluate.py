"""`loku evaluate`: a model or an adapter on a suite, or official TOFU logs, from options to results on disk."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from loku.assessment import in_order, print_table
from loku.config import EvaluateOptions
from loku.data.prompts import resolve_template
from loku.errors import InputError
from loku.evaluation.assembly import read_target
from loku.evaluation.cache import BatchCache
from loku.evaluation.log_figures import evaluate_logs
from loku.evaluation.official_logs import official_log
from loku.evaluation.open_unlearning import write_evaluation
from loku.evaluation.paired import across_seeds, compare
from loku.evaluation.reference import load_reference
from loku.evaluation.results import Results, read_results, write_results
from loku.evaluation.sharing import is_first, several_processes
from loku.evaluation.utility import utility_figures
from loku.files import check_output_folder, json_text, read_object, sha256_file, sha256_json, write_json, write_text
from loku.finished import CACHE, evaluation_request, finished_results, remember
from loku.models import check_model_source, load_adapter, load_model, load_tokenizer, weights_sha256
from loku.progress import console, progress, say
from loku.suites import Loaded, Work, check_suite, prepare_suite

LOG_RESULTS, COMPARISON, SEEDS = "results_from_logs.json", "comparison.json", "seeds.json"
LOG_COLUMNS = {
    "probability": "probability",
    "ROUGE-L": "rougeL_recall",
    "truth ratio": "truth_ratio",
    "(arithmetic)": "truth_ratio_arithmetic",
}
NOTHING_LOST = "Choose another folder: nothing there is overwritten."
RUNS = ("unlearn", "demo")  # commands whose folders hold a results.json of their own


def evaluate_from_options(options: EvaluateOptions, role: str = "model") -> dict[str, Any]:
    """Run `loku evaluate` on a model: measure, write results.json, print. Returns the content of results.json.

    With the role "retain_only" there is no verdict: nothing was unlearned from that model.

    A folder that holds the results of the same call answers at once, and an interrupted evaluation goes on from the
    scores in its cache. Under torchrun the processes share the work, and the first one writes and speaks.

    Raises InputError before anything is measured, also when the folder holds a run or the results of something else.
    """
    check_model_source(options.model)
    _check_options(options)
    if options.output:
        check_no_run(options.output)
    work = prepare_suite(options)
    request = evaluation_request(options, work.hashes) if options.output and options.cache else None
    known = finished_results(options.output, request) if options.output else None
    with several_processes():
        results = known or _measured(options, work, request, role)
        if is_first():
            _show(results, options, role, again=known is not None)
    return results.to_json()


def _measured(options: EvaluateOptions, work: Work, request: str | None, role: str) -> Results:
    """Load the model, measure it, and write the results."""
    work.check()
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
        check_same_evaluation(options.output, options.suite, digest, adapter.get("sha256"), work.hashes)
    cache = None
    if options.output and options.cache:
        key = sha256_json([digest, _adapter_files(options.adapter), str(model.dtype)])
        cache = BatchCache(Path(options.output) / CACHE / "batches", key, keep_text=options.keep_text)
    with progress("measuring") as update:
        results = work.run(Loaded(model, tokenizer, template, digest, cache), update)
    results.adapter = adapter or None
    if role == "retain_only":
        results.verdict = None
    if options.output and is_first():
        write_results(results, options.output)
        if options.write_logs:
            write_logs(results, options.output, options.write_logs)
        remember(options.output, request)
    return results


def _show(results: Results, options: EvaluateOptions, role: str, *, again: bool) -> None:
    """Print what was measured, unless one JSON object was asked for, and the warnings in any case."""
    if options.output and not options.json:
        said = "the same was measured before: results are in" if again else "results written to"
        console.print(f"{said} {Path(options.output) / 'results.json'}")
    if not options.json:
        beside = _beside(options)
        if results.suite in ("own", "tofu"):
            print_table({role: results} | beside)
            _print_membership(results)
            for name, figure in utility_figures(results).items():
                console.print(f"{name}: {figure:.4g}")
        else:
            print_suite(results, beside)
        if results.verdict:
            say("verdict:", f" {results.verdict['level']}. {results.verdict['sentence']}")
    for warning in results.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _beside(options: EvaluateOptions) -> dict[str, Results]:
    """Return the results of the target and of the retain-only model, where they were given."""
    found = {"target": read_target(options.target)} if options.target else {}
    reference = load_reference(options.reference).results if options.reference else None
    return found if reference is None else found | {"retain_only": reference}


def _check_options(options: EvaluateOptions) -> None:
    """Raise InputError for options that do not go together."""
    if options.retain_logs:
        raise InputError("--retain-logs was given without --from-logs.", "Use --reference for a model's reference.")
    check_suite(options)
    if options.write_logs and not options.output:
        raise InputError("--write-logs was given without --output.", "Give a folder for the log.")
    if options.write_logs and options.suite != "tofu":
        raise InputError(f"--write-logs was given with --suite {options.suite}.", "Those formats are TOFU's.")
    if not options.output and not options.json:
        raise InputError("--output is missing.", "Give a folder for results.json, or --json to print it.")
    _beside(options)  # what cannot be read is refused now


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


def write_logs(results: Results, output: str, form: str) -> list[Path]:
    """Write results in another project's format into a folder; texts only where they were kept. Returns the files."""
    folder = Path(output)
    files: dict[Path, Any]
    if form == "tofu":
        files = {folder / "eval_log_aggregated.json": official_log(results)}
    else:
        evaluation, summary = write_evaluation(results)
        files = {folder / "TOFU_EVAL.json": evaluation, folder / "TOFU_SUMMARY.json": summary}
    for file, value in files.items():
        write_json(file, value)
    return list(files)


def compare_from_options(options: EvaluateOptions) -> dict[str, Any]:
    """Run `loku evaluate --compare a b`: paired differences of two results files of the same rows.

    With --output they are also written to comparison.json there. Raises InputError for results that do not compare.
    """
    first, second = options.compare
    outcome = compare(*map(_results, (first, second)), names=(first, second), seed=options.seed)
    table = Table("", "a", "b", "b - a", "95 % interval", "p", box=None, pad_edge=False)
    for name, found in outcome["sets"].items():
        table.add_row(Text(name, style="bold"))
        for metric, row in found.items():
            figures = [f"{row[key]:.3g}" for key in ("a", "b", "difference")]
            table.add_row(metric, *figures, f"{row['low']:.3g} to {row['high']:.3g}", f"{row['p']:.2g}")
    return _finish(outcome, options, table, COMPARISON)


def seeds_from_options(options: EvaluateOptions) -> dict[str, Any]:
    """Run `loku evaluate --seeds a b c`: mean, deviation and interval over runs. With --output also to seeds.json."""
    outcome = across_seeds([_results(path) for path in options.seeds])
    table = Table("", "mean", "deviation", "95 % interval", box=None, pad_edge=False)
    for name, found in (outcome["sets"] | {"summary": outcome["summary"]}).items():
        table.add_row(Text(name, style="bold"))
        for metric, row in found.items():
            known = row["deviation"] is not None
            more = [f"{row['deviation']:.3g}", f"{row['low']:.3g} to {row['high']:.3g}"] if known else ["-", "-"]
            table.add_row(metric, f"{row['mean']:.4g}", *more)
    return _finish(outcome, options, table, SEEDS)


def _results(path: str) -> Results:
    return read_results(Path(path) / "results.json" if Path(path).is_dir() else path)


def _finish(outcome: dict[str, Any], options: EvaluateOptions, table: Table, name: str) -> dict[str, Any]:
    """Write and print what was worked out from results files."""
    folder = check_output_folder(options.output, f"Give a folder for {name}.") if options.output else None
    for warning in outcome.get("warnings", ()):
        print(f"warning: {warning}", file=sys.stderr)
    if folder is not None:
        write_json(folder / name, outcome)
    if not options.json:
        console.print(table)
        if folder is not None:
            console.print(f"results written to {folder / name}")
    return outcome


def print_suite(results: Results, beside: Mapping[str, Results] | None = None) -> None:
    """Print a benchmark's own figures and the means of its sets; beside them the target's and the retain-only's."""
    others = in_order(beside or {})
    heads = [name.replace("_", "-") for name in others]
    table = Table("", "mean", "95 % interval", "rows", *heads, box=None, pad_edge=False)
    for name, found in results.sets.items():
        for metric, value in found.metrics.items():
            theirs = [other.mean(name, metric) for other in others.values()]
            table.add_row(
                f"{name} {metric}", f"{value.mean:.4g}", f"{value.low:.4g} to {value.high:.4g}", str(found.rows),
                *("-" if mean is None else f"{mean:.4g}" for mean in theirs),
            )  # fmt: skip
    console.print(table)
    for name, figure in results.summary.items():
        known = {head: other.summary.get(name) for head, other in zip(heads, others.values(), strict=True)}
        more = ", ".join(f"{head} {value:.4g}" for head, value in known.items() if value is not None)
        console.print(f"{name}: {figure:.4g}" + (f" ({more})" if more else ""))


def _print_membership(results: Results) -> None:
    """Print the AUCs of membership attacks, each with its distance from the retain-only model's where there is one."""
    for name, value in results.summary.items():
        if name.startswith(("mia_auc", "priv_leak")) and not name.endswith("_distance"):
            distance = results.summary.get(f"{name}_distance")
            more = "" if distance is None else f" ({distance:.3f} from the retain-only model's)"
            console.print(f"{name}: {value:.3f}{more}")


def _print_logs(outcome: Mapping[str, Any]) -> None:
    """Print the figures of every set, and what follows from them."""
    table = Table("", "rows", *LOG_COLUMNS, box=None, pad_edge=False)
    for name, values in outcome["sets"].items():
        table.add_row(name, str(values["rows"]), *(f"{values[key]:.4f}" for key in LOG_COLUMNS.values()))
    console.print(table)
    for key, value in outcome.items():
        if isinstance(value, int | float):
            console.print(f"{key}: {value:.6g}")
