"""`loku reference`: the retain-only model, by the target's recipe without the forget rows, measured and cached."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from loku.config import EvaluateOptions, FinetuneOptions, ReferenceOptions
from loku.data.records import content
from loku.data.sources import RecordSet, load_records
from loku.errors import InputError
from loku.evaluate import evaluate_from_options
from loku.files import sha256_file, sha256_json
from loku.finetune import fit
from loku.models import check_model_source
from loku.progress import console
from loku.runs import SETTINGS_WITHOUT_EFFECT, RunFolder, check_tracker

# What training starts from, in a model's folder: weights, configuration, tokenizer and how prompts are written.
BASE_FILES = (
    "*.safetensors", "pytorch_model*.bin", "config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.model", "chat_template*", "prompt_template.json",
)  # fmt: skip
ROWS = ("retain", "holdout", "general")  # what may be measured beside the forget rows


def reference(options: ReferenceOptions) -> Path:
    """Train a model on --data without the --forget rows, for the steps that all of --data take, and measure it.

    The folder's name ends in a hash of base model, kept rows and settings unless --output names it, so the same call
    finds the model that is there; an interrupted one goes on. Returns the model folder, which also holds results.json.

    Raises InputError before any work when something given cannot be used, and when no forget row stands in --data.
    """
    check_tracker(options.report_to)
    whole, forget = _rows(options)
    for name in ROWS:  # what cannot be measured must not show after the training
        if getattr(options, name):
            load_records(getattr(options, name), option=f"--{name}", data_dir=options.data_dir)
    kept = without(whole, forget)
    data = {
        "train": {"name": kept.name, "sha256": kept.sha256, "rows": len(kept)},
        "left_out": {"name": forget.name, "sha256": forget.sha256, "rows": len(whole) - len(kept)},
        "base": {"name": options.model or options.new_model, "sha256": _base_sha256(options)},
    }
    settings = _training_settings(options)
    folder = options.output or _default_folder(options, settings, data)
    run = RunFolder.check(folder, settings)
    run.check_inputs(data)
    if run.finished and any(run.path.glob("*.safetensors")):
        console.print(f"the retain-only model is there already: {run.path}")
    else:
        fit(_as_finetune(options, str(folder)), run, kept, whole=whole, command="reference", data=data)
    _measure(options, run.path)
    console.print(f"use it: loku unlearn ... --retain-only-model {run.path}")
    return run.path


def without(whole: RecordSet, forget: RecordSet) -> RecordSet:
    """Return the rows of a set that do not say what a forget row says (case and blanks aside), with their index.

    Warns of forget rows that the set does not hold. Raises InputError when it holds none of them, or nothing else.
    """
    gone = {content(record) for record in forget}
    kept = tuple(record for record in whole if content(record) not in gone)
    if len(kept) == len(whole):
        raise InputError(
            f"None of the {len(forget)} forget rows stands in --data '{whole.name}'.",
            "Give the rows that the target was trained on as --data, in the same format as --forget.",
        )
    if not kept:
        raise InputError(
            f"--data '{whole.name}' holds nothing but forget rows.", "Give all rows that the target was trained on."
        )
    absent = len(gone - {content(record) for record in whole})
    if absent:
        print(
            f"warning: {absent} of {len(gone)} forget rows do not stand in --data word for word; what --data says of "
            "them in other words is learnt.",
            file=sys.stderr,
        )
    digest = sha256_json([dataclasses.asdict(record) for record in kept])
    return RecordSet(f"{whole.name} without {forget.name}", kept, digest, whole.origin)


def _rows(options: ReferenceOptions) -> tuple[RecordSet, RecordSet]:
    if not options.data:
        more = f" ('{options.like}' was trained on rows in memory)" if options.like else ""
        raise InputError(f"--data is missing{more}.", "Give all rows that the target was trained on.")
    if not options.forget:
        raise InputError("--forget is missing.", "Give the rows that the model must not learn.")
    if not options.output and not options.like:
        raise InputError("--output is missing.", "Give a folder for the model, or the target's with --like.")
    return (
        load_records(options.data, option="--data", data_dir=options.data_dir),
        load_records(options.forget, option="--forget", data_dir=options.data_dir),
    )


def _base_sha256(options: ReferenceOptions) -> str:
    """Return a hash of what training starts from: the base's files, or the settings of a new model."""
    if options.new_model:
        return sha256_file(options.new_model) if Path(options.new_model).is_file() else ""
    folder = Path(check_model_source(options.model))
    files = sorted({file for pattern in BASE_FILES for file in folder.glob(pattern) if file.is_file()})
    return sha256_json({file.name: sha256_file(file) for file in files})  # of a hub id nothing but its name counts


def _training_settings(options: ReferenceOptions) -> dict[str, Any]:
    """Return the settings that decide the weights: the folder may be measured on other rows, too."""
    names = [*FinetuneOptions.fields(), "forget"]
    return {name: getattr(options, name) for name in names if name not in ("output", *SETTINGS_WITHOUT_EFFECT)}


def _default_folder(options: ReferenceOptions, settings: dict[str, Any], data: dict[str, Any]) -> Path:
    assert options.like is not None
    digests = {name: entry["sha256"] for name, entry in data.items()}
    return Path(f"{Path(options.like)}-retain-only-{sha256_json([settings, digests])[:12]}")


def _as_finetune(options: ReferenceOptions, folder: str) -> FinetuneOptions:
    values = {name: getattr(options, name) for name in FinetuneOptions.fields()}
    return FinetuneOptions(**(values | {"output": folder}))


def _measure(options: ReferenceOptions, folder: Path) -> None:
    """Measure the model as `loku evaluate` does, which answers a repeated call at once."""
    rows = {name: getattr(options, name) for name in ("forget", *ROWS)}
    same = ("dtype", "device", "prompt_template", "max_length", "data_dir", "trust_remote_code", "max_new_tokens")
    more = {name: getattr(options, name) for name in (*same, "keep_text")}
    asked = EvaluateOptions(model=str(folder), output=str(folder), max_rows=options.eval_rows, **rows, **more)
    asked.check()
    evaluate_from_options(asked, role="retain_only")
