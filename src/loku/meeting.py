"""Where the forget and the retain gradient meet: the state around the pure functions of `losses.combine`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loku.errors import InputError, suggestion
from loku.files import write_json
from loku.losses.combine import COMBINERS, dual_step

Combiner = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]

NAMES = ("sum", *COMBINERS, "primal-dual")
FILE_NAME = "dual.json"


@dataclass
class Meeting:
    """Keeps the two gradients apart over the micro-batches of a step, or adapts the retain weight between steps.

    With a `combiner` the cost is one more set of gradients for each side. With a `bound` (nats) the retain weight takes
    a step of dual ascent after every optimiser step.
    """

    combiner: Combiner | None = None
    bound: float | None = None
    rate: float = 1.0
    _sides: list[Sequence[Tensor | None] | None] = field(default_factory=lambda: [None, None])

    @classmethod
    def named(cls, combine: str | Combiner, *, bound: float | None = None, rate: float = 1.0) -> Meeting:
        """Return the meeting of that name. Raises InputError for unknown names and for a bound without its use."""
        if callable(combine):
            return cls(combine)
        if combine not in NAMES:
            raise InputError(f"--combine '{combine}' is not known.", suggestion(combine, NAMES))
        if combine == "primal-dual":
            if bound is None:
                raise InputError(
                    "--combine primal-dual needs a bound on the retain loss.",
                    "Give --retain-bound, a little above the retain loss before unlearning (in nats).",
                )
            return cls(bound=bound, rate=rate)
        if bound is not None:
            raise InputError(f"--retain-bound is of no use with --combine {combine}.", "Add --combine primal-dual.")
        return cls(COMBINERS.get(combine))

    def add(self, side: int, gradients: Sequence[Tensor | None]) -> None:
        """Add one micro-batch's gradients to one side (0 forget, 1 retain); None is a weight without any."""
        kept = self._sides[side]
        if kept is None:
            self._sides[side] = gradients
            return
        self._sides[side] = [
            old if new is None else new if old is None else old + new for old, new in zip(kept, gradients, strict=True)
        ]

    def finish(self, parameters: Sequence[Tensor], accelerator: Any) -> None:
        """Exchange both sides between processes, combine them and put the result where the optimiser looks."""
        sides: list[list[Tensor]] = []
        for kept in self._sides:
            given = kept or [None] * len(parameters)
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, given, strict=True)]
            # Each process holds its part of the step's sum, so parts are added, not averaged.
            sides.append([accelerator.reduce(g, reduction="sum") for g in filled])
        self._sides = [None, None]
        assert self.combiner is not None
        for parameter, gradient in zip(parameters, self.combiner(*sides), strict=True):
            parameter.grad = gradient.to(parameter.dtype)

    def next_weight(self, weight: float, retain_loss: float) -> float:
        """Return the retain weight of the next step."""
        return weight if self.bound is None else dual_step(weight, retain_loss, bound=self.bound, rate=self.rate)


def save_weight(folder: str | Path, weight: float) -> None:
    """Write the dual weight into a checkpoint."""
    write_json(Path(folder) / FILE_NAME, {"retain_weight": weight})


def load_weight(folder: str | Path) -> float:
    """Read the dual weight of a checkpoint."""
    return float(json.loads((Path(folder) / FILE_NAME).read_text(encoding="utf-8"))["retain_weight"])
