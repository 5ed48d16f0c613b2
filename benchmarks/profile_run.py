"""Where each second of a LoKU run goes: a profile of the run of whole_run.py, and of its training alone.

    python benchmarks/profile_run.py --output benchmarks/results/profile.json        about 9 minutes on one core

Every operation's own time is put down to one heading: the head (everything within its sweep), attention, the optimiser,
other matrix products, other operations on tensors; what no operation accounts for is Python, the Trainer, files, charts
and the profiler itself, which costs more the smaller the operations are. The rate of matrix products is their floating
point operations over their time, the achievable rate that of one large product on the same thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import environment
from torch.profiler import ProfilerActivity, profile
from whole_run import Compared

PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv"}


def heading(event: Any) -> str:
    """Return what an operation's own time is put down to."""
    names, place = [], event
    while place is not None:
        names.append(place.name)
        place = place.cpu_parent
    joined = " ".join(names)
    if "_Sweep" in joined:
        return "head"
    if "Optimizer.step" in joined:
        return "optimiser"
    if "attention" in joined:
        return "attention"
    if "Dataloader" in joined or "DataLoader" in joined:
        return "data"
    return "matrix products" if event.name in PRODUCTS else "other operations"


def achievable() -> float:
    """Return the operations a second of one large product on this thread."""
    a, b = torch.randn(2048, 512), torch.randn(1408, 512)
    best = 0.0
    for _ in range(5):
        start = time.process_time()
        for _ in range(20):
            a @ b.T
        best = max(best, 20 * 2 * 2048 * 512 * 1408 / (time.process_time() - start))
    return best


def profiled(run: Callable[[], Any]) -> dict[str, Any]:
    """Run once as it is and once under the profiler; return the shares."""
    start = time.process_time()
    run()
    plain = time.process_time() - start
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as found:
        run()
    whole = time.perf_counter() - start
    spent: dict[str, float] = defaultdict(float)
    operations = product_time = 0.0
    for event in found.events():
        own = event.self_cpu_time_total / 1e6
        spent[heading(event)] += own
        if event.name in PRODUCTS and event.flops:
            operations += event.flops
            product_time += own
    spent["Python and all else"] = max(whole - sum(spent.values()), 0.0)
    return {
        "cpu_seconds": plain,
        "profiled_seconds": whole,
        "shares": {name: value / whole for name, value in sorted(spent.items(), key=lambda item: -item[1])},
        "product_rate": operations / product_time,
        "share_of_achievable_rate": operations / product_time / achievable(),
    }


def main() -> None:
    """Profile and write the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--rows", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about, c = environment(threads=1), Compared(args.rows)

    def training() -> None:
        with tempfile.TemporaryDirectory() as folder:
            c.trainer(model, folder).train()

    model = c.adapted(c.factors())
    found = {
        "training": profiled(training),
        "importance": profiled(c.loku_importance),
        "scores": profiled(c.loku_scores),
        "run": profiled(c.loku_run),
    }
    for name, part in found.items():
        shares = ", ".join(f"{heading} {share:.0%}" for heading, share in part["shares"].items())
        print(f"{name}: {part['cpu_seconds']:.2f} s; {shares}; {part['share_of_achievable_rate']:.0%} of the rate")
    if args.output:
        args.output.write_text(json.dumps({"about": about, "rows": args.rows, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
