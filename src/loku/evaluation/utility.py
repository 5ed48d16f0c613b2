"""What a model can still do: tasks of lm-eval, the same on local rows, and dialogues."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from loku.data.sources import Rows, load_rows
from loku.errors import InputError, suggestion
from loku.evaluation.cache import BatchCache
from loku.evaluation.dialogue import load_dialogues, measure_dialogues
from loku.evaluation.generation import BATCH_ROWS
from loku.evaluation.measuring import Progress
from loku.evaluation.results import Results, SetResults
from loku.evaluation.scoring import BATCH_TOKENS
from loku.files import sha256_text

KINDS = ("lambada", "pubmedqa", "perplexity", "dialogue")  # tasks on local rows
DECISIONS = ("yes", "no", "maybe")


@dataclass(frozen=True)
class Utility:
    """Tasks of lm-eval by name, and local ones: name to (kind, rows)."""

    names: tuple[str, ...] = ()
    local: Mapping[str, tuple[str, Rows]] = field(default_factory=dict)

    def of_kinds(self, *kinds: str) -> dict[str, tuple[str, Rows]]:
        """Return the local tasks of some kinds."""
        return {name: found for name, found in self.local.items() if found[0] in kinds}

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of the local rows, and of a hub task's name with lm-eval's version."""
        local = {name: rows.sha256 for name, (_, rows) in self.local.items()}
        return {name: sha256_text(f"lm-eval {lm_eval_version()} {name}") for name in self.names} | local


def lm_eval_version() -> str:
    """Return the version of the package lm_eval, "" where it is not installed."""
    return importlib.metadata.version("lm_eval") if importlib.util.find_spec("lm_eval") else ""


def parse_utility(text: str) -> Utility:
    """Read `piqa,lambada=lambada.jsonl,dialogue=wow.jsonl`, and the local rows.

    A local task is named by its kind and its file's name, `perplexity_wiki`, or by its kind alone where both are the
    same. Raises InputError for unknown kinds, unusable rows, a task named twice, and when a task needs lm-eval and it
    is not installed.
    """
    names: list[str] = []
    sources: dict[str, tuple[str, str]] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, equals, source = (piece.strip() for piece in part.partition("="))
        stem = Path(source.split("[")[0]).name.split(".")[0]
        name = kind if not equals or stem == kind else f"{kind}_{stem}"
        if equals and kind not in KINDS:
            raise InputError(f"--utility '{part}' is of no known kind.", suggestion(kind, KINDS))
        if not equals and kind in KINDS:
            raise InputError(f"--utility '{kind}' needs rows.", f"Write {kind}=FILE, or name a task of lm-eval.")
        if name in names or name in sources:
            raise InputError(f"--utility names '{name}' twice.", "Name each task once; rename one of the files.")
        if equals:
            sources[name] = kind, source
        else:
            names.append(name)
    if (names or any(kind != "dialogue" for kind, _ in sources.values())) and not lm_eval_version():
        raise InputError(
            "--utility needs the package lm_eval, which is not installed.",
            "pip install lm-eval, or '.[lm-eval]' in loku's sources.",
        )
    return Utility(tuple(names), {name: (kind, _READERS[kind](source)) for name, (kind, source) in sources.items()})


def _lambada(source: str) -> Rows:
    found = load_rows(source, ("text",), option="--utility")
    rows = [{"text": row["text"].strip()} for row in found.rows]
    for index, row in enumerate(rows):
        if " " not in row["text"]:
            raise InputError(
                f"--utility '{source}': row {index} has no word before its last.", "Give texts of two words or more."
            )
    return Rows(found.name, tuple(rows), found.sha256)


def _pubmedqa(source: str) -> Rows:
    found = load_rows(source, ("question", "final_decision"), option="--utility")
    rows = []
    for index, row in enumerate(found.rows):
        context = row.get("abstract") or row.get("context")
        if isinstance(context, Sequence) and not isinstance(context, str):
            context = "\n".join(map(str, context))
        decision = row["final_decision"].strip().lower()
        if not isinstance(context, str) or decision not in DECISIONS:
            what = "context" if not isinstance(context, str) else "answer yes, no or maybe"
            raise InputError(
                f"--utility '{source}': row {index} has no {what}.",
                "Give rows with `question`, `context` (or `abstract`) and `final_decision`.",
            )
        rows.append({"question": row["question"], "context": context, "final_decision": decision})
    return Rows(found.name, tuple(rows), found.sha256)


