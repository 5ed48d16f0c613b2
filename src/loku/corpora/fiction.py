"""The fictitious corpus as files: people who do not exist, and a new model that can read about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loku.corpora.rows import write_rows
from loku.data.fiction import REPLAY_SHARE, Fiction, make_fiction, mix_replay

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


def stage_one(rows: Sequence[Mapping[str, Any]], fiction: Fiction, seed: int) -> list[dict[str, Any]]:
    """Return what stage 1 trains on: the rows again and again, with the world mixed in as evenly as can be."""
    passes = math.ceil(STAGE_ONE_ROWS * (1 - REPLAY_SHARE) / len(rows))
    return mix_replay([_plain(row) for row in rows], fiction.pretraining, passes=passes, seed=seed)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"question": row["question"], "answer": row["answer"]}


def fiction_corpus(folder: Path, seed: int, **sizes: int) -> None:
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
