"""`loku bench`: print what it costs, run what is missing, write the page."""

from __future__ import annotations

import shutil
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from loku.bench.leaderboard import write_leaderboard
from loku.bench.recipe import load_recipe
from loku.bench.schedule import Schedule
from loku.bench.store import Task, write_collection
from loku.bench.workers import check_backend, cores, workers
from loku.config import BenchOptions
from loku.errors import InputError, LokuError
from loku.files import check_output_folder, write_json
from loku.progress import Update, console, progress


def bench(options: BenchOptions) -> Path:
    """Run a benchmark's grid and return the leaderboard's path. Runs whose JSON is there are not run again."""
    recipe = load_recipe(options.recipe)
    check_backend(options.backend)
    root = check_output_folder(options.output or f"bench/{recipe.name}")
    schedule = Schedule(recipe, str(root))
    count = options.workers or cores()
    console.print(describe(schedule, count))
    if options.dry_run:
        from loku.bench.dry_run import dry_run

        found = dry_run(recipe)
        console.print(found.table())
        for note in found.notes:
            console.print(f"note: {note}")
        return root
    root.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(str(options.recipe), root / "recipe.yaml")
    failures: list[str] = []
    try:
        with progress(recipe.name) as update:
            failures = _run(schedule, options, count, update)
    finally:  # a page of what is there, also after an interruption
        page = write_outcome(schedule, root)
    if failures:
        raise LokuError(
            f"{len(failures)} of the runs failed: {'; '.join(failures[:3])}",
            "What was written is kept; run the same command again to repeat them.",
        )
    console.print(f"leaderboard: {page}")
    return page


def describe(schedule: Schedule, workers: int) -> str:
    """Return what a benchmark is to do, and its core-hours."""
    recipe, counts = schedule.recipe, schedule.counts()
    hours = schedule.core_hours()
    cost = "unknown until the first runs are done" if hours is None else f"about {hours:.2f} core-hours"
    return (
        f"{recipe.title}: {len(recipe.arms)} arms, seeds {', '.join(map(str, recipe.seeds))}; {counts['models']} sets "
        f"of models, {counts['tuning']} tuning runs, {counts['final']} runs; {schedule.done()} done.\n"
        f"Still to come: {cost}, on {workers} workers."
    )


def write_outcome(schedule: Schedule, root: Path) -> Path:
    """Write the tuning's choices, the collected runs and the leaderboard."""
    recipe = schedule.recipe
    choices: dict[str, Any] = {}
    for arm in recipe.arms:
        found = schedule.chosen(arm)
        if found is not None:
            choices[arm.name] = {"point": dict(found[0]), "tuned_as": recipe.tuned_as(arm).name, "scores": found[1]}
    write_json(root / "chosen.json", {"rule": recipe.tuning.choose, "arms": choices})
    models = [schedule.record(schedule.models(seed)) for seed in recipe.seeds]
    measured = [found for found in models if found is not None]
    write_collection([*measured, *schedule.finished()], root / "runs.jsonl")
    return write_leaderboard(recipe, measured, schedule.finished(), choices, root)


def _run(schedule: Schedule, options: BenchOptions, count: int, update: Update) -> list[str]:
    """Run everything that is missing. The first InputError ends it: the recipe or the data cannot be used."""
    counts = schedule.counts()
    total, done = sum(counts.values()), schedule.done()
    pending: dict[Future[str], Task] = {}
    begun: set[Path] = set()
    failures: list[str] = []
    with workers(options.backend, count, options.ray_address) as submit:
        while True:
            for task in schedule.ready():
                if task.path not in begun:
                    begun.add(task.path)
                    pending[submit(task)] = task
            if not pending:
                return failures
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                task = pending.pop(future)
                error = future.exception()
                if isinstance(error, InputError):
                    raise error
                if error is not None:
                    failures.append(f"{task.label}: {error!r}")
                done += 1
                update(done, total, task.label)
