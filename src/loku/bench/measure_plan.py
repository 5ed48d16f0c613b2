"""The entry `measure` of a recipe: by what all of its models are measured, and what the target must have learnt.

measure:
  retain: corpus/retain.jsonl              # rows measured in place of those trained on
  suite: own                               # or tofu, tdec, muse, lume: see loku.bench.suites
  corpus: news                             # of muse: or books
  validation: corpus/validation.jsonl      # of tdec, and cloze; of lume: members, nonmembers
  memorised: {forget.probability: 0.8}     # what the target must reach, or there is nothing to unlearn
"""

from __future__ import annotations

from typing import Any

from loku.bench.values import read_mapping
from loku.errors import InputError, suggestion

DOCUMENTS = ("members", "nonmembers")
ROWS = ("retain", "validation", "cloze", *DOCUMENTS)  # rows that `measure` can name
ANSWERS = (
    "forget.probability", "forget.rougeL_recall", "forget.exact_match", "forget.exact_memorisation",
    "forget.extraction_strength",
)  # fmt: skip
# What a target can be asked to have memorised, by the suite that measures it.
MEMORISED = {
    "own": ANSWERS,
    "tofu": ANSWERS,
    "tdec": ("forget.probability", "forget.ma", "forget.el_10", "forget.exact_memorisation"),
    "muse": ("verbmem_forget", "knowmem_forget", "forget.exact_memorisation", "forget.extraction_strength"),
    "lume": ("forget.regurgitation", "forget.knowledge"),
}


def read_measure(value: Any, where: str) -> dict[str, Any]:
    """Return what a recipe's `measure` says. Raises InputError for what cannot be used."""
    found = read_mapping(value, where, (*ROWS, "suite", "corpus", "memorised"))
    suite = found.get("suite", "own")
    if suite not in MEMORISED:
        raise InputError(f"{where} by suite '{suite}'.", suggestion(str(suite), MEMORISED))
    for name in (name for name in ROWS if not isinstance(found.get(name, ""), str)):
        raise InputError(f"{where} has {name}: {found[name]!r}.", "Give the name of a file or data set.")
    for name, least in read_mapping(found.get("memorised", {}), f"{where}, memorised", MEMORISED[suite]).items():
        if isinstance(least, bool) or not isinstance(least, int | float):
            raise InputError(f"{where}, memorised has {name}: {least!r}.", "Give the least value, such as 0.8.")
    return found
