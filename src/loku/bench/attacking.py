"""The attacks of `loku attack` on a benchmark's models: once on a seed's own, then on each run that is reported.

What attacks found on the target and the retain-only model, by row, stays in the models' folder, so that the paired
score of each run needs its own model alone. A run's record keeps means and scores.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loku.adapters.export import load_lora
from loku.attack_models import adapter_maker, choose, load, merged_model, named, run_attacks
from loku.attack_sources import Sources, load_setting, new_setting, not_yet, read_rows
from loku.attack_store import AttackStore
from loku.attacks.suite import Attack, Setting, plan
from loku.attacks.summary import summarise
from loku.bench.models import located, shared_options
from loku.bench.recipe import RETAIN_ONLY, TARGET, Recipe
from loku.bench.store import SCHEMA_VERSION, Task, attacks_folder, models_folder, noise_names, read_record
from loku.config import AttackOptions
from loku.errors import InputError
from loku.files import read_object, write_json
from loku.job import UnlearnResult
from loku.models import check_model_source, load_config, weights_sha256
from loku.runs import hardware, peak_memory_bytes, versions

OWN = {"retain_only": RETAIN_ONLY, "target": TARGET}  # the seed's own models by role, the reference first
SAME = ("max_length", "prompt_template", "data_dir", "dtype", "device", "trust_remote_code", "seed")
AGAIN = "Remove it: it is made again."

Found = dict[str, Any]


def attack_sources(recipe: Recipe, folder: Path, seed: int) -> tuple[Sources, AttackOptions]:
    """Return what a seed's attacks are on and their options; the unlearned model is left to the caller."""
    assert recipe.attack is not None
    settings = dict(recipe.attack.settings)
    shared = shared_options(recipe, folder, seed)
    rows = {
        name: located(str(settings.pop(name)), recipe, folder) if settings.get(name) else settings.pop(name)
        for name in ("forget", "retain", "holdout", "unrelated")
    }
    if settings["other_base"]:
        settings["other_base"] = located(settings["other_base"], recipe, folder)
    options = AttackOptions(**settings, **{name: getattr(shared, name) for name in SAME})
    models: dict[str, str | None] = {role: located(name, recipe, folder) for role, name in OWN.items()}
    return Sources(models | {"unlearned": models["target"]}, rows), options


def check_attack(recipe: Recipe, folder: Path) -> None:
    """Raise InputError for rows that cannot be used, and for attacks that were named and cannot run on them."""
    assert recipe.attack is not None
    sources, options = attack_sources(recipe, folder, 0)
    try:
        setting = new_setting(None, None, read_rows(sources, options), options)
        arms = [arm for arm in recipe.arms if recipe.attack.covers(arm.name)]
        setting.adapted = not_yet if any(recipe.settings(arm, {}).get("tune") != "full" for arm in arms) else None
        choose(options.attacks, plan(setting))
        base = recipe.attack.settings["other_base"]
        if base and "data" not in recipe.stages.get(base, {}):
            load_config(check_model_source(str(options.other_base), option="other_base"))
    except InputError as error:
        raise InputError(f"{recipe.name}, attack: {error.given}", error.remedy) from None


