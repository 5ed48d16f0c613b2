"""The entry `attack` of a recipe: which attacks its reported runs go through, on which rows, with which settings.

attack:
  attacks: all                    # or families and single attacks: relearn,quantise,lens
  arms: [GA, LoKU]                # optional: these arms only
  retain: corpus/retain.jsonl     # rows; by default those that `measure` and `unlearn` name
  holdout: corpus/holdout.jsonl
  unrelated: corpus/general.jsonl
  max_rows: 32                    # and other options of `loku attack`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loku.bench.values import read_list, read_mapping
from loku.config import AttackOptions, resolve
from loku.errors import InputError, suggestion
from loku.files import sha256_json

ROWS = {"retain": "retain", "holdout": "holdout", "unrelated": "general"}  # and where they are from by default
SETTINGS = (
    "attacks", "other_base", "share", "steps", "every", "learning_rate", "batch_size", "rank", "prune_rates",
    "adapter_scales", "samples", "temperature", "max_rows", "retain_rows",
)  # fmt: skip


@dataclass(frozen=True)
class AttackPlan:
    """Options of `loku attack` with the recipe's names of rows and models, all of them, and the arms that they are on.

    Without names of arms it is on all of them.
    """

    settings: Mapping[str, Any]
    arms: tuple[str, ...] = ()

    def covers(self, arm: str) -> bool:
        """Return whether an arm's runs are attacked."""
        return not self.arms or arm in self.arms

    @property
    def id(self) -> str:
        """A hash of all that decides what the attacks find on a model."""
        return sha256_json(self.settings)[:10]

    @property
    def common_id(self) -> str:
        """The same but for the choice of attacks: others may be added to those that are done."""
        return sha256_json({name: value for name, value in self.settings.items() if name != "attacks"})[:10]


def read_attack(value: Any, where: str, arms: Sequence[str], rows: Mapping[str, Any]) -> AttackPlan | None:
    """Return what a recipe's `attack` says, or None without one.

    `rows` names the rows of the recipe by set. Raises InputError for arms, attacks and options that do not exist.
    """
    if value is None:
        return None
    where = f"{where}, attack"
    given = read_mapping(value, where, ("arms", *ROWS, *SETTINGS))
    named = read_list(given.pop("arms"), f"{where}: arms") if "arms" in given else []
    for name in named:
        if name not in arms:
            raise InputError(f"{where}: '{name}' is no arm.", suggestion(str(name), arms))
    for name in (*ROWS, "other_base", "attacks"):
        if not isinstance(given.get(name, ""), str):
            raise InputError(f"{where} has {name}: {given[name]!r}.", "Give text, such as the name of a file.")
    try:
        options = resolve(AttackOptions, given, {}, where=where)
        options.check()
        _check_names(options)
    except InputError as error:
        raise InputError(f"{where}: {error.given}", error.remedy) from None
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings |= {name: getattr(options, name) or rows.get(source) for name, source in ROWS.items()}
    if settings["retain"] == "self":  # there are no such rows before a run has sampled them
        settings["retain"] = None
    return AttackPlan(settings | {"forget": rows.get("forget")}, tuple(map(str, named)))


def _check_names(options: AttackOptions) -> None:
    """Raise InputError for attacks that do not exist, whatever rows there may be."""
    from loku.attack_models import named
    from loku.attack_sources import every_attack

    named(options.attacks, every_attack(options))
