"""Worker processes for the demo: they import the libraries, the command line need not."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loku.progress import Board

WORKERS = 2


@dataclass(frozen=True)
class Step:
    """One step of the demo, by name, in the demo's folder."""

    name: str
    folder: Path
    seed: int


@dataclass
class Workers:
    """Two processes of one thread each, and one board of progress for both.

    `module` holds what they do: `start_worker(queue)` once each, `run_step(step)` for each step.
    """

    module: str

    def __enter__(self) -> Workers:
        # A fork server imports the libraries once and forks clean workers: no import time in each of them.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([self.module])
        os.environ["OMP_NUM_THREADS"] = "1"
        self._queue = context.Queue()
        self._pool = ProcessPoolExecutor(
            WORKERS, mp_context=context, initializer=_call, initargs=(self.module, "start_worker", self._queue)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, steps: Sequence[Step], *, meanwhile: Callable[[], object] | None = None) -> None:
        """Run steps side by side, showing their progress. The first error stops the rest."""
        with Board() as board:
            futures = [self._pool.submit(_call, self.module, "run_step", step) for step in steps]
            if meanwhile is not None:
                meanwhile()
            while not all(future.done() for future in futures):
                wait(futures, timeout=0.1)
                self._drain(board)
                _raise_first(futures)
            self._drain(board)
            _raise_first(futures)

    def _drain(self, board: Board) -> None:
        while not self._queue.empty():
            board.update(*self._queue.get())


def _call(module: str, function: str, argument: Any) -> Any:
    return getattr(importlib.import_module(module), function)(argument)


def _raise_first(futures: Sequence[Future[Any]]) -> None:
    for future in futures:
        if future.done():
            future.result()
