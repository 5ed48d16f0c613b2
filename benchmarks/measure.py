"""What the benchmarks share: CPU time, peak memory, medians, and what they ran on."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MEGABYTE = 1e6


def peak_megabytes(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the highest sum of live allocations during a call, above its start, and what the call returned."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - start) / MEGABYTE, kept
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / MEGABYTE, kept


def seconds(run: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    """Time one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def summary(values: list[float]) -> dict[str, float]:
    """Return the median and the spread."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def environment(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Return what the figures depend on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": threads,
        "load_average_at_start": os.getloadavg()[0],
    }
