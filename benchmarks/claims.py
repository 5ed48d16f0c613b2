"""The four qualitative claims of the LoKU paper, each with its figures on every committed benchmark, and a verdict.

Figures come from the runs that `loku bench` collected; the verdicts in `VERDICTS` are ours, read off those figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from loku.bench.figures import value_of
from loku.bench.store import read_collection
from loku.bench.tuning import distance, steps_taken
from loku.files import read_json

RESULTS = Path(__file__).resolve().parent / "results"
Record = dict[str, Any]
UTILITY = ("model_utility", "utility")
LEFT = ("forget.probability", "forget.ma", "forget.regurgitation")  # what is left of the forget set, by suite


@dataclass(frozen=True)
class Bench:
    """One benchmark's reported models and runs."""

    title: str
    name: str
    rank: int

    @property
    def records(self) -> list[Record]:
        """All committed records."""
        return read_collection(RESULTS / f"{self.name}.jsonl")

    def runs(self, method: str, init: str = "lora", *, tune: str = "lora") -> list[Record]:
        """Return the runs of one arm, at the rank that was tuned."""
        if (method, init) == ("ihl", "fila") and not self._runs(method, init, tune):
            method, init = "loku", "fila"  # the arm goes by the recipe's name there
        return self._runs(method, init, tune)

    def _runs(self, method: str, init: str, tune: str) -> list[Record]:
        default = "fila" if method == "loku" else "lora"
        found = [record for record in self.records if "arm" in record]
        return [
            record
            for record in found
            if record["options"]["method"] == method
            and (tune == "full" or record["options"].get("init", default) == init)
            and record["options"].get("tune", "lora") == tune
            and record["settings"].get("rank", self.rank) == self.rank
        ]

    def model(self, name: str, figure: str) -> float | None:
        """Return a figure of the target or of the retain-only model, as a mean over seeds."""
        found = [record["models"][name]["figures"] for record in self.records if "arm" not in record]
        values = [value_of(figures, figure) for figures in found]
        return mean(values) if values and None not in values else None

    def distance(self, runs: list[Record]) -> float:
        """Return the mean distance to the retain-only model of the same seed."""
        by_seed = {r["seed"]: r["models"]["retain-only"]["figures"] for r in self.records if "arm" not in r}
        return mean(distance(run["figures"], by_seed[run["seed"]]) for run in runs)

    def utility(self, runs: list[Record]) -> str:
        """Return the share of the target's utility that is kept, and over how many seeds it ranges."""
        name = next(name for name in UTILITY if self.model("target", name) is not None)
        whole = self.model("target", name) or 1.0
        kept = sorted((value_of(run["figures"], name) or 0.0) / whole for run in runs)
        return f"{mean(kept):.2f}" + (f" ({kept[0]:.2f} to {kept[-1]:.2f})" if len(kept) > 1 else "")

    def left(self, runs: list[Record]) -> str:
        """Return what is left of the forget set."""
        name = next(name for name in LEFT if self.model("target", name) is not None)
        values = sorted(value_of(run["figures"], name) or 0.0 for run in runs)
        return f"{mean(values):.2f}" + (f" ({values[0]:.2f} to {values[-1]:.2f})" if len(values) > 1 else "")

    def rates(self, arm_starts: str) -> str:
        """Return the distance that tuning found at every rate of an arm."""
        file = RESULTS / f"{self.name}.chosen.json"
        arms = read_json(file)["arms"]
        name = next((name for name in arms if name.startswith(arm_starts)), None)
        return "-" if name is None else ", ".join(f"{entry['score'][0]:.2f}" for entry in arms[name]["scores"])

    def steps(self, runs: list[Record]) -> float:
        """Return the mean steps taken."""
        return mean(steps_taken(run) for run in runs)
