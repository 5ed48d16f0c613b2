"""What a recipe is checked for before anything is trained: its rows, its models, and every arm on them."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from loku.assessment import check_rows
from loku.bench.attacking import check_attack
from loku.bench.measure_plan import DOCUMENTS, ROWS
from loku.bench.models import (
    SETS,
    all_measured_rows,
    by_name,
    check_unchanged,
    has_level_model,
    located,
    measured_rows,
    shared_options,
    unlearn_options,
    watched_rows,
)
from loku.bench.recipe import CORPUS, TARGET, Recipe
from loku.bench.store import models_folder, read_record
from loku.corpora import write_corpus
from loku.data.sources import RecordSet, Rows, load_records
from loku.data.sources import load_rows as load_rows_with
from loku.errors import InputError
from loku.evaluation.lume import DOCUMENT
from loku.files import sha256_json
from loku.job import SELF, load_rows, prepare
from loku.models import check_model_source, load_config, load_tokenizer

# Options whose values were checked when the recipe was read: no rows and no model are needed to refuse them.
ALWAYS_USABLE = (
    "learning_rate", "epochs", "max_steps", "batch_size", "grad_accum", "warmup_epochs", "warmup_steps", "scheduler",
    "weight_decay", "adam_beta2", "max_grad_norm", "max_loss", "save_steps", "importance_eps", "alpha",
)  # fmt: skip
WATCHING = ("eval_steps", "stop_at", "level", "keep", "keep_utility")


def check_inputs(recipe: Recipe, root: str) -> None:
    """Raise InputError for rows, models and arms that cannot be used. Nothing is written, no weights are loaded.

    Rows of a corpus are those of the first seed. Arms are checked on the rows that they will be trained and measured
    on, with a model without weights of the architecture that the target is trained from.
    """
    with _corpus(recipe, root) as folder:
        stages = {name: _check_stage(name, stage, recipe, folder) for name, stage in recipe.stages.items()}
        _check_sources(recipe, folder)
        _check_unchanged({name: rows for name, rows in stages.items() if rows is not None}, recipe, root)
        if recipe.attack is not None:
            check_attack(recipe, folder)
        start = _start(recipe, TARGET)
        if start is not None:
            _check_arms(recipe, folder, located(start, recipe, folder))


@contextmanager
def _corpus(recipe: Recipe, root: str) -> Iterator[Path]:
    """Provide a folder with the corpus of the first seed: the benchmark's own when it is there, else one that goes."""
    seed = recipe.model_seeds[0]
    own = models_folder(root, recipe, seed)
    if recipe.corpus is None or (own / "models.json").is_file():
        yield own
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_corpus(recipe.corpus, Path(temporary) / CORPUS, seed)
        try:
            yield Path(temporary)
        except InputError as error:  # in the words of the recipe
            raise InputError(error.given.replace(f"{temporary}/", ""), error.remedy) from None


def _check_stage(name: str, stage: Any, recipe: Recipe, folder: Path) -> RecordSet | None:
    """Check a stage's rows, and its model where that is none of the benchmark's own. Return what it is trained on."""
    found: dict[str, RecordSet] = {}
    label = f"{recipe.name}, stage '{name}':"
    for key in ("data", "tokenizer_data"):
        if stage.get(key):
            source = located(str(stage[key]), recipe, folder)
            found[key] = load_records(source, option=f"{label} {key}", data_dir=stage.get("data_dir"))
    if stage.get("new_model") and not Path(str(stage["new_model"])).is_file():
        raise InputError(f"{label} new_model '{stage['new_model']}' does not exist.", "Give a JSON file.")
    model = stage.get("model")
    if model and model not in recipe.stages:
        place = located(str(model), recipe, folder)
        load_config(check_model_source(place, option=f"{label} model"))
        load_tokenizer(place)
    return found.get("data")


def _check_sources(recipe: Recipe, folder: Path) -> None:
    """Check the rows that are unlearned and measured, whichever arm or grid point names them."""
    sources: dict[str, tuple[str, Any]] = {}
    every = [recipe.settings(arm, point) for arm in recipe.arms for point in recipe.points(arm)]
    for settings in every:
        for name in SETS:
            if settings.get(name) and settings[name] != SELF:
                sources.setdefault(str(settings[name]), (f"unlearn: {name}", settings.get("data_dir")))
    for name in ROWS:
        if name in recipe.measure:
            sources.setdefault(str(recipe.measure[name]), (f"measure: {name}", recipe.unlearn.get("data_dir")))
    for source, (option, data_dir) in sources.items():
        place, label = located(source, recipe, folder), f"{recipe.name}, {option}"
        if option.removeprefix("measure: ") in DOCUMENTS:
            load_rows_with(place, DOCUMENT, option=label, data_dir=data_dir)
        else:
            load_records(place, option=label, data_dir=data_dir)


def _check_unchanged(stages: Mapping[str, RecordSet], recipe: Recipe, root: str) -> None:
    """Check that rows are those of the models in the output folder: of the first seed that has any.

    `stages` are the rows that stages are trained on; those of a corpus are made anew for every seed.
    """
    for seed in recipe.model_seeds:
        folder = models_folder(root, recipe, seed)
        made = read_record(folder / "models.json")
        if made is None:
            continue
        options = shared_options(recipe, folder, seed)
        own = {n: rows for n, rows in stages.items() if not str(recipe.stages[n]["data"]).startswith(f"{CORPUS}/")}
        rows: dict[str, Mapping[str, RecordSet | Rows]] = {
            "data": all_measured_rows(recipe, options, folder),
            "trained_on": own,
            "unlearned": by_name(load_rows(options), folder),
        }
        check_unchanged(made, rows, f"the models of seed {seed}")
        return


def _start(recipe: Recipe, name: str) -> str | None:
    """Return the model that a stage's weights come from in the end, or None for a new one."""
    while name in recipe.stages:
        stage = recipe.stages[name]
        if not stage.get("model"):
            return None
        name = str(stage["model"])
    return name


def _check_arms(recipe: Recipe, folder: Path, place: str) -> None:
    """Prepare every arm as its run would; those alike in all that can be refused are prepared once."""
    tokenizer = load_tokenizer(place)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(place)).eval()

    @functools.cache
    def read(retain: str | None) -> Any:
        return load_rows(unlearn_options(recipe, {**recipe.unlearn, "retain": retain}, folder, 0))

    rows = measured_rows(recipe, shared_options(recipe, folder, 0), folder)
    seen: set[str] = set()
    for arm in recipe.arms:
        for point in recipe.points(arm):
            settings = {k: v for k, v in recipe.settings(arm, point).items() if k not in ALWAYS_USABLE}
            found = sha256_json(settings)
            if found in seen or settings.get("retain") == SELF:  # which is sampled from a model with its weights
                continue
            seen.add(found)
            options = unlearn_options(recipe, settings, folder, 0)
            options.level_model = options.importance = None  # made by the time the arm runs
            options.model = place
            try:
                forget, retain = read(settings.get("retain"))
                job = prepare(model, tokenizer, forget, retain, options)
                watched = {name: settings.get(name) for name in WATCHING}
                if sha256_json(watched) not in seen:
                    check_rows(watched_rows(rows, place if has_level_model(recipe) else None), job, options)
                    seen.add(sha256_json(watched))
            except InputError as error:
                raise InputError(f"{recipe.name}, arm '{arm.name}': {error.given}", error.remedy) from None
