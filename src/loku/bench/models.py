"""A seed's corpus and models: made stage by stage by `loku finetune`, then target and retain-only measured once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loku.assessment_rows import AssessmentRows
from loku.bench.figures import figures_of, value_of
from loku.bench.measure_plan import DOCUMENTS, ROWS
from loku.bench.recipe import CORPUS, RETAIN_ONLY, TARGET, Recipe
from loku.bench.relearning import relearned
from loku.bench.store import SCHEMA_VERSION, Task, noise_count
from loku.bench.suites import measure_suite
from loku.config import FinetuneOptions, UnlearnOptions, resolve
from loku.corpora import write_corpus
from loku.data.prompts import resolve_template
from loku.data.sources import RecordSet, Rows, load_records
from loku.data.sources import load_rows as load_columns
from loku.errors import InputError
from loku.evaluation.lume import DOCUMENT
from loku.evaluation.own import evaluate_own
from loku.evaluation.reference import load_reference
from loku.evaluation.results import Results, read_results, write_results
from loku.files import read_json, write_json
from loku.finetune import finetune
from loku.job import load_rows
from loku.models import load_model, load_tokenizer, weights_sha256
from loku.runs import RunFolder, hardware, peak_memory_bytes, versions

SETS = ("forget", "retain", "general", "holdout")
NOISE_SEED = 7919  # what is added to a seed for a further retain-only model


def noise_name(number: int) -> str:
    """Return the name of a further retain-only model."""
    return f"{RETAIN_ONLY}-{number + 2}"


def located(name: str, recipe: Recipe, folder: Path) -> str:
    """Return the path of a stage's model or a corpus file; other names stay as they are."""
    if name in recipe.stages:
        stage = recipe.stages[name]
        return str(folder / name) if "data" in stage else located(str(stage["model"]), recipe, folder)
    return str(folder / name) if recipe.corpus is not None and name.startswith(f"{CORPUS}/") else name


def recipe_name(path: str, folder: Path) -> str:
    """Return what the recipe calls a file: the inverse of `located`, so that results name no machine's folders."""
    return path.removeprefix(f"{folder}/")


def build_models(task: Task) -> None:
    """Make what one seed's runs start from, and write models.json when all is there. An interrupted build goes on."""
    recipe, folder, start = task.recipe, task.path.parent, time.monotonic()
    if recipe.corpus is not None:
        write_corpus(recipe.corpus, folder / CORPUS, task.seed)
    seconds: dict[str, float] = {}
    for name, stage in recipe.stages.items():
        if "data" in stage:
            seconds[name] = _train(name, recipe, folder, task.seed)
    options = shared_options(recipe, folder, task.seed)
    record: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "seed": task.seed, "models": {}}
    record["data"] = {name: found.sha256 for name, found in all_measured_rows(recipe, options, folder).items()}
    record["trained_on"] = {name: _trained_on(folder / name) for name in seconds}
    record["unlearned"] = {name: found.sha256 for name, found in by_name(load_rows(options), folder).items()}
    for name in (TARGET, RETAIN_ONLY):
        if name in recipe.stages:
            record["models"][name] = _baseline(name, recipe, folder, options)
            if name == TARGET:
                check_memorised(recipe, record["models"][name]["figures"], task.seed)
    for i in range(noise_count(recipe, task.seed)):
        name, seed = noise_name(i), task.seed + (i + 1) * NOISE_SEED
        seconds[name] = _train(RETAIN_ONLY, recipe, folder, seed, output=name)
        record["models"][name] = _baseline(name, recipe, folder, options, scored=True)
    seconds["all"] = round(time.monotonic() - start, 2)
    record |= {"seconds": seconds, "versions": versions(), "hardware": hardware()}
    write_json(task.path, record | {"peak_memory_bytes": peak_memory_bytes()})


def shared_options(recipe: Recipe, folder: Path, seed: int) -> UnlearnOptions:
    """Return the options that say what all models of a seed are measured on."""
    return unlearn_options(recipe, dict(recipe.unlearn), folder, seed)


