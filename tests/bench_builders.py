"""A recipe that takes seconds, and records as a benchmark writes them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import yaml

from loku.bench.leaderboard import FIGURES, columns_of
from loku.bench.rows import Row
from loku.report.bench import Section, write_bench_page

STAGE = {
    "model": "corpus/model", "max_steps": 4, "batch_size": 8, "grad_accum": 1, "learning_rate": 1e-3, "warmup_steps": 0,
}  # fmt: skip
TINY: dict[str, Any] = {
    "name": "tiny",
    "title": "A tiny benchmark",
    "corpus": {"kind": "fiction", "people": 10, "world_people": 10},
    "stages": {
        "target": STAGE | {"data": "corpus/full.jsonl"},
        "retain-only": STAGE | {"data": "corpus/retain.jsonl"},
    },
    "unlearn": {
        "forget": "corpus/forget.jsonl", "retain": "corpus/retain-mixed.jsonl", "eval_rows": 2, "max_new_tokens": 3,
        "max_steps": 3, "batch_size": 2, "grad_accum": 1, "warmup_steps": 0, "rank": 2, "save_steps": 1,
    },
    "measure": {"retain": "corpus/retain.jsonl"},
    "arms": [{"name": "IHL", "method": "ihl", "learning_rate": 1e-3}],
    "seeds": [0],
}  # fmt: skip


def tiny(**changes: Any) -> dict[str, Any]:
    """The recipe with other entries."""
    return copy.deepcopy(TINY) | changes


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Write the recipe to a file."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny(**changes)))
    return path


def figures(**means: float) -> dict[str, Any]:
    """Figures as `figures_of` gives them; `forget_probability` stands for forget.probability."""
    named = {name.replace("__", "."): {"mean": value} for name, value in means.items()}
    return {"values": named, "verdict": None}


def models_record(seed: int, **models: dict[str, Any]) -> dict[str, Any]:
    """The models.json of a seed."""
    found = {name.replace("_", "-"): {"sha256": "a", "figures": value} for name, value in models.items()}
    return {"schema_version": 1, "seed": seed, "models": found, "data": {}, "seconds": {"all": 20.0}}


def run_record(arm: str, seed: int, found: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """The JSON of a run."""
    record = {
        "schema_version": 1, "arm": arm, "seed": seed, "figures": found, "error": None if found else "It blew up.",
        "steps": 100, "seconds": {"all": 10.0}, "peak_memory_bytes": 5e8,
    }  # fmt: skip
    return record | more


def page(folder: Path, count: int) -> Path:
    """A leaderboard with many arms that lie close together."""
    arms = [
        Row(
            f"Arm {i} from fila-two-sided, rank {i}",
            "unlearned",
            {name: [0.1 + i / 500, 0.12] for name in FIGURES}
            | {"utility": [0.6 + i / 200] * 2, "seconds": [50.0 - i], "peak MB": [512.0]},
            diverged=int(i == 3),
        )
        for i in range(count)
    ]
    rows = [
        Row("target", "target", {"forget prob.": [0.99], "utility": [0.8]}),
        *arms,
        Row("retain-only, other seeds", "noise", {"forget prob.": [0.15], "utility": [0.81]}),
        Row("retain-only", "retain_only", {"forget prob.": [0.18], "utility": [0.8]}),
    ]
    scores = [{"point": {"learning_rate": rate}, "score": [rate]} for rate in (1e-3, 2e-3, 4e-3)]
    choices = {
        arm.label: {"point": {"learning_rate": 1e-3}, "tuned_as": arms[0].label, "scores": scores} for arm in arms
    }
    return write_bench_page(
        "Many arms", Section(rows, columns_of(rows), "What it says."), choices, folder / "report.html"
    )


def put(path: Path, record: dict[str, Any]) -> None:
    """Write a record where a task would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
