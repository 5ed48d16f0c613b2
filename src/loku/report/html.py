"""The report: one HTML file that needs no network and no script."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from loku.files import check_output_file, write_text
from loku.report import charts
from loku.report.artefacts import ROLES, RunFolder, at, read_folders, section
from loku.report.attacks import attack_section
from loku.report.compare import comparison
from loku.report.details import costs, data_counts, importance_rows, layer_figures, provenance
from loku.report.examples import example_sets
from loku.report.figures import all_figures, glance, key_figures, metric_info
from loku.report.numerals import count, duration, figure, memory, moment, percent
from loku.report.recorded import recorded
from loku.report.svg import strip
from loku.report.watched import watched_charts, watched_notes
from loku.report.words import explanation, missing_pieces, not_claimed, verdict

# What the template asks of run.json's "method"; a field that is missing there is None.
METHOD_FIELDS = ("name", "tune", "rank", "forget_loss", "retain_loss", "forget_weight", "retain_weight")


def write_report(folders: Sequence[str | Path], output: str | Path, *, title: str | None = None) -> Path:
    """Write the report of one run, or of several side by side, as one self-contained HTML file.

    A folder is a run folder (run.json) or an evaluation folder (results.json only); pieces that do not exist are
    stated in the report. Raises InputError when a folder is neither, when a file in it is damaged, or when `output`
    cannot be a file.
    """
    check_output_file(output, "Give the HTML file to write.")
    runs = read_folders(folders)
    templates = environment()
    if len(runs) == 1:
        page, content = "run.html.j2", run_content(runs[0])
    else:
        page, content = "compare.html.j2", comparison(runs)
    content["title"] = title or content["title"]
    write_text(output, templates.get_template(page).render(content))
    return Path(output)


def environment() -> Environment:
    """Return the templates with the filters they use."""
    found = Environment(
        loader=PackageLoader("loku.report"),
        autoescape=True,  # for every template: texts of models and data sets are never trusted
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "figure": figure,
        "count": count,
        "percent": percent,
        "duration": duration,
        "memory": memory,
        "strip": strip,
        "prose": prose,
    }
    found.filters.update(filters)
    found.globals["metric_info"] = metric_info
    return found


def prose(text: str) -> Markup:
    """Escape a sentence, then set `code` as code and the apostrophe of a genitive as a typographer would."""
    curly = re.sub(r"(?<=\w)'(?=s\b)", "\N{RIGHT SINGLE QUOTATION MARK}", text)
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(curly))))


def run_content(folder: RunFolder) -> dict[str, Any]:
    """Return what the template of a single run shows."""
    run, results = folder.run, folder.results
    labels = dict(ROLES)
    if run is None:
        labels["unlearned"] = "Evaluated model"  # nobody knows here whether it was unlearned
    forget = at(run, "data", "forget", "name") or at(results.get("unlearned"), "data", "forget", "name")
    model = at(run, "model", "name") or at(results.get("unlearned"), "model", "name")
    texts = example_sets(folder.examples, results)
    curves = charts.curve_charts(folder.curves)
    layers = layer_figures(run)
    mode = at(run, "importance", "mode")
    what = "Unlearning" if run is not None else "Evaluation of"
    return {
        "title": f"{what} {forget or model or folder.name}" + (f" in {model}" if forget and model else ""),
        "folder": folder.name,
        "run": run,
        "status": at(run, "status"),
        "started": moment(at(run, "started")),
        "method": dict.fromkeys(METHOD_FIELDS) | section(run, "method"),
        "labels": {role: labels[role] for role in ROLES if role in results},
        "verdict": verdict(results.get("unlearned")),
        "explanation": explanation(results, evaluated="unlearned" if run is not None else "evaluated"),
        "not_claimed": not_claimed(run, results, folder.attacks),
        "missing": missing_pieces(run, results, has_texts=bool(texts), has_curves=bool(folder.curves))
        + folder.problems,
        "glance": glance(results),
        "groups": key_figures(results),
        "all_figures": all_figures(results),
        "example_sets": texts,
        "truth": charts.truth_chart(results, "truth-chart", labels),
        "curves": curves,
        "watched": watched_charts(folder.watched, run),
        "watched_notes": watched_notes(run),
        "importance": charts.importance(layers, "importance-chart", mode == "activations") if layers else None,
        "importance_mode": mode,
        "initialiser": at(run, "initialisation", "initialiser") or at(run, "method", "initialiser"),
        "importance_rows": importance_rows(layers),
        "attacks": attack_section(folder.attacks),
        "costs": costs(run),
        "data": data_counts(run, results),
        "config": folder.config,
        "provenance": provenance(folder),
        "record": recorded(folder.record),
    }
