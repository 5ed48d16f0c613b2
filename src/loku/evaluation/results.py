"""The results file: what an evaluation writes and everything else reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loku.errors import InputError
from loku.evaluation.metrics import Interval
from loku.files import json_text, read_json, write_text

SCHEMA_VERSION = 1
SUITES = ("tofu", "own", "tdec", "muse", "lume", "rwku", "utility")
REMEASURE = "Restore the file from a copy, or write it again with `loku evaluate`."


@dataclass
class SetResults:
    """The metrics of one set, and the numbers of each of its rows.

    Rows hold `index` and numbers only. Their truth ratios are the raw R; the set's own `truth_ratio` is the mean of
    min(R, 1/R) on the forget set and of max(0, 1 - R) elsewhere, as TOFU defines it.
    """

    rows: int
    metrics: dict[str, Interval]
    per_example: list[dict[str, float]] = field(default_factory=list)

    def mean(self, metric: str) -> float | None:
        """Return a metric's mean, or None where it was not measured."""
        found = self.metrics.get(metric)
        return None if found is None else found.mean


@dataclass
class Results:
    """One evaluation of one model. `texts` go to examples.jsonl, everything else to results.json."""

    suite: str
    model: dict[str, Any]
    data: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    sets: dict[str, SetResults]
    summary: dict[str, float]
    adapter: dict[str, Any] | None = None
    reference: dict[str, Any] | None = None
    verdict: dict[str, str] | None = None
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    texts: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def mean(self, name: str, metric: str) -> float | None:
        """Return a set's mean of a metric, or None where it was not measured."""
        found = self.sets.get(name)
        return None if found is None else found.mean(metric)

    def to_json(self) -> dict[str, Any]:
        """Return the content of results.json."""
        value = {"schema_version": SCHEMA_VERSION} | asdict(self)
        del value["texts"]
        for name, found in self.sets.items():
            value["sets"][name]["metrics"] = {metric: item._asdict() for metric, item in found.metrics.items()}
        return value


def results_text(results: Results) -> str:
    """Return what results.json holds. Raises ValueError for NaN and infinity: they are not JSON."""
    return json_text(results.to_json())


def write_results(results: Results, folder: str | Path, *, role: str | None = None) -> Path:
    """Write results.json, and examples.jsonl where texts were kept, and return the path of the first.

    With a role ("target", "retain_only") the names are results.<role>.json and examples.<role>.jsonl, as in a run
    folder. Texts of an earlier evaluation under the same name are removed: they do not belong to these numbers.
    """
    ending = f".{role}" if role else ""
    path, examples = Path(folder) / f"results{ending}.json", Path(folder) / f"examples{ending}.jsonl"
    write_text(path, results_text(results))
    if results.texts:
        write_text(examples, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in results.texts))
    else:
        examples.unlink(missing_ok=True)
    return path


def read_results(path: str | Path) -> Results:
    """Read and check a results file; `texts` stay empty.

    Raises InputError when the file is absent, no JSON, of another schema version, or lacks a part.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no results file '{path}'.", "Give a results.json written by `loku evaluate`.")
    try:
        value = read_json(path)
    except ValueError as error:
        raise InputError(f"The results file '{path}' is not readable JSON ({error}).", REMEASURE) from None
    return parse_results(value, str(path))


def parse_results(value: Any, source: str) -> Results:
    """Return the Results that a JSON value describes; `source` names it in errors."""
    if not isinstance(value, Mapping) or "sets" not in value:
        raise InputError(
            f"'{source}' is not a results file: it has no 'sets'.", "Give a results.json written by `loku evaluate`."
        )
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"The results file '{source}' has schema_version {version!r}; this version of loku reads {SCHEMA_VERSION}.",
            "Run the evaluation again with this version of loku.",
        )
    suite = _part(value, "suite", str, source)
    if suite not in SUITES:
        raise InputError(f"The results file '{source}' is of suite '{suite}'.", f"Give one of: {', '.join(SUITES)}.")
    sets = _part(value, "sets", Mapping, source)
    data = _part(value, "data", Mapping, source)
    summary = _part(value, "summary", Mapping, source)
    for name, number in summary.items():
        if not _is_number(number):
            raise InputError(f"The results file '{source}' has no usable number for '{name}'.", REMEASURE)
    return Results(
        suite=suite,
        model=dict(_part(value, "model", Mapping, source)),
        data={name: dict(_part(data, name, Mapping, source)) for name in data},
        settings=dict(_part(value, "settings", Mapping, source)),
        sets={name: _parse_set(item, f"{source}: {name}") for name, item in sets.items()},
        summary=dict(summary),
        adapter=value.get("adapter"),
        reference=value.get("reference"),
        verdict=value.get("verdict"),
        warnings=list(value.get("warnings") or []),
        versions=dict(value.get("versions") or {}),
        seconds=float(value["seconds"]) if _is_number(value.get("seconds")) else 0.0,
    )


def _part(value: Mapping[str, Any], key: str, kind: type, source: str) -> Any:
    if not isinstance(value, Mapping) or not isinstance(value.get(key), kind):
        raise InputError(f"The results file '{source}' has no usable '{key}'.", REMEASURE)
    return value[key]


def _parse_set(value: Any, source: str) -> SetResults:
    metrics = {}
    for name, item in _part(value, "metrics", Mapping, source).items():
        numbers = [item.get(key) if isinstance(item, Mapping) else None for key in Interval._fields]
        if not all(map(_is_number, numbers)):
            raise InputError(f"The results file '{source}' has no usable numbers for '{name}'.", REMEASURE)
        metrics[name] = Interval(*(float(number) for number in numbers))  # type: ignore[arg-type]
    rows = _part(value, "per_example", list, source)
    for row in rows:
        if not (isinstance(row, Mapping) and "index" in row and all(map(_is_number, row.values()))):
            raise InputError(f"The results file '{source}' has a row without usable numbers.", REMEASURE)
    return SetResults(int(_part(value, "rows", int, source)), metrics, [dict(row) for row in rows])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
