"""Runs that differ in their seed alone: one row of means, and how two runs differ row by row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from loku.errors import InputError
from loku.report.artefacts import RunFolder, at
from loku.report.figures import metric_info, set_title
from loku.report.numerals import figure

SEED = "seed"
HIDDEN_SETTINGS = ("output", "output_dir", "resume")  # differ between all runs and say nothing about the method
LEAST_P = 1e-300  # p-values below it are taken for it, as `loku evaluate --seeds` does
NONE = figure(None)


def settings_of(run: RunFolder) -> dict[str, str]:
    """Return a run's settings, flat, by name; none where config.yaml is absent or unreadable."""
    try:
        value = yaml.safe_load(run.config or "")
    except yaml.YAMLError:
        return {}
    return {name: text for name, text in _flat(value).items() if name not in HIDDEN_SETTINGS}


def _flat(value: object, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, Mapping):
        return {prefix.rstrip("."): str(value)} if prefix else {}
    return {name: text for key, inner in value.items() for name, text in _flat(inner, f"{prefix}{key}.").items()}


def seed_groups(runs: Sequence[RunFolder]) -> list[list[int]]:
    """Return the places of runs, those together that differ in their seed alone, in the order of their first.

    They have settings on record, the same but for different seeds, and share suite, target model, and data by hash.
    What has no settings stays by itself.
    """
    groups: dict[Any, list[int]] = {}
    for place, run in enumerate(runs):
        settings = settings_of(run)
        seed = settings.pop(SEED, None)
        data = at(run.results.get("unlearned"), "data")
        hashes = tuple(sorted((name, str(at(item, "sha256"))) for name, item in (data or {}).items()))
        alike = (
            tuple(sorted(settings.items())),
            at(run.run, "method", "name"),
            at(run.run, "model", "sha256"),
            at(run.results.get("unlearned"), "suite"),
            hashes,
        )
        key: Any = alike if seed is not None and "unlearned" in run.results else place
        known = groups.setdefault(key, [])
        if seed in [settings_of(runs[other]).get(SEED) for other in known] and known:
            groups[place] = [place]  # the same seed twice is no second seed
        else:
            known.append(place)
    return list(groups.values())


def spread_text(values: Sequence[float | None], *, logarithm: bool = False) -> str:
    """Return mean, deviation, least and largest of a figure over seeds, as one text; a dash where a run lacks it.

    The deviation is the sample's (n - 1), as in `loku evaluate --seeds`. With `logarithm` it is that of log10, for
    p-values, which span orders of magnitude.
    """
    from loku.evaluation.paired import spread  # brings torch

    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return NONE
    if logarithm:
        known = [math.log10(max(value, LEAST_P)) for value in known]
    found = spread(known)
    text = figure(found.mean)
    if found.deviation is not None:
        text += f" ± {figure(found.deviation)} ({figure(min(known))}\N{EN DASH}{figure(max(known))})"
    return f"log10 {text}" if logarithm else text


def paired_rows(runs: Sequence[RunFolder]) -> list[tuple[str, str, list[str]]]:
    """Return (set, metric, cells) of two runs compared on the rows they share; nothing for other numbers of runs.

    Cells are the mean of second - first, its 95 % interval, and the p-value of `loku evaluate --compare`. Results that
    do not compare give nothing.
    """
    results = [run.results.get("unlearned") for run in runs]
    if len(results) != 2 or None in results:
        return []
    from loku.evaluation.paired import compare  # brings torch
    from loku.evaluation.results import parse_results

    try:
        found = compare(*(parse_results(value, run.name) for value, run in zip(results, runs, strict=True)))
    except InputError:
        return []
    return [
        (
            set_title(name),
            metric_info(metric).label,
            [
                figure(row["difference"]),
                f"{figure(row['low'])} to {figure(row['high'])}",
                figure(row["p"]),
                str(row["rows"]),
            ],
        )
        for name, metrics in found["sets"].items()
        for metric, row in metrics.items()
    ]
