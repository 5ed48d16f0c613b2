"""A share of an evaluation's rows, measured again with the evaluation's own settings and compared number by number."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from loku.data.encoding import Encoder
from loku.data.prompts import ChatTemplate, TagTemplate, Template
from loku.data.sources import RecordSet
from loku.errors import InputError
from loku.evaluation.assembly import evaluate_prepared, prepare
from loku.evaluation.measuring import Effort, Progress, answer_limit, summarise
from loku.evaluation.results import Results, SetResults

TOLERANCES = {"float32": 1e-3, "float64": 1e-3}  # a number's, times its size where that is above 1
HALF_TOLERANCE = 5e-2  # of types that keep 8 or 11 bits
GREEDY = (
    "rougeL_recall",
    "rouge1_recall",
    "exact_match",
    "paraphrase_exact_match",
    "refusal_rate",
    "repetition",
    "token_entropy",
)  # fmt: skip - what hangs on generated words: two nearly equal tokens may change places on other hardware


@dataclass(frozen=True)
class Difference:
    """One number of one row that is another when measured again; `now` is None where it is gone."""

    set: str
    index: int
    metric: str
    recorded: float
    now: float | None

    def __str__(self) -> str:
        now = "nothing" if self.now is None else f"{self.now:.6g}"
        return f"{self.set} row {self.index}: {self.metric} {self.recorded:.6g} recorded, {now} now"


@dataclass(frozen=True)
class Comparison:
    """How many rows and numbers were compared, what differed, and the largest difference of all."""

    rows: int
    numbers: int
    differences: list[Difference]
    largest: float


def tolerance_of(results: Results, given: float | None) -> float:
    """Return the tolerance: the one given, or what the model's type allows."""
    return given if given is not None else TOLERANCES.get(str(results.model.get("dtype")), HALF_TOLERANCE)


def is_apart(recorded: float, now: float, tolerance: float) -> bool:
    """Say whether two numbers differ by more than the tolerance, times the recorded number's size where above 1."""
    return not abs(recorded - now) <= tolerance * max(1.0, abs(recorded))


def choose_rows(results: Results, share: float, seed: int) -> dict[str, set[int]]:
    """Return the indices of a random share of each set's rows, at least one of a set unless the share is 0."""
    chosen = {}
    for name, found in results.sets.items():
        indices = sorted(int(row["index"]) for row in found.per_example)
        count = math.ceil(share * len(indices))
        chosen[name] = set(random.Random(f"{seed} {name}").sample(indices, count))
    return {name: indices for name, indices in chosen.items() if indices}


def measure_again(
    model: nn.Module,
    tokenizer: Any,
    results: Results,
    rows: Mapping[str, RecordSet],
    chosen: Mapping[str, set[int]],
    progress: Progress | None = None,
) -> Results:
    """Measure the chosen rows of the sets given, as the results say that they were measured.

    How long an answer may be follows from all rows of the evaluation, not from the chosen ones.
    """
    settings, template = results.settings, template_of(results)
    limit = settings.get("max_new_tokens")
    if limit is None:
        whole = {name: list(found)[: results.sets[name].rows] for name, found in rows.items()}
        limit = answer_limit(model, tokenizer, Encoder(tokenizer, template, settings["max_length"]), whole)
    subset = {
        name: RecordSet(found.name, tuple(r for r in found if r.index in chosen[name]), found.sha256, found.origin)
        for name, found in rows.items()
        if chosen.get(name)
    }
    return evaluate_prepared(
        model,
        tokenizer,
        prepare(subset, max_rows=None, reference=None, target=None),
        suite=results.suite,
        template=template,
        max_length=settings["max_length"],
        effort=Effort(None, limit, fit_answers=True),
        settings={},
        keep_text=False,
        seed=settings["seed"],
        model_name=None,
        model_sha256=None,
        progress=progress,
    )


def template_of(results: Results) -> Template:
    """Return the template that results were measured with. Raises InputError where they do not say."""
    found = dict(results.settings.get("template") or {})
    kinds: dict[str, type[TagTemplate | ChatTemplate]] = {"TagTemplate": TagTemplate, "ChatTemplate": ChatTemplate}
    try:
        return kinds[str(found.pop("kind", None))](**found)
    except (KeyError, TypeError) as error:
        raise InputError("The results do not say how their prompts were made.", "Measure them again.") from error


def compare(recorded: Results, now: Results, tolerance: float, skip: Collection[str] = ()) -> Comparison:
    """Compare the rows that were measured again with what was recorded of them, but for the metrics to skip."""
    differences, numbers, rows, largest = [], 0, 0, 0.0
    for name, found in now.sets.items():
        before = {int(row["index"]): row for row in recorded.sets[name].per_example}
        for row in found.per_example:
            rows += 1
            for metric, value in before[int(row["index"])].items():
                if metric in skip:
                    continue
                numbers += 1
                again = row.get(metric)
                if again is None or is_apart(value, again, tolerance):
                    differences.append(Difference(name, int(row["index"]), metric, value, again))
                if again is not None:
                    largest = max(largest, abs(value - again) / max(1.0, abs(value)))
    return Comparison(rows, numbers, differences, largest)


def figures_that_do_not_follow(results: Results) -> list[str]:
    """Return the figures of results that do not follow from the numbers of their rows."""
    found = []
    for name, recorded in results.sets.items():
        lacking = [row.get("index") for row in recorded.per_example if not {"nll", "tokens"} <= set(row)]
        if lacking or not recorded.per_example:
            found.append(f"{name} row {lacking[0]} has no nll" if lacking else f"{name} has no rows")
            continue
        again = _summary(results, name, recorded)
        for metric, value in recorded.metrics.items():
            if metric not in again.metrics:
                found.append(f"{name} {metric} is of no row")
            elif any(is_apart(a, b, 1e-9) for a, b in zip(value, again.metrics[metric], strict=True)):
                found.append(f"{name} {metric} {value.mean:.6g} recorded, {again.metrics[metric].mean:.6g} by its rows")
        if recorded.rows != again.rows:
            found.append(f"{name}: {recorded.rows} rows recorded, {again.rows} there")
    return found


def _summary(results: Results, name: str, recorded: SetResults) -> SetResults:
    return summarise(recorded.per_example, forget=name == "forget", seed=int(results.settings.get("seed", 42)))
