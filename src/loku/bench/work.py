"""What a worker process does: one task, on one thread, in silence. Importing this module imports the libraries."""

from __future__ import annotations

import os

import torch

from loku.bench.models import build_models
from loku.bench.store import Task
from loku.bench.trial import run_trial
from loku.progress import forward_to
from loku.quiet import quiet_libraries


def run_task(task: Task) -> str:
    """Do a task and return its label. Its result is the JSON file at `task.path`."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    quiet_libraries()
    forward_to(lambda *update: None)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # a process on a GPU does many tasks
    if task.arm is None:
        build_models(task)
    else:
        run_trial(task)
    return task.label
