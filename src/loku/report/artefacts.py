"""What a run folder or an evaluation folder holds, read and checked before anything is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loku.errors import InputError
from loku.files import read_object, sha256_file

SCHEMA_VERSION = 1

# The three models that a report sets side by side, in the order in which they are shown.
ROLES = {"target": "Target", "unlearned": "Unlearned", "retain_only": "Retain-only"}
RESULT_FILES = {"target": "results.target.json", "unlearned": "results.json", "retain_only": "results.retain_only.json"}
ATTACKS = "attacks.json"
EXAMPLE_FILES = {
    "target": "examples.target.jsonl",
    "unlearned": "examples.jsonl",
    "retain_only": "examples.retain_only.jsonl",
}


@dataclass(frozen=True)
class RunFolder:
    """The artefacts of one folder; a piece that does not exist is None or empty."""

    path: Path
    run: dict[str, Any] | None
    config: str | None
    curves: list[dict[str, Any]]
    results: dict[str, dict[str, Any]]
    examples: dict[str, list[dict[str, Any]]]
    hashes: dict[str, str]
    problems: list[str] = field(default_factory=list)
    watched: list[dict[str, Any]] = field(default_factory=list)  # what was measured while training
    attacks: dict[str, Any] | None = None
    record: dict[str, Any] | None = None  # record.json, where the run has one

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name


def at(value: object, *keys: str) -> Any:
    """Follow keys through nested mappings; None where one is missing or something else stands there."""
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def section(value: object, *keys: str) -> dict[str, Any]:
    """Like `at`, for a part that should be a mapping: an empty one when it is not there."""
    found = at(value, *keys)
    return dict(found) if isinstance(found, Mapping) else {}


def number(value: object) -> float | None:
    """Return a finite number as float, and None for everything else (bool, text, NaN, infinity)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def read_folder(path: str | Path) -> RunFolder:
    """Read a run folder (run.json) or an evaluation folder (results.json only).

    Raises InputError when the folder holds neither, or when a file in it is damaged or of a newer schema.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(
            f"There is no folder '{path}'.",
            "Give a run folder made by `loku unlearn`, or a folder written by `loku evaluate`.",
        )
    if not (path / "run.json").is_file() and not (path / "results.json").is_file():
        raise InputError(
            f"The folder '{path}' holds neither run.json nor results.json.",
            "Give a run folder made by `loku unlearn`, or a folder written by `loku evaluate`.",
        )
    problems: list[str] = []
    run = _read_object(path / "run.json")
    results = {role: _read_object(path / name) for role, name in RESULT_FILES.items()}
    examples = {role: _read_lines(path / name, problems) for role, name in EXAMPLE_FILES.items()}
    config = path / "config.yaml"
    hashed = [*RESULT_FILES.values(), "run.json", "config.yaml", "metrics.jsonl", "curve.jsonl", ATTACKS]
    return RunFolder(
        path=path,
        run=run,
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
        curves=_read_lines(path / "metrics.jsonl", problems),
        results={role: value for role, value in results.items() if value is not None},
        examples={role: rows for role, rows in examples.items() if rows},
        hashes={name: sha256_file(path / name) for name in sorted(hashed) if (path / name).is_file()},
        problems=problems,
        watched=_read_lines(path / "curve.jsonl", problems),
        attacks=_read_object(path / ATTACKS),
        record=_read_object(path / "record.json"),
    )


def _read_object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    value = read_object(path, _restore(path))
    version = value.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise InputError(
            f"The file '{path}' has schema_version {version!r}; this version of loku reads {SCHEMA_VERSION}.",
            "Make the report with the version of loku that wrote the folder, or run the evaluation again.",
        )
    return value


def _read_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Read JSON lines. A broken last line is what a killed run leaves behind: it is dropped, and said."""
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also cut at U+2028 inside a text
    except UnicodeDecodeError as error:
        raise InputError(f"The file '{path}' is not UTF-8 text ({error}).", _restore(path)) from None
    rows: list[dict[str, Any]] = []
    for position, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if position == len(lines):
                problems.append(f"The last line of {path.name} is incomplete and was left out.")
                break
            raise InputError(
                f"Line {position} of the file '{path}' is not readable JSON ({error}).", _restore(path)
            ) from None
        if not isinstance(row, dict):
            raise InputError(f"Line {position} of the file '{path}' is not a JSON object.", _restore(path))
        rows.append(row)
    return rows


def _restore(path: Path) -> str:
    written = dict.fromkeys(("run.json", "metrics.jsonl", "curve.jsonl"), "loku unlearn")
    written |= {ATTACKS: "loku attack", "record.json": "loku record"}
    verb = written.get(path.name, "loku evaluate")
    return f"Restore the file from a copy, or write it again with `{verb}`."


def read_folders(folders: Sequence[str | Path]) -> list[RunFolder]:
    """Read one or several folders, refusing an empty list and a folder that is given twice."""
    if not folders:
        raise InputError("No run folder was given.", "Give one run folder, or several to compare them.")
    seen: set[Path] = set()
    for folder in folders:
        resolved = Path(folder).resolve()
        if resolved in seen:
            raise InputError(f"The folder '{folder}' was given twice.", "Give each run folder once.")
        seen.add(resolved)
    return [read_folder(folder) for folder in folders]
