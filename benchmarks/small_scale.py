"""Small-scale results: the demo on several seeds and the mini-TOFU recipe, as JSON.

    python benchmarks/small_scale.py --seeds 0 1 2 3 4     # about a minute a seed; --mini-tofu: 5 minutes more
    python benchmarks/tables.py                            # writes the tables of docs/results.md

Figures are written as they come; seeds that the JSON has already are not run again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loku.evaluation.results import Results, read_results
from loku.files import read_json, write_json
from loku.runs import hardware, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "small_scale.json"
ORDER = ("target", "ga", "graddiff", "npo", "ihl", "loku", "retain-only")
COLUMNS = {
    "forget acc.": ("forget", "exact_match"),
    "forget prob.": ("forget", "probability"),
    "truth ratio": ("forget", "truth_ratio"),
    "forget repetition": ("forget", "repetition"),
    "retain acc.": ("retain", "exact_match"),
    "world acc.": ("general", "exact_match"),
}
TOFU_COLUMNS = {
    "forget prob.": ("forget", "probability"),
    "forget ROUGE-L": ("forget", "rougeL_recall"),
    "truth ratio": ("forget", "truth_ratio"),
    "forget repetition": ("forget", "repetition"),
    "retain prob.": ("retain", "probability"),
    "retain ROUGE-L": ("retain", "rougeL_recall"),
}


def figures(results: Results, columns: dict[str, tuple[str, str]]) -> dict[str, float | None]:
    """Return the table's figures of one model."""
    found = {name: results.mean(*place) for name, place in columns.items()}
    summary = {"utility": "model_utility", "forget quality": "forget_quality"}
    return found | {name: results.summary.get(key) for name, key in summary.items()}


def loku(*arguments: str, cwd: Path) -> None:
    """Run the command line in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "loku", *arguments], cwd=cwd, env=environment, check=True)


def demo(seed: int) -> dict[str, Any]:
    """Run the demo for one seed."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        loku("demo", "--seed", str(seed), "--output", "demo", cwd=Path(folder))
        seconds = time.monotonic() - start
        places = {name: Path(folder, "demo", "runs", name) for name in ORDER[1:-1]}
        places |= {name: Path(folder, "demo", name) for name in ("target", "retain-only")}
        models = {name: figures(read_results(places[name] / "results.json"), COLUMNS) for name in ORDER}
        runs = {name: read_json(places[name] / "run.json")["seconds"] for name in ORDER[1:-1]}
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "models": models,
        "run_seconds": runs,
        "load": os.getloadavg()[0],
    }


def mini_tofu() -> dict[str, Any]:
    """Run the mini-TOFU recipe: two trainings side by side, then the unlearning."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "recipes").symlink_to(ROOT / "recipes")
        start = time.monotonic()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "loku", "finetune"]
        trainings = [
            subprocess.Popen([*command, f"recipes/mini-tofu/{name}.yaml"], cwd=place, env=environment)
            for name in ("target", "retain-only")
        ]
        if any(training.wait() for training in trainings):
            raise SystemExit("a training failed")
        loku("unlearn", "recipes/mini-tofu/unlearn.yaml", cwd=place)
        run = place / "runs" / "mini-tofu" / "unlearn"
        files = {"target": "results.target.json", "loku": "results.json", "retain-only": "results.retain_only.json"}
        found = {name: read_results(run / file) for name, file in files.items()}
        return {
            "seconds": round(time.monotonic() - start, 1),
            "models": {name: figures(results, TOFU_COLUMNS) for name, results in found.items()},
            "verdict": found["loku"].verdict,
            "load": os.getloadavg()[0],
        }


def run(seeds: list[int], with_tofu: bool) -> None:
    """Run what the JSON lacks, and write it after every run."""
    kept = read_json(RESULTS) if RESULTS.is_file() else {"demo": [], "mini_tofu": None}
    for seed in seeds:
        if seed not in [entry["seed"] for entry in kept["demo"]]:
            kept["demo"].append(demo(seed))
            write_json(RESULTS, kept | {"versions": versions(), "hardware": hardware()})
    if with_tofu:
        kept["mini_tofu"] = mini_tofu()
        write_json(RESULTS, kept | {"versions": versions(), "hardware": hardware()})


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--mini-tofu", action="store_true")
    arguments = parser.parse_args()
    run(arguments.seeds, arguments.mini_tofu)


if __name__ == "__main__":
    main()
