"""loku: remove chosen knowledge from a language model with a small adapter, and prove it.

The public names load on first use, so that `import loku` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loku.adapters.anchor import attach, target_model
    from loku.adapters.export import portable_lora, save_merged
    from loku.adapters.importance import estimate_importance
    from loku.config import UnlearnOptions
    from loku.data.sources import load_records
    from loku.errors import DivergenceError, InputError
    from loku.evaluation.own import evaluate_own
    from loku.evaluation.tofu import evaluate_tofu
    from loku.losses.hinge import inverted_hinge
    from loku.report.html import write_report
    from loku.trainer import UnlearnTrainer
    from loku.unlearning import unlearn

__version__ = "0.1.0"

_HOMES = {
    "DivergenceError": "loku.errors",
    "InputError": "loku.errors",
    "UnlearnOptions": "loku.config",
    "UnlearnTrainer": "loku.trainer",
    "attach": "loku.adapters.anchor",
    "estimate_importance": "loku.adapters.importance",
    "evaluate_own": "loku.evaluation.own",
    "evaluate_tofu": "loku.evaluation.tofu",
    "inverted_hinge": "loku.losses.hinge",
    "load_records": "loku.data.sources",
    "portable_lora": "loku.adapters.export",
    "save_merged": "loku.adapters.export",
    "target_model": "loku.adapters.anchor",
    "unlearn": "loku.unlearning",
    "write_report": "loku.report.html",
}

__all__ = [
    "DivergenceError",
    "InputError",
    "UnlearnOptions",
    "UnlearnTrainer",
    "attach",
    "estimate_importance",
    "evaluate_own",
    "evaluate_tofu",
    "inverted_hinge",
    "load_records",
    "portable_lora",
    "save_merged",
    "target_model",
    "unlearn",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loku' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
