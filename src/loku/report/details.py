"""The engineer's part of a report: costs, data counts, importances, hashes and versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loku.report.artefacts import ROLES, RunFolder, at, number, section
from loku.report.numerals import count, duration, memory, percent

PHASES = ("importance", "activations", "initialisation", "training", "watching", "evaluation")

DATA_COUNTS = {
    "rows": "Rows",
    "sequences": "Sequences",
    "supervised_tokens": "Supervised tokens",
    "windows_cut": "Cut into windows",
    "truncated": "Truncated",
    "shifted_boundaries": "Shifted boundaries",
}

IMPORTANCE = {
    "forget": "Mean F forget",
    "retain": "Mean F retain",
    "ratio": "Ratio",
    "relative_max": "Largest / mean row",
    "directions": "Directions found",
    "share_below_eps": "Retain entries below ε",
    "rank_correlation_forget_only": "Rank corr. with forget-only",
    "energy_captured": "Energy captured",
    "norm_a": "‖A‖",
    "norm_b": "‖B‖",
}


def costs(run: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return seconds by phase with their shares, and the other costs as (name, text)."""
    if run is None:
        return None
    seconds = {name: number(value) for name, value in section(run, "seconds").items()}
    known = {name: value for name, value in seconds.items() if value is not None and name != "total"}
    order = [name for name in PHASES if name in known] + [name for name in known if name not in PHASES]
    measured = sum(known.values())
    total = seconds.get("total") or measured
    # Shares are of the total, so that time spent outside the phases (loading, writing) shows as a gap.
    phases = [(name.capitalize(), known[name], known[name] / max(total, measured, 1e-9)) for name in order]
    trainable, hardware = section(run, "trainable"), section(run, "hardware")
    cores, threads = number(hardware.get("cores")), number(hardware.get("threads"))
    rows = [
        ("Total time", duration(total) if seconds else None),
        ("Peak memory", memory(number(run.get("peak_memory_bytes"))) if "peak_memory_bytes" in run else None),
        ("Optimiser steps", count(number(run.get("steps"))) if "steps" in run else None),
        ("Trainable parameters", count(number(trainable.get("parameters"))) if trainable else None),
        ("Trainable share", percent(number(trainable.get("share"))) if trainable else None),
        ("Device", hardware.get("device")),
        ("Processor", hardware.get("cpu")),
        ("Cores / threads", f"{count(cores)} / {count(threads)}" if cores or threads else None),
    ]
    return {"phases": phases, "rows": [(name, str(value)) for name, value in rows if value]}


def data_counts(run: Mapping[str, Any] | None, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the counts of the training data, and of what was evaluated where that is all there is."""
    used = {name: entry for name, entry in section(run, "data").items() if isinstance(entry, Mapping)}
    scored = {name: entry for name, entry in section(results.get("unlearned"), "sets").items()}
    columns = [name for name in DATA_COUNTS if any(name in entry for entry in used.values())]
    rows = [
        (name, str(entry.get("name") or ""), [count(number(entry.get(column))) for column in columns])
        for name, entry in used.items()
    ]
    evaluated = [
        (name, str(at(results.get("unlearned"), "data", name, "name") or ""), count(number(at(entry, "rows"))))
        for name, entry in scored.items()
    ]
    if not rows and not evaluated:
        return None
    return {"columns": [DATA_COUNTS[name] for name in columns], "rows": rows, "evaluated": evaluated}


def layer_figures(run: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return what run.json says of each layer: what the initialiser saw of it, and where its adapter starts."""
    found: dict[str, dict[str, Any]] = {}
    for part in ("importance", "initialisation"):
        layers = at(run, part, "layers")
        for layer in layers if isinstance(layers, list) else []:
            if isinstance(layer, Mapping):
                found.setdefault(str(layer.get("name")), {}).update(layer)
    return list(found.values())


def importance_rows(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the table of importances: every column that any layer has."""
    if not layers:
        return None
    rows = []
    for layer in layers:
        values = {name: number(layer.get(name)) for name in IMPORTANCE}
        forget, retain = values["forget"], values["retain"]
        if forget is not None and retain:
            values["ratio"] = forget / retain
        rows.append((str(layer.get("name", "")), values))
    columns = [name for name in IMPORTANCE if any(values[name] is not None for _, values in rows)]
    return {
        "columns": [IMPORTANCE[name] for name in columns],
        "rows": [(name, [values[column] for column in columns]) for name, values in rows],
    }


def provenance(folder: RunFolder) -> dict[str, Any]:
    """Return hashes as (what, name, sha256), and versions as (what, version)."""
    run, results = folder.run, folder.results
    hashes: list[tuple[str, str, str]] = []

    def add(what: str, entry: object) -> None:
        sha = at(entry, "sha256")
        row = (what, str(at(entry, "name") or ""), str(sha))
        if sha and not any(row[2] == other[2] for other in hashes):
            hashes.append(row)

    if run is not None:
        add("Target model", run.get("model"))
        add("Adapter", run.get("adapter"))
        for name, entry in section(run, "data").items():
            add(f"Data: {name}", entry)
    for role, result in results.items():
        label = ROLES[role]
        add(f"{label}: model", result.get("model"))
        add(f"{label}: adapter", result.get("adapter"))
        add(f"{label}: reference", result.get("reference"))
        for name, entry in section(result, "data").items():
            add(f"Evaluation data: {name}", entry)
    hashes += [("File", name, sha) for name, sha in folder.hashes.items()]
    versions = section(run, "versions") or section(results.get("unlearned"), "versions")
    facts = [
        ("Command", at(run, "command")),
        ("Seed", at(run, "seed")),
        ("Architecture", at(run, "model", "architecture")),
        ("Parameters", count(number(at(run, "model", "parameters"))) if at(run, "model", "parameters") else None),
        ("Stored as", at(run, "model", "dtype")),
        ("Suite", at(results.get("unlearned"), "suite")),
    ]
    return {
        "hashes": hashes,
        "versions": [(name, str(version)) for name, version in versions.items()],
        "facts": [(name, str(value)) for name, value in facts if value is not None],
    }
