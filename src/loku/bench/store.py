"""Where a benchmark's results lie: one JSON file a run, found again by arm, settings and seed.

<output>/recipe.yaml                          the recipe as it was given
<output>/models/<id>/seed-<s>/                corpus, models, and models.json: target and retain-only measured
<output>/models/<id>/seed-<s>/attacks-<id>/   what attacks found on the seed's own models, by row, for all of its runs
<output>/runs/<arm>/<run id>/seed-<s>.json    one run: settings, figures, curve, relearning, costs, versions
<output>/runs/<arm>/<run id>/seed-<s>.work/   while it runs, and after a kill: where the next call goes on
<output>/runs/<arm>/<run id>/seed-<s>.error.txt    why it failed, until it is repeated
<output>/chosen.json                          the tuning's choice for every arm
<output>/runs.jsonl                           all of the runs in one file, for committing
<output>/leaderboard.html, leaderboard.md     the page
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loku.bench.recipe import RETAIN_ONLY, TARGET, Arm, Recipe
from loku.errors import InputError
from loku.files import read_json, write_text

SCHEMA_VERSION = 1
Record = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One piece of work that a worker can do from its fields alone."""

    kind: str  # "models", "attacks" (on the seed's own models) or "trial"
    root: str
    seed: int
    recipe: Recipe
    arm: Arm | None = None
    point: Mapping[str, Any] | None = None

    @property
    def path(self) -> Path:
        """The file that is there when the task is done."""
        if self.kind == "attacks" and self.recipe.attack is not None:
            return attacks_folder(self.root, self.recipe, self.seed) / f"{self.recipe.attack.id}.json"
        if self.arm is None:
            return models_folder(self.root, self.recipe, self.seed) / "models.json"
        return run_file(self.root, self.recipe, self.arm, self.point or {}, self.seed)

    @property
    def error_file(self) -> Path:
        """The file that says why the task failed, when it did."""
        return self.path.with_suffix(".error.txt")

    @property
    def label(self) -> str:
        """How a person calls it."""
        if self.arm is None:
            return f"{'attacks on the ' if self.kind == 'attacks' else ''}models of seed {self.seed}"
        point = ", ".join(f"{name} {value}" for name, value in (self.point or {}).items())
        return f"{self.arm.name}{f' ({point})' if point else ''}, seed {self.seed}"


def models_folder(root: str | Path, recipe: Recipe, seed: int) -> Path:
    """Return the folder of a seed's corpus and models."""
    return Path(root) / "models" / recipe.models_id() / f"seed-{seed}"


def attacks_folder(root: str | Path, recipe: Recipe, seed: int) -> Path:
    """Return the folder of what the recipe's attacks found on a seed's own models."""
    assert recipe.attack is not None
    return models_folder(root, recipe, seed) / f"attacks-{recipe.attack.common_id}"


def run_file(root: str | Path, recipe: Recipe, arm: Arm, point: Mapping[str, Any], seed: int) -> Path:
    """Return the file of a run."""
    found = recipe.run_id(arm, point, attacked=recipe.attacked(arm, seed))
    return Path(root) / "runs" / arm.slug / found / f"seed-{seed}.json"


def read_record(path: Path) -> Record | None:
    """Return a finished task's JSON, or None. Raises InputError for a file of another version or no JSON."""
    if not path.is_file():
        return None
    try:
        value = read_json(path)
    except ValueError as error:
        raise InputError(f"'{path}' is not readable JSON ({error}).", "Remove it: it is made again.") from None
    if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"'{path}' is of another version of loku bench.", "Choose a new --output folder.")
    return value


def noise_count(recipe: Recipe, seed: int) -> int:
    """Return how many further retain-only models a seed has: those of a tuning seed would be scored by nobody."""
    return recipe.noise_floor if seed in recipe.seeds else 0


def noise_names(record: Record) -> list[str]:
    """Return the names of the further retain-only models in a models.json."""
    return [name for name in record["models"] if name not in (TARGET, RETAIN_ONLY)]


def all_records(root: str | Path) -> Iterator[Record]:
    """Return every run of an output folder, in the order of their names."""
    for path in sorted(Path(root, "runs").glob("*/*/seed-*.json")):
        found = read_record(path)
        if found is not None:
            yield found


def write_collection(records: list[Record], path: Path) -> None:
    """Write records as JSON lines."""
    write_text(
        path, "".join(json.dumps(r, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n" for r in records)
    )


def read_collection(path: str | Path) -> list[Record]:
    """Read what `write_collection` wrote."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]
