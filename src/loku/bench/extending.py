"""Recipes that extend one another: a file says `extends: other.yaml` and what differs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loku.errors import InputError


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> Any:
    """Return what a recipe's YAML file says, merged into the one that it extends. Raises InputError."""
    import yaml

    if not path.is_file():
        raise InputError(f"The recipe '{path}' does not exist.", "Give the path of a benchmark's YAML file.")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The recipe '{path}' is not YAML: {error}", "See docs/bench.md for one that is.") from error
    if isinstance(value, Mapping) and "extends" in value:
        base = path.parent / str(value["extends"])
        if base.resolve() in (*seen, path.resolve()):
            raise InputError(f"The recipe '{path}' extends itself.", "Let the last of a chain stand on its own.")
        value = merged(read_yaml(base, (*seen, path.resolve())), {k: v for k, v in value.items() if k != "extends"})
    return value


def merged(base: Any, changes: Any) -> Any:
    """Return what a recipe that `extends` another stands for: mappings merged name by name, all else replaced.

    A name that is given nothing (`data:`) is taken out, and a mapping that says `replace: true` is not merged.
    """
    if isinstance(changes, Mapping) and changes.get("replace") is True:
        return {name: value for name, value in changes.items() if name != "replace"}
    if not isinstance(base, Mapping) or not isinstance(changes, Mapping):
        return changes
    kept = {name: value for name, value in base.items() if changes.get(name, ...) is not None}
    return kept | {name: merged(base.get(name), value) for name, value in changes.items() if value is not None}


def plain_text(path: Path) -> str:
    """Return a recipe as text that stands alone: as it was given, unless it extends another."""
    import yaml

    text = path.read_text(encoding="utf-8")
    given = yaml.safe_load(text)
    if not isinstance(given, Mapping) or "extends" not in given:
        return text
    return yaml.safe_dump(read_yaml(path), sort_keys=False, allow_unicode=True)
