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
VILA = "Kim et al. 2025, arXiv 2508.21300"
REGLU = "Xiao et al. 2026, arXiv 2604.17396"
TOFU = "Maini et al. 2024, arXiv 2401.06121"
ME = "Yuan et al. 2024, arXiv 2410.08109"

METHODS: dict[str, Method] = {
    "loku": Method(
        "bounded loss + initialiser",
        {"forget_loss": "ihl", "retain_loss": "nll", "retain_weight": 1.0, "init": "fila"},
        "retain rows",
        "one importance pass, then forget and retain rows once a step; the anchor adds one low-rank product a layer",
        "the default: fast forgetting, fluent answers",
        LOKU,
    ),
    "ihl": Method(
        "bounded loss",
        {"forget_loss": "ihl", "retain_loss": "nll", "retain_weight": 1.0, "init": "lora"},
        "retain rows",
        "forget and retain rows once a step",
        "when no importance pass is wanted, or FILA costs general utility",
        LOKU,
    ),
    "vila": Method(
        "bounded loss + initialiser",
        {"forget_loss": "ihl", "retain_loss": "nll", "retain_weight": 1.3, "init": "vila"},
        "retain rows",
        "one importance pass without weight gradients, then forget and retain rows once a step; the anchor as in loku",
        "loku with a cheaper importance; the retain weight is the median of the six tuned on TOFU (0.8 to 1.4)",
        VILA,
    ),
    "reglu": Method(
        "bounded loss + initialiser + regulariser",
        {
            "forget_loss": "ihl",
            "retain_loss": "nll",
            "retain_weight": 1.0,
            "init": "reglu",
            "orthogonality": 0.5,
        },
        "retain rows",
        "one pass over at most 256 rows of each set without gradients, then forget and retain rows once a step; anchor",
        "when the retain set's directions should be left alone explicitly",
        REGLU,
    ),
    "npo": Method(
        "preference",
        {"forget_loss": "npo", "retain_loss": "nll", "retain_weight": 1.0, "init": "lora"},
        "retain rows",
        "one pass over the forget set for the reference, then forget and retain rows once a step",
        "a slower, smoother ascent; the usual baseline",
        "Zhang et al. 2024, arXiv 2404.05868",
    ),
    "graddiff": Method(
        "gradient ascent",
        {"forget_loss": "grad_ascent", "retain_loss": "nll", "retain_weight": 1.0, "init": "lora"},
        "retain rows",
        "forget and retain rows once a step",
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
    "kl": Method(
        "gradient ascent",
        {"forget_loss": "grad_ascent", "retain_loss": "kl", "retain_weight": 1.0, "init": "lora"},
        "retain rows",
        "forget and retain rows once a step, and distributions of the target model on retain rows",
        "as a baseline: ascent held back by the target model's distribution on the retain set",
        TOFU,
    ),
    "simnpo": Method(
        "preference",
        {
            "forget_loss": "simnpo",
            "forget_options": {"beta": 4.5, "delta": 0.0},
            "forget_weight": 0.125,
            "retain_loss": "nll",
            "retain_weight": 1.0,
            "init": "lora",
        },
        "retain rows",
        "forget and retain rows once a step",
        "NPO without a pass over the target model; needs tuning (the settings are TOFU forget10's)",
        "Fan et al. 2024, arXiv 2410.07163",
    ),
    "dpo": Method(
        "preference",
        {"forget_loss": "dpo", "retain_loss": "nll", "retain_weight": 1.0, "init": "lora"},
        "retain rows; refusals, or an `alternate` column (AltPO)",
        "two passes over the forget set for the reference, then forget rows twice and retain rows once a step",
        "to put another answer in place of the unwanted one",
        "Mekala et al. 2024, arXiv 2409.13474",
    ),
    "idk": Method(
        "other answers",
        {"forget_loss": "idk", "retain_loss": "nll", "retain_weight": 1.0, "init": "lora"},
        "retain rows; refusals, or an `alternate` column",
        "forget and retain rows once a step",
        "when the model should say that it does not know",
        TOFU,
    ),
    "idk-ap": Method(
        "other answers",
        {"forget_loss": "idk", "retain_loss": "ap", "retain_weight": 1.0, "init": "lora"},
        "retain rows; refusals, or an `alternate` column",
        "forget rows, and retain rows with both answers, once a step",
        "as idk, without refusing retain questions too",
        ME,
    ),
    "me": Method(
        "entropy",
        {
            "forget_loss": "max_entropy",
            "forget_weight": 0.1,
            "retain_loss": "nll",
            "retain_weight": 1.0,
            "init": "lora",
        },
        "retain rows",
        "forget and retain rows once a step",
        "when no confident substitute may take the place of what must go",
        ME,
    ),
    "pdu": Method(
        "entropy",
        {
            "forget_loss": "pdu",
            "retain_loss": "nll",
            "retain_weight": 50.0,
            "combine": "primal-dual",
            "init": "lora",
        },
        "retain rows; --retain-bound, a little above the retain loss before unlearning",
        "forget and retain rows once a step",
        "flat predictions under a guarantee on the retain loss",
        "Entesari et al. 2025, arXiv 2506.05314",
    ),
    "wga": Method(
        "gradient ascent",
        {"forget_loss": "wga", "retain_loss": "nll", "retain_weight": 1.0, "init": "lora"},
        "retain rows",
        "forget and retain rows once a step",
        "ascent that leaves forgotten tokens alone; a strong simple baseline",
        "Wang et al. 2025, arXiv 2502.19301",
    ),
    "satimp": Method(
        "gradient ascent",
        {"forget_loss": "satimp", "retain_loss": "nll", "retain_weight": 0.1, "init": "lora"},
        "retain rows",
        "forget and retain rows once a step",
        "ascent on tokens that are likely but not certain",
        "Yang et al. 2025, arXiv 2505.11953",
    ),
    "ce-u": Method(
        "bounded loss",
        {"forget_loss": "ce_u", "retain_loss": "nll", "retain_weight": 0.0, "init": "lora"},
        "forget rows only",
        "one forward pass a step",
        "cheap and bounded, but nothing protects the rest",
        "Yang 2025, arXiv 2503.01224",
    ),
    "undial": Method(
        "distillation",
        {"forget_loss": "undial", "retain_loss": "nll", "retain_weight": 0.0, "init": "lora"},
        "forget rows only",
        "one forward pass a step, and one of the target model",
        "stable without retain rows",
        "Dong et al. 2024, arXiv 2402.10052",
    ),
    "rmu": Method(
        "hidden states",
        {"forget_loss": "rmu", "retain_loss": "hidden", "retain_weight": 1.0, "init": "lora"},
        "retain rows; a --layer that suits the model",
        "forget and retain rows once a step, and hidden states of the target model on retain rows",
        "for hazardous topics rather than single facts; leaves gibberish",
        "Li et al. 2024, arXiv 2403.03218",
    ),
}
