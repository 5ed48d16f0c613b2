"""Progress that a person can follow: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)
progress_console = Console(stderr=True, highlight=False)  # standard output is for results

Update = Callable[[int, int, str], None]

QUIET_INTERVAL = 10.0  # seconds between lines where no live bar is possible


@contextmanager
def progress(title: str) -> Iterator[Update]:
    """Show a task's progress. The update function takes (done, total, note)."""
    if progress_console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=progress_console) as bar:
            task = bar.add_task(title, total=None, note="")

            def show(done: int, total: int, note: str = "") -> None:
                bar.update(task, completed=done, total=total, note=note)

            yield show
        return
    last = time.monotonic()

    def update(done: int, total: int, note: str = "") -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= QUIET_INTERVAL:
            last = time.monotonic()
            progress_console.print(f"{title} {done}/{total} {note}".rstrip())

    yield update
