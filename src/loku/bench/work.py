"""What a worker process does: one task, on one thread, in silence. Importing this module imports the libraries."""

from __future__ import annotations

import os
import traceback

import torch

from loku.bench.attacking import attack_models
from loku.bench.models import build_models
from loku.bench.store import Task
from loku.bench.trial import run_trial
from loku.bench.workers import Outcome
from loku.errors import InputError, LokuError
from loku.files import write_text
from loku.progress import forward_to
from loku.quiet import quiet_libraries


def run_task(task: Task) -> Outcome:
    """Do a task and say how it went. Its result is the JSON file at `task.path`, of a failure `task.error_file`."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    quiet_libraries()
    forward_to(lambda *update: None)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # a process on a GPU does many tasks
    try:
        {"models": build_models, "attacks": attack_models, "trial": run_trial}[task.kind](task)
    except InputError as error:
        return Outcome(task.label, "refused", f"{task.label}: {error.given}", error.remedy)
    except Exception as error:
        given = error.given if isinstance(error, LokuError) else repr(error)
        return Outcome(task.label, "failed", f"{task.label}: {given}", _written(task, traceback.format_exc()))
    task.error_file.unlink(missing_ok=True)
    return Outcome(task.label)


def _written(task: Task, text: str) -> str:
    """Write why a task failed, and say where; without a place to write, say where it happened."""
    try:
        write_text(task.error_file, text)
    except OSError:
        return f"It happened here: {text.splitlines()[-3].strip()}."
    return f"See '{task.error_file}'."
