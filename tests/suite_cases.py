"""Every suite with a few rows made here, as `test_suite_cache.py` and its processes run it from the command line."""

from __future__ import annotations

import json
from pathlib import Path

from builders import CORPUS
from conftest import perturbed, rows
from loku.evaluation import generation, scoring
from loku.suites import prepare_suite


def write(path, made):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def make_files(folder):
    """Write the rows of all suites into a data folder."""
    probes = [
        {"id": f"x{kind}{n}", "input": f"Who wrote it, number {n}?", "output": "She", "task": f"Task{task}"}
        for task in (1, 2, 3)
        for kind in ("sc", "qa")
        for n in range(3)
    ]
    for name in ("forget", "retain"):
        write(folder / "lume" / f"{name}.jsonl", probes)
    for name, text in {"members": "She wrote it.", "nonmembers": "They did not."}.items():
        write(folder / f"{name}.jsonl", [{"document": f"{text} {n} times." * (n + 1)} for n in range(4)])
    for name in ("forget_qa", "retain_qa"):
        write(folder / "muse" / "news" / "knowmem" / f"{name}.jsonl", rows(4))
    write(folder / "muse" / "news" / "verbmem" / "forget.jsonl", [{"prompt": text, "gt": text} for text in CORPUS])
    for name in ("forget", "holdout"):
        write(folder / "muse" / "news" / "privleak" / f"{name}.jsonl", [{"text": text + name} for text in CORPUS])
    kinds = ("cloze", "simple question", "role play")
    for level, kind in zip("123", kinds, strict=True):
        made = [{"level": level, "type": kind, "query": f"Mira {n}?", "answer": "born"} for n in range(4)]
        write(folder / "rwku" / f"forget_level{level}.jsonl", made)
    write(folder / "text.jsonl", [{"text": text} for text in CORPUS])
    write(folder / "unseen.jsonl", [{"text": f"{text} Again: {text}"} for text in CORPUS])
    write(folder / "forget.jsonl", [perturbed(row) for row in rows(4)])
    write(folder / "holdout.jsonl", rows(4, 40))


def cases(model, folder):
    """Return the options of each suite's call."""
    folder = Path(folder)
    common = {"model": str(model), "data_dir": str(folder), "max_new_tokens": 6}
    own = {"forget": str(folder / "forget.jsonl"), "holdout": str(folder / "holdout.jsonl")}
    return {
        "own": common | own | {"extras": "gradient_norm,memo,sampling", "reference_model": str(model)},
        "tdec": common | {
            "suite": "tdec", "data": str(folder / "text.jsonl"), "validation": str(folder / "unseen.jsonl"),
            "max_length": 30,
        },
        "muse": common | {"suite": "muse"},
        "lume": common | {
            "suite": "lume", "members": str(folder / "members.jsonl"), "nonmembers": str(folder / "nonmembers.jsonl"),
        },
        "rwku": common | {"suite": "rwku"},
    }  # fmt: skip


def small_batches(monkeypatch):
    """Let a batch be decoded for every three prompts, so that few rows make several."""
    real = generation._batches
    monkeypatch.setattr(generation, "_batches", lambda lengths, limits, rows, *rest: real(lengths, limits, 3, *rest))
    monkeypatch.setattr(scoring, "BATCH_TOKENS_CPU", 100)


def figures(found):
    """Return what an evaluation found, without times and names."""
    return {name: one.per_example for name, one in found.sets.items()} | {"summary": found.summary}


def measure(options, loaded):
    """Run a suite on a loaded model."""
    return figures(prepare_suite(options).run(loaded, None))
