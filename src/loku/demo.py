"""`loku demo`: an offline tour on a fictitious corpus, from training to the report, on two cores in a minute."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loku.config import DemoOptions
from loku.data.fiction import Fiction, make_fiction, mix_replay
from loku.demo_steps import METHODS, Step, run_step, start_worker
from loku.errors import InputError, LokuError
from loku.evaluation.results import Results, read_results
from loku.files import check_output_folder, write_json, write_text
from loku.progress import Board, console
from loku.report.html import write_report

MARKER = "demo.json"
WORKERS = 2
WORLD_SHARE = 0.12  # of the retain rows of unlearning
MEMORISED = 0.95  # share of forget answers that the target must give, or there is nothing to unlearn


def demo(options: DemoOptions) -> Path:
    """Invent a corpus, train a target and a retain-only model, unlearn with five methods, evaluate and report.

    Everything is deterministic for a seed and offline. Raises LokuError when the target did not memorise its rows.
    """
    start = time.monotonic()
    folder = _fresh_folder(options.output)
    fiction = make_fiction(options.seed)
    write_corpus(fiction, folder / "data")
    console.print(
        f"[bold]loku demo[/bold] (seed {options.seed}): {len(fiction.full)} facts about people who do not exist; "
        f"{len(fiction.forget)} of them must go"
    )
    with Workers(options.seed) as workers:
        workers.run([Step("pretrain", folder, options.seed)])
        workers.run([Step("target", folder, options.seed), Step("retain-only", folder, options.seed)])
        check_memorised(read_results(folder / "target" / "results.json"), options.seed)
        workers.run([Step(f"unlearn {name}", folder, options.seed) for name in METHODS])
    runs = [folder / "runs" / name for name in METHODS]
    report = write_report(runs, folder / "report.html", title="Five methods on the fictitious corpus")
    print_outcome(folder, runs)
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


def write_corpus(fiction: Fiction, folder: Path) -> None:
    """Write the corpus as JSON lines files, the ordinary input of every verb."""
    for name in ("pretraining", "full", "forget", "retain", "general", "holdout"):
        _write_rows(folder / f"{name}.jsonl", getattr(fiction, name))
    # A little of the world among the retain rows, in other phrasings than those measured: without it, it fades.
    mixed = mix_replay(fiction.retain, fiction.pretraining, share=WORLD_SHARE, seed=fiction.seed)
    _write_rows(folder / "retain-mixed.jsonl", mixed)


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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


@dataclass
class Workers:
    """Two processes of one thread each, and one board of progress for both."""

    seed: int

    def __enter__(self) -> Workers:
        # A fork server imports the libraries once and forks clean workers: no import time in each of them.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["loku.demo_steps"])
        os.environ["OMP_NUM_THREADS"] = "1"
        self._queue = context.Queue()
        self._pool = ProcessPoolExecutor(WORKERS, mp_context=context, initializer=start_worker, initargs=(self._queue,))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, steps: Sequence[Step]) -> None:
        """Run steps side by side, showing their progress. The first error stops the rest."""
        with Board() as board:
            futures = [self._pool.submit(run_step, step) for step in steps]
            while not all(future.done() for future in futures):
                wait(futures, timeout=0.1)
                self._drain(board)
                _raise_first(futures)
            self._drain(board)
            _raise_first(futures)

    def _drain(self, board: Board) -> None:
        while not self._queue.empty():
            board.update(*self._queue.get())


def _raise_first(futures: Sequence[Future[Any]]) -> None:
    for future in futures:
        if future.done():
            future.result()
