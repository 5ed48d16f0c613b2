"""The model card: what the hub and the next user read first. It never holds a text of the data."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCardData

from loku.errors import InputError
from loku.files import write_text
from loku.report.artefacts import ROLES, at, number, section
from loku.report.details import DATA_COUNTS
from loku.report.figures import beyond_note, beyond_retain_only, forget_quality_allowed, key_figures
from loku.report.numerals import count, figure, percent
from loku.report.words import release_note, verdict

KINDS = {
    "adapter": "LoRA adapter",
    "merged": "merged model",
    "model": "model",
}

CITATION = """```bibtex
@inproceedings{cha2025loku,
  title     = {Towards Robust and Parameter-Efficient Knowledge Unlearning for {LLMs}},
  author    = {Cha, Sungmin and Cho, Sungjun and Hwang, Dasol and Lee, Moontae},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2025},
  note      = {arXiv:2408.06621}
}
```"""


def write_model_card(
    folder: str | Path,
    *,
    run: Mapping[str, Any],
    results: Mapping[str, Any] | None,
    kind: Literal["adapter", "merged", "model"],
    base_model: str,
    target: Mapping[str, Any] | None = None,
    retain_only: Mapping[str, Any] | None = None,
    record: str | None = None,
) -> Path:
    """Write README.md into the folder of an adapter ("adapter"), a merged model or a fully tuned one ("model").

    `run` is run.json's content; `results`, `target` and `retain_only` are results files of the unlearned model, the
    model before, and the retain-only reference. A `base_model` that is a local path stays out of the metadata, which
    the hub checks, and only its last part is named. `record` is where the unlearning record lies, seen from the card.
    Raises InputError for an unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"There is no model card of kind '{kind}'.", f"Give one of: {', '.join(KINDS)}.")
    found = {"target": target, "unlearned": results, "retain_only": retain_only}
    measured = {role: result for role, result in found.items() if result}
    base = public_name(base_model)
    parts = [
        f"---\n{card_data(kind, base_model).to_yaml()}\n---",
        _opening(run, kind, base),
        _forgotten(run),
        _method(run),
        _figures(measured),
        _record(record, kind),
        _loading(kind, base_model),
        _limits(run, measured, kind),
        f"## Citation\n\nThe method is LoKU:\n\n{CITATION}",
    ]
    path = Path(folder) / "README.md"
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def card_data(kind: str, base_model: str) -> ModelCardData:
    """Return the metadata that the hub reads. The licence is left out: it is the base model's and the user's matter."""
    adapter = kind == "adapter"
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        base_model=base_model if is_hub_id(base_model) else None,
        base_model_relation=("adapter" if adapter else "finetune") if is_hub_id(base_model) else None,
        pipeline_tag="text-generation",
        tags=["unlearning", "loku"] if kind == "model" else ["unlearning", "loku", "lora"],
    )


