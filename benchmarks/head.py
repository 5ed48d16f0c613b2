"""Time and memory of the Inverted Hinge Loss from hidden states to their gradient: this project's head against others.

    python benchmarks/head.py --output benchmarks/results/head.json        about 5 minutes on one core
    python benchmarks/head.py --quick                                      a smoke run of a few seconds

The batch is TOFU-like: questions of 22 or so tokens with answers of 28 to 55 (TOFU's answers have 27 words on
average). Half of the answer tokens are memorised. The head's weights are frozen. Variants:

    released   the released formulation: rows padded to 500 tokens, logits of every position, softmax over the
               vocabulary, one-hot mask, and prompt and padding dropped only from the mean. In the type of the model.
               Boolean selections are written as fills, which is kinder to it than the published code
    plain      softmax by automatic differentiation, on answer positions only, logits widened to float32; rows padded to
               the longest of the batch, as for loku
    limit      the two matrix products nobody can avoid, on answer positions, into buffers made beforehand
    limit32    the same in float32 on widened weights (bfloat16 only; its price of widening is not counted)
    loku       `scores_from_hidden`, at its default tile; and at other tiles, to justify the default

All variants run in every round, one after the other (the slow `released` in the first rounds only); ratios are taken
within a round, and the median over rounds is reported with the extremes. The clock is the process's CPU time on one
thread, wall time otherwise. Losses and gradients are compared with a float64 plain path, and the run fails if they
disagree. Peak memory is the sum of allocations minus frees that torch's allocator reports to its profiler, above the
start of the call, so temporaries inside kernels count; the buffers that MKL packs matrices into do not, in any variant.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import environment, peak_megabytes, seconds, summary
from torch import Tensor

from loku.losses.head import scores_from_hidden
from loku.losses.tiles import default_tile

# Vocabulary, hidden size, rows: loku's default of 8 a step for the small shape, 4 for the others to save time.
SHAPES = {"small": (4096, 512, 8), "phi-1.5": (51200, 2048, 4), "llama-2": (32000, 4096, 4)}
QUICK = {"quick": (1000, 64, 4)}
ANSWERS = (28, 36, 41, 55)  # answer tokens of a row, repeated
LENGTH = 500
TILES = (256, 512, 1024, 2048)


@dataclass
class Problem:
    """One batch at one shape and type; hidden states and weights as a model would hand them over."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor

    @property
    def targets(self) -> Tensor:
        """The answer tokens."""
        return self.labels[self.labels != -100]

    def trimmed(self) -> Problem:
        """The same batch padded to its longest row."""
        length = int((self.labels != -100).any(dim=0).nonzero().max()) + 1
        hidden = self.hidden.detach()[:, :length].clone().requires_grad_()
        return Problem(hidden, self.weight, self.labels[:, :length])

    def states(self) -> Tensor:
        """The hidden states that predict them."""
        return self.hidden.flatten(0, 1)[(self.labels != -100).flatten().nonzero().squeeze(1) - 1]


def make_problem(vocab: int, d: int, rows: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
    """Logits of standard deviation 2; half of the answer tokens are memorised, with a probability around 0.9."""
    generator = torch.Generator().manual_seed(seed)
    spread = 2.0
    weight = torch.randn(vocab, d, generator=generator) * spread / d**0.5
    hidden = torch.randn(rows, LENGTH, d, generator=generator)
    labels = torch.full((rows, LENGTH), -100)
    memorised_logit = math.log(vocab) + spread**2 / 2 + 3  # 3 above the logarithm of the sum over the others
    for row in range(rows):
        tokens, start = ANSWERS[row % len(ANSWERS)], 20 + row % 4
        labels[row, start : start + tokens] = torch.randint(0, vocab, (tokens,), generator=generator)
        memorised = torch.arange(start, start + tokens, 2)
        hidden[row, memorised - 1] += weight[labels[row, memorised]] * memorised_logit / spread**2
    return Problem(hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype), labels.to(device))


def released(p: Problem) -> Tensor:
    """IHL as released."""
    logits = F.linear(p.hidden, p.weight)
    logits = logits[:, :-1].contiguous().view(-1, logits.shape[-1])
    labels = p.labels[:, 1:].contiguous().view(-1)
    probabilities = logits.softmax(dim=-1)
    supervised = labels != -100
    one_hot = F.one_hot(labels.clamp(min=0), logits.shape[-1]).bool()
    target = probabilities.masked_fill(~one_hot, 0).sum(dim=-1)
    runner_up = probabilities.masked_fill(one_hot, 0).max(dim=-1).values
    return ((1 + target - runner_up) * supervised).float().sum() / supervised.sum()


