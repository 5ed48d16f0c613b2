"""What each verb of the command line does: load what the options name, call the library, print the outcome."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.table import Table
from rich.text import Text

from loku.config import (
    AttackOptions,
    BenchOptions,
    DemoOptions,
    EvaluateOptions,
    ExportOptions,
    FinetuneOptions,
    ImportanceOptions,
    RecordOptions,
    ReferenceOptions,
    ReportOptions,
    UnlearnOptions,
    VerifyOptions,
)
from loku.errors import InputError
from loku.files import check_output_file
from loku.methods import METHODS
from loku.progress import console
from loku.quiet import quiet_libraries

Options = TypeVar("Options")


def quietly(verb: Callable[[Options], None]) -> Callable[[Options], None]:
    """Keep the libraries quiet while a verb runs."""

    @functools.wraps(verb)
    def wrapped(options: Options) -> None:
        quiet_libraries()
        verb(options)

    return wrapped


def methods(_: None = None) -> None:
    """List every method: family, needs, cost, when to use it."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, method in METHODS.items():
        table.add_row(Text(name, style="bold"), "", f"{method.family} ({method.source})")
        for label in ("when", "needs", "cost"):
            table.add_row("", label, getattr(method, label))
    console.print(table)


@quietly
def finetune(options: FinetuneOptions) -> None:
    """Train a target or a retain-only model."""
    from loku.finetune import finetune as run

    run(options)


@quietly
def reference(options: ReferenceOptions) -> None:
    """Train and measure the retain-only model."""
    from loku.retain_only import reference as run

    run(options)


@quietly
def unlearn(options: UnlearnOptions) -> None:
    """Do the main job, from loading to the report."""
    from loku.assessment import assess, check_rows
    from loku.assessment_rows import load_assessment_rows
    from loku.data.prompts import resolve_template
    from loku.job import load_rows, load_target, prepare
    from loku.models import check_model_source, load_config, load_tokenizer
    from loku.plan import print_plan
    from loku.runs import RunFolder
    from loku.training import run_job

    check_model_source(options.model)
    assert options.model is not None
    run = RunFolder.check(options.output, options.as_dict())
    if run.finished:
        console.print(f"{run.path} is finished: nothing to do. Its report is {run.path / 'report.html'}.")
        return
    forget, retain = load_rows(options)
    extra = load_assessment_rows(options)
    load_config(options.model, trust_remote_code=options.trust_remote_code)
    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    resolve_template(tokenizer, options.model, options.prompt_template)
    model = load_target(options)
    job = prepare(model, tokenizer, forget, retain, options)
    check_rows(extra, job, options)
    print_plan(job, run, options)
    result = run_job(job, run, options, extra)
    assess(result, job, run, options, extra)


@quietly
def importance(options: ImportanceOptions) -> None:
    """Estimate Fisher importance and write it to a file."""
    from loku.adapters.layers import target_layers
    from loku.evidence import importance_provenance, measure_importance, partial_folder
    from loku.job import load_rows, load_target, prepare
    from loku.models import check_model_source, load_tokenizer, weights_sha256

    if not options.output:
        raise InputError("--output is missing.", "Give a file name ending in .safetensors.")
    check_output_file(options.output, "Give a file name ending in .safetensors.")
    check_model_source(options.model)
    settings = UnlearnOptions(
        **{name: value for name, value in options.as_dict().items() if name in UnlearnOptions.fields()}
    )
    settings.rank = 1  # no adapter is made: any layer is wide enough
    forget, retain = load_rows(settings)
    tokenizer = load_tokenizer(str(options.model), trust_remote_code=options.trust_remote_code)
    model = load_target(settings)
    job = prepare(model, tokenizer, forget, retain, settings)
    layers = target_layers(model, options.targets)
    provenance = importance_provenance(job, options.init, options, weights_sha256(model))
    partial = partial_folder(options.output)
    measured = measure_importance(job, options.init, options, layers, provenance, partial=partial)
    measured.save(options.output)
    console.print(f"importance of {len(measured.layers)} layers written to {options.output}")


@quietly
def evaluate(options: EvaluateOptions) -> None:
    """Measure a model or adapter, or official TOFU logs."""
    from loku.evaluate import (
        compare_from_options,
        evaluate_from_options,
        evaluate_logs_from_options,
        seeds_from_options,
    )

    if options.compare:
        outcome = compare_from_options(options)
    elif options.seeds:
        outcome = seeds_from_options(options)
    elif options.from_logs:
        outcome = evaluate_logs_from_options(options)
    else:
        outcome = evaluate_from_options(options)
    if options.json:
        json.dump(outcome, sys.stdout, indent=2, allow_nan=False)
        sys.stdout.write("\n")


@quietly
def attack(options: AttackOptions) -> None:
    """Try to bring the knowledge back."""
    from loku.attack import attack as run

    outcome = run(options)
    if options.json:
        json.dump(outcome, sys.stdout, indent=2, allow_nan=False)
        sys.stdout.write("\n")


@quietly
def export(options: ExportOptions) -> None:
    """Write an ordinary LoRA, a truncated one, or a merged model."""
    from loku.release import export as run

    run(options)


@quietly
def record(options: RecordOptions) -> None:
    """Write the unlearning record of a finished run."""
    from loku.record import record_from_options

    console.print(f"record written to {record_from_options(options)}")


@quietly
def verify(options: VerifyOptions) -> None:
    """Compare a record with what is there, and say what differs."""
    from loku.verify import verify_from_options

    verify_from_options(options)


def report(options: ReportOptions) -> None:
    """Write one run, or several side by side, as HTML."""
    from loku.report.html import write_report

    folders = [Path(folder) for folder in options.folders]
    output = Path(options.output) if options.output else folders[0] / "report.html"
    console.print(f"report written to {write_report(folders, output, title=options.title)}")


def demo(options: DemoOptions) -> None:
    """Run the offline tour."""
    from loku.demo import demo as run

    run(options)


@quietly
def bench(options: BenchOptions) -> None:
    """Run a grid of methods and seeds from a recipe."""
    from loku.bench.runner import bench as run

    run(options)
