"""One step of LoKU training against the released one, with more or fewer rows in a forward pass.

    python benchmarks/training_step.py --output benchmarks/results/training_step.json        about 5 minutes on one core

The model, rows and adapter of whole_run.py; a step of 8 + 8 rows with IHL and cross entropy: its batches made, forward
and backward, clipping and the optimiser, without what a training pays once (the Trainer's start, a collection of
garbage, logging). The released way goes by micro-batches of 2 + 2 rows, as its scripts do; loku by all 8 + 8 at once
(its default), by 4 + 4 and by 2 + 2, whose gradients must be the same to rounding. Every way runs in every round;
memory is the peak of torch's allocations above the start of a step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import released
import torch
from measure import environment, peak_megabytes, seconds, summary
from torch.nn.utils import clip_grad_norm_
from whole_run import ALPHA, BATCH, CPU, RANK, RATE, ROUNDING, Compared, difference

PASSES = (8, 4, 2)  # forget rows of a pass, and as many retain rows


def optimised(model: Any, gradients: Callable[[], Any]) -> Callable[[], None]:
    """Return a step: gradients, clipping, AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01, fused=True)

    def step() -> None:
        gradients()
        clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def ours(c: Compared, model: Any, rows: int) -> Callable[[], None]:
    """Return what makes the gradients of a step by passes of so many rows."""
    trainer = c.trainer(model, tempfile.mkdtemp())
    items = [trainer.train_dataset[i] for i in range(BATCH)]

    def gradients() -> None:
        batches = [trainer.data_collator(items[start : start + rows]) for start in range(0, BATCH, rows)]
        count = trainer._get_num_items_in_batch(batches, CPU)
        for batch in batches:
            trainer.training_step(trainer.model, batch, count)

    return gradients


def gradients_of(model: Any, make: Callable[[], None]) -> dict[str, torch.Tensor]:
    """Return the gradients that a call makes, and leave none behind."""
    make()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def measure(c: Compared, rounds: int) -> dict[str, Any]:
    """Time a step every way, after a warm-up that takes the peak of its memory."""
    factors = c.factors()
    theirs = released.attached(c.model, factors, RANK, ALPHA)
    theirs.train()
    (pairs, *_) = c.pairs()
    ways = {"released": optimised(theirs, lambda: released.ihl_step(theirs, pairs, c.pad_id))}
    right: dict[str, torch.Tensor] = {}
    apart = {}
    for rows in PASSES:
        model = c.adapted(factors)
        make = ours(c, model, rows)
        found = gradients_of(model, make)
        right = right or found
        apart[rows] = difference(found, right)
        if not apart[rows] < ROUNDING:
            raise SystemExit(f"Passes of {rows} rows: the gradient is another one ({apart[rows]}).")
        ways[f"loku, {rows} + {rows} rows"] = optimised(model, make)
    peaks = {name: peak_megabytes(step, CPU)[0] for name, step in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, step in ways.items():
            times[name].append(seconds(step, CPU, time.process_time))
    return {
        name: {
            "seconds": summary(values),
            "times_faster": summary([a / b for a, b in zip(times["released"], values, strict=True)]),
            "peak_megabytes": peaks[name],
            "share_of_memory": peaks[name] / peaks["released"],
        }
        for name, values in times.items()
    } | {"gradients_apart": apart}


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about, c = environment(threads=1), Compared(BATCH)
    lengths = [len(example.input_ids) for example in c.forget + c.retain]
    about |= {"rows": c.bench.source, "tokens": sum(lengths), "released_tokens": released.LENGTH * len(lengths)}
    about |= {"parameters": sum(p.numel() for p in c.model.parameters()), "rank": RANK}
    found = measure(c, args.rounds)
    for name, part in found.items():
        if "seconds" in part:
            print(
                f"{name:20} {part['seconds']['median']:.2f} s, {part['times_faster']['median']:.2f} times faster "
                f"({part['times_faster']['min']:.2f} to {part['times_faster']['max']:.2f}), "
                f"{part['peak_megabytes']:.0f} MB ({part['share_of_memory']:.3f})"
            )
    if args.output:
        args.output.write_text(json.dumps({"about": about, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
