"""Warns when an operation has become slower in relation to another one than the committed ratio says.

    python benchmarks/guard.py             about a minute; never fails
    python benchmarks/guard.py --record    makes the measured ratios the committed ones

Ratios are of CPU times in the same process, taken in turn, so they hold on any machine, roughly: kernels and caches
differ. A ratio counts as worse when it falls below `TOLERANCE` times the committed one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import environment, seconds
from scaling import BATCH, VOCAB, model_of, rows_of

from loku.adapters.anchor import attach
from loku.adapters.folded import folded
from loku.adapters.importance import estimate_importance
from loku.adapters.initialisers import initial_factors
from loku.adapters.layers import target_layers
from loku.data.batching import pad_batch
from loku.data.encoding import IGNORE, Example
from loku.data.packing import lay_out, part_of_batch, read_ids
from loku.evaluation.passes import reading_of
from loku.evaluation.scoring import score
from loku.forward import Forward
from loku.losses.head import scores_from_hidden
from loku.losses.scores import scores_from_logits

FILE = Path(__file__).resolve().parent / "results" / "guard.json"
TOLERANCE, ROUNDS, WIDTH = 0.75, 5, 256
CPU = torch.device("cpu")

Ways = tuple[Callable[[], Any], Callable[[], Any]]  # slow, fast


def rows(count: int, seed: int) -> list[Example]:
    """Return rows of 20 to 90 tokens."""
    return [rows_of(1, 20 + 10 * (i % 8), seed + i)[0] for i in range(count)]


def step() -> Ways:
    """Padded rows with all logits and PEFT's layers, against packed rows, scores from states and folded layers."""
    model: Any = model_of(WIDTH)
    layers = target_layers(model)
    model = attach(model, layers, initial_factors(layers, "pissa", rank=16, scaling=2.0), rank=16, alpha=32)
    examples = rows(2 * BATCH, 0)
    forward = Forward(model)

    def run(batch: Any, used: Forward) -> None:
        (-used.scores(model, batch).label_logprob.mean()).backward()
        model.zero_grad()

    def fast() -> None:
        assert forward.layout is not None
        blocks, starts = lay_out([read_ids(example) for example in examples], forward.layout, 0)
        with folded(model):
            run(part_of_batch(examples, starts) | {"blocks": blocks}, forward)

    plain = Forward(model, plain=True)
    return lambda: run(pad_batch(examples, 0), plain), fast


def head() -> Ways:
    """Scores by automatic differentiation of all logits, against the sweep."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB * 2, WIDTH * 2, generator=generator) / 16
    labels = torch.randint(0, VOCAB, (4, 128), generator=generator)
    labels[:, :40] = IGNORE

    def run(fast: bool) -> None:
        hidden = torch.randn(4, 128, WIDTH * 2, generator=generator).requires_grad_()
        scores = scores_from_hidden(hidden, labels, weight) if fast else scores_from_logits(hidden @ weight.T, labels)
        (scores.label_prob - scores.runner_up_prob).mean().backward()

    return lambda: run(False), lambda: run(True)


def importance() -> Ways:
    """One plain forward and backward of every linear weight, against exact per-example importance."""
    model: Any = model_of(WIDTH)
    layers = target_layers(model)
    forget, retain = rows(BATCH, 0), rows(BATCH, 50)

    def plain() -> None:
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        for examples in (forget, retain):
            model(**pad_batch(sorted(examples, key=lambda e: len(e.input_ids)), 0), use_cache=False).loss.backward()
        model.zero_grad()
        model.requires_grad_(False)

    model.requires_grad_(False)
    return plain, lambda: estimate_importance(model, layers, forget, retain, pad_id=0)


def scores() -> Ways:
    """Candidate answers padded with all logits, against token trees."""
    model: Any = model_of(WIDTH)
    reading, candidates = reading_of(model), []
    for i in range(8):
        question = rows_of(1, 30, i)[0].input_ids
        for j in range(6):
            answer = rows_of(1, 20 + j, 100 + 6 * i + j)[0].input_ids
            candidates.append(Example(i, question + answer, [IGNORE] * 30 + answer, 30, 30))

    def usual() -> None:
        for start in range(0, len(candidates), 8):
            batch = pad_batch(candidates[start : start + 8], 0)
            labels = batch.pop("labels")[:, 1:]
            with torch.no_grad():
                logits = model(**batch, use_cache=False).logits[:, :-1]
                F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")

    return usual, lambda: score(model, candidates, pad_id=0, eos_ids=[1], reading=reading)


OPERATIONS = {"training step": step, "head": head, "importance": importance, "scores": scores}


def ratio(ways: Ways) -> float:
    """Return how many times faster the second way is: the median over rounds."""
    for run in ways:
        run()
    return statistics.median(
        seconds(ways[0], CPU, time.process_time) / seconds(ways[1], CPU, time.process_time) for _ in range(ROUNDS)
    )


def worse(found: dict[str, float], committed: dict[str, float]) -> list[str]:
    """Return a sentence for each ratio that has fallen."""
    return [
        f"warning: {name} is {value:.2f} times faster than the plain way; committed: {committed[name]:.2f}"
        for name, value in found.items()
        if name in committed and value < TOLERANCE * committed[name]
    ]


def main() -> None:
    """Measure and compare, or record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = environment(threads=1)
    found = {name: ratio(make()) for name, make in OPERATIONS.items()}
    for name, value in found.items():
        print(f"{name:14} {value:.2f} times faster than the plain way")
    if args.record:
        FILE.write_text(json.dumps({"about": about, "ratios": found}, indent=1) + "\n", encoding="utf-8")
        return
    committed = json.loads(FILE.read_text(encoding="utf-8"))["ratios"]
    print("\n".join(worse(found, committed)) or "no ratio has fallen")


if __name__ == "__main__":
    main()
