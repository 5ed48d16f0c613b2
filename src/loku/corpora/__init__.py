"""Corpora that a benchmark makes anew for every seed, as JSON lines files: the ordinary input of every verb."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loku.corpora.fiction import fiction_corpus
from loku.corpora.lume import lume_corpus
from loku.corpora.tdec import tdec_corpus
from loku.errors import InputError, suggestion

# How each kind is written, and the counts that it takes.
CORPORA: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "fiction": (fiction_corpus, ("world_people", "people")),
    "tdec": (tdec_corpus, ("repeats", "passages", "characters", "validation", "cloze")),
    "lume": (lume_corpus, ("documents",)),
}


def check_corpus(corpus: Mapping[str, Any], where: str) -> None:
    """Raise InputError for a kind that does not exist and settings that it does not take."""
    kind = str(corpus.get("kind"))
    if kind not in CORPORA:
        raise InputError(f"{where} has a corpus of kind '{kind}'.", suggestion(kind, CORPORA))
    taken = CORPORA[kind][1]
    for name, value in corpus.items():
        if name == "kind":
            continue
        if name not in taken:
            raise InputError(f"{where}: the corpus '{kind}' takes no '{name}'.", suggestion(name, ("kind", *taken)))
        if type(value) is not int or value < 0:
            raise InputError(
                f"{where}: the corpus has {name}: {value!r}.",
                "Give a whole number, 0 or more.",
            )


def write_corpus(corpus: Mapping[str, Any], folder: Path, seed: int) -> None:
    """Write a corpus's files into a folder; the same seed gives the same files."""
    settings = {name: value for name, value in corpus.items() if name != "kind"}
    CORPORA[str(corpus["kind"])][0](folder, seed, **settings)
