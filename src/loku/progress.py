"""Progress that a person can follow: live bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

# No markup: prompts, paths and names of others are printed as they are, brackets too.
console = Console(highlight=False, soft_wrap=True, markup=False)
progress_console = Console(stderr=True, highlight=False, markup=False)  # standard output is for results

Update = Callable[[int, int, str], None]
Sink = Callable[[str, int, int, str], None]

QUIET_INTERVAL = 10.0  # seconds between lines where no live bar is possible

_sink: Sink | None = None


def forward_to(sink: Sink) -> None:
    """Send this process's progress to `sink(title, done, total, note)` and print nothing: for worker processes."""
    global _sink  # noqa: PLW0603 - a process has one place to show progress
    _sink = sink
    console.quiet = True


def say(head: str, text: str, style: str = "bold") -> None:
    """Print a line whose beginning stands out."""
    console.print(Text.assemble((head, style), text))


class Board:
    """Several tasks' progress, one bar each (on a terminal) or one line now and then (elsewhere)."""

    def __init__(self) -> None:
        self._live = progress_console.is_terminal
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bars = Progress(*columns, TextColumn("{task.fields[note]}", markup=False), console=progress_console)
        self._tasks: dict[str, TaskID] = {}
        self._last = time.monotonic()

    def __enter__(self) -> Board:
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bars.stop()

    def update(self, title: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` are done."""
        if not self._live:
            if done == total or time.monotonic() - self._last >= QUIET_INTERVAL:
                self._last = time.monotonic()
                progress_console.print(f"{title} {done}/{total} {note}".rstrip())
            return
        if title not in self._tasks:
            self._tasks[title] = self._bars.add_task(title, total=total, note="")
        self._bars.update(self._tasks[title], completed=done, total=total, note=note)


@contextmanager
def progress(title: str) -> Iterator[Update]:
    """Show one task's progress. The update function takes (done, total, note)."""
    if _sink is not None:
        sink = _sink
        yield lambda done, total, note="": sink(title, done, total, note)  # type: ignore[misc]
        return
    with Board() as board:

        def update(done: int, total: int, note: str = "") -> None:
            board.update(title, done, total, note)

        yield update
