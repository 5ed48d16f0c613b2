"""Where tasks run: in processes of this machine, or on a Ray cluster.

A task's result is its JSON file; what a worker sends back is only how it went.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from loku.bench.store import Task
from loku.errors import InputError

WORK = "loku.bench.work"
BACKENDS = ("local", "ray")
PASSED_ON = ("LOKU_DATA_DIR", "HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")  # to a Ray cluster's workers


@dataclass(frozen=True)
class Outcome:
    """How a task went: done, refused (what was given cannot be used) or failed, with the two halves of its error."""

    label: str
    status: str = "done"
    given: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Workers:
    """`submit` hands a task to a worker; `slots` says how many tasks to have there at once."""

    submit: Callable[[Task], Future[Outcome]]
    slots: Callable[[], int]


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_count(*, gpu: bool) -> int:
    """Return how many tasks run at once where nobody says: one on a GPU, else one a core."""
    import torch

    return 1 if gpu and torch.cuda.is_available() else cores()


def check_backend(backend: str, address: str | None = None) -> None:
    """Raise InputError when Ray is asked for and not installed, and for an address without Ray."""
    if backend == "ray" and importlib.util.find_spec("ray") is None:
        raise InputError(
            "--backend ray was given, but Ray is not installed.", "pip install ray, or '.[ray]' in loku's sources."
        )
    if backend != "ray" and address:
        raise InputError(f"--ray-address {address} is of no use without Ray.", "Add --backend ray, or leave it out.")


@contextmanager
def workers(backend: str, count: int = 0, address: str | None = None, *, gpu: bool = False) -> Iterator[Workers]:
    """Provide workers: `count` of them, or with 0 `default_count`. On the way out all of them are ended."""
    with _ray(address, count, gpu) if backend == "ray" else _local(count or default_count(gpu=gpu)) as found:
        yield found


@contextmanager
def _local(count: int) -> Iterator[Workers]:
    """Run each task in a process of its own, forked from a server that has imported the libraries.

    So a run's peak memory is its own, nothing that it leaves behind reaches the next, and a killed one takes no other
    with it. On a GPU, where a new process costs seconds, a process does one task after the other.
    """
    import torch

    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([WORK])
    processes = Processes(context, keep=torch.cuda.is_available())
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    threads = ThreadPoolExecutor(count)
    try:
        yield Workers(lambda task: threads.submit(processes.run, task), lambda: count)
    finally:
        processes.end()
        threads.shutdown(cancel_futures=True)
        processes.join()
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


class Processes:
    """Worker processes: one a task, or with `keep` one for each thread that asks."""

    def __init__(self, context: Any, *, keep: bool = False) -> None:
        self.context = context
        self.keep = keep
        self.alive: set[Any] = set()
        self.closed = False
        self.lock = threading.Lock()
        self.own = threading.local()

    def run(self, task: Task) -> Outcome:
        """Do a task in a process, and wait for it."""
        kept = getattr(self.own, "worker", None)
        process, pipe = kept or self._start()
        if process is None:
            return _died(task, "was not begun")
        try:
            pipe.send(task)
            outcome: Outcome = pipe.recv()
        except (EOFError, OSError):
            process.join()
            outcome = _died(task, f"its process ended (exit code {process.exitcode})")
        if self.keep and process.is_alive():
            self.own.worker = process, pipe
            return outcome
        self.own.worker = None
        pipe.close()  # which tells the process that there is no more to do
        process.join()
        with self.lock:
            self.alive.discard(process)
        return outcome

    def _start(self) -> tuple[Any, Any]:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs,))
        with self.lock:
            if self.closed:
                return None, None
            process.start()
            self.alive.add(process)
        theirs.close()
        return process, ours

    def end(self) -> None:
        """End all of them; what they have written stays for the next call."""
        with self.lock:
            self.closed = True
            for process in self.alive:
                process.terminate()

    def join(self) -> None:
        """Wait for those that no thread waits for."""
        for process in self.alive:
            process.join()


def _died(task: Task, how: str) -> Outcome:
    memory = "Run the same command again; with fewer --workers if memory was short."
    return Outcome(task.label, "failed", f"{task.label}: {how}.", memory)


def _serve(pipe: Any) -> None:
    """Do tasks and send how they went, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            pipe.send(_run(pipe.recv()))


def _end_with_parent() -> None:
    """End this process when its parent is gone: a new call would otherwise write into the same folders beside it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _ray(address: str | None, count: int, gpu: bool) -> Iterator[Workers]:
    """Run tasks on a Ray cluster, or on a local Ray. Output folder and rows must be where all nodes see them."""
    import ray

    started = not ray.is_initialized()
    if started:
        names = PASSED_ON if address else (*PASSED_ON, "PYTHONPATH")
        settings = {name: os.environ[name] for name in names if name in os.environ}
        local = {} if address else {"num_cpus": count or cores()}
        ray.init(
            address=address, include_dashboard=False, log_to_driver=False, logging_level="error",
            runtime_env={"env_vars": settings | {"OMP_NUM_THREADS": "1"}}, **local,
        )  # fmt: skip
    gpu = gpu and ray.cluster_resources().get("GPU", 0) >= 1
    # A process of its own for each task, as on one machine; one that dies is a failure, repeated by the next call.
    remote = ray.remote(num_cpus=1, num_gpus=int(gpu), max_calls=1, max_retries=0)(_run_in)
    given: list[Any] = []

    def submit(task: Task) -> Future[Outcome]:
        given.append(remote.remote(os.getcwd(), task))
        future: Future[Outcome] = given[-1].future()
        return future

    def slots() -> int:
        """Return how many tasks the cluster can hold now: it may grow."""
        there = max(1, int(ray.cluster_resources().get("GPU" if gpu else "CPU", 1)))
        return min(there, count) if count else there

    try:
        yield Workers(submit, slots)
    finally:
        for reference in given:
            with contextlib.suppress(Exception):  # those that are done cannot be cancelled
                ray.cancel(reference, force=True)
        if started:
            ray.shutdown()


def _run_in(folder: str, task: Task) -> Outcome:
    """Do a task from the caller's folder, which a recipe's file names start from."""
    if os.path.isdir(folder):
        os.chdir(folder)
    return _run(task)


def _run(task: Task) -> Outcome:
    found: Outcome = importlib.import_module(WORK).run_task(task)
    return found
