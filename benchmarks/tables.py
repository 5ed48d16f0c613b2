"""Writes the tables of docs/performance.md, results.md, ablation.md and robustness.md, and the charts, from the JSON.

    python benchmarks/tables.py            rewrites the marked blocks
    python benchmarks/tables.py --check    fails when a block does not say what the JSON says

A block stands between `<!-- name -->` and `<!-- end -->`; the function of that name makes it, here or in the modules of
`OF_RUNS`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import ablation
import claims
import leaderboards
import robustness
from plots import Panel, grid

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "docs" / name for name in ("performance.md", "results.md", "ablation.md", "robustness.md")]


def read(name: str) -> dict[str, Any]:
    """Return a committed result."""
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def recorded(name: str) -> bool:
    """Whether a result was committed."""
    return (ROOT / "benchmarks" / "results" / f"{name}.json").is_file()


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(found: dict[str, float], digits: int = 2) -> str:
    """Return a median with its extremes."""
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f} to {found['max']:.{digits}f})"


def head(file: str = "head") -> str:
    """The fused head against the released formulation, plain autograd and the two products nobody can avoid."""
    rows = [
        [
            f"{r['shape']} ({r['vocab']:,} x {r['hidden']:,})",
            r["dtype"],
            spread(r["speedup"]["released"], 1),
            spread(r["speedup"]["plain"]),
            spread(r["over_limit"]["limit"]),
            f"1/{r['memory_ratio']['released']:.0f}",
            f"{r['errors']['loku']['gradient_before_rounding']:.0e}",
            f"{r['errors']['plain']['gradient']:.0e}",
        ]
        for r in read(file)["results"]
    ]
    names = ["shape", "type", "times faster than released", "than plain", "time over the limit", "memory of released"]
    return table([*names, "gradient error", "of plain"], rows)


def meeting() -> str:
    """The ways in which two gradients meet."""
    rows = [
        [
            {"lora": "LoRA of rank 16", "full": "all weights"}[r["tune"]],
            f"`{r['combine']}`",
            spread(r["time_over_sum"]),
            f"{r['memory_over_sum']:.2f}",
            f"{r['peak_megabytes']:.0f} MB",
        ]
        for r in read("meeting")["results"]
    ]
    return table(["trained", "combine", "time over sum", "memory over sum", "peak"], rows)


def importance() -> str:
    """Fisher importance against a plain forward and backward, and against the released way."""
    (r,) = read("importance")["results"]
    peak, times = r["peak_megabytes"], r["seconds"]
    rows = []
    for name, over in (
        ("plain, in order", None),
        ("plain, sorted", None),
        ("loku", r["over_plain"]["plain, sorted"]),
        ("loku, grouped", None),
        ("released", None),
    ):
        ratio = spread(over) if over else f"{times[name]['median'] / times['plain, sorted']['median']:.2f}"
        rows.append([name, spread(times[name], 1), ratio, f"{peak[name]:.0f} MB"])
    return table(["way", "seconds", "time over plain, sorted", "peak"], rows)


def factorisation() -> str:
    """Block Krylov against the released sketch."""
    rows = [
        [
            f"{r['rows']:,} x {r['columns']:,}",
            r["spectrum"],
            f"{r['captured']['released']:.4f}",
            f"{r['captured']['loku']:.4f}",
            spread(r["time_over_released"]),
            f"{r['seconds']['loku']['median']:.2f} s",
        ]
        for r in read("factorisation")["results"]
    ]
    return table(["matrix", "spectrum", "captured, released", "captured, loku", "time over released", "time"], rows)


def models() -> str:
    """The time to factorise every layer of a model."""
    rows = [
        [name, str(r["layers"]), f"{r['seconds']['released']:.0f} s", f"{r['seconds']['loku']:.0f} s"]
        for name, r in read("factorisation")["models"].items()
    ]
    return table(["model", "layers", "released", "loku"], rows)


def evaluation() -> str:
    """The evaluation engine against the usual and the released way."""
    rows = [
        [name, way, spread(found, 1), f"{part['seconds']['engine']['median']:.2f} s"]
        for name, part in read("evaluation")["results"].items()
        for way, found in part["times_faster_than"].items()
        if "by heart" not in name  # nothing is decoded: any ratio would do
    ]
    return table(["part", "against", "times faster", "the engine's own time"], rows)


PARTS = {
    "importance": "importance",
    "initialisation": "initialisation",
    "training": "training, one epoch",
    "npo and kl": "a step of NPO and KL",
    "scores": "log-probabilities",
    "generation, before": "generation, memorised rows",
    "generation, after": "generation, after unlearning",
    "generation, new model": "generation, nothing known",
    "run": "**from start to report**",
}


def whole_run() -> str:
    """Every part of a run against the released way."""
    rows = []
    for name, part in read("whole_run")["results"]["parts"].items():
        times, peak = part["seconds"], part.get("peak_megabytes")
        memory = [f"{peak['released']:.0f} MB", f"{peak['loku']:.0f} MB"] if peak else ["-", "-"]
        rows.append(
            [
                PARTS[name],
                f"{times['released']['median']:.2f}",
                f"{times['loku']['median']:.2f}",
                spread(part["times_faster"], 1),
                *memory,
            ]
        )
    return table(["part", "released, s", "loku, s", "times faster", "peak, released", "peak, loku"], rows)


def reached() -> str:
    """What was to be reached in the whole run and in a training step, and what was."""
    step = read("training_step")["results"]["loku, 4 + 4 rows"]
    of_step = [
        ("a training step in passes of 4 + 4 rows, times faster", 8.0, step["times_faster"]["median"], True),
        ("that step, share of the memory", 1 / 3, step["share_of_memory"], False),
    ]
    lines = [
        {"target": text, "wanted": wanted, "value": value, "reached": value >= wanted if most else value <= wanted}
        for text, wanted, value, most in of_step
    ]
    rows = [
        [line["target"], f"{line['wanted']:.3g}", f"{line['value']:.3g}", "yes" if line["reached"] else "**no**"]
        for line in (*lines, *read("whole_run")["results"]["targets"])
    ]
    return table(["target", "wanted", "found", "reached"], rows)


def training_step() -> str:
    """A step of training against the released one, by the rows of a pass."""
    rows = [
        [
            name,
            f"{part['seconds']['median']:.2f} s",
            spread(part["times_faster"], 1),
            f"{part['peak_megabytes']:.0f} MB",
            f"{part['share_of_memory']:.2f}",
        ]
        for name, part in read("training_step")["results"].items()
        if name != "gradients_apart"
    ]
    return table(["way", "a step", "times faster", "peak", "share of the memory"], rows)


def agreement() -> str:
    """How far losses and gradients of the two ways are apart."""
    ways = ("loku float64", "loku float32", "released float32")
    rows = [
        [name, str(number), *(f"{step[f'{way}, gradient']:.0e}" for way in ways)]
        for name, steps in read("whole_run")["results"]["agreement"].items()
        for number, step in enumerate(steps, start=1)
    ]
    return table(["losses", "step", *ways], rows)


def profile() -> str:
    """Where the seconds of a run go."""
    parts = read("profile")["results"]
    headings = list(parts["run"]["shares"])
    headings += [name for part in parts.values() for name in part["shares"] if name not in headings]
    headings = list(dict.fromkeys(headings))
    rows = [
        [
            name,
            f"{part['cpu_seconds']:.1f} s",
            *(f"{part['shares'].get(heading, 0):.0%}" for heading in headings),
            f"{part['product_rate'] / 1e9:.0f} G ({part['share_of_achievable_rate']:.0%})",
        ]
        for name, part in parts.items()
    ]
    return table(["part", "time", *headings, "operations a second in products"], rows)


def scaling() -> str:
    """Time and memory over rows, length, rank and model size."""
    results = read("scaling")["results"]
    rows = []
    for one, other in zip(results[::2], results[1::2], strict=True):
        rows.append([one["varied"], f"{one['value']:,}"])
        for found in (one, other):
            rows[-1] += [f"{found['seconds']:.2f} s", f"{found['peak_megabytes']:.0f} MB"]
    chart = "![Time and memory over rows, length, rank and model size](scaling.svg)"
    return f"{chart}\n\n" + table(
        ["varied", "value", "importance", "its peak", "training, one epoch", "its peak"], rows
    )


def scaling_plot() -> str:
    """The same as a chart."""
    titles = {
        "rows": ("forget rows", "rows"),
        "length": ("sequence length", "tokens"),
        "rank": ("rank", "rank"),
        "model": ("model size", "parameters"),
    }
    results = read("scaling")["results"]
    grids = []
    for key, what in (("seconds", "CPU seconds"), ("peak_megabytes", "peak, MB")):
        grids.append([])
        for varied, (title, unit) in titles.items():
            lines = {
                part: [(r["value"], r[key]) for r in results if r["varied"] == varied and r["part"] == part]
                for part in ("importance", "training")
            }
            grids[-1].append(Panel(f"{what}: {title}", unit, lines))
    return grid(grids, "Time and memory of importance and training over rows, length, rank and model size")


PLOTS = {"scaling": scaling_plot}
FROM = {"reached": "whole_run", "agreement": "whole_run", "models": "factorisation"}  # blocks of another's file

BLOCKS = {
    "whole_run": whole_run,
    "reached": reached,
    "agreement": agreement,
    "profile": profile,
    "training_step": training_step,
    "scaling": scaling,
    "head": head,
    "head_cuda": lambda: head("head_cuda"),
    "meeting": meeting,
    "importance": importance,
    "factorisation": factorisation,
    "models": models,
    "evaluation": evaluation,
}
OF_RUNS = ablation.BLOCKS | robustness.BLOCKS | leaderboards.BLOCKS | claims.BLOCKS  # from runs that `loku bench` kept


def filled(text: str) -> str:
    """Return a page with every block made anew."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name in OF_RUNS:
            made = OF_RUNS[name]()
        else:
            made = BLOCKS[name]() if recorded(FROM.get(name, name)) else "*Not recorded yet.*"
        return f"<!-- {name} -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite the pages and charts, or check them."""
    pages = {page: filled(page.read_text(encoding="utf-8")) for page in PAGES}
    plots = {ROOT / "docs" / f"{name}.svg": make() for name, make in PLOTS.items() if recorded(name)}
    for path, text in (pages | plots).items():
        if sys.argv[1:] != ["--check"]:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{path.name} does not say what the JSON says: run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
