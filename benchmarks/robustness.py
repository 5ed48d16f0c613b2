"""Tables of docs/robustness.md: what attacks bring back of every method, from the runs that `loku bench` collected.

loku bench recipes/bench/attacks-fiction.yaml     # then copy its runs.jsonl to benchmarks/results/attacks-fiction.jsonl
python benchmarks/tables.py                       # writes the tables
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from loku.bench.robustness import attack_lines, robustness_columns, robustness_rows
from loku.bench.rows import markdown
from loku.bench.store import Record, read_collection

RESULTS = Path(__file__).resolve().parent / "results"
MISSING = "*Not recorded yet.*"


def collected(name: str) -> tuple[list[Record], list[Record], list[str]]:
    """Return a benchmark's models, its runs, and its arms in the order of their runs; nothing where it was not run."""
    path = RESULTS / f"{name}.jsonl"
    records = read_collection(path) if path.is_file() else []
    runs = [record for record in records if "arm" in record]
    models = [record for record in records if "arm" not in record]
    return models, runs, list(dict.fromkeys(run["arm"] for run in runs))


def arms(name: str) -> str:
    """Return the table of arms by family of attacks."""
    rows = robustness_rows(*collected(name))
    return markdown(rows, robustness_columns(rows)) if rows else MISSING


def attacks(name: str) -> str:
    """Return the table of single attacks over all arms."""
    lines = attack_lines(*collected(name))
    head = ["attack", "could tell", "target", "retain-only", "mean score of the arms", "largest mean score"]
    if not lines:
        return MISSING
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


BLOCKS: dict[str, Callable[[], str]] = {
    f"{block}_{name.replace('-', '_')}": partial(make, f"attacks-{name}")
    for name in ("fiction", "mini-tofu-10")
    for block, make in (("arms", arms), ("attacks", attacks))
}
