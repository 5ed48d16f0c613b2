"""An evaluation that is finished already: asked again, its folder answers without loading the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loku.config import EvaluateOptions
from loku.evaluation.results import Results, read_results
from loku.files import read_json, sha256_file, sha256_json, write_json
from loku.runs import versions

CACHE = "cache"  # in an evaluation's folder; may be deleted at any time
RECORD = "finished.json"
WITHOUT_EFFECT = ("output", "json", "cache")
FILES = ("prompt_template", "reference", "target")  # options that name a file or a folder with results


def evaluation_request(options: EvaluateOptions, hashes: Mapping[str, str]) -> str | None:
    """Return a hash of everything that decides an evaluation, or None when that cannot be told without the model.

    Rows count by their content, models and adapters in folders by the names, sizes and times of their files, as `make`
    does; so no weights need to be read. Paths are not written anywhere. A model from the hub has no such folder.
    """
    if not Path(str(options.model)).is_dir():
        return None
    named = {
        name: Path(path) for name in ("model", "adapter", "reference_model", *FILES) if (path := getattr(options, name))
    }
    return sha256_json(
        {
            "options": {k: v for k, v in options.as_dict().items() if k not in WITHOUT_EFFECT},
            "rows": dict(hashes),
            "files": {name: _identity(path, results=name in FILES) for name, path in named.items()},
            "versions": versions(),
        }
    )


def finished_results(output: str | Path, request: str | None) -> Results | None:
    """Return the results in a folder when they are those of a request, unchanged since; otherwise None."""
    folder = Path(output)
    record = folder / CACHE / RECORD
    if request is None or not record.is_file():
        return None
    try:
        known = read_json(record)
    except ValueError:
        return None
    return read_results(folder / "results.json") if known == _record(folder, request) else None


def remember(output: str | Path, request: str | None) -> None:
    """Note in a folder that its results are those of a request."""
    if request is not None:
        write_json(Path(output) / CACHE / RECORD, _record(Path(output), request))


def _record(folder: Path, request: str) -> dict[str, Any]:
    files = {name: folder / name for name in ("results.json", "examples.jsonl")}
    return {"request": request} | {n: sha256_file(file) if file.is_file() else None for n, file in files.items()}


def _identity(path: Path, *, results: bool) -> list[Any]:
    """Return names, sizes and times of the files of a folder, with or without results; of a single file, its hash."""
    if path.is_file():
        return [sha256_file(path)]
    if not path.is_dir():
        return []
    files = sorted(file for file in path.iterdir() if file.is_file())
    if not results:  # an evaluation may live in the model's own folder
        files = [file for file in files if not file.name.startswith(("results", "examples", "report"))]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
