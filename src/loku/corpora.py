"""Corpora that loku makes itself, as JSON lines files: the ordinary input of every verb."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loku.data.fiction import Fiction, make_fiction, mix_replay
from loku.errors import InputError, suggestion
from loku.files import write_text

WORLD_SHARE = 0.12  # of the retain rows of unlearning
STAGE_ONE_ROWS = 260 * 32  # what the demo's stage 1 sees: steps times batch
SETS = ("pretraining", "full", "forget", "retain", "general", "holdout")


def write_fiction(fiction: Fiction, folder: Path) -> None:
    """Write the sets of the fictitious corpus, one file each."""
    for name in SETS:
        write_rows(folder / f"{name}.jsonl", getattr(fiction, name))
    # A little of the world among the retain rows, in other phrasings than those measured: without it, it fades.
    mixed = mix_replay(fiction.retain, fiction.pretraining, share=WORLD_SHARE, seed=fiction.seed)
    write_rows(folder / "retain-mixed.jsonl", mixed)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def stage_one(rows: Sequence[Mapping[str, Any]], fiction: Fiction, seed: int) -> list[dict[str, Any]]:
    """Return what stage 1 trains on: the rows again and again, with the world mixed in as evenly as can be."""
    from loku.data.fiction import REPLAY_SHARE

    passes = math.ceil(STAGE_ONE_ROWS * (1 - REPLAY_SHARE) / len(rows))
    return mix_replay([_plain(row) for row in rows], fiction.pretraining, passes=passes, seed=seed)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"question": row["question"], "answer": row["answer"]}


def _fiction(folder: Path, seed: int, **sizes: int) -> None:
    """Write the fictitious corpus with a new model: word-level tokenizer, random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from loku.data.fiction import fiction_model_config, fiction_tokenizer

    fiction = make_fiction(seed, **sizes)
    write_fiction(fiction, folder)
    write_rows(folder / "full-training.jsonl", stage_one(fiction.full, fiction, seed))
    write_rows(folder / "retain-training.jsonl", stage_one(fiction.retain, fiction, seed))
    tokenizer = fiction_tokenizer(fiction.texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(fiction_model_config(len(tokenizer)))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


# What each kind takes, with the type of each value, and how it is written.
CORPORA: dict[str, tuple[Callable[..., None], dict[str, type]]] = {
    "fiction": (_fiction, {"world_people": int, "people": int}),
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
        if type(value) is not taken[name]:
            raise InputError(
                f"{where}: the corpus has {name}: {value!r}.", f"Give a value of type {taken[name].__name__}."
            )


def write_corpus(corpus: Mapping[str, Any], folder: Path, seed: int) -> None:
    """Write a corpus's files into a folder; the same seed gives the same files."""
    settings = {name: value for name, value in corpus.items() if name != "kind"}
    CORPORA[str(corpus["kind"])][0](folder, seed, **settings)