def unlearn_options(recipe: Recipe, settings: dict[str, Any], folder: Path, seed: int) -> UnlearnOptions:
    """Return a run's options with the recipe's names turned into paths."""
    placed = {
        name: located(value, recipe, folder)
        if isinstance(value, str) and name in ("forget", "retain", "general", "holdout", "level_model")
        else value
        for name, value in settings.items()
    }
    placed |= {"model": located(TARGET, recipe, folder), "seed": seed, "threads": 1}
    options: UnlearnOptions = resolve(UnlearnOptions, placed, {}, where=recipe.name)
    return options


def measured_rows(recipe: Recipe, options: UnlearnOptions, folder: Path) -> dict[str, RecordSet]:
    """Return the sets that every model of a seed is measured on."""
    found = measured_sources(recipe, options, folder)
    return {name: load_records(found[name], option=name, data_dir=options.data_dir) for name in SETS if name in found}


def all_measured_rows(recipe: Recipe, options: UnlearnOptions, folder: Path) -> dict[str, RecordSet | Rows]:
    """Return these sets, and the rows that suites alone read."""
    return {**measured_rows(recipe, options, folder), **suite_rows(recipe, options, folder)}


def suite_rows(recipe: Recipe, options: UnlearnOptions, folder: Path) -> dict[str, RecordSet | Rows]:
    """Return the rows that suites alone read: validation, cloze, members, nonmembers."""
    found: dict[str, RecordSet | Rows] = {}
    for name in (name for name in ROWS if name not in SETS and name in recipe.measure):
        place, data_dir = located(recipe.measure[name], recipe, folder), options.data_dir
        if name in DOCUMENTS:
            found[name] = load_columns(place, DOCUMENT, option=name, data_dir=data_dir)
        else:
            found[name] = load_records(place, option=name, data_dir=data_dir)
    return found


def by_name(rows: Iterable[RecordSet | str | None], folder: Path) -> dict[str, RecordSet]:
    """Return the sets that are rows, and not to be sampled from the model, by what the recipe calls them."""
    return {recipe_name(found.name, folder): found for found in rows if isinstance(found, RecordSet)}


def check_unchanged(made: Mapping[str, Any], rows: Mapping[str, Mapping[str, RecordSet | Rows]], what: str) -> None:
    """Raise InputError for rows that are not those that `what` was made with, by the hashes in its JSON, `made`.

    `rows` are by use ("data": measured, "trained_on", "unlearned") and name. Runs on other rows would stand in one
    table with those that are there, under the same names.
    """
    for use, found in rows.items():
        for name, own in found.items():
            if made.get(use, {}).get(name, own.sha256) != own.sha256:
                raise InputError(
                    f"The rows '{own.name}' are not those of {what}: they have changed since.",
                    "Restore them, or choose a new --output folder.",
                )


def measured_sources(recipe: Recipe, options: UnlearnOptions, folder: Path) -> dict[str, str]:
    """Return where the rows of every measured set are: those of unlearning, unless `measure:` names others."""
    given = {name: getattr(options, name) for name in SETS}
    given |= {name: located(recipe.measure[name], recipe, folder) for name in ROWS if name in recipe.measure}
    return {name: source for name, source in given.items() if source and source != "self"}


def watched_rows(rows: Mapping[str, RecordSet], retain_only: str | None, target: Path | None = None) -> AssessmentRows:
    """Return what a run's measurements while training look at.

    `retain_only` is a model's name or results file, `target` the target's results file, where it was measured.
    """
    retain, general, holdout = (rows.get(name) for name in ("retain", "general", "holdout"))
    measured = retain_only if retain_only and retain_only.endswith(".json") else None
    return AssessmentRows(
        retain=retain, general=general, holdout=holdout, retain_only_model=None if measured else retain_only,
        reference=load_reference(measured) if measured else None,
        target=None if target is None else read_results(target),
    )  # fmt: skip


def has_level_model(recipe: Recipe) -> bool:
    """Whether the forget level is that of the seed's retain-only model; TDEC's is the target's own, on unseen text."""
    return RETAIN_ONLY in recipe.stages and recipe.measure.get("suite") != "tdec"


