"""The methods by name: which losses, initialiser and retain weight each one stands for. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """One published method as settings of `loku unlearn`.

    `settings` are the option values that the name stands for; `needs`, `cost` and `when` are for people choosing.
    """

    family: str
    settings: dict[str, Any]
    needs: str
    cost: str
    when: str
    source: str


LOKU = "Cha et al. 2024, arXiv 2408.06621"
TOFU = "Maini et al. 2024, arXiv 2401.06121"

METHODS: dict[str, Method] = {
    "loku": Method(
        "bounded loss + initialiser",
        {"forget_loss": "ihl", "retain_loss": "nll", "retain_weight": 1.0, "init": "fila"},
        "retain rows",
        "one importance pass, then two forward passes a step; the anchor adds one low-rank product a layer",
        "the default: fast forgetting, fluent answers",
        LOKU,
    ),
    "ihl": Method(
        "bounded loss",
        {"forget_loss": "ihl", "retain_loss": "nll", "retain_weight": 1.0, "init": "lora"},
        "retain rows",
        "two forward passes a step",
        "when no importance pass is wanted, or FILA costs general utility",
        LOKU,
    ),
    "npo": Method(
        "preference",
        {"forget_loss": "npo", "retain_loss": "nll", "retain_weight": 1.0, "init": "lora"},
        "retain rows",
        "one pass over the forget set for the reference, then two forward passes a step",
        "a slower, smoother ascent; the usual baseline",
        "Zhang et al. 2024, arXiv 2404.05868",
    ),
    "graddiff": Method(
        "gradient ascent",
        {"forget_loss": "grad_ascent", "retain_loss": "nll", "retain_weight": 1.0, "init": "lora"},
        "retain rows",
        "two forward passes a step",
        "as a baseline: forgets, at a price in utility",
        TOFU,
    ),
    "ga": Method(
        "gradient ascent",
        {"forget_loss": "grad_ascent", "retain_loss": "nll", "retain_weight": 0.0, "init": "lora"},
        "forget rows only",
        "one forward pass a step",
        "as a baseline: destroys the model when run for long",
        TOFU,
    ),
}