def plain(p: Problem) -> Tensor:
    """IHL by automatic differentiation on answer positions."""
    logits = F.linear(p.states(), p.weight)
    if logits.dtype != torch.float64:
        logits = logits.float()
    label = p.targets.unsqueeze(1)
    choice = logits.detach().scatter(1, label, -torch.inf).argmax(dim=1, keepdim=True)
    probabilities = logits.softmax(dim=-1)
    return (1 + probabilities.gather(1, label) - probabilities.gather(1, choice)).mean()


def loku(p: Problem, tile: int | None = None) -> Tensor:
    """IHL by this project's head."""
    scores = scores_from_hidden(p.hidden, p.labels, p.weight, tile=tile)
    return (1 + scores.label_prob - scores.runner_up_prob).mean()


def gradient(loss: Callable[[Problem], Tensor], p: Problem) -> tuple[Tensor, Tensor]:
    """Return a loss and its gradient with respect to the hidden states."""
    value = loss(p)
    return value.detach(), torch.autograd.grad(value, p.hidden)[0]


def products(p: Problem, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that makes the two products: logits, and something like them times the weights."""
    h, w = p.states().detach().to(dtype), p.weight.to(dtype)
    logits, out = h.new_empty(h.shape[0], w.shape[0]), torch.empty_like(h)

    def run() -> None:
        torch.mm(h, w.T, out=logits)
        torch.mm(logits, w, out=out)

    return run


def compare_numbers(p: Problem, found: dict[str, tuple[Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """Return the errors of each loss and gradient against float64; fail where loku's exceed what its type allows."""
    exact = Problem(p.hidden.detach().double().requires_grad_(), p.weight.double(), p.labels)
    loss, slope = gradient(plain, exact)
    choice = _runner_up(exact)
    errors = {}
    for name, (value, grad) in found.items():
        trimmed = grad[:, : p.labels.shape[1]]
        if grad.count_nonzero() != trimmed.count_nonzero():
            raise SystemExit(f"The gradient of '{name}' is not zero on padding.")
        errors[name] = {
            "loss": abs(float(value) - float(loss)),
            "gradient": float((trimmed.double() - slope).norm() / slope.norm()),
        }
    errors["plain"]["runner_up_flips"] = int((_runner_up(p) != choice).sum())
    # Float32 states with the weights as they are: the gradient before it is rounded to the type of the states.
    widened = Problem(p.hidden.detach().float().requires_grad_(), p.weight, p.labels)
    value, grad = gradient(loku, widened)
    errors["loku"]["gradient_before_rounding"] = float((grad.double() - slope).norm() / slope.norm())
    half = p.weight.dtype != torch.float32
    bounds = {"released": 1.0 if half else 1e-4, "plain": 1.0 if half else 1e-4, "loku": 4e-3 if half else 1e-6}
    for name, bound in bounds.items():
        if not errors[name]["gradient"] <= bound:
            raise SystemExit(f"The gradient of '{name}' is off by {errors[name]['gradient']:.1e} (allowed: {bound:g}).")
    if not (errors["loku"]["loss"] <= 1e-6 and errors["loku"]["gradient_before_rounding"] <= 1e-6):
        raise SystemExit(f"loku's numbers are off: {errors['loku']}.")
    return errors


def _runner_up(p: Problem) -> Tensor:
    with torch.no_grad():
        return F.linear(p.states(), p.weight).scatter(1, p.targets.unsqueeze(1), -torch.inf).argmax(dim=1)


def measure(name: str, vocab: int, d: int, rows: int, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Any]:
    """Return times, peak memory and errors of every variant at one shape and type."""
    device = torch.device(args.device)
    clock = time.process_time if device.type == "cpu" and args.threads == 1 else time.perf_counter
    padded = make_problem(vocab, d, rows, dtype, device)
    p = padded.trimmed()
    variants: dict[str, Callable[[], Any]] = {
        "released": lambda: gradient(released, padded),
        "plain": lambda: gradient(plain, p),
        "limit": products(p, dtype),
        "loku": lambda: gradient(loku, p),
    }
    if dtype != torch.float32:
        variants["limit32"] = products(p, torch.float32)
    default = default_tile(d, dtype)
    others = [tile for tile in TILES if tile != default and tile <= vocab]
    tiles = {f"loku, tile {tile}": (lambda tile=tile: gradient(lambda q: loku(q, tile), p)) for tile in others}
    # The memory run is also the warm-up, and its numbers are compared.
    memory_runs = {key: peak_megabytes(variants[key], device) for key in ("released", "plain", "loku")}
    peak = {key: megabytes for key, (megabytes, _) in memory_runs.items()}
    errors = compare_numbers(p, {key: numbers for key, (_, numbers) in memory_runs.items()})
    del memory_runs
    for key in ("limit", "limit32"):
        variants.get(key, lambda: None)()
    rounds = 5 if vocab * d > 2**24 else 41
    slow_rounds = 3 if vocab * d > 2**24 else 9
    tile_rounds = 3 if vocab * d > 2**24 else 21
    times: dict[str, list[float]] = {key: [] for key in (*variants, *tiles)}
    for r in range(rounds):
        for key, run in (variants | tiles).items():
            if (key == "released" and r >= slow_rounds) or (key in tiles and r >= tile_rounds):
                continue
            times[key].append(seconds(run, device, clock))
    ours = times["loku"]
    return {
        "shape": name,
        "vocab": vocab,
        "hidden": d,
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "positions": padded.labels.numel(),
        "answer_tokens": len(p.targets),
        "tile": default,
        "seconds": {key: summary(values) for key, values in times.items()},
        "speedup": {
            key: summary([a / b for a, b in zip(times[key], ours, strict=False)]) for key in ("released", "plain")
        },
        "over_limit": {
            key: summary([b / a for a, b in zip(times[key], ours, strict=False)])
            for key in ("limit", "limit32")
            if key in times
        },
        "tiles_over_limit": {
            key.rsplit(" ", 1)[-1]: summary([b / a for a, b in zip(times["limit"], times[key], strict=False)])
            for key in tiles
        },
        "peak_megabytes": peak,
        "memory_ratio": {key: peak[key] / peak["loku"] for key in ("released", "plain")},
        "errors": errors,
    }


def targets(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was set out to be reached, and what was."""
    found = []
    for r in results:
        where = f"{r['shape']} {r['dtype']}"
        checks = [
            ("at least 10 times faster than released", r["speedup"]["released"]["median"], 10, True),
            ("at most 1/40 of the memory of released", r["memory_ratio"]["released"], 40, True),
        ]
        bound = {"phi-1.5": 1.05, "small": 1.3}.get(r["shape"])
        if bound:
            checks.append((f"at most {bound} times the limit", r["over_limit"]["limit"]["median"], bound, False))
        if r["dtype"] == "float32":
            checks.append(("gradient within 1e-6 of float64", r["errors"]["loku"]["gradient"], 1e-6, False))
        found += [
            {"where": where, "target": text, "value": value, "reached": value >= goal if at_least else value <= goal}
            for text, value, goal, at_least in checks
        ]
    return found


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--quick", action="store_true", help="one tiny shape only")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    about = environment(args.threads, args.device)
    results = []
    for name, (vocab, d, rows) in (QUICK if args.quick else {name: SHAPES[name] for name in args.shapes}).items():
        for dtype in (torch.float32, torch.bfloat16):
            r = measure(name, vocab, d, rows, dtype, args)
            results.append(r)
            limits = ", ".join(f"{v['median']:.2f} x {k}" for k, v in r["over_limit"].items())
            print(
                f"{name} {r['dtype']}: {r['speedup']['released']['median']:.1f} x released, "
                f"{r['speedup']['plain']['median']:.2f} x plain in speed; {limits} in time; "
                f"memory {r['peak_megabytes']['released']:.0f} -> {r['peak_megabytes']['loku']:.1f} MB "
                f"(1/{r['memory_ratio']['released']:.0f}); gradient error {r['errors']['loku']['gradient']:.1e}",
                flush=True,
            )
    reached = [] if args.quick else targets(results)
    for check in reached:
        if not check["reached"]:
            print(f"NOT REACHED: {check['where']}: {check['target']} ({check['value']:.3g})")
    minutes = (time.perf_counter() - start) / 60
    print(f"{minutes:.1f} minutes")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        report = {"environment": about, "minutes": round(minutes, 2), "targets": reached, "results": results}
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