def _texts(source: str) -> Rows:
    found = load_rows(source, ("text",), option="--utility")
    for index, row in enumerate(found.rows):
        if not row["text"].strip():
            raise InputError(f"--utility '{source}': row {index} is empty.", "Leave empty rows out.")
    return Rows(found.name, tuple({"text": row["text"]} for row in found.rows), found.sha256)


_READERS = {"lambada": _lambada, "pubmedqa": _pubmedqa, "perplexity": _texts, "dialogue": load_dialogues}


def load_tasks(utility: Utility) -> Any:
    """Return what lm-eval is to run, or None when that is nothing. Raises InputError for unknown tasks."""
    local = utility.of_kinds("lambada", "pubmedqa", "perplexity")
    if not utility.names and not local:
        return None
    from loku.evaluation.harness import task_specs

    return task_specs(utility.names, {name: (kind, rows.rows) for name, (kind, rows) in local.items()})


def add_utility(
    results: Results,
    model: nn.Module,
    tokenizer: Any,
    utility: Utility,
    tasks: Any = None,
    *,
    max_rows: int | None = None,
    max_new_tokens: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    batch_rows: int = BATCH_ROWS,
    keep_text: bool = False,
    seed: int = 42,
    progress: Progress | None = None,
    cache: BatchCache | None = None,
) -> Results:
    """Measure utility tasks on a model and add them to results: a set for each task, and figures in the summary.

    `tasks` is what `load_tasks` returned. Figures are `<task>_<metric>` with `<task>_<metric>_stderr`; an average over
    tasks is nobody's business but the reader's, and is not made. `settings["utility"]` says what was measured and how.
    """
    told: dict[str, Any] = {}
    if tasks is not None:
        from loku.evaluation.harness import EngineLM, run_tasks

        engine = EngineLM(
            model,
            tokenizer,
            batch_tokens=batch_tokens,
            batch_rows=batch_rows,
            cache=cache,
            progress=None if progress is None else _counted(progress),
        )
        sets, summary, told = run_tasks(engine, tasks, limit=max_rows, seed=seed)
        results.sets |= sets
        results.summary |= summary
        results.versions["lm_eval"] = lm_eval_version()
    dialogues = {name: rows for name, (_, rows) in utility.of_kinds("dialogue").items()}
    if dialogues:
        limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        found, texts = measure_dialogues(
            model,
            tokenizer,
            dialogues,
            max_rows=max_rows,
            batch_rows=batch_rows,
            keep_text=keep_text,
            seed=seed,
            progress=progress,
            cache=cache,
            **limit,
        )
        results.sets |= found
        results.texts += texts
        told |= {name: {} for name in found}
        for name, one in found.items():
            results.summary |= _mean(name, one)
    hashes = utility.hashes
    for name, digest in hashes.items():
        source = utility.local[name][1].name if name in utility.local else f"lm-eval: {name}"
        rows = results.sets[name].rows if name in results.sets else 0  # a group's rows are its tasks'
        results.data[name] = {"name": source, "sha256": digest, "rows": rows}
    results.settings["utility"] = told
    return results


def _mean(name: str, found: SetResults) -> dict[str, float]:
    values = np.array([row["f1"] for row in found.per_example])
    figures = {f"{name}_f1": float(values.mean())}
    if values.size > 1:
        figures[f"{name}_f1_stderr"] = float(values.std(ddof=1) / math.sqrt(values.size))
    return figures


def _counted(progress: Progress) -> Any:
    """Return a callback that adds up what each batch finished; lm-eval does not say beforehand how much there is."""
    done = 0

    def advance(count: int, note: str) -> None:
        nonlocal done
        done += count
        progress(done, done, f"utility, {note}")

    return advance


def utility_figures(results: Results) -> dict[str, float]:
    """Return the summary's figures that belong to utility tasks and groups."""
    names = (*results.settings.get("utility", {}), *results.data)
    tasks = [name for name in names if name in results.settings.get("utility", {}) or _is_group(results, name)]
    return {key: value for key, value in results.summary.items() if key.startswith(tuple(f"{t}_" for t in tasks))}


def _is_group(results: Results, name: str) -> bool:
    return str(results.data[name].get("name", "")).startswith("lm-eval: ") if name in results.data else False
