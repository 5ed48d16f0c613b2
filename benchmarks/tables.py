"""Writes the tables of docs/performance.md and docs/ablation.md from the committed JSON.

    python benchmarks/tables.py            rewrites the marked blocks
    python benchmarks/tables.py --check    fails when a block does not say what the JSON says

A block stands between `<!-- name -->` and `<!-- end -->`; the function of that name here makes it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import ablation

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "docs" / name for name in ("performance.md", "ablation.md")]


def read(name: str) -> dict[str, Any]:
    """Return a committed result."""
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


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


BLOCKS = {
    "head": head,
    "head_cuda": lambda: head("head_cuda"),
    "meeting": meeting,
    "importance": importance,
    "factorisation": factorisation,
    "models": models,
    "evaluation": evaluation,
    **ablation.BLOCKS,
}


def filled(text: str) -> str:
    """Return a page with every block made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite the pages, or check them."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if sys.argv[1:] == ["--check"]:
            if filled(text) != text:
                raise SystemExit(f"{page.name} does not say what the JSON says: run python benchmarks/tables.py")
        else:
            page.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
