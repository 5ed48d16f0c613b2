"""What the LoKU paper's four qualitative claims rest on: the arms that they are about, on every committed benchmark.

The figures are those of the runs that `loku bench` collected; the verdicts stand beside the table, in docs/results.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from loku.bench.figures import value_of
from loku.bench.store import read_collection
from loku.bench.tuning import UTILITY, distance, steps_taken
from loku.files import read_json

RESULTS = Path(__file__).resolve().parent / "results"
Record = dict[str, Any]

TITLES = {
    "fiction": "fictitious corpus",
    "mini-tofu-10": "ten TOFU authors",
    "mini-tofu-50": "fifty TOFU authors",
    "mini-tdec": "TDEC, 0.7 M",
    "mini-lume": "LUME, 48 documents",
}
# What the claims are about, and the arm of each benchmark, by its name there; adapters are of rank 8.
ARMS = {
    "GA, all weights": ("ga, all weights", "GA, all weights"),
    "GA, LoRA": ("ga from lora",),
    "GA, FILA": ("ga from fila",),
    "GradDiff, all weights": ("graddiff, all weights", "GradDiff, all weights"),
    "GradDiff, LoRA": ("graddiff from lora", "graddiff from lora, rank 8"),
    "GradDiff, FILA": ("graddiff from fila", "graddiff from fila, rank 8"),
    "IHL, LoRA": ("ihl from lora", "ihl from lora, rank 8"),
    "IHL, FILA: LoKU": ("LoKU", "ihl from fila, rank 8"),
}
LEFT = ("forget.ma", "forget.probability", "forget.regurgitation")  # what is left of the forget set, by suite
HEAD = (
    "benchmark",
    "arm",
    "rate",
    "forget set left",
    "utility kept",
    "repetition",
    "distance or steps",
    "at every rate tried",
)


def claims() -> str:
    """Return the claims' arms on every benchmark, one line each."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for name, title in TITLES.items():
        file = RESULTS / f"{name}.jsonl"
        if file.is_file():
            lines += ["| " + " | ".join(row) + " |" for row in _rows(name, title, read_collection(file))]
    return "\n".join(lines)


def _rows(name: str, title: str, records: Sequence[Record]) -> list[list[str]]:
    models = {record["seed"]: record["models"] for record in records if "arm" not in record}
    runs = [record for record in records if "arm" in record]
    chosen = read_json(RESULTS / f"{name}.chosen.json")["arms"]
    target = [found["target"] for found in models.values()]
    utility = next(figure for figure in UTILITY if value_of(target[0]["figures"], figure) is not None)
    left = next(figure for figure in LEFT if value_of(target[0]["figures"], figure) is not None)
    by_steps = any(run.get("stopped") for run in runs)
    rows = []
    for label, names in ARMS.items():
        arm = next((arm for arm in names if any(run["arm"] == arm for run in runs)), None)
        if arm is None:
            continue
        found = [run for run in runs if run["arm"] == arm]
        whole = {seed: value_of(model["target"]["figures"], utility) or 1.0 for seed, model in models.items()}
        kept = [(value_of(run["figures"], utility) or 0.0) / whole[run["seed"]] for run in found]
        far = [distance(run["figures"], models[run["seed"]]["retain-only"]["figures"]) for run in found]
        rows.append(
            [
                title,
                label,
                f"{chosen[arm]['point']['learning_rate']:g}",
                _spread([value_of(run["figures"], left) or 0.0 for run in found]),
                _spread(kept),
                _repetition([run["figures"] for run in found]),
                f"{mean(map(steps_taken, found)):.0f} steps" if by_steps else f"{mean(far):.2f}",
                _at_every_rate(chosen[arm]["scores"], by_steps),
            ]
        )
    bound = [model["retain-only"]["figures"] for model in models.values()]
    never_seen = _spread([value_of(figures, left) or 0.0 for figures in bound])
    return [*rows, [title, "retain-only model", "-", never_seen, "-", _repetition(bound), "-", "-"]]


def _repetition(figures: Sequence[Any]) -> str:
    known = [value for found in figures if (value := value_of(found, "forget.repetition")) is not None]
    return f"{mean(known):.2f}" if known else "-"


def _at_every_rate(scores: Sequence[dict[str, Any]], by_steps: bool) -> str:
    """Return what tuning found at every rate, the least rate first: the distance, or the steps to the level."""
    cells = []
    for entry in scores:
        missed, steps = entry["score"][0], entry["score"][-1]
        cells.append(f"{missed:.2f}" if not by_steps else "missed" if missed else f"{steps:.0f}")
    return ", ".join(cells) or "-"


def _spread(values: Sequence[float]) -> str:
    """Return the mean, and the least and greatest over seeds."""
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


BLOCKS: dict[str, Callable[[], str]] = {"claims": claims}
