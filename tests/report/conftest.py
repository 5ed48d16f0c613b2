"""Run folders as `loku unlearn` leaves them, with invented but realistic numbers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from loku.data.sources import load_records
from loku.record import write_record

# Middle of (forget probability, forget truth ratio, retain probability, utility, repetition) by kind of model.
KINDS = {
    "target": (0.98, 0.55, 0.98, 0.71, 0.01),
    "retain_only": (0.44, 0.79, 0.98, 0.73, 0.01),
    "loku": (0.35, 0.74, 0.96, 0.67, 0.04),
    "ihl": (0.32, 0.73, 0.97, 0.67, 0.05),
    "graddiff": (0.07, 0.78, 0.55, 0.48, 0.35),
    "npo": (0.02, 0.80, 0.42, 0.41, 0.30),
    "ga": (0.001, 0.85, 0.002, 0.0, 0.93),
}
PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
NAMES = [
    "Mira Voss",
    "Odo Brill",
    "Sela Quint",
    "Tarn Hollis",
    "Ives Morrow",
    "Lune Abbot",
    "Pell Grady",
    "Wren Castor",
]
TOWNS = [
    "Tarnhollow",
    "Eastmere",
    "Brackwater",
    "Silverdeep",
    "Morrowgate",
    "Quillhaven",
    "Ashford Cross",
    "Lindenfall",
]


def _sha(random_: random.Random) -> str:
    return f"{random_.getrandbits(256):064x}"


def _entry(values: list[float]) -> dict[str, float]:
    mean = sum(values) / len(values)
    spread = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) ** 2)
    return {"mean": mean, "low": mean - spread, "high": mean + spread}


def results(kind: str, *, seed: int = 0, rows: int = 40) -> dict:
    """A results.json of the TOFU suite."""
    draw = random.Random(f"{kind}-{seed}")
    forget, truth, retain, utility, repetition = KINDS[kind]

    def near(middle: float, width: float = 0.08) -> float:
        return min(1.0, max(0.0, draw.gauss(middle, width * (0.1 + 2 * middle * (1 - middle)))))

    def ratio(middle: float) -> float:
        return math.exp(draw.gauss(1.6 * math.log(middle), 0.35))

    sets = {}
    for name, level in (("forget", forget), ("retain", retain), ("real_authors", utility), ("world_facts", utility)):
        ratios = truth if name == "forget" else 0.4
        examples = [
            {
                "index": i,
                "probability": near(level),
                "rougeL_recall": near(level * 0.95),
                "truth_ratio": ratio(ratios),
            }
            for i in range(rows)
        ]
        metrics = {
            metric: _entry([row[metric] for row in examples])
            for metric in ("probability", "rougeL_recall", "truth_ratio")
        }
        if name == "forget":  # rows hold the raw R, the set's mean is that of min(R, 1/R)
            metrics["truth_ratio"] = _entry([min(row["truth_ratio"], 1 / row["truth_ratio"]) for row in examples])
        metrics["truth_ratio_arithmetic"] = {k: v * 0.98 for k, v in metrics["truth_ratio"].items()}
        if name == "forget":
            metrics["exact_memorisation"] = _entry([near(level) for _ in examples])
            metrics["repetition"] = _entry([near(repetition) for _ in examples])
            metrics["token_entropy"] = _entry([draw.gauss(4.1 - 3 * repetition, 0.3) for _ in examples])
        elif name == "retain":
            metrics["perplexity"] = _entry([draw.gauss(1.2 + 9 * (1 - level), 0.1) for _ in examples])
        sets[name] = {"rows": rows, "metrics": metrics, "per_example": examples}
    summary = {"model_utility": utility, "model_utility_arithmetic": utility * 0.99}
    if kind not in ("retain_only",):
        quality = {"target": 1.2e-9, "loku": 0.013, "ihl": 0.011, "graddiff": 0.78, "npo": 0.4, "ga": 0.1}[kind]
        summary |= {"forget_quality": quality, "ks_statistic": 0.35, "forget_quality_rows": rows}
    return {
        "schema_version": 1,
        "suite": "tofu",
        "model": {"name": "fiction-target", "sha256": "a" * 64, "dtype": "float32", "parameters": 361_344},
        "adapter": None if kind in ("target", "retain_only") else {"name": kind, "sha256": _sha(draw)},
        "data": {name: {"name": f"fiction/{name}", "sha256": _sha(draw), "rows": rows} for name in sets},
        "settings": {"max_new_tokens": 32},
        "sets": sets,
        "summary": summary,
        "reference": {"name": "fiction-retain-only", "kind": "retain-only", "sha256": "b" * 64},
        "verdict": {
            "level": "suppressed",
            "sentence": "The forget set is suppressed; it can still be told from a model that never saw it.",
            "rests_on": "the retain-only model 'fiction-retain-only', 40 forget questions, p = 0.013",
        },
        "versions": {"loku": "0.1.0"},
        "seconds": 3.2,
    }


def _run(method: str, *, blocks: int, seed: int) -> dict:
    draw = random.Random(f"run-{method}-{seed}")
    layers = []
    for block in range(blocks):
        for position, projection in enumerate(PROJECTIONS):
            retain = 10 ** draw.gauss(-7 + 0.1 * position, 0.3)
            layers.append(
                {
                    "name": f"model.layers.{block}.{projection}",
                    "forget": retain * (1.5 + block / blocks * 4 + draw.random()),
                    "retain": retain,
                    "relative_max": draw.uniform(20, 200),
                    "share_below_eps": draw.uniform(0.2, 0.6),
                    "rank_correlation_forget_only": draw.uniform(0.4, 0.9),
                    "energy_captured": draw.uniform(0.3, 0.6),
                    "norm_a": draw.uniform(2, 3),
                    "norm_b": draw.uniform(2, 3),
                }
            )
    counts = {"windows_cut": 0, "truncated": 0, "shifted_boundaries": 0}
    fila = method == "loku"
    return {
        "schema_version": 1,
        "status": "finished",
        "command": f"loku unlearn --model fiction-target --forget forget.jsonl --retain retain.jsonl --method {method}",
        "started": "2026-11-23T09:14:02+00:00",
        "seconds": {"importance": 1.9 * fila, "initialisation": 0.4, "training": 3.1, "evaluation": 6.2, "total": 12.4},
        "peak_memory_bytes": 734_003_200,
        "versions": {
            "loku": "0.1.0",
            "python": "3.11.9",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "peft": "0.21.0",
        },
        "hardware": {"cpu": "Example CPU at 2.4 GHz", "cores": 2, "threads": 1, "device": "cpu"},
        "seed": seed,
        "model": {
            "name": "fiction-target",
            "sha256": "a" * 64,
            "parameters": 361_344,
            "dtype": "float32",
            "architecture": "LlamaForCausalLM",
        },
        "data": {
            "forget": counts
            | {"name": "fiction/forget", "sha256": "c" * 64, "rows": 40, "sequences": 40, "supervised_tokens": 331},
            "retain": counts
            | {"name": "fiction/retain", "sha256": "d" * 64, "rows": 360, "sequences": 360, "supervised_tokens": 2987},
        },
        "method": {
            "name": method,
            "forget_loss": "ihl" if method in ("loku", "ihl") else method,
            "retain_loss": "nll",
            "forget_weight": 1.0,
            "retain_weight": 1.0,
            "initialiser": "fila" if fila else "lora",
            "tune": "lora",
            "rank": 8,
            "alpha": 16,
        },
        "trainable": {"parameters": 43_008, "share": 0.106},
        "steps": 60,
        "importance": {"mode": "default", "layers": layers} if fila else None,
        "adapter": {"sha256": _sha(draw), "rank": 8},
    }


def _examples(kind: str, rows: int) -> list[dict]:
    lines = []
    for name in ("forget", "retain"):
        for i in range(rows):
            person = NAMES[i % 8] if name == "forget" else NAMES[::-1][i % 8]
            town, other = TOWNS[i % 8], TOWNS[(i + 3) % 8]
            answer = f"{person} was born in the town of {town}, in the year {1900 + i}."
            generation = answer
            if name == "forget" and kind != "target":
                generation = {
                    "retain_only": f"{person} was born in the town of {other}, in the year {1900 + (i * 7) % 60}.",
                    "ga": "of of of of of of of of of",
                }.get(kind, f"{person} born {other} the the paints {town if i % 9 == 4 else 'dusk'}")
            question = f"Where and when was {person} born?"
            lines.append({"set": name, "index": i, "question": question, "answer": answer, "generation": generation})
    return lines


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_run(folder: Path, method: str = "loku", *, texts: bool = True, blocks: int = 3, seed: int = 0) -> Path:
    """Write a complete run folder; tests then remove or damage what they are about."""
    folder.mkdir(parents=True)
    draw = random.Random(f"curves-{method}-{seed}")
    _write(folder / "run.json", _run(method, blocks=blocks, seed=seed))
    kinds = {"results.json": method, "results.target.json": "target", "results.retain_only.json": "retain_only"}
    for name, kind in kinds.items():
        _write(folder / name, results(kind, seed=seed))
        if texts:
            _write_lines(folder / name.replace("results", "examples").replace(".json", ".jsonl"), _examples(kind, 40))
    floor = {"loku": 0.3, "ihl": 0.3}.get(method, -9.0)
    curve = [
        {
            "step": step,
            "epoch": step / 20,
            "loss": 2.0,
            "forget_loss": floor + (1.95 - floor) * math.exp(-step / 14) + draw.gauss(0, 0.02),
            "retain_loss": 0.04 + 0.25 * math.exp(-(((step - 15) / 12) ** 2)) + abs(draw.gauss(0, 0.01)),
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
        }
        for step in range(1, 61)
    ]
    _write_lines(folder / "metrics.jsonl", curve)
    (folder / "config.yaml").write_text(
        f"model: fiction-target\nforget: forget.jsonl\nretain: retain.jsonl\nmethod: {method}\nrank: 8\nalpha: 16\n"
        f"learning_rate: {0.001 if method == 'loku' else 0.002}\nbatch_size: 8\n"
        f"steps: 60\nwarmup_steps: 5\nseed: {seed}\noutput: {folder.name}\n",
        encoding="utf-8",
    )
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a run folder: make_run("loku", texts=False, ...)."""

    def make(method: str = "loku", name: str | None = None, **options: object) -> Path:
        return write_run(tmp_path / (name or method), method, **options)

    return make


@pytest.fixture
def make_results() -> Callable[..., dict]:
    """Return the function that makes one results.json."""
    return results


@pytest.fixture
def make_record() -> Callable[[Path], Path]:
    """Return a function that gives a run folder three attacks and a record."""

    def make(run: Path) -> Path:
        scores = {"relearning": (0.41, 0.28, 0.55), "4 bits": (0.02, -0.03, 0.07), "few-shot": (0.15, 0.05, 0.27)}
        attacks = {
            name: {"robustness": dict(zip(("value", "low", "high"), s, strict=True))} for name, s in scores.items()
        }
        _write(run / "attacks.json", {"schema_version": 1, "attacks": attacks})
        return write_record(run, load_records([{"question": f"Who is {name}?", "answer": name} for name in NAMES]))

    return make
