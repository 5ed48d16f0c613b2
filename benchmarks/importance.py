"""What Fisher importance costs: against a plain forward and backward, and against the released way.

    python benchmarks/importance.py --output benchmarks/results/importance.json        3 to 5 minutes on one core

A 30M Llama and rows of TOFU's lengths (random tokens), on one thread. Over the same forget and retain rows:

- plain: one forward and backward of the model's own loss, padded to the longest row of a batch, with the gradients of
  the linear layers' weights and of nothing else; *in order*: rows as they come, *sorted* by length as loku has them;
- loku: `estimate_importance`, exact per-example squares, both passes; *grouped* within a quarter of the memory;
- released: squares of batch means, rows padded to 500 tokens, every parameter with a gradient, squares moved to host
  memory every step. Timed on one batch of 4 forget and one of 4 retain rows: padding makes all batches cost the same.

All variants run in every round, one after the other, and ratios are taken within a round. The clock is the process's
CPU time. Memory is the peak of torch's allocations above the start of the call. The sums are compared with automatic
differentiation of one example at a time in float64, and the mode `official` with the released way; the run fails if
they disagree.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import environment, peak_megabytes, seconds, summary
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from loku.adapters.backward import plan_batches
from loku.adapters.importance import RELATIVE_EPS, Importance, estimate_importance
from loku.adapters.layers import Layers, target_layers
from loku.data.batching import pad_batch
from loku.data.encoding import IGNORE, Example

LENGTH = 500
RELEASED_BATCH = 4
VOCAB = 4096


def model_30m() -> LlamaForCausalLM:
    """Return a randomly initialised Llama of 30 million parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rows_of(count: int, seed: int) -> list[Example]:
    """Return random rows of TOFU's lengths: questions of 12 to 30 tokens, answers of 20 to 70."""
    draw = random.Random(seed)
    made = []
    for index in range(count):
        question, answer = draw.randint(12, 30), draw.randint(20, 70)
        ids = [draw.randrange(3, VOCAB) for _ in range(question + answer)]
        made.append(Example(index, ids, [IGNORE] * question + ids[question:], question, question))
    return made


def plain(model: LlamaForCausalLM, layers: Layers, batches: list[list[Example]]) -> None:
    """One forward and backward, the linear layers' weight gradients included."""
    model.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    for batch in batches:
        model(**pad_batch(batch, 0), use_cache=False).loss.backward()
    model.zero_grad()
    model.requires_grad_(False)


def released(model: LlamaForCausalLM, layers: Layers, examples: list[Example]) -> dict[str, Tensor]:
    """Mean of squared batch-mean gradients of every linear weight, as released; the model is in train mode."""
    model.train().requires_grad_(True)
    total = {name: torch.zeros_like(layer.weight, device="cpu") for name, layer in layers.items()}
    tokens = 0
    for start in range(0, len(examples), RELEASED_BATCH):
        filler = Example(-1, [0] * LENGTH, [IGNORE] * LENGTH, LENGTH, LENGTH)
        batch = {key: value[:-1] for key, value in pad_batch([*examples[start : start + 4], filler], 0).items()}
        model(**batch, use_cache=False).loss.backward()
        count = int((batch["labels"] != IGNORE).sum())
        tokens += count
        for name, layer in layers.items():
            assert layer.weight.grad is not None
            total[name] += layer.weight.grad.detach().to("cpu", copy=True).float().square() * count
        model.zero_grad()
    model.eval().requires_grad_(False)
    return {name: value / tokens for name, value in total.items()}


def exact(model: LlamaForCausalLM, forget: list[Example], retain: list[Example]) -> dict[str, Tensor]:
    """Relative importance of each row by automatic differentiation of one example at a time, in float64."""
    model = copy.deepcopy(model).double()
    layers = target_layers(model)
    plain_weights = [layer.weight.requires_grad_(True) for layer in layers.values()]

    def fisher(examples: list[Example]) -> list[Tensor]:
        sums, tokens = [torch.zeros_like(w) for w in plain_weights], 0
        for example in examples:
            count = sum(label != IGNORE for label in example.labels)
            loss = model(**pad_batch([example], 0), use_cache=False).loss
            for total, gradient in zip(sums, torch.autograd.grad(loss, plain_weights), strict=True):
                total.add_(count * gradient.square())
            tokens += count
        return [total / tokens for total in sums]

    pairs = zip(layers, fisher(forget), fisher(retain), strict=True)
    return {name: (f / (r + RELATIVE_EPS * r.mean())).sum(1) for name, f, r in pairs}


