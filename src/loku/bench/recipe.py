"""The recipe of a benchmark: where models and rows come from, the arms to compare, and the tuning each arm gets.

    name: fiction
    title: Methods on the fictitious corpus
    corpus: {kind: fiction}                    # optional: rows made anew for every seed; files are named corpus/...
    stages:                                    # models, in order; options of `loku finetune`
      pretrained: {model: corpus/model, data: corpus/pretraining.jsonl, max_steps: 300}
      target: {model: pretrained, data: corpus/full-training.jsonl, max_steps: 260}
      retain-only: {model: pretrained, data: corpus/retain-training.jsonl, max_steps: 260}
    unlearn:                                   # options of `loku unlearn` that all arms share
      forget: corpus/forget.jsonl
      retain: corpus/retain-mixed.jsonl
      max_steps: 100
    measure:                                   # optional
      retain: corpus/retain.jsonl              # rows measured in place of those trained on
      memorised: {forget.probability: 0.8}     # what the target must reach; see loku.bench.measure_plan
    relearn: {share: 0.25, steps: 20}          # optional: the relearning attack after every run
    attack: {attacks: all, arms: [GA]}         # optional: attacks on reported runs, see loku.bench.attack_plan
    arms:
      - {name: GA, method: ga}
      - name: "{method} from {init}, rank {rank}"
        matrix: {method: [ihl, graddiff], init: [lora, fila], rank: [4, 8]}
    tuning:                                    # optional; every arm gets the same grid on the same seeds
      seeds: [10, 11]
      grid: {learning_rate: [5e-4, 1e-3, 2e-3]}
      choose: closest                          # or: level
      at: {rank: 8}                            # arms that differ in these options alone are tuned together, here
                                               # or `chosen: file`, a chosen.json: nothing is tuned
    seeds: [0, 1, 2, 3, 4]
    noise_floor: 1                             # further retain-only models a seed, scored as if unlearned
    seconds: {models: 60, trial: 15}           # what to expect before anything was measured
    config: {model_type: llama, ...}           # the target's config.json, for --dry-run without the hub

A stage without `data` names a model that exists, such as a hub id. Every seed has its own corpus, models and runs.
A recipe may begin with `extends: other.yaml`: it is that one, with its own entries merged into it.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loku.bench.attack_plan import AttackPlan, read_attack
from loku.bench.extending import read_yaml
from loku.bench.measure_plan import read_measure
from loku.bench.tuning_plan import Tuning, read_tuning
from loku.bench.values import read_count, read_list, read_mapping, read_number, read_numbers, read_seeds
from loku.config import FinetuneOptions, UnlearnOptions, resolve
from loku.errors import InputError, suggestion
from loku.files import sha256_json
from loku.methods import METHODS
from loku.options import Options

TARGET, RETAIN_ONLY, CORPUS = "target", "retain-only", "corpus"
RELEARN: dict[str, Any] = {"share": 0.25, "steps": 20, "learning_rate": 5e-4, "every": 5}
# What all models of a benchmark are measured by: the same for all arms, or their figures could not be compared.
SHARED = ("forget", "general", "holdout", "eval_rows", "max_length", "max_new_tokens", "prompt_template", "dtype")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SET_BY_THE_BENCH = ("output", "seed", "threads", "model", "retain_only_model", "evaluate", "keep_text")


@dataclass(frozen=True)
class Arm:
    """One thing that is compared: a name, and options of `loku unlearn`."""

    name: str
    options: Mapping[str, Any]

    @property
    def slug(self) -> str:
        """A name for files."""
        return re.sub(r"[^a-z0-9.+-]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Recipe:
    """A benchmark, checked: every option of every stage and arm is one that its verb takes."""

    name: str
    title: str
    corpus: Mapping[str, Any] | None
    stages: Mapping[str, Mapping[str, Any]]
    unlearn: Mapping[str, Any]
    measure: Mapping[str, Any]
    relearn: Mapping[str, Any] | None
    arms: tuple[Arm, ...]
    tuning: Tuning
    seeds: tuple[int, ...]
    noise_floor: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] | str | None = None
    attack: AttackPlan | None = None

    @property
    def model_seeds(self) -> tuple[int, ...]:
        """The seeds that models are needed for: those of the tuning first."""
        return tuple(dict.fromkeys((*self.tuning.seeds, *self.seeds)))

    def settings(self, arm: Arm, point: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of an arm's run at a point of the grid; what the arm fixes itself is not tuned."""
        return {**self.unlearn, **point, **arm.options}

    def tuned_as(self, arm: Arm) -> Arm:
        """Return the arm at which this one is tuned: itself, or its sibling at the values of `tuning.at`."""
        if not self.tuning.at or not all(name in arm.options for name in self.tuning.at):
            return arm
        return next(self._siblings(arm), arm)

    def has_sibling(self, arm: Arm) -> bool:
        """Return whether some arm has this one's options with the values of `tuning.at`."""
        return next(self._siblings(arm), None) is not None

    def _siblings(self, arm: Arm) -> Iterator[Arm]:
        wanted = {**arm.options, **self.tuning.at}
        return (other for other in self.arms if dict(other.options) == wanted)

    def points(self, arm: Arm) -> list[dict[str, Any]]:
        """Return the grid points that differ for an arm; one when it fixes everything that is tuned."""
        points = [self.tuning.chosen[arm.name]] if self.tuning.source else self.tuning.points
        free = [{k: v for k, v in point.items() if k not in arm.options} for point in points]
        return [point for i, point in enumerate(free) if point not in free[:i]]

    def attacked(self, arm: Arm, seed: int) -> bool:
        """Return whether an arm's run is attacked: one that is reported, of an arm that `attack` names."""
        return self.attack is not None and seed in self.seeds and self.attack.covers(arm.name)

    def run_id(self, arm: Arm, point: Mapping[str, Any], *, attacked: bool = False) -> str:
        """Return a hash of all that decides a run but its seed; the attacks are part of it only where there are any."""
        parts: tuple[Any, ...] = (self.corpus, self.stages, self.settings(arm, point), self.measure, self.relearn)
        if attacked and self.attack is not None:
            parts += (self.attack.id,)
        return sha256_json(parts)[:10]

    def models_id(self) -> str:
        """Return a hash of all that decides corpus and models but the seed."""
        return sha256_json((self.corpus, self.stages, self.measure, self.relearn, self._measured()))[:10]

    def _measured(self) -> dict[str, Any]:
        names = [*SHARED, "device", "data_dir", *(() if "retain" in self.measure else ("retain",))]
        return {name: self.unlearn[name] for name in dict.fromkeys(names) if name in self.unlearn}


