"""Tables of docs/results.md: the demo, the mini-TOFU recipe, and the leaderboards of the committed benchmarks.

loku bench recipes/bench/fiction.yaml                  # then copy its runs.jsonl and chosen.json to benchmarks/results/
python benchmarks/tables.py                            # writes the tables
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from small_scale import ORDER

from loku.bench.leaderboard import columns_of, leaderboard_rows
from loku.bench.rows import markdown
from loku.bench.store import read_collection
from loku.files import read_json

RESULTS = Path(__file__).resolve().parent / "results"
SHOWN = (
    "forget prob.", "forget ROUGE-L", "forget acc.", "truth ratio", "forget repetition", "retain prob.", "retain acc.",
    "general acc.", "utility", "forget quality", "EL10", "MA", "unseen EL10", "unseen MA", "forgotten", "cloze acc.",
    "perplexity", "forget regurgitation", "forget knowledge", "retain regurgitation", "retain knowledge",
    "task aggregate", "MIA score", "distance", "relearned rest, acc.", "steps", "seconds",
)  # fmt: skip
TUNED_ON = "seeds 10 and 11"
STARTS = ("lora", "fila", "pissa", "fila-official", "fila-two-sided", "vila", "reglu", "all weights")


def cell(values: list[float | None]) -> str:
    """Return mean and standard deviation over seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if max(known) < 0.01 and min(known) > 0:
        return f"{min(known):.0e}" + (f" to {max(known):.0e}" if len(known) > 1 else "")
    return f"{mean(known):.2f}" + (f" ± {stdev(known):.2f}" if len(known) > 1 else "")


def table(entries: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    """Return a Markdown table of means over entries."""
    columns = list(entries[0]["models"][names[0]])
    lines = ["| model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = [cell([entry["models"][name][column] for entry in entries]) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def demo() -> str:
    """The demo's methods over its seeds."""
    kept = read_json(RESULTS / "small_scale.json")
    times, loads = ([entry[name] for entry in kept["demo"]] for name in ("seconds", "load"))
    seeds = ", ".join(str(entry["seed"]) for entry in kept["demo"])
    said = (
        f"Mean ± standard deviation over seeds {seeds}. A seed took {min(times):.0f} to {max(times):.0f} s on "
        f"{kept['hardware']['cores']} cores (load average {min(loads):.1f} to {max(loads):.1f})."
    )
    return f"{said}\n\n{table(kept['demo'], ORDER)}"


def mini_tofu() -> str:
    """The mini-TOFU recipe."""
    found = read_json(RESULTS / "small_scale.json")["mini_tofu"]
    said = f"One seed, {found['seconds']:.0f} s in all (two trainings side by side, then LoKU): `make mini-tofu`."
    verdict = f"Verdict: {found['verdict']['level']}. {found['verdict']['sentence']}"
    return f"{said}\n\n{table([found], ('target', 'loku', 'retain-only'))}\n\n{verdict}"


def leaderboard(name: str) -> str:
    """Return the leaderboard of a committed benchmark."""
    records = read_collection(RESULTS / f"{name}.jsonl")
    models = [record for record in records if "arm" not in record]
    runs = [record for record in records if "arm" in record]
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    rows = leaderboard_rows(models, runs, arms)
    to_level = any(run.get("stopped") for run in runs)  # elsewhere all runs take the same steps
    shown = [column for column in columns_of(rows) if column in SHOWN and (column != "steps" or to_level)]
    return f"{_what_ran(models, runs)}\n\n{markdown(rows, shown)}"


def _what_ran(models: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """Return how many runs there are, on what they ran and how long, and how many failed."""
    hours = sum(record["seconds"]["all"] for record in (*models, *runs)) / 3600
    torch, transformers = (
        " and ".join(dict.fromkeys(record["versions"][name] for record in (*models, *runs)))
        for name in ("torch", "transformers")
    )
    where = " and ".join(dict.fromkeys(_machine(run["hardware"]) for run in runs))
    seeds = len({run["seed"] for run in runs})
    return (
        f"{len(runs)} runs of {len({run['arm'] for run in runs})} arms on {seeds} seed{'s' * (seeds > 1)} and their "
        f"models, tuning left out: {hours:.1f} hours on {where}; torch {torch}, transformers "
        f"{transformers}. Diverged: {sum(bool(run.get('error')) for run in runs) or 'none'}."
    )


def _machine(found: dict[str, Any]) -> str:
    return found["device"] if found["device"] != "cpu" else f"{found['cores']} cores of {found['cpu']}"


def tuned(name: str) -> str:
    """Return what tuning found: every arm's least distance to the retain-only model, and the rate there."""
    cells: dict[str, dict[str, str]] = {}
    by_steps = False
    for arm, found in read_json(RESULTS / f"{name}.chosen.json")["arms"].items():
        # The rank, where an arm's name goes on with it, is no matter: ranks share their scores.
        method, start, *_ = re.split(r" from |, ", "ihl from fila" if arm == "LoKU" else arm)
        best = next(entry["score"] for entry in found["scores"] if entry["point"] == found["point"])
        by_steps = len(best) > 1
        if not by_steps:
            cell = f"{best[0]:.2f}"
        elif best[0]:
            cell = "not reached"
        else:
            cell = f"{best[-1]:.0f} steps, utility {-best[1]:.2f}"
        cells.setdefault(method.lower(), {})[start] = f"{cell} at {found['point']['learning_rate']:g}"
    starts = [start for start in STARTS if any(start in row for row in cells.values())]
    rows = [[method, *(row.get(start, "-") for start in starts)] for method, row in cells.items()]
    head = ["loss", *starts]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    what = (
        "The steps to the level at the rate that tuning chose" if by_steps else "The least distance that tuning found"
    )
    return "\n".join([f"{what}, on {TUNED_ON}, and the learning rate there:", "", *lines])


BLOCKS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "mini_tofu": mini_tofu,
    "midsize": partial(leaderboard, "midsize-tofu"),
    "tofu_50_methods": partial(leaderboard, "mini-tofu-50"),  # at the rates of ten authors: nothing was tuned
}
for block, bench in (
    ("fiction_methods", "fiction"),
    ("tofu_10_methods", "mini-tofu-10"),
    ("tdec", "mini-tdec"),
    ("lume", "mini-lume"),
):
    BLOCKS |= {block: partial(leaderboard, bench), f"{block}_tuned": partial(tuned, bench)}
