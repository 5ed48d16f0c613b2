"""One run of the grid: unlearn with an arm's options, measure, try relearning, and keep the figures."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loku.bench.attacking import attack_run
from loku.bench.figures import figures_of
from loku.bench.models import (
    by_name,
    check_unchanged,
    has_level_model,
    located,
    measure,
    measured_rows,
    recipe_name,
    reopened,
    results_file,
    suite_rows,
    unlearn_options,
    watched_rows,
)
from loku.bench.recipe import CORPUS, RETAIN_ONLY, TARGET, Recipe
from loku.bench.relearning import relearned
from loku.bench.store import SCHEMA_VERSION, Record, Task, models_folder, read_record
from loku.data.sources import RecordSet
from loku.errors import DivergenceError, InputError
from loku.files import read_json, write_json
from loku.job import Job, load_rows, load_target, prepare
from loku.models import load_tokenizer, weights_sha256
from loku.plan import describe_data
from loku.runs import RunFolder, hardware, peak_memory_bytes, versions
from loku.training import run_job

KEPT = ("steps", "stopped", "best", "trainable", "importance", "initialisation", "data", "adapter")


def run_trial(task: Task) -> None:
    """Do one run and write its JSON. A run that diverges is a result, too."""
    assert task.arm is not None
    recipe, point = task.recipe, dict(task.point or {})
    folder = models_folder(task.root, recipe, task.seed)
    models = read_record(folder / "models.json")
    if models is None:
        raise InputError(f"The models of seed {task.seed} are not there.", "Run the benchmark again: it makes them.")
    options = unlearn_options(recipe, recipe.settings(task.arm, point), folder, task.seed)
    if RETAIN_ONLY in recipe.stages:
        options.retain_only_model = str(results_file(folder, RETAIN_ONLY))
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "bench": recipe.name,
        "arm": task.arm.name,
        "options": dict(task.arm.options),
        "point": point,
        "seed": task.seed,
        "settings": recipe.settings(task.arm, point),
        "models": {name: found["sha256"] for name, found in models["models"].items()},
        "measured": models.get("data", {}),
    }
    work = task.path.with_suffix(".work")
    start = time.monotonic()
    try:
        record |= _unlearn(task, options, models, work)
        record["error"] = None
    except DivergenceError as error:
        record |= _known(read_json(work / "run.json"), work, folder) | {"figures": None, "error": error.given}
    record |= {"versions": versions(), "hardware": hardware(), "peak_memory_bytes": peak_memory_bytes()}
    record.setdefault("seconds", {})["all"] = round(time.monotonic() - start, 2)
    write_json(task.path, record)
    shutil.rmtree(work, ignore_errors=True)


def _unlearn(task: Task, options: Any, models: Record, work: Path) -> dict[str, Any]:
    """Unlearn in a scratch folder, which a killed run resumes; return what the record keeps."""
    recipe, folder = task.recipe, models_folder(task.root, task.recipe, task.seed)
    forget, retain = load_rows(options)
    rows, trained = measured_rows(recipe, options, folder), by_name((forget, retain), folder)
    measured = {**rows, **suite_rows(recipe, options, folder)}
    check_unchanged(models, {"data": measured, "unlearned": trained}, f"the models of seed {task.seed}")
    _check_other_seeds(task, trained)
    tokenizer = load_tokenizer(str(options.model), trust_remote_code=options.trust_remote_code)
    model = load_target(options)
    job = prepare(model, tokenizer, forget, retain, options)
    run = _opened(work, options, job)
    target = results_file(folder, TARGET)
    watched = watched_rows(rows, _level_source(job, recipe, folder), target)
    result = run_job(job, run, options, watched)
    against: dict[str, Any] = {"target": target}
    if RETAIN_ONLY in recipe.stages:
        against["reference"] = results_file(folder, RETAIN_ONLY)
    with run.timed("evaluation"):
        results = measure(recipe, folder, result.model, tokenizer, options, model_name=str(options.method), **against)
    found: dict[str, Any] = {"figures": figures_of(results)}
    if recipe.relearn is not None and task.seed in recipe.seeds:  # no choice of tuning looks at it
        with run.timed("relearning"):
            found["relearning"] = relearned(result.model, tokenizer, rows["forget"], recipe.relearn, options)
    if task.arm is not None and recipe.attacked(task.arm, task.seed):
        with run.timed("attacks"):
            found["attacks"] = attack_run(task, result, work)
    return found | _known(run.record, work, folder)


def _check_other_seeds(task: Task, trained: Mapping[str, RecordSet]) -> None:
    """Check that the rows are those of the same run on other seeds; a corpus is another on each."""
    lasting = {name: found for name, found in trained.items() if not name.startswith(f"{CORPUS}/")}
    for path in sorted(task.path.parent.glob("seed-*.json")):
        other = read_record(path) or {}
        made = {rows["name"]: rows["sha256"] for rows in other.get("data", {}).values()}
        check_unchanged({"unlearned": made}, {"unlearned": lasting}, f"the run of seed {other.get('seed')}")


def _opened(work: Path, options: Any, job: Job) -> RunFolder:
    """Return the scratch folder. What a killed run on other rows or another model left there is made anew."""
    run = reopened(work, options.as_dict())
    if run.record:
        try:
            run.check_inputs(describe_data(job), weights_sha256(job.model))
        except InputError:
            shutil.rmtree(work)
            run = reopened(work, options.as_dict())
    return run


def _level_source(job: Job, recipe: Recipe, folder: Path) -> str | None:
    """Return where the forget level comes from: results that are there, or the model where they lack its figures."""
    if not has_level_model(recipe):
        return None
    if job.forget[0].is_text or recipe.measure.get("suite", "own") not in ("own", "tofu"):
        return located(RETAIN_ONLY, recipe, folder)
    return str(results_file(folder, RETAIN_ONLY))


def _known(run: dict[str, Any], work: Path, folder: Path) -> dict[str, Any]:
    """Return what the record keeps of run.json, as far as the run came."""
    found = {name: run[name] for name in KEPT if run.get(name) is not None}
    for name in ("initialisation", "importance"):
        found[name] = _brief(found.get(name))
    found["data"] = {side: {**rows, "name": recipe_name(rows["name"], folder)} for side, rows in run["data"].items()}
    return found | {"seconds": dict(run.get("seconds", {})), "curve": _curve(work / "curve.jsonl")}


def _brief(value: Any) -> Any:
    """Leave out the figures by layer: one record a run, hundreds of runs."""
    return {k: v for k, v in value.items() if k != "layers"} if isinstance(value, dict) else value


def _curve(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
