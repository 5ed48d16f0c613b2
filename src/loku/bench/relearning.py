"""The relearning attack after a run: fine-tune on a share of the forget set, score the disjoint rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loku.attacks.relearning import relearn, split_forget
from loku.config import UnlearnOptions
from loku.data.prompts import resolve_template
from loku.data.sources import RecordSet
from loku.errors import DivergenceError

KEPT = ("steps", "means", "losses", "settings")  # values of single rows are too many to keep of hundreds of runs


def relearned(
    model: Any, tokenizer: Any, forget: RecordSet, settings: Mapping[str, Any], options: UnlearnOptions
) -> dict[str, Any]:
    """Return the curve of the attack on one model: `means[set][figure]` at each of `steps`, or why it ended.

    The sets are "learned" and "rest". The split is that of the seed, the same for all models.
    """
    learn, rest = split_forget(forget, share=settings["share"], seed=options.seed)
    try:
        curve = relearn(
            model,
            tokenizer,
            template=resolve_template(tokenizer, options.model, options.prompt_template),
            learn=learn,
            probe={"learned": learn, "rest": rest},
            steps=settings["steps"],
            learning_rate=settings["learning_rate"],
            every=settings["every"],
            max_length=options.max_length,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
        )
    except DivergenceError as error:  # of the attack: the run itself is none the worse
        return {"error": error.given, "settings": dict(settings)}
    return {name: value for name, value in curve.to_json().items() if name in KEPT}