def is_hub_id(name: str) -> bool:
    """Say whether a model's name looks like an id of the hub and is no folder here."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name)) and not Path(name).exists()


def public_name(name: str) -> str:
    """Return a name that may be published: of a local path only the last part."""
    return name if is_hub_id(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name


def _plain(value: object) -> str:
    """Make a recorded name harmless in a Markdown table."""
    text = re.sub(r"\s+", " ", str(value))
    return text.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _opening(run: Mapping[str, Any], kind: str, base: str) -> str:
    forget = at(run, "data", "forget", "name")
    title = f"# {_plain(base)}, with {_plain(public_source(forget)) if forget else 'chosen knowledge'} unlearned"
    note = release_note({"method": {"tune": "full"}} if kind == "model" else run)
    if kind == "merged":
        note = (
            "This is the merged model, the form that is released to outsiders: an adapter could be removed, and the "
            "base model underneath still knows everything."
        )
    return (
        f"{title}\n\nThis {KINDS[kind]} was made with `loku`: it was trained to forget chosen data and to keep "
        f"everything else. The base is {_plain(base)}.\n\n> **Before you release anything:** {note}"
    )


def public_source(name: object) -> str:
    """Return a data set's name; of a path only the last part, folders are nobody's business."""
    text = str(name)
    is_path = text.startswith(("/", "\\", "~", ".")) or ":\\" in text or os.path.exists(text.split("[", maxsplit=1)[0])
    is_path = is_path or re.search(r"\.\w{2,7}(\[[\d:]+\])?$", text) is not None
    return re.split(r"[/\\]", text)[-1] if is_path else text


def _forgotten(run: Mapping[str, Any]) -> str:
    data = {name: entry for name, entry in section(run, "data").items() if isinstance(entry, Mapping)}
    if not data:
        return "## What was unlearned\n\nThe run record holds no data counts."
    columns = [name for name in DATA_COUNTS if any(name in entry for entry in data.values())]
    lines = [
        "| Set | Name | " + " | ".join(DATA_COUNTS[column] for column in columns) + " |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for name, entry in data.items():
        cells = [count(number(entry.get(column))) for column in columns]
        lines.append(f"| {_plain(name)} | {_plain(public_source(entry.get('name', '')))} | " + " | ".join(cells) + " |")
    return "## What was unlearned\n\nThe texts themselves are not part of this card.\n\n" + "\n".join(lines)


def _method(run: Mapping[str, Any]) -> str:
    method, trainable = section(run, "method"), section(run, "trainable")
    rank, alpha = number(method.get("rank")), number(method.get("alpha"))
    facts = {
        "Method": method.get("name"),
        "Forget loss": _with_weight(method.get("forget_loss"), method.get("forget_weight")),
        "Retain loss": _with_weight(method.get("retain_loss"), method.get("retain_weight")),
        "Initialiser": method.get("initialiser"),
        "Rank, alpha": f"{rank:.0f}, {alpha:.0f}" if rank and alpha and method.get("tune") != "full" else None,
        "Optimiser steps": count(number(run.get("steps"))) if number(run.get("steps")) else None,
        "Trainable share": percent(number(trainable.get("share"))) if number(trainable.get("share")) else None,
        "Seed": run.get("seed"),
        "Versions": ", ".join(f"{name} {version}" for name, version in section(run, "versions").items()) or None,
    }
    lines = [f"| {name} | {_plain(value)} |" for name, value in facts.items() if value is not None]
    if not lines:
        return ""
    return "## Method and settings\n\n| Setting | Value |\n|---|---|\n" + "\n".join(lines)


def _with_weight(loss: object, weight: object) -> str | None:
    return f"{loss}, weight {weight}" if loss else None


def _figures(measured: Mapping[str, Mapping[str, Any]]) -> str:
    if "unlearned" not in measured:
        return "## Measured figures\n\nThis model was not evaluated."
    outcome = verdict(measured["unlearned"])
    lines = [
        f"**{outcome.level}.** {_plain(outcome.sentence)}"
        + (f" Rests on: {_plain(outcome.rests_on)}." if outcome.rests_on else ""),
        "On the forget set the aim is the level of a retain-only model, which never saw that data, and not zero.",
    ]
    titles = {"target": "Before", "unlearned": "After", "retain_only": "Retain-only"}
    roles = [role for role in ROLES if role in measured]
    table = [
        "| Set | Figure | " + " | ".join(titles[role] for role in roles) + " |",
        "|---|---|" + "---:|" * len(roles),
    ]
    for group in key_figures(measured):
        for row in group.rows:
            cells = [_cell(row.values[role]) if role in row.values else figure(None) for role in roles]
            table.append(f"| {_plain(group.title)} | {_plain(row.label)} | " + " | ".join(cells) + " |")
    lines.append("\n".join(table))
    beyond = beyond_retain_only(measured)
    if beyond:
        lines.append(beyond_note(beyond))
    if (
        forget_quality_allowed(measured["unlearned"])
        and at(measured["unlearned"], "summary", "forget_quality") is not None
    ):
        lines.append("Forget quality is to be read with utility and fluency only: a broken model can score high.")
    return "## Measured figures\n\n" + "\n\n".join(lines)


def _record(record: str | None, kind: str) -> str:
    if record is None:
        return ""
    of = "" if kind == "model" else " It is of the adapter as it was trained."
    return (
        f"## Unlearning record\n\n[`record.json`]({record}) says what was asked, done and found, with hashes of rows, "
        f"weights and results, and which attacks were survived.{of} Check it with `loku verify record.json`. It is "
        "empirical evidence, not a guarantee of deletion."
    )


def _cell(value: Any) -> str:
    return f"{value.text} ({value.interval})" if value.interval else value.text


def _loading(kind: str, base_model: str) -> str:
    name = base_model if is_hub_id(base_model) else f"path/to/{public_name(base_model)}"
    if kind == "adapter":
        code = (
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'base = "{name}"\n'
            "tokenizer = AutoTokenizer.from_pretrained(base)\n"
            "model = AutoModelForCausalLM.from_pretrained(base)\n"
            'model = PeftModel.from_pretrained(model, "path/to/this/adapter")'
        )
        intro = "An ordinary LoRA on the untouched base model; `loku` is not needed:"
    else:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/model")\n'
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/model")'
        )
        intro = "An ordinary model folder; neither `loku` nor PEFT is needed:"
    return f"## How to load it\n\n{intro}\n\n```python\n{code}\n```"


def _limits(run: Mapping[str, Any], measured: Mapping[str, Mapping[str, Any]], kind: str) -> str:
    points = [
        "The figures are empirical evidence from the questions that were asked. They are no proof and no guarantee "
        "that information was deleted from the weights; fine-tuning on a few of the facts can bring others back.",
        "Answers about the forgotten data can be gibberish or invented. They are not refusals.",
    ]
    if kind != "model":
        points.append(
            "The adapter can be removed: the base model still knows everything, so what is released to outsiders is "
            "the merged model."
        )
    if "retain_only" not in measured:
        points.append(
            "No retain-only figures stand beside these, so indistinguishability cannot be judged from this card."
        )
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points)
