"""The entry `tuning` of a recipe: the grid that every arm gets on the same seeds, and the rule that chooses of it.

tuning:
  seeds: [10, 11]
  grid: {learning_rate: [5e-4, 1e-3, 2e-3]}
  choose: closest                 # or: level
  at: {rank: 8}                   # arms that differ in these options alone are tuned together, here
                                  # or `chosen: file`, a chosen.json of another benchmark: nothing is tuned
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loku.bench.values import read_list, read_mapping, read_seeds
from loku.config import UnlearnOptions
from loku.errors import InputError, suggestion
from loku.files import read_object

RULES = ("closest", "level")


@dataclass(frozen=True)
class Tuning:
    """The budget of every arm: grid points times seeds, and how a point is chosen.

    Or, where nothing is tuned, the points that another benchmark chose, by arm, and the file that they are from.
    """

    seeds: tuple[int, ...] = ()
    points: tuple[Mapping[str, Any], ...] = ({},)
    choose: str = "closest"
    at: Mapping[str, Any] = field(default_factory=dict)
    chosen: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    source: str | None = None


def read_tuning(value: Any, where: str, arms: Sequence[str]) -> Tuning:
    """Return what a recipe's `tuning` says for arms of these names. Raises InputError for what cannot be used."""
    if value is None:
        return Tuning()
    parts = read_mapping(value, f"{where}, tuning", ("seeds", "grid", "choose", "at", "chosen"))
    if "chosen" in parts:
        return _chosen(parts, f"{where}, tuning", arms)
    grid = {
        k: read_list(v, f"{where}, grid '{k}'")
        for k, v in read_mapping(parts.get("grid", {}), f"{where}, grid").items()
    }
    rule = str(parts.get("choose", "closest"))
    if rule not in RULES:
        raise InputError(f"{where}, tuning chooses by '{rule}'.", suggestion(rule, RULES))
    points = tuple(dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    seeds = read_seeds(parts.get("seeds"), f"{where}, tuning seeds")
    if not grid:
        raise InputError(f"{where}, tuning has no grid.", "Give grid: {learning_rate: [1e-3, 3e-3]}, or no tuning.")
    at = read_mapping(parts.get("at", {}), f"{where}, tuning: at", tuple(UnlearnOptions.fields()))
    return Tuning(seeds, points, rule, at)


def _chosen(parts: Mapping[str, Any], where: str, arms: Sequence[str]) -> Tuning:
    """Return the points of a chosen.json, each arm's by its name."""
    if len(parts) > 1:
        others = ", ".join(name for name in parts if name != "chosen")
        raise InputError(
            f"{where} has chosen, and {others} as well.", "Give one: in a recipe that extends another, replace: true."
        )
    path = str(parts["chosen"])
    if not Path(path).is_file():
        raise InputError(f"{where}: chosen '{path}' does not exist.", "Give a chosen.json that loku bench wrote.")
    found = read_object(Path(path), "Give a chosen.json that loku bench wrote.").get("arms")
    if not isinstance(found, Mapping) or not all(isinstance(arm, Mapping) and "point" in arm for arm in found.values()):
        raise InputError(f"{where}: '{path}' holds no chosen points.", "Give a chosen.json that loku bench wrote.")
    for arm in arms:
        if arm not in found:
            raise InputError(f"{where}: '{path}' has no arm '{arm}'.", suggestion(arm, map(str, found)))
    return Tuning(chosen={arm: dict(found[arm]["point"]) for arm in arms}, source=path)
