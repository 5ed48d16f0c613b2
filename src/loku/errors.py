"""Errors with two halves: what was given, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LokuError(Exception):
    """An error that a user can act on.

    `given` says what was found, echoing the value; `remedy` says what to do. The command line prints both halves
    without a traceback.
    """

    def __init__(self, given: str, remedy: str) -> None:
        super().__init__(f"{given}\n{remedy}")
        self.given = given
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[LokuError], tuple[str, str]]:  # errors come back from worker processes
        return type(self), (self.given, self.remedy)


class InputError(LokuError, ValueError):
    """Something the user gave cannot be used. Raised before any work starts."""


class DivergenceError(LokuError, RuntimeError):
    """Training left the range of finite, sensible losses and was stopped."""


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Return a sentence that names the nearest valid name, or all of them when none is near."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"Did you mean '{near[0]}'?"
    if any("," in name for name in names):
        names = [f"'{name}'" for name in names]
    return f"Valid names are: {', '.join(names)}."