def check(model: LlamaForCausalLM, layers: Layers) -> dict[str, float]:
    """Return the largest relative errors of row sums; fail where they are no rounding."""
    forget, retain = rows_of(5, 11), rows_of(6, 12)
    found = estimate_importance(model, layers, forget, retain, pad_id=0)
    expected = exact(model, forget, retain)
    worst = max(float((found.layers[n].relative / expected[n] - 1).abs().max()) for n in layers)
    official = estimate_importance(model, layers, forget[:4], retain[:4], pad_id=0, mode="official")
    other = released(model, layers, forget[:4])
    against = max(float((official.layers[n].forget / other[n].sum(1) - 1).abs().max()) for n in layers)
    if not (worst <= 1e-4 and against <= 1e-4):
        raise SystemExit(f"The sums disagree: {worst:.1e} from float64, {against:.1e} from the released way.")
    return {"relative_importance_from_float64": worst, "official_from_released": against}


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--rows", type=int, default=16, help="forget rows, and as many retain rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about, device = environment(threads=1), torch.device("cpu")
    start = time.perf_counter()
    model = model_30m()
    layers = target_layers(model)
    forget, retain = rows_of(args.rows, 1), rows_of(args.rows, 2)
    accumulators = sum(4 * layer.weight.numel() for layer in layers.values())

    def batches(*, sort: bool) -> list[list[Example]]:
        return [b for rows in (retain, forget) for b in plan_batches(rows, args.batch_size, sort=sort)]

    def loku(memory: float | None = None) -> Importance:
        return estimate_importance(model, layers, forget, retain, pad_id=0, batch_size=args.batch_size, memory=memory)

    variants: dict[str, Callable[[], Any]] = {
        "plain, in order": lambda: plain(model, layers, batches(sort=False)),
        "plain, sorted": lambda: plain(model, layers, batches(sort=True)),
        "loku": loku,
        "loku, grouped": lambda: loku(accumulators / 4 / 2**30),
        "released": lambda: [released(model, layers, rows[:RELEASED_BATCH]) for rows in (forget, retain)],
    }
    errors = check(model, layers)
    peak = {name: peak_megabytes(run, device)[0] for name, run in variants.items()}  # the warm-up, too
    times: dict[str, list[float]] = {name: [] for name in variants}
    slow = {"released": 2, "loku, grouped": 2}
    for number in range(args.rounds):
        for name, run in variants.items():
            if number < slow.get(name, args.rounds):
                times[name].append(seconds(run, device, time.process_time))
    # All but the released way saw all rows.
    times["released"] = [value * args.rows / RELEASED_BATCH for value in times["released"]]

    def ratio(above: str, below: str) -> dict[str, float]:
        return summary([a / b for a, b in zip(times[above], times[below], strict=False)])

    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": args.rows,
        "batch_size": args.batch_size,
        "tokens": sum(len(e.input_ids) for e in forget + retain),
        "seconds": {name: summary(values) for name, values in times.items()},
        "over_plain": {name: ratio("loku", name) for name in ("plain, in order", "plain, sorted")},
        "grouped_over_loku": ratio("loku, grouped", "loku"),
        "released_over_loku": ratio("released", "loku"),
        "released_over_plain": ratio("released", "plain, in order"),
        "peak_megabytes": peak,
        "accumulators_megabytes": accumulators / 1e6,
        "errors": errors,
    }
    targets = [
        ("at most 1.1 times plain, in order", result["over_plain"]["plain, in order"]["median"], 1.1, False),
        ("at most 1.1 times plain, sorted", result["over_plain"]["plain, sorted"]["median"], 1.1, False),
        ("at least 6.5 times faster than released", result["released_over_loku"]["median"], 6.5, True),
    ]
    reached = [
        {"target": text, "value": value, "reached": value >= goal if at_least else value <= goal}
        for text, value, goal, at_least in targets
    ]
    for line in reached:
        print(f"{'' if line['reached'] else 'NOT REACHED: '}{line['target']}: {line['value']:.3g}")
    print({name: round(value) for name, value in peak.items()}, errors)
    minutes = (time.perf_counter() - start) / 60
    print(f"{minutes:.1f} minutes")
    if args.output:
        report = {"environment": about, "minutes": round(minutes, 2), "targets": reached, "results": [result]}
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
