"""Where tasks run: in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from loku.bench.store import Task
from loku.errors import InputError

Submit = Callable[[Task], "Future[str]"]
WORK = "loku.bench.work"
BACKENDS = ("local", "ray")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_backend(backend: str) -> None:
    """Raise InputError when Ray is asked for and not installed."""
    if backend == "ray" and importlib.util.find_spec("ray") is None:
        raise InputError("--backend ray was given, but Ray is not installed.", "pip install 'loku[ray]'")


@contextmanager
def workers(backend: str, count: int, address: str | None = None) -> Iterator[Submit]:
    """Provide a function that hands a task to a worker. What has not begun is cancelled on the way out."""
    with _ray(address, count) if backend == "ray" else _local(count) as submit:
        yield submit


@contextmanager
def _local(count: int) -> Iterator[Submit]:
    # A fork server imports the libraries once; every task gets a process of its own, so that its peak memory is its
    # own, and nothing that one run leaves behind reaches the next. On a GPU a new process would cost seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([WORK])
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    tasks = None if torch.cuda.is_available() else 1
    pool = ProcessPoolExecutor(count, mp_context=context, max_tasks_per_child=tasks)
    try:
        yield lambda task: pool.submit(_run, task)
    finally:
        pool.shutdown(cancel_futures=True)
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


@contextmanager
def _ray(address: str | None, count: int) -> Iterator[Submit]:
    """Run tasks on a Ray cluster, or on a local Ray. The output folder must be one that all nodes see."""
    import ray

    started = not ray.is_initialized()
    if started:
        local = {} if address else {"num_cpus": count}
        ray.init(address=address, include_dashboard=False, log_to_driver=False, **local)
    remote = ray.remote(max_calls=1)(_run)  # a process of its own for each task, as on one machine
    try:
        yield lambda task: remote.remote(task).future()
    finally:
        if started:
            ray.shutdown()


def _run(task: Task) -> Any:
    return importlib.import_module(WORK).run_task(task)
