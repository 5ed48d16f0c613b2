"""Tables of docs/ablation.md: what each initialiser does at each rank, from the runs that `loku bench` collected.

loku bench recipes/bench/initialisers-fiction.yaml     # then copy its runs.jsonl to benchmarks/results/
python benchmarks/tables.py                            # writes the tables
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from loku.bench.figures import value_of
from loku.bench.store import read_collection
from loku.bench.tuning import steps_taken

RESULTS = Path(__file__).resolve().parent / "results"
INITIALISERS = ("lora", "pissa", "fila-official", "fila", "fila-two-sided", "vila", "reglu")
Record = dict[str, Any]
Figure = Callable[[Record], float | None]
LEVEL = ("probability", "exact_memorisation")  # the figures of the forget level
NEAR = 0.02  # of them, where runs come close to the level and hover there


def runs_of(name: str, method: str, *, eps: bool = False) -> list[Record]:
    """Return a method's runs; with `eps` those whose eps was set by hand, else the others."""
    found = [record for record in read_collection(RESULTS / f"{name}.jsonl") if "arm" in record]
    return [r for r in found if r["options"]["method"] == method and ("importance_eps" in r["options"]) == eps]


def figure(name: str) -> Figure:
    """Return a function that reads one figure of a run."""
    return lambda record: value_of(record["figures"], name)


def steps(record: Record) -> float:
    """Return the steps that a run took."""
    return steps_taken(record)


