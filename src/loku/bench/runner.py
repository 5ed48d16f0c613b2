"""`loku bench`: check the recipe, print what it costs, run what is missing, write the page."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loku.bench.checks import check_inputs
from loku.bench.compact import compact
from loku.bench.extending import plain_text, read_yaml
from loku.bench.leaderboard import write_leaderboard
from loku.bench.recipe import Recipe, load_recipe
from loku.bench.schedule import Schedule
from loku.bench.store import Task, write_collection
from loku.bench.workers import Outcome, Workers, check_backend, default_count, workers
from loku.config import BenchOptions
from loku.errors import InputError, LokuError, suggestion
from loku.files import check_output_folder, write_json, write_text
from loku.progress import Update, console, progress, say

AGAIN = "What was written is kept; run the same command again to repeat them."


def bench(options: BenchOptions) -> Path:
    """Run a benchmark's grid and return the leaderboard's path. Runs whose JSON is there are not run again.

    Raises InputError before anything is trained when recipe, rows or models cannot be used, and LokuError at the end
    when runs failed; the page is written all the same.
    """
    recipe = load_recipe(options.recipe)
    check_backend(options.backend, options.ray_address)
    _check_names(options.only, recipe)
    root = check_output_folder(options.output or f"bench/{recipe.name}").absolute()
    _check_root(root, recipe)
    schedule = Schedule(recipe, str(root), tuple(options.only))
    if schedule.ready() and not options.dry_run:
        check_inputs(recipe, str(root))
    gpu = recipe.unlearn.get("device") != "cpu"
    console.print(describe(schedule, options.workers or (default_count(gpu=gpu) if options.backend == "local" else 0)))
    if options.dry_run:
        _resolve(replace(recipe, arms=tuple(schedule.arms)))
        check_inputs(recipe, str(root))
        return root
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        write_text(root / "recipe.yaml", plain_text(Path(str(options.recipe))))
        grid = Grid(schedule, options.time_limit)
        try:
            if schedule.ready():
                with (
                    workers(options.backend, options.workers, options.ray_address, gpu=gpu) as found,
                    progress(recipe.name) as update,
                ):
                    grid.run(found, update)
        finally:  # a page of what is there, also after an interruption
            page = write_outcome(schedule, root)
    console.print(f"leaderboard: {page}")
    if grid.failures:
        for failure in grid.failures:
            say("failed", f" {failure.given} {failure.remedy}", "red")
        raise LokuError(f"{len(grid.failures)} of the runs failed: {grid.failures[0].given}", AGAIN)
    if schedule.ready():
        console.print(f"The time limit of {options.time_limit:g} minutes is over: run the same command again to go on.")
    return page


def _resolve(recipe: Recipe) -> None:
    """Print what every stage and arm would do and need, and what is out of reach."""
    from loku.bench.dry_run import dry_run

    resolved = dry_run(recipe)
    console.print(resolved.table())
    for note in resolved.notes:
        console.print(f"note: {note}")


def _check_names(only: list[str], recipe: Recipe) -> None:
    names = [arm.name for arm in recipe.arms]
    for name in only:
        if name not in names:
            raise InputError(f"--only '{name}' is no arm of {recipe.name}.", suggestion(name, names))


def _check_root(root: Path, recipe: Recipe) -> None:
    """Refuse the folder of another benchmark: its page and collected runs would be written over."""
    kept = root / "recipe.yaml"
    found = read_yaml(kept) if kept.is_file() else None
    name = str(found.get("name")) if isinstance(found, Mapping) else recipe.name
    if name != recipe.name:
        raise InputError(f"--output '{root}' holds the benchmark '{name}'.", f"Give {recipe.name} a folder of its own.")


def describe(schedule: Schedule, workers: int) -> str:
    """Return what a benchmark is to do, and its core-hours."""
    recipe, counts = schedule.recipe, schedule.counts()
    hours = schedule.core_hours()
    arms = "1 arm" if len(schedule.arms) == 1 else f"{len(schedule.arms)} arms"
    attacked = f", {counts['attacks']} sets of models under attack" if counts["attacks"] else ""
    cost = "unknown until the first runs are done" if hours is None else f"about {hours:.2f} core-hours"
    return (
        f"{recipe.title}: {arms}, seeds {', '.join(map(str, recipe.seeds))}; {counts['models']} sets of models, "
        f"{counts['tuning']} tuning runs, {counts['final']} runs{attacked}; {schedule.done()} done.\n"
        f"Still to come: {cost}, on {workers or 'all'} workers."
    )


def write_outcome(schedule: Schedule, root: Path) -> Path:
    """Write the tuning's choices, the collected runs and the leaderboard, of all arms that have been run."""
    recipe = schedule.recipe
    choices: dict[str, Any] = {}
    for arm in recipe.arms:
        found = schedule.chosen(arm)
        if found is not None:
            choices[arm.name] = {"point": dict(found[0]), "tuned_as": recipe.tuned_as(arm).name, "scores": found[1]}
    write_json(root / "chosen.json", {"rule": recipe.tuning.choose, "arms": choices})
    models = [schedule.measured(seed) for seed in recipe.seeds]
    measured = [found for found in models if found is not None]
    write_collection([compact(record) for record in (*measured, *schedule.finished())], root / "runs.jsonl")
    return write_leaderboard(recipe, measured, schedule.finished(), choices, root)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Refuse a second benchmark in the same folder at the same time. The lock goes with the process."""
    try:
        import fcntl
    except ImportError:  # no such locks there
        yield
        return
    with (root / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"Another loku bench is at work in '{root}'.", "Wait for it, or choose another --output folder."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


@dataclass
class Grid:
    """The tasks on their way: what is ready goes to a free worker, until nothing is ready or the time is over.

    A run that fails is not begun again before the next call. When the rows of an arm cannot be used, no more of its
    runs are begun; when those of the models cannot, everything ends.
    """

    schedule: Schedule
    minutes: float | None = None
    failures: list[Outcome] = field(default_factory=list)
    _begun: set[Path] = field(default_factory=set)
    _refused: set[str] = field(default_factory=set)

    def run(self, workers: Workers, update: Update) -> None:
        """Run everything that is missing. Raises InputError when models cannot be made of what was given."""
        start = time.monotonic()
        total, pending = sum(self.schedule.counts().values()), dict[Future[Outcome], Task]()
        while True:
            over = self.minutes is not None and time.monotonic() - start >= 60 * self.minutes
            for task in [] if over else self._next(workers.slots() - len(pending)):
                self._begun.add(task.path)
                pending[workers.submit(task)] = task
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                self._note(pending.pop(future), future)
            update(self.schedule.done(), total, f"{len(pending)} running, {len(self.failures)} failed")

    def _next(self, count: int) -> list[Task]:
        if count < 1:
            return []
        ready = [task for task in self.schedule.ready() if task.path not in self._begun]
        return [task for task in ready if task.arm is None or task.arm.name not in self._refused][:count]

    def _note(self, task: Task, future: Future[Outcome]) -> None:
        error = future.exception()
        outcome = future.result() if error is None else Outcome(task.label, "failed", f"{task.label}: {error!r}")
        if outcome.status == "refused" and task.arm is None:
            raise InputError(outcome.given, outcome.remedy)
        if outcome.status == "refused" and task.arm is not None:
            self._refused.add(task.arm.name)
        if outcome.status != "done":
            self.failures.append(outcome)
