"""Every option, defined once: name, type, default, help and the source of the default. Needs no torch.

The command line, YAML recipes and the Python API all read these dataclasses. Those of the large verbs stand in files of
their own; all are found here.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loku.errors import InputError, suggestion
from loku.evaluation_options import AttackOptions, EvaluateOptions
from loku.methods import METHODS
from loku.options import Options, option, seed_option, several
from loku.record_options import RecordOptions, VerifyOptions
from loku.training_options import (
    COMBINERS,
    FORGET_LOSSES,
    INITIALISERS,
    RETAIN_LOSSES,
    FinetuneOptions,
    ImportanceOptions,
    ModelOptions,
    ReferenceOptions,
    TrainingOptions,
    UnlearnOptions,
)

__all__ = [
    "COMBINERS", "FORGET_LOSSES", "INITIALISERS", "RETAIN_LOSSES", "AttackOptions", "BenchOptions", "DemoOptions",
    "EvaluateOptions", "ExportOptions", "FinetuneOptions", "ImportanceOptions", "ModelOptions", "RecordOptions",
    "ReferenceOptions", "ReportOptions", "TrainingOptions", "UnlearnOptions", "VerifyOptions", "read_recipe",
    "recorded_settings", "resolve",
]  # fmt: skip


@dataclass
class ExportOptions(Options):
    """Options of `loku export`."""

    run: str | None = option(None, "run folder, or adapter folder together with --model")
    model: str | None = option(None, "base model (default: the one the run or adapter names)")
    form: str = option(
        "merged",
        "lora: rank as trained; truncated: --rank; merged: a whole model",
        choices=("lora", "truncated", "merged"),
    )
    rank: int | None = option(None, "with --form truncated: the rank to keep", least=1)
    dtype: str = option(
        "auto", "type of the merged weights: auto keeps the base's", choices=("auto", "float32", "bfloat16", "float16")
    )
    output: str | None = option(None, "folder to write")
    rescore: bool = option(True, "merged: measure the forget set again in the stored type, and warn when it moved")
    data_dir: str | None = option(None, "folder with benchmark files (default: $LOKU_DATA_DIR, else the hub)")
    trust_remote_code: bool = option(False, "run the model repository's own code")


@dataclass
class ReportOptions(Options):
    """Options of `loku report`."""

    folders: list[str] = field(
        default_factory=list, metadata={"help": "run or evaluation folders; several are compared"}
    )
    output: str | None = option(None, "HTML file to write (default: report.html in the first folder)")
    title: str | None = option(None, "title of the page")


@dataclass
class DemoOptions(Options):
    """Options of `loku demo`."""

    output: str = option("demo", "folder to write")
    full: bool = option(False, "also attack the models unlearned by ihl and loku: a minute more")
    seed: int = seed_option(0, "seed of corpus and training")


@dataclass
class BenchOptions(Options):
    """Options of `loku bench`."""

    recipe: str | None = option(None, "the benchmark's YAML file; see docs/bench.md")
    output: str | None = option(None, "folder to write and to go on in (default: bench/<the recipe's name>)")
    workers: int = option(0, "processes, one thread each; 0: one a core, or one on a GPU", least=0)
    backend: str = option("local", "local: processes of this machine; ray: a Ray cluster", choices=("local", "ray"))
    ray_address: str | None = option(None, "with --backend ray: the cluster's address (default: a local Ray)")
    only: list[str] = several("names of the arms to run (default: all)")
    time_limit: float | None = option(
        None, "minutes after which no run begins; those begun go on to their end", above=0
    )
    dry_run: bool = option(False, "check the recipe, print what would be run and what it costs, and stop")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a YAML recipe: a flat mapping of option names (with _ or -) to values."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise InputError(f"The recipe '{path}' does not exist.", "Give the path of a YAML file, or options only.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"The recipe '{path}' is not UTF-8 text ({error}).", "Save it as UTF-8.") from error
    except yaml.YAMLError as error:
        raise InputError(f"The recipe '{path}' is not YAML: {error}", "Write one `option: value` a line.") from error
    if not isinstance(values, dict):
        raise InputError(f"The recipe '{path}' holds no options.", "Write one `option: value` a line.")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def recorded_settings(folder: str | Path) -> dict[str, Any]:
    """Return the settings of a `loku finetune` run, for --like; its output folder is not among them."""
    file = Path(folder) / "config.yaml"
    values = read_recipe(file) if file.is_file() else {}
    known = FinetuneOptions.fields()
    if not {"data", "learning_rate"} <= set(values) <= set(known):
        raise InputError(
            f"--like '{folder}' holds no config.yaml of `loku finetune`.",
            "Give the folder that the target was written to, or its recipe: --model, --data and the settings.",
        )
    return {name: value for name, value in values.items() if name != "output"}


def resolve(cls: type[Options], recipe: dict[str, Any], flags: dict[str, Any], *, where: str = "The recipe") -> Any:
    """Combine defaults, the method's settings (or those of --like), a recipe and flags; later ones win."""
    hints = typing.get_type_hints(cls)
    for name in recipe:
        if name not in hints:
            raise InputError(f"{where} has the unknown option '{name}'.", suggestion(name, hints))
    settings: dict[str, Any] = {}
    method = flags.get("method", recipe.get("method"))
    if "method" in hints and isinstance(method, str) and method in METHODS:
        settings = dict(METHODS[method].settings)
    like = flags.get("like", recipe.get("like"))
    if "like" in hints and isinstance(like, str):
        settings = recorded_settings(like)
    found = cls.from_mapping(settings | recipe | flags, where=where)
    found.resolved = True
    return found