def load_recipe(path: str | Path | None) -> Recipe:
    """Read and check a benchmark's recipe. Raises InputError that names the part that cannot be used."""
    if not path:
        raise InputError("The recipe is missing.", "Give a YAML file: loku bench recipes/bench/fiction.yaml.")
    return parse_recipe(read_yaml(Path(path)), str(path))


def parse_recipe(value: Any, where: str) -> Recipe:
    """Return the recipe that a YAML value describes; `where` names it in errors."""
    names = ("name", "title", *Recipe.__dataclass_fields__)
    parts = read_mapping(read_numbers(value), where, names)
    for name in ("name", "stages", "unlearn", "arms", "seeds"):
        if name not in parts:
            raise InputError(f"{where} has no '{name}'.", "See docs/bench.md for what a benchmark's recipe holds.")
    stages = {str(k): read_mapping(v, f"{where}, stage '{k}'") for k, v in read_mapping(parts["stages"], where).items()}
    if TARGET not in stages:
        raise InputError(f"{where} has no stage '{TARGET}'.", "Name the model that is to forget something so.")
    relearn = parts.get("relearn")
    arms = _arms(parts["arms"], where)
    unlearn, measure = read_mapping(parts["unlearn"], f"{where}, unlearn"), parts.get("measure", {})
    recipe = Recipe(
        name=str(parts["name"]),
        title=str(parts.get("title", parts["name"])),
        corpus=_corpus(parts.get("corpus"), where),
        stages=stages,
        unlearn=unlearn,
        measure=read_measure(measure, f"{where}, measure"),
        relearn=None
        if relearn is None
        else _relearn(read_mapping(relearn, f"{where}, relearn", tuple(RELEARN)), where),
        arms=arms,
        tuning=read_tuning(parts.get("tuning"), where, [arm.name for arm in arms]),
        seeds=read_seeds(parts["seeds"], f"{where}, seeds"),
        noise_floor=read_count(parts.get("noise_floor", 0), f"{where}, noise_floor"),
        seconds={
            kind: read_number(value, f"{where}, seconds: {kind}")
            for kind, value in read_mapping(
                parts.get("seconds", {}), f"{where}, seconds", ("models", "trial", "attack")
            ).items()
        },
        config=_config(parts.get("config"), where),
        attack=read_attack(parts.get("attack"), where, [arm.name for arm in arms], {**unlearn, **measure}),
    )
    if not NAME.fullmatch(recipe.name):
        raise InputError(f"{where} has the name '{recipe.name}'.", "Give letters, digits, dots and hyphens: a folder.")
    _check_stages(recipe, where)
    _check_arms(recipe, where)
    return recipe


