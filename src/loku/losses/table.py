"""The losses by name, and what the trainer must hand to each of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from loku.losses import forget, hidden, hinge, preference, retain
from loku.losses.scores import Extra

Unit = Literal["token", "sequence", "alternate", "position"]


@dataclass(frozen=True)
class Loss:
    """A loss and how to call it.

    `needs` are its positional arguments, by name:

    - `scores`: TokenScores of the batch's supervised tokens; `alternate`: those of the alternate answers;
    - `reference`, `alternate_reference`: the target model's summed log-probability of each sequence;
    - `positions`, `reference_logits`: the logits at the supervised positions, of the model and of the target model;
    - `hidden`, `reference_hidden`: one layer's states at the supervised tokens; `direction`: RMU's random direction.

    `unit` is what it averages over: supervised tokens, sequences, the alternate answers' tokens, or all positions
    that are not padding (then these count as supervised). `fields` are the optional scores it reads.
    """

    function: Callable[..., Tensor]
    needs: tuple[str, ...] = ("scores",)
    unit: Unit = "token"
    fields: tuple[Extra, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """The keyword options that a user may set, with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {
            p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("num_items", "weights")
        }

    @property
    def takes_weights(self) -> bool:
        """Whether token weights are handed over on their own, because no scores carry them."""
        return "weights" in inspect.signature(self.function).parameters


FORGET_LOSSES: dict[str, Loss] = {
    "ihl": Loss(hinge.ihl),
    "grad_ascent": Loss(forget.grad_ascent),
    "npo": Loss(preference.npo, ("scores", "reference"), "sequence"),
    "simnpo": Loss(preference.simnpo, unit="sequence"),
    "dpo": Loss(preference.dpo, ("scores", "reference", "alternate", "alternate_reference"), "sequence"),
    "idk": Loss(preference.idk, ("alternate",), "alternate"),
    "ce_u": Loss(forget.ce_u, fields=("expected_other",)),
    "wga": Loss(forget.wga),
    "satimp": Loss(forget.satimp),
    "undial": Loss(forget.undial, ("positions", "reference_logits")),
    "max_entropy": Loss(forget.max_entropy, unit="position", fields=("mean_logit",)),
    "pdu": Loss(forget.pdu, fields=("mean_logit",)),
    "rmu": Loss(hidden.rmu, ("hidden", "direction")),
}

RETAIN_LOSSES: dict[str, Loss] = {
    "nll": Loss(retain.nll),
    "kl": Loss(retain.kl, ("positions", "reference_logits")),
    "hidden": Loss(hidden.hidden_distance, ("hidden", "reference_hidden")),
    "ap": Loss(preference.answer_preservation, ("scores", "alternate"), "sequence"),
}
