"""`loku demo`: an offline tour on a fictitious corpus, from training to the report, on two cores in a minute."""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loku.config import DemoOptions
from loku.corpora.fiction import write_fiction
from loku.data.fiction import make_fiction
from loku.demo_workers import Step, Workers
from loku.errors import InputError, LokuError
from loku.files import check_output_folder, read_json, write_json
from loku.progress import console, say

if TYPE_CHECKING:
    from loku.evaluation.results import Results

METHODS = ("ga", "graddiff", "npo", "ihl", "loku")
ATTACKED = ("loku", "ihl")  # with --full
STEPS, REPORT = "loku.demo_steps", "loku.report.html"
MARKER = "demo.json"
MEMORISED = 0.95  # share of forget answers that the target must give, or there is nothing to unlearn


def demo(options: DemoOptions) -> Path:
    """Invent a corpus, train a target and a retain-only model, unlearn with five methods, evaluate and report.

    Everything is deterministic for a seed and offline. Raises LokuError when the target did not memorise its rows.
    """
    start = time.monotonic()
    folder = _fresh_folder(options.output)
    fiction = make_fiction(options.seed)
    write_fiction(fiction, folder / "data")
    say(
        "loku demo",
        f" (seed {options.seed}): {len(fiction.full)} facts about people who do not exist; "
        f"{len(fiction.forget)} of them must go",
    )
    with Workers(STEPS) as workers:
        # What the report needs is imported while the first step occupies one core; the trainings need both.
        workers.run([Step("pretrain", folder, options.seed)], meanwhile=lambda: importlib.import_module(REPORT))
        from loku.evaluation.results import read_results
        from loku.report.html import write_report

        workers.run([Step("target", folder, options.seed), Step("retain-only", folder, options.seed)])
        check_memorised(read_results(folder / "target" / "results.json"), options.seed)
        # The longest first, so that both cores end together.
        workers.run([Step(f"unlearn {name}", folder, options.seed) for name in reversed(METHODS)])
        if options.full:
            console.print(f"attacks on {' and '.join(ATTACKED)}: every one that loku knows, on three models each")
            workers.run([Step(f"attack {name}", folder, options.seed) for name in ATTACKED])
    runs = [folder / "runs" / name for name in METHODS]
    report = write_report(runs, folder / "report.html", title="Five methods on the fictitious corpus")
    print_outcome(folder, runs)
    if options.full:
        print_attacks(folder)
    console.print(f"\nreport: {report}  (one page a run: {runs[-1] / 'report.html'})")
    console.print(f"{time.monotonic() - start:.0f} s")
    return folder


def _fresh_folder(output: str) -> Path:
    """Return an empty folder; only a former demo is replaced."""
    folder = check_output_folder(output, "Choose a new folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise InputError(f"--output '{output}' is not empty and holds no demo.", "Choose a new folder.")
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_json(folder / MARKER, {"made_by": "loku demo"})
    return folder


def check_memorised(target: Results, seed: int) -> None:
    """Raise LokuError when the target does not know what it is to forget."""
    known = target.mean("forget", "exact_match") or 0.0
    if known < MEMORISED:
        raise LokuError(
            f"The target model memorised only {known:.0%} of the forget rows (seed {seed}).",
            "Nothing can be unlearnt that was not learnt: choose another --seed.",
        )


def print_outcome(folder: Path, runs: Sequence[Path]) -> None:
    """Print the table: target above, the methods, retain-only below, with verdicts."""
    from rich.table import Table

    from loku.evaluation.results import read_results

    columns = {
        "forget\nacc.": ("forget", "exact_match"),
        "forget\nprob.": ("forget", "probability"),
        "truth\nratio": ("forget", "truth_ratio"),
        "retain\nacc.": ("retain", "exact_match"),
        "world\nacc.": ("general", "exact_match"),
    }
    headings = ("\nmodel", *columns, "model\nutility", "forget\nquality", "\nverdict")
    table = Table(*headings, box=None, pad_edge=False, padding=(0, 1, 0, 0))  # 80 characters are enough for it
    models = {"target": folder / "target", **{run.name: run for run in runs}, "retain-only": folder / "retain-only"}
    for name, place in models.items():
        results = read_results(place / "results.json")
        values = [results.mean(*column) for column in columns.values()]
        quality = results.summary.get("forget_quality")
        table.add_row(
            name,
            *("-" if value is None else f"{value:.2f}" for value in values),
            f"{results.summary['model_utility']:.2f}",
            "-" if quality is None else f"{quality:.2g}",
            results.verdict["level"] if results.verdict and place in runs else "-",
        )
    console.print(table)
    console.print("Zero is not the goal: the nearer to the retain-only row in every column, the better.")


def print_attacks(folder: Path) -> None:
    """Print what the attacks conclude, and where each attack's figures stand."""
    for name in ATTACKED:
        headline = read_json(folder / "runs" / name / "attacks.json")["summary"]["headline"]
        say(f"\nunder attack, {name}", f": {headline['level']}. {headline['sentence']}")
        console.print(f"every attack: {folder / 'runs' / name / 'report.html'}")