def _corpus(value: Any, where: str) -> dict[str, Any] | None:
    if value is None:
        return None
    from loku.corpora import check_corpus

    corpus = read_mapping(value, f"{where}, corpus")
    check_corpus(corpus, where)
    return corpus


def _config(value: Any, where: str) -> dict[str, Any] | str | None:
    if value is None or (isinstance(value, str) and Path(value).is_file()):
        return value
    if isinstance(value, str):
        raise InputError(f"{where}: the config '{value}' does not exist.", "Give a JSON file, or its content.")
    found = read_mapping(value, f"{where}, config")
    if "model_type" not in found:
        raise InputError(f"{where}, config has no model_type.", "Give what the model's config.json says.")
    return found


def _relearn(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings of the relearning attack, those that were not given by their defaults."""
    found = RELEARN | dict(given)
    for name in ("steps", "every"):
        if type(found[name]) is not int or found[name] < 1:
            raise InputError(f"{where}, relearn: {name} is {found[name]!r}.", "Give a whole number, 1 or more.")
    found["learning_rate"] = read_number(found["learning_rate"], f"{where}, relearn: learning_rate")
    found["share"] = read_number(found["share"], f"{where}, relearn: share", most=1.0)
    return found


def _arms(value: Any, where: str) -> tuple[Arm, ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}, arms is no list.", "Give at least one arm: {name: LoKU, method: loku}.")
    arms = [arm for i, item in enumerate(value) for arm in _expand(read_mapping(item, f"{where}, arm {i}"), where)]
    slugs = [arm.slug for arm in arms]
    for arm in arms:
        if not arm.name:
            given = f"{where} has an arm without name and method: {dict(arm.options)}."
            raise InputError(given, "Give it a name, such as {name: GA, method: ga}.")
        if not arm.slug or slugs.count(arm.slug) > 1:
            raise InputError(f"{where} has two arms called '{arm.name}'.", "Give every arm a name of its own.")
    return tuple(arms)


def _expand(item: dict[str, Any], where: str) -> list[Arm]:
    """Return one arm, or one for each combination of its matrix's values."""
    name, matrix = str(item.pop("name", "")), read_mapping(item.pop("matrix", {}), f"{where}, matrix")
    arms = []
    for values in itertools.product(*(read_list(v, f"{where}, matrix '{k}'") for k, v in matrix.items())):
        options = dict(item) | dict(zip(matrix, values, strict=True))
        try:
            label = string.Formatter().vformat(name, (), options) or str(options.get("method", ""))
        except (KeyError, ValueError, IndexError) as error:
            raise InputError(
                f"{where} has the arm name '{name}', which names no option of the arm ({error}).",
                "Write option names in braces, such as '{method}, rank {rank}'.",
            ) from None
        arms.append(Arm(label, options))
    return arms


def _check_stages(recipe: Recipe, where: str) -> None:
    known: list[str] = []
    for name, stage in recipe.stages.items():
        label = f"{where}, stage '{name}'"
        if name == CORPUS or "/" in name:
            raise InputError(f"{where} has a stage called '{name}'.", "Give it a name without a slash, not corpus.")
        if "data" in stage:
            _refuse(stage, ("output", "seed", "threads"), label)
            _resolved(FinetuneOptions, stage, label)
            if not stage.get("model") and not stage.get("new_model"):
                raise InputError(f"{label} has no model.", "Give model, or new_model with the settings of a new one.")
        elif set(stage) != {"model"}:
            raise InputError(f"{label} has no data.", "Give data and its training, or nothing but the model's name.")
        if stage.get("model") in recipe.stages and stage["model"] not in known:
            raise InputError(
                f"{label} starts from the stage '{stage['model']}', which does not come before it.",
                "Put that stage first; a model's own folder of that name is ./" + str(stage["model"]) + ".",
            )
        known.append(name)
    if recipe.attack is not None and RETAIN_ONLY not in recipe.stages:
        raise InputError(f"{where} has attacks, but no stage '{RETAIN_ONLY}'.", "Add it: scores are relative to it.")
    if recipe.noise_floor and "data" not in recipe.stages.get(RETAIN_ONLY, {}):
        raise InputError(f"{where} has a noise_floor, but trains no stage '{RETAIN_ONLY}'.", "Leave noise_floor out.")
    if len(recipe.tuning.points) > 1 and recipe.tuning.choose == "closest" and RETAIN_ONLY not in recipe.stages:
        raise InputError(
            f"{where} tunes for the point closest to the retain-only model, but has no stage '{RETAIN_ONLY}'.",
            "Add that stage, or tune by choose: level.",
        )
    overlap = sorted(set(recipe.seeds) & set(recipe.tuning.seeds))
    if overlap:
        raise InputError(f"{where} tunes on seeds that it reports ({overlap}).", "Tune on other seeds.")


def _check_arms(recipe: Recipe, where: str) -> None:
    if not recipe.unlearn.get("forget"):
        raise InputError(f"{where} has no forget set.", "Give unlearn: {forget: ...}.")
    for arm in recipe.arms:
        label = f"{where}, arm '{arm.name}'"
        for point in recipe.points(arm):
            own = {**point, **arm.options}
            _refuse(own, SHARED, label, "which all arms must share", "Put it under unlearn.")
            if "retain" in own and "retain" not in recipe.measure:
                given = f"{label} sets 'retain', and is measured on those rows, too."
                raise InputError(given, "Name the rows to measure all arms on: measure: {retain: ...}.")
            settings = recipe.settings(arm, point)
            _refuse(settings, SET_BY_THE_BENCH, label)
            options = _resolved(UnlearnOptions, settings, label)
            if recipe.tuning.choose == "level" and options.stop_at != "level":
                raise InputError(
                    f"{label} is tuned by choose: level, but does not stop there.",
                    "Give unlearn: {eval_steps: 5, stop_at: level}, or tune by choose: closest.",
                )
        at = recipe.tuning.at
        if at and all(name in arm.options for name in at) and not recipe.has_sibling(arm):
            raise InputError(
                f"{label} is to be tuned at {dict(at)}, but no arm of its kind has these values.",
                "Add that arm, or leave out tuning: {at}.",
            )


def _refuse(
    options: Mapping[str, Any],
    names: Sequence[str],
    where: str,
    why: str = "which the benchmark sets itself",
    remedy: str = "Leave it out.",
) -> None:
    for name in names:
        if name in options:
            raise InputError(f"{where} sets '{name}', {why}.", remedy)


def _resolved(cls: type[Options], values: Mapping[str, Any], where: str) -> Any:
    names = cls.fields()
    for name in values:
        if name not in names:
            raise InputError(f"{where} has the unknown option '{name}'.", suggestion(name, names))
    method = values.get("method")
    if cls is UnlearnOptions and method is not None and method not in METHODS:
        raise InputError(f"{where}: the method '{method}' is not known.", suggestion(str(method), METHODS))
    try:
        return resolve(cls, dict(values), {}, where=where)
    except InputError as error:
        raise InputError(f"{where}: {error.given}", error.remedy) from None
