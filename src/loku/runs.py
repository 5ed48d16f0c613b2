"""The run folder: what a run was asked, what it did, and where it can go on after being killed."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback

from loku.errors import InputError
from loku.files import check_output_folder, read_json, read_object, write_json, write_text

SCHEMA_VERSION = 1
PACKAGES = (
    "loku", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "scipy", "scikit-learn", "rouge-score",
)  # fmt: skip
SETTINGS_WITHOUT_EFFECT = ("threads", "report_to")  # may differ when a run is resumed


class RunFolder:
    """A run's folder: config.yaml, run.json, metrics.jsonl, checkpoints/ and the results.

    Opening an existing folder with the same settings resumes it; with other settings it is refused.
    """

    def __init__(self, path: str | Path, config: dict[str, Any]) -> None:
        self.path = Path(path)
        self.config = config
        self.record: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
        if (self.path / "run.json").is_file():
            self.record = read_object(
                self.path / "run.json", "Restore it from a copy, or choose a new --output folder."
            )

    @classmethod
    def check(cls, path: str | Path | None, config: dict[str, Any]) -> RunFolder:
        """Open the folder without writing to it. Raises InputError when it is not free for this run."""
        if not path:
            raise InputError("--output is missing.", "Give a folder for the run; it is made when it does not exist.")
        folder = check_output_folder(path)
        file = folder / "config.yaml"
        if file.is_file():
            previous = _read_settings(file)
            different = sorted(
                name
                for name in set(previous) | set(config)
                if previous.get(name) != config.get(name) and name not in SETTINGS_WITHOUT_EFFECT
            )
            if different:
                names = ", ".join(different[:6])
                raise InputError(
                    f"--output '{path}' holds another run (it differs in: {names}).",
                    "Choose another folder, or repeat that run's settings to resume it.",
                )
        elif folder.is_dir() and any(folder.iterdir()):
            raise InputError(
                f"--output '{path}' is not empty and holds no run.",
                "Choose a new folder: nothing there is overwritten.",
            )
        return cls(folder, config)

    def check_inputs(self, data: dict[str, Any], model_sha256: str | None = None) -> None:
        """Raise InputError when the run that the folder holds was started on other rows or another model."""
        recorded = self.record.get("data", {}) | {"model": self.record.get("model", {})}
        given = data | ({"model": {"sha256": model_sha256}} if model_sha256 else {})
        changed = [
            name for name in given if recorded.get(name, {}).get("sha256", ...) not in (..., given[name]["sha256"])
        ]
        if changed:
            raise InputError(
                f"--output '{self.path}' holds a run on other input (changed since: {', '.join(changed)}).",
                "Choose another folder, or give what that run was given to resume it.",
            )

    def start(self, command: str, device: str | None = None) -> None:
        """Create the folder and write the settings; `device` is the one that is computed on."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
        self.update(
            status="running",
            command=command,
            started=self.record.get("started") or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions=versions(),
            hardware=hardware(device),
            seconds=self.record.get("seconds", {}),
        )

    def update(self, **values: Any) -> None:
        """Merge values into run.json and write it."""
        self.record |= values
        write_json(self.path / "run.json", self.record)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of a phase to run.json, in seconds."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = self.record.setdefault("seconds", {})
            seconds[phase] = round(seconds.get(phase, 0.0) + time.monotonic() - start, 3)

    @property
    def finished(self) -> bool:
        """Whether the run has done everything."""
        return bool(self.record.get("status") == "finished")

    @property
    def checkpoints(self) -> Path:
        """The folder of the Trainer's checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The file with one JSON object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def curve(self) -> Path:
        """The file with one JSON object a measurement while training."""
        return self.path / "curve.jsonl"

    def last_checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint. A half-written one (the Trainer writes its state last) is removed."""
        found = sorted(self.checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[-1]))
        while found and not _is_json(found[-1] / "trainer_state.json"):
            shutil.rmtree(found.pop())
        return found[-1] if found else None

    def rewind_metrics(self, checkpoint: Path | None) -> None:
        """Drop the logged and measured steps after a checkpoint, and a line that was cut off: they are made again."""
        step = int(checkpoint.name.rsplit("-", 1)[-1]) if checkpoint else 0
        for file in (self.metrics, self.curve):
            if file.is_file():
                kept = [line for line in file.read_text().split("\n") if 0 <= _step_of(line) <= step]
                write_text(file, "".join(line + "\n" for line in kept))


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"'{file}' is not the config.yaml of a run.", "Choose a new --output folder.")
    return settings


def _step_of(line: str) -> int:
    """Return the step of a logged line; -1 for one that is empty or was cut off as it was written."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def _is_json(file: Path) -> bool:
    try:
        read_json(file)
    except (OSError, ValueError):
        return False
    return True


class MetricsLog(TrainerCallback):
    """Append what the Trainer logs to metrics.jsonl, one flushed line a step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Write one line."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        line = {"step": state.global_step} | {k: (v if _finite(v) else None) for k, v in logs.items()}
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        found[name] = importlib.metadata.version(name)
    return found


def check_tracker(name: str) -> None:
    """Raise InputError when the package of a tracker is not installed: the Trainer would say so in mid-run."""
    from transformers.integrations import get_available_reporting_integrations

    if name not in ("none", "all", *get_available_reporting_integrations()):
        raise InputError(
            f"--report-to '{name}' was given, but its package is not installed.",
            "Install it, or leave --report-to out: metrics.jsonl holds the same numbers.",
        )


def hardware(device: str | None = None) -> dict[str, Any]:
    """Return what is computed on: the device, or without one a GPU where there is one."""
    gpu = _on_gpu(device)
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            return next(line.split(":", 1)[1].strip() for line in handle if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _on_gpu(device: str | None) -> bool:
    return torch.cuda.is_available() and (device is None or str(device).startswith("cuda"))


def peak_memory_bytes(device: str | None = None) -> int:
    """Return the peak memory so far: of the GPU when it computes, else of this process (resident set)."""
    if _on_gpu(device):
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what a parent held when it started this process
        high = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")]
        return int(high[0].split()[1]) * 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