def attack_models(task: Task) -> None:
    """Attack a seed's target, its retain-only model and those of the noise floor, each attack kept when it is done.

    The last of the files that are written says how the noise floor fared, and that all is there.
    """
    recipe, folder, start = task.recipe, models_folder(task.root, task.recipe, task.seed), time.monotonic()
    models = read_record(folder / "models.json")
    if models is None:
        raise InputError(f"The models of seed {task.seed} are not there.", "Run the benchmark again: it makes them.")
    sources, options = attack_sources(recipe, folder, task.seed)
    setting = load_setting(sources, options)
    place = attacks_folder(task.root, recipe, task.seed)
    hashes = {role: models["models"][name]["sha256"] for role, name in OWN.items()}
    own = _store(place, sources, setting, options, hashes)
    setting.reference = load(str(sources.models["retain_only"]), options)
    for role in OWN:
        run_attacks(setting, load(str(sources.models[role]), options), role, chosen(setting, options), own)
    noise: Found = {}
    for name in noise_names(models):
        sha = {"unlearned": models["models"][name]["sha256"]}
        store = _store(place / name, sources, setting, options, sha)
        run_attacks(setting, load(str(folder / name), options), "unlearned", chosen(setting, options), store)
        noise[name] = brief(own.document, store.document, options.seed)
    write_json(
        task.path,
        {
            "schema_version": SCHEMA_VERSION, "seed": task.seed, "models": noise, "failed": own.document["failed"],
            "seconds": {"all": round(time.monotonic() - start, 2)}, "versions": versions(), "hardware": hardware(),
            "peak_memory_bytes": peak_memory_bytes(),
        },
    )  # fmt: skip


def attack_run(task: Task, result: UnlearnResult, work: Path) -> Found:
    """Attack the model of a finished run, and return what its record keeps: see `brief`.

    An adapter is merged into a copy of the target, as `loku attack` does; a model trained as a whole is attacked
    itself. Every attack leaves a model as it was. Those that were done before a kill are in `work`.
    """
    folder = models_folder(task.root, task.recipe, task.seed)
    sources, options = attack_sources(task.recipe, folder, task.seed)
    setting = load_setting(sources, options)
    setting.reference = load(str(sources.models["retain_only"]), options)
    model: Any = result.model
    if (result.folder / "adapter").is_dir():
        lora, target = load_lora(result.folder / "adapter"), str(sources.models["target"])
        model = merged_model(target, lora, 1.0, options)
        setting.adapted = adapter_maker(lora, target, options)
    sha = weights_sha256(model)
    store = _store(work / f"attacks-{sha[:10]}", sources, setting, options, {"unlearned": sha})
    run_attacks(setting, model.eval(), "unlearned", chosen(setting, options), store)
    own = read_object(attacks_folder(task.root, task.recipe, task.seed) / "attacks.json", AGAIN)
    return brief(own, store.document, options.seed)


def chosen(setting: Setting, options: AttackOptions) -> list[Attack]:
    """Return the attacks that were named and can run; a model without an adapter has none of those on it."""
    return [item for item in named(options.attacks, plan(setting)) if not item.missing]


def _store(
    place: Path, sources: Sources, setting: Setting, options: AttackOptions, hashes: Mapping[str, str]
) -> AttackStore:
    """Return the store of attacks on the models of some roles, known by their hashes."""
    request = dataclasses.replace(sources, models={}).request(setting, options)
    request["models"] = {role: {"sha256": sha} for role, sha in hashes.items()}
    return AttackStore(place / "attacks.json", request)


def brief(own: Mapping[str, Any], unlearned: Mapping[str, Any], seed: int) -> Found:
    """Return the figures of one model under each attack beside the seed's own models: means and scores, no rows."""
    results = {
        name: {**found, "roles": {**own["attacks"].get(name, {}).get("roles", {}), **found["roles"]}}
        for name, found in unlearned["attacks"].items()
    }
    summary = summarise(results, seed=seed)
    attacks = {
        name: _brief(found) | {"seconds": results[name]["roles"]["unlearned"]["seconds"]}
        for name, found in summary["attacks"].items()
    }
    failed = {**own["failed"], **unlearned["failed"]}
    return {name: summary[name] for name in ("metric", "damaged", "headline")} | {"attacks": attacks, "failed": failed}


def _brief(found: Mapping[str, Any]) -> Found:
    kept = {
        name: found[name] for name in ("family", "metric", "rows", "score", "membership", "damaged") if name in found
    }
    kept["beside"] = found["beside"].get("unlearned", {})
    if "figures" in found:
        metric = found["metric"]
        kept["means"] = {role: own[metric]["mean"] for role, own in found["figures"].items() if metric in own}
    return kept
