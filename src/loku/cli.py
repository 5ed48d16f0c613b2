"""The command line: verbs and their options, all taken from `loku.config`. Needs no torch until a verb runs."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from loku.config import (
    AttackOptions,
    BenchOptions,
    DemoOptions,
    EvaluateOptions,
    ExportOptions,
    FinetuneOptions,
    ImportanceOptions,
    RecordOptions,
    ReferenceOptions,
    ReportOptions,
    UnlearnOptions,
    VerifyOptions,
    read_recipe,
    resolve,
)
from loku.errors import LokuError, suggestion
from loku.options import Options, flag

VERBS: dict[str, tuple[type[Options] | None, str]] = {
    "demo": (DemoOptions, "offline tour: trains small models on a fictitious corpus, unlearns, evaluates, reports"),
    "finetune": (FinetuneOptions, "train a target or a retain-only model"),
    "reference": (ReferenceOptions, "train and measure the retain-only model: the target's recipe without forget rows"),
    "importance": (ImportanceOptions, "Fisher importance of forget against retain rows, to a file"),
    "unlearn": (UnlearnOptions, "the main job: model + forget set (+ retain set) in, adapter + report out"),
    "evaluate": (EvaluateOptions, "measure a model or adapter, or official TOFU logs"),
    "attack": (AttackOptions, "try to bring the knowledge back: relearning, compression, prompts, membership, ..."),
    "export": (ExportOptions, "ordinary LoRA, rank-truncated LoRA, or merged model"),
    "record": (RecordOptions, "the unlearning record of a finished run, to hand over"),
    "verify": (VerifyOptions, "recompute the hashes and a share of the figures of a record, and say what differs"),
    "report": (ReportOptions, "one run, or several side by side, as one HTML file"),
    "bench": (BenchOptions, "a grid of methods and seeds from a recipe, resumable, to JSON and a leaderboard"),
    "methods": (None, "list every method: family, needs, cost, when to use it"),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors have two halves and suggest the nearest verb."""

    def error(self, message: str) -> NoReturn:
        """Print what was given and what to do, and exit with status 2."""
        remedy = f"See `{self.prog} --help`."
        if "invalid choice" in message:
            name = message.split("'")[1]
            message, remedy = f"'{name}' is not a verb of loku.", suggestion(name, VERBS)
        fail(message, remedy)
        sys.exit(2)


def fail(given: str, remedy: str) -> None:
    """Print an error's two halves."""
    print(f"error: {given}\n{remedy}", file=sys.stderr)


def _kind(hint: Any) -> Callable[[str], Any]:
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    return typing.cast(Callable[[str], Any], kinds[0])


def add_options(parser: argparse.ArgumentParser, cls: type[Options]) -> None:
    """Add a flag for every field of an option set. Flags that are not given stay absent, so that a recipe can win."""
    hints = typing.get_type_hints(cls)
    for name, field in cls.fields().items():
        if name in ("folders", "run", "record") or (cls is BenchOptions and name == "recipe"):  # positional
            continue
        kind = _kind(hints[name])
        many = "+" if typing.get_origin(hints[name]) is list else None
        default = "" if field.default in (None, "", dataclasses.MISSING) else f" [{field.default}]"
        text = (field.metadata["help"] + default).replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(
                flag(name),
                type=kind,
                choices=None,  # checked by the option set, whose errors have two halves
                metavar="|".join(field.metadata.get("choices") or ()) or name.upper(),
                default=argparse.SUPPRESS,
                help=text,
                nargs=many,
            )


def _positional(cls: type[Options] | None) -> str:
    names: dict[type[Options], str] = {
        ReportOptions: "folder ... ",
        ExportOptions: "run ",
        RecordOptions: "run ",
        VerifyOptions: "record.json ",
        BenchOptions: "recipe.yaml ",
        AttackOptions: "[run | recipe.yaml] ",
    }
    return "" if cls is None else names.get(cls, "[recipe.yaml] ")


def build_parser() -> Parser:
    """Return the parser of the whole command line."""
    import importlib.metadata

    parser = Parser(
        prog="loku",
        description="Remove chosen knowledge from a language model with a small adapter, and prove it.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"loku {importlib.metadata.version('loku')}")
    verbs = parser.add_subparsers(dest="verb", metavar="verb", required=True, parser_class=Parser)
    for verb, (cls, text) in VERBS.items():
        usage = f"loku {verb} {_positional(cls)}[--options]".strip()
        sub = verbs.add_parser(verb, help=text, description=text, usage=usage, allow_abbrev=False)
        if cls is None:
            continue
        if cls is ReportOptions:
            sub.add_argument("folders", nargs="+", help="run or evaluation folders; several are compared")
        elif cls is ExportOptions:
            sub.add_argument("run", help="run folder, or adapter folder together with --model")
        elif cls is RecordOptions:
            sub.add_argument("run", help=cls.fields()["run"].metadata["help"])
        elif cls is VerifyOptions:
            sub.add_argument("record", help=cls.fields()["record"].metadata["help"])
        elif cls is BenchOptions:
            sub.add_argument("recipe", nargs="?", help="the benchmark's YAML file; see docs/bench.md")
        elif cls is AttackOptions:
            sub.add_argument("run", nargs="?", default=argparse.SUPPRESS, help="run folder, or YAML file with options")
        else:
            sub.add_argument("recipe", nargs="?", help="YAML file with options; flags win over it")
        add_options(sub, cls)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 done, 1 a failure with a message, 2 wrong usage."""
    known, unknown = build_parser().parse_known_args(arguments)
    flags = vars(known)
    verb = flags.pop("verb")
    cls = VERBS[verb][0]
    if unknown:
        name = unknown[0].split("=")[0]
        valid = [flag(field) for field in cls.fields()] if cls is not None else ["--help"]
        fail(f"'{name}' is not an option of `loku {verb}`.", f"{suggestion(name, valid)} See `loku {verb} --help`.")
        return 2
    try:
        options = None
        if cls is not None:
            path = None if cls is BenchOptions else flags.pop("recipe", None)  # a benchmark's recipe is no option list
            if cls is AttackOptions and str(flags.get("run")).endswith((".yaml", ".yml")):
                path = flags.pop("run")
            recipe = read_recipe(path) if path else {}
            options = resolve(cls, recipe, flags, where=str(path) if path else "The command line")
        from loku import verbs  # heavy libraries are imported by the verb that needs them

        getattr(verbs, verb)(options)
    except LokuError as error:
        fail(error.given, error.remedy)
        return 1 if not isinstance(error, ValueError) else 2
    except KeyboardInterrupt:
        print("\ninterrupted: what was written is kept; run the same command again to go on", file=sys.stderr)
        return 130
    return 0