def rest(record: Record) -> float | None:
    """Return the answer probability of the forgotten facts that were not trained on, after relearning the others."""
    return record["relearning"]["means"]["rest"]["probability"][-1] if record.get("relearning") else None


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return mean ± standard deviation."""
    if not values:
        return "-"
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def cell(records: Sequence[Record], read: Figure, digits: int) -> str:
    """Return one cell; seeds that never reached the level are counted beside the steps."""
    values = [value for value in map(read, records) if value is not None]
    text = spread(values, digits)
    missed = sum(not record.get("stopped") for record in records)
    return text + (f" ({missed} of {len(records)} not reached)" if missed and read is steps else "")


def grid(name: str, method: str, read: Figure, digits: int = 2) -> str:
    """Return a table: initialisers down, ranks across."""
    runs = runs_of(name, method)
    ranks = sorted({r["options"]["rank"] for r in runs})
    head = " | ".join(f"rank {rank}" for rank in ranks)
    lines = [f"| starts from | {head} |", "| --- " * (len(ranks) + 1) + "|"]
    for init in INITIALISERS:
        cells = [[r for r in runs if (r["options"]["init"], r["options"]["rank"]) == (init, rank)] for rank in ranks]
        if any(cells):
            lines.append(f"| {init} | " + " | ".join(cell(found, read, digits) for found in cells) + " |")
    return "\n".join(lines)


def steps_near(levels: dict[int, dict[str, float]]) -> Figure:
    """Return a function that reads the step of the first look at which all figures were within `NEAR` of the level."""

    def read(record: Record) -> float | None:
        level = levels[record["seed"]]
        near = (
            row["step"] for row in record["curve"] if all(row[name] <= value + NEAR for name, value in level.items())
        )
        return next(near, None)

    return read


def levels_of(name: str) -> dict[int, dict[str, float]]:
    """Return the forget level of every seed: what its retain-only model knows of the forget rows."""
    found = {}
    for record in read_collection(RESULTS / f"{name}.jsonl"):
        if "arm" not in record:
            figures = record["models"]["retain-only"]["figures"]
            found[record["seed"]] = {key: value_of(figures, f"forget.{key}") or 0.0 for key in LEVEL}
    return found


def at_one_rank(name: str, method: str) -> str:
    """Return a table of a benchmark that has one rank: initialisers down, figures across."""
    near = steps_near(levels_of(name))
    lines = [f"| starts from | steps to {NEAR} from the level | steps to the level | utility | relearned rest, prob. |"]
    lines.append("| --- " * 5 + "|")
    for init in INITIALISERS:
        found = [r for r in runs_of(name, method) if r["options"]["init"] == init]
        if found:
            missed = sum(near(r) is None for r in found)
            first = cell(found, near, 0) + (f" ({missed} of {len(found)} not reached)" if missed else "")
            cells = (first, cell(found, steps, 0), cell(found, figure("model_utility"), 3), cell(found, rest, 2))
            lines.append(f"| {init} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(name: str, method: str, base: str = "lora", taken: Figure = steps) -> str:
    """Return a table: steps of each initialiser over those of `base` on the same seed, same rank; and two differences.

    The ratio is the geometric mean over seeds and ranks with its 95 % interval (normal, on the logarithm); seeds at
    which either did not reach the level count with the steps they had, so a ratio is then a bound. `taken` reads the
    steps; a pair where it finds none counts for the differences only.
    """
    runs = runs_of(name, method)
    plain = {(r["options"]["rank"], r["seed"]): r for r in runs if r["options"]["init"] == base}
    lines = [f"| starts from | steps over {base}'s | utility minus {base}'s | relearned rest minus {base}'s | pairs |"]
    lines.append("| --- " * 5 + "|")
    for init in [init for init in INITIALISERS[1:] if init != base]:
        mine = [r for r in runs if r["options"]["init"] == init and (r["options"]["rank"], r["seed"]) in plain]
        pairs = [(r, plain[r["options"]["rank"], r["seed"]]) for r in mine]
        if not pairs:
            continue
        counts = [(taken(a), taken(b)) for a, b in pairs]
        logs = [math.log(one / other) for one, other in counts if one and other]
        cells = [_ratio(logs)]
        for read in (figure("model_utility"), rest):
            values = [(read(a), read(b)) for a, b in pairs]
            cells.append(_difference([x - y for x, y in values if x is not None and y is not None]))
        lines.append(f"| {init} | " + " | ".join(cells) + f" | {len(pairs)} |")
    return "\n".join(lines)


def paired_near(name: str, method: str, base: str) -> str:
    """Return the table of `paired` by the steps to near the level."""
    return paired(name, method, base, steps_near(levels_of(name)))


def _ratio(logs: Sequence[float]) -> str:
    if not logs:
        return "-"
    half = 1.96 * stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
    low, middle, high = (math.exp(mean(logs) + side * half) for side in (-1, 0, 1))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _difference(values: Sequence[float]) -> str:
    if not values:
        return "-"
    half = 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{mean(values):+.3f} ({mean(values) - half:+.3f} to {mean(values) + half:+.3f})"


def eps(name: str) -> str:
    """Return a table of FILA at rank 8 by eps."""
    lines = ["| method | eps | steps | utility | relearned rest, prob. |", "| --- " * 5 + "|"]
    for method in ("ihl", "graddiff"):
        by_eps: dict[Any, list[Record]] = {}
        default = [r for r in runs_of(name, method) if r["options"]["init"] == "fila" and r["options"]["rank"] == 8]
        for record in (*default, *runs_of(name, method, eps=True)):
            by_eps.setdefault(record["options"].get("importance_eps", "relative (default)"), []).append(record)
        for value, found in by_eps.items():
            cells = (cell(found, steps, 0), cell(found, figure("model_utility"), 3), cell(found, rest, 2))
            lines.append(f"| {method} | {value} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def baselines(name: str) -> str:
    """Return a table of the target and the retain-only model over seeds."""
    lines = ["| model | forget prob. | utility | relearned rest, prob. |", "| --- " * 4 + "|"]
    records = [record for record in read_collection(RESULTS / f"{name}.jsonl") if "arm" not in record]
    for model in ("target", "retain-only"):
        found = [record["models"][model] for record in records]
        shown = ("forget.probability", "model_utility")
        values = [[value_of(m["figures"], key) or 0.0 for m in found] for key in shown]
        cells = [spread(column) for column in values] + [spread([rest(m) or 0.0 for m in found])]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


FICTION, TOFU, FIFTY = "initialisers-fiction", "initialisers-tofu-10", "initialisers-tofu-50"
PLACES = {"fiction": FICTION, "tofu": TOFU, "fifty": FIFTY}
METHODS = ("ihl", "graddiff")
BLOCKS: dict[str, Callable[[], str]] = {
    f"{place}_{method}_{what}": partial(grid, PLACES[place], method, read, digits)
    for place in ("fiction", "tofu")
    for method in METHODS
    for what, read, digits in (
        ("steps", steps, 0),
        ("utility", figure("model_utility"), 3),
        ("rest", rest, 2),
    )
}
BLOCKS |= {f"fifty_{method}": partial(at_one_rank, FIFTY, method) for method in METHODS}
BLOCKS |= {f"{place}_baselines": partial(baselines, name) for place, name in PLACES.items()}
BLOCKS |= {f"{place}_eps": partial(eps, PLACES[place]) for place in ("fiction", "tofu")}
BLOCKS |= {
    f"{place}_{method}_{what}": partial(paired_near if name == FIFTY else paired, name, method, base)
    for place, name in PLACES.items()
    for method in METHODS
    for what, base in (("paired", "lora"), ("over_pissa", "pissa"))
}
