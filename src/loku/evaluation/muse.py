"""The MUSE suite (Shi et al. 2024, arXiv 2407.06460), News and Books: VerbMem, KnowMem, PrivLeak."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from loku.data.sources import SUFFIXES, Rows, load_rows
from loku.errors import InputError, suggestion
from loku.evaluation.assembly import Identity, suite_results
from loku.evaluation.cache import BatchCache
from loku.evaluation.generation import BATCH_ROWS
from loku.evaluation.measuring import Progress
from loku.evaluation.membership import attack_aucs, distances, priv_leak
from loku.evaluation.metrics import rouge
from loku.evaluation.probing import Probe, ask, encode_text, example_text, plain_set, score_texts
from loku.evaluation.results import Results, SetResults
from loku.evaluation.scoring import BATCH_TOKENS
from loku.models import context_length

CORPORA = ("news", "books")
HUB = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
# The parts: folder and file (or configuration and split), and the columns needed.
PARTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "verbmem_forget": ("verbmem", "forget", ("prompt", "gt")),
    "knowmem_forget": ("knowmem", "forget_qa", ("question", "answer")),
    "knowmem_forget_shots": ("knowmem", "forget_qa_icl", ("question", "answer")),
    "knowmem_retain": ("knowmem", "retain_qa", ("question", "answer")),
    "knowmem_retain_shots": ("knowmem", "retain_qa_icl", ("question", "answer")),
    "forget": ("privleak", "forget", ("text",)),
    "holdout": ("privleak", "holdout", ("text",)),
}
ROUGE = ("rougeL_f1", "rougeL_recall")
VERBMEM_TOKENS, KNOWMEM_TOKENS = 128, 32
STOPS = ("\n\n", "\nQuestion", "Question:")  # an answer ends before the first of them
MAX_LENGTH = 4096  # tokens of a text for PrivLeak; less where the model reads less
# AUC of the benchmark's own retrained models by Min-40 %, forget against holdout, in MUSE's orientation (constants of
# the official repository). They belong to those models, and only to them.
RETRAINED_AUC = {"news": 0.4772, "books": 0.5393}


def load_muse(corpus: str, data_dir: str | Path | None = None) -> tuple[dict[str, Rows], list[str]]:
    """Return the parts of a corpus and warnings about those that are missing.

    They are read from `<data_dir>/muse/<corpus>/<folder>/<file>` where that folder exists (by default under
    $LOKU_DATA_DIR), else from the hub. Raises InputError for an unknown corpus and when no part is found.
    """
    if corpus not in CORPORA:
        raise InputError(f"--corpus '{corpus}' is not one of MUSE's.", suggestion(corpus, CORPORA))
    base = data_dir or os.environ.get("LOKU_DATA_DIR")
    folder = None if base is None else Path(base) / "muse" / corpus
    found, missing = {}, []
    for name, (config, split, columns) in PARTS.items():
        source = f"{HUB[corpus]}/{config}:{split}"
        if folder is not None and folder.is_dir():
            files = [folder / config / f"{split}{suffix}" for suffix in SUFFIXES]
            file = next((file for file in files if file.is_file()), None)
            if file is None:
                missing.append(f"{config}/{split}")
                continue
            source = str(file)
        found[name] = load_rows(source, columns, option="--corpus")
    if not found:
        raise InputError(
            f"The folder '{folder}' holds no part of MUSE.",
            "Give --data-dir a folder with muse/news/knowmem.",
        )
    return found, [f"Not measured, since these files are missing: {', '.join(missing)}."] if missing else []


def few_shot(question: str, shots: Sequence[Mapping[str, Any]]) -> str:
    """Return KnowMem's prompt: the shots as "Question: ...", "Answer: ...", a blank line each, then the question."""
    told = "".join(f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n" for shot in shots)
    return f"{told}Question: {question}\nAnswer: "


def first_answer(text: str) -> str:
    """Return a generation up to the first blank line, or to where it goes on to ask: empty when it starts so."""
    for stop in STOPS:
        text = text.split(stop, maxsplit=1)[0]
    return text


def evaluate_muse(
    model: nn.Module,
    tokenizer: Any,
    data: Mapping[str, Rows],
    *,
    corpus: str,
    max_rows: int | None = None,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    batch_rows: int = BATCH_ROWS,
    keep_text: bool = False,
    reference: Results | None = None,
    identity: Identity | None = None,
    warnings: Sequence[str] = (),
    progress: Progress | None = None,
    cache: BatchCache | None = None,
) -> Results:
    """Measure the parts of MUSE that there are, as the official code does.

    - `verbmem_forget`: 100 x mean ROUGE-L F1, stemmer off, of 128 greedy tokens after `prompt` against the first 128
      tokens of `gt` (special tokens counted).
    - `knowmem_forget`, `knowmem_retain`: the same of 32 greedy tokens after a few-shot prompt, cut at a blank line or
      "Question", against `answer`.
    - `priv_leak`: 100 (A - A_ref) / A_ref in per cent; A is the AUC by Min-40 % of texts scored whole, forget against
      holdout, so oriented that a holdout looking more familiar is high. A_ref is that of `reference`, a retain-only
      model's results of this suite, or else of MUSE's own retrained model, with a warning: it fits no other.

    The AUCs in the summary have our orientation (1: membership fully visible). Answers are compared as decoded.
    Raises InputError when a prompt is longer than what the model reads.
    """
    started, identity = time.monotonic(), identity or Identity()
    rows = {name: list(part.rows if name.endswith("_shots") else part.rows[:max_rows]) for name, part in data.items()}
    sets: dict[str, SetResults] = {}
    texts: list[dict[str, Any]] = []
    notes = list(warnings)
    asked = {name: _questions(tokenizer, name, rows) for name in _ASKED if name in rows}
    probes = {
        name: [
            Probe(prompt, partial(_rouge, name, answer), f"{name} {answer}", _LIMITS[name]) for prompt, answer in pairs
        ]
        for name, pairs in asked.items()
    }
    answers = ask(
        model,
        tokenizer,
        probes,
        ROUGE,
        keep_text=keep_text,
        batch_rows=batch_rows,
        progress=progress,
        cache=cache,
    )
    for name, (numbers, said) in answers.items():
        rated = [row | {"index": index} for index, row in enumerate(numbers)]
        sets[name] = plain_set(rated, ROUGE, identity.seed)
        if keep_text:
            pairs = enumerate(zip(asked[name], said, strict=True))
            texts += [example_text(name, index, *question, _cut(name, text)) for index, (question, text) in pairs]
    summary = {name: 100.0 * found.metrics["rougeL_f1"].mean for name, found in sets.items()}
    length = min(max_length or MAX_LENGTH, context_length(model) or MAX_LENGTH)
    if "forget" in rows and "holdout" in rows:
        for name in ("forget", "holdout"):
            found = [row["text"] for row in rows[name]]
            scored = score_texts(model, tokenizer, found, max_length=length, batch_tokens=batch_tokens, cache=cache)
            sets[name] = plain_set(scored, ("exact_memorisation", "extraction_strength"), identity.seed)
        aucs = attack_aucs(sets["forget"].per_example, sets["holdout"].per_example)
        leak, leak_notes = _leak(aucs, corpus, reference)
        summary |= aucs | leak
        notes += leak_notes
    return suite_results(
        model,
        "muse",
        identity,
        started=started,
        data=data,
        rows={name: len(found) for name, found in rows.items()},
        settings={"corpus": corpus, "max_rows": max_rows, "max_length": length},
        sets=sets,
        summary=summary,
        warnings=notes,
        texts=texts,
    )


_ASKED = ("verbmem_forget", "knowmem_forget", "knowmem_retain")
_LIMITS = dict(zip(_ASKED, (VERBMEM_TOKENS, KNOWMEM_TOKENS, KNOWMEM_TOKENS), strict=True))


def _questions(tokenizer: Any, name: str, rows: Mapping[str, list[dict[str, Any]]]) -> list[tuple[str, str]]:
    """Return what is asked and what should be said."""
    if name.startswith("knowmem"):
        shots = rows.get(f"{name}_shots", [])
        return [(few_shot(row["question"], shots), row["answer"]) for row in rows[name]]
    answers = []
    for row in rows[name]:
        ids = encode_text(tokenizer, row["gt"])[:VERBMEM_TOKENS]
        answers.append((row["prompt"], tokenizer.decode(ids, skip_special_tokens=True)))
    return answers


def _cut(name: str, text: str) -> str:
    return first_answer(text) if name.startswith("knowmem") else text


def _rouge(name: str, answer: str, text: str) -> dict[str, float]:
    found = rouge(_cut(name, text), answer, stemmer=False)
    return {"rougeL_f1": found.f1, "rougeL_recall": found.recall}


def _leak(aucs: Mapping[str, float], corpus: str, reference: Results | None) -> tuple[dict[str, float], list[str]]:
    """Return PrivLeak and the attacks' distances from the reference, and a warning where there is none of our own."""
    if reference is not None and "mia_auc_min_k" in reference.summary:
        leak = priv_leak(aucs["mia_auc_min_k"], reference.summary["mia_auc_min_k"])
        return {"priv_leak": leak} | distances(aucs, reference.summary), []
    note = (
        f"PrivLeak compares with MUSE's own retrained model (AUC {RETRAINED_AUC[corpus]}), which fits no other target: "
        "give the retain-only model's results of this suite as --reference."
    )
    return {"priv_leak": priv_leak(aucs["mia_auc_min_k"], 1.0 - RETRAINED_AUC[corpus])}, [note]