def results_file(folder: Path, name: str) -> Path:
    """Return the results file of a seed's target or retain-only model."""
    return folder / f"{name}.results" / "results.json"


def measure(
    recipe: Recipe,
    folder: Path,
    model: Any,
    tokenizer: Any,
    options: UnlearnOptions,
    *,
    model_name: str,
    **against: Any,
) -> Results:
    """Measure a model as every model of the benchmark is measured, against `target` and `reference` where given."""
    if recipe.measure.get("suite", "own") != "own":
        sources = measured_sources(recipe, options, folder)
        return measure_suite(recipe.measure, model, tokenizer, sources, options, model_name=model_name, **against)
    rows: dict[str, Any] = dict(measured_rows(recipe, options, folder))
    template = resolve_template(tokenizer, options.model, options.prompt_template)
    return evaluate_own(
        model, tokenizer, forget=rows.pop("forget"), **rows, max_rows=options.eval_rows, template=template,
        max_length=options.max_length, max_new_tokens=options.max_new_tokens, seed=options.seed, model_name=model_name,
        **against,
    )  # fmt: skip


def check_memorised(recipe: Recipe, figures: dict[str, Any], seed: int) -> None:
    """Raise InputError where the target knows the forget set less well than the recipe's `memorised` asks for."""
    for name, least in recipe.measure.get("memorised", {}).items():
        value = value_of(figures, name)
        if value is None:
            given = f"{recipe.name} asks for {name} of the target, which is not measured on these rows."
            raise InputError(given, "Under measure: memorised, name another score.")
        if value < least:
            raise InputError(
                f"The target of seed {seed} has {name} {value:.3f}, and {recipe.name} asks for {least}: "
                "it has not learnt what it is to forget.",
                "Train the stage 'target' longer or at a higher rate; what is not known cannot be unlearned.",
            )


def _train(name: str, recipe: Recipe, folder: Path, seed: int, *, output: str | None = None) -> float:
    stage = dict(recipe.stages[name])
    for key in ("model", "data", "tokenizer_data"):
        if isinstance(stage.get(key), str):
            stage[key] = located(stage[key], recipe, folder)
    settings = {"save_steps": -1} | stage | {"output": str(folder / (output or name)), "seed": seed, "threads": 1}
    options = resolve(FinetuneOptions, settings, {}, where=f"stage {name}")
    reopened(folder / (output or name), options.as_dict())
    finetune(options)
    return float(read_json(folder / (output or name) / "run.json")["seconds"]["training"])


def reopened(path: Path, config: dict[str, Any]) -> RunFolder:
    """Return a run folder to go on in. One that a killed run left without settings, or with others, is made anew."""
    try:
        return RunFolder.check(path, config)
    except InputError:
        shutil.rmtree(path)
        return RunFolder.check(path, config)


def _trained_on(folder: Path) -> str:
    """Return the hash of the rows that a stage was trained on."""
    return str(read_json(folder / "run.json")["data"]["train"]["sha256"])


def _baseline(
    name: str, recipe: Recipe, folder: Path, options: UnlearnOptions, *, scored: bool = False
) -> dict[str, Any]:
    """Measure a model of the seed; with `scored`, as if it were unlearned, against target and retain-only."""
    place = str(folder / name) if (folder / name).is_dir() else located(name, recipe, folder)
    model = load_model(place, dtype=options.dtype, device=options.device)
    tokenizer = load_tokenizer(place)
    against: dict[str, Any] = {}
    if recipe.measure.get("suite", "own") != "own" and name != TARGET:
        against = {"target": results_file(folder, TARGET)}
    if scored:
        against = {"reference": results_file(folder, RETAIN_ONLY), "target": results_file(folder, TARGET)}
    results = measure(recipe, folder, model, tokenizer, options, model_name=name, **against)
    write_results(results, results_file(folder, name).parent)
    record = {"sha256": weights_sha256(model), "figures": figures_of(results)}
    if recipe.relearn is not None:
        forget = measured_rows(recipe, options, folder)["forget"]
        record["relearning"] = relearned(model, tokenizer, forget, recipe.relearn, options)
    return record
