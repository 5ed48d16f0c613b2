"""`loku bench --dry-run`: what every stage and arm of a recipe would do and need, without weights.

Rows are read and counted where they can be reached; a corpus is written into a temporary folder. Sequence lengths are
the tokenizer's, or, where none can be loaded, `CHARACTERS` characters a token; of rows that cannot be reached, all that
`max_length` allows. A model's sizes are those of its folder or the hub, else of the recipe's `config:` (a mapping as in
a model's config.json, or the name of such a file). What cannot be found out is said, and leaves a gap in the table.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from loku.bench.footprint import Batch, Footprint, finetuning_footprint, unlearning_footprint
from loku.bench.models import located, unlearn_options
from loku.bench.recipe import CORPUS, TARGET, Arm, Recipe
from loku.config import FinetuneOptions, TrainingOptions, UnlearnOptions, resolve
from loku.corpora import write_corpus
from loku.data.encoding import Encoder
from loku.data.prompts import resolve_template
from loku.data.records import Record
from loku.data.sources import RecordSet, load_records
from loku.errors import InputError, LokuError
from loku.files import read_json
from loku.guarded_trainer import steps_per_epoch
from loku.job import SELF

CHARACTERS = 3.5  # a token of English text, where no tokenizer is there: between GPT-2's 4 and what code takes
TAGS = 30  # characters of a prompt's tags, likewise
UNKNOWN = "?"


@dataclass(frozen=True)
class Line:
    """One stage or arm: what is known of it."""

    name: str
    steps: int | None = None
    rows: int | None = None
    footprint: Footprint | None = None
    at_most: bool = False  # memory of the longest sequences there can be, where rows are out of reach


@dataclass
class DryRun:
    """All lines of a recipe, and why some of them have gaps."""

    stages: list[Line] = field(default_factory=list)
    arms: list[Line] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Say something once."""
        self.notes.setdefault(text)

    def table(self) -> Table:
        """Return the lines as a table."""
        table = Table(title="dry run: nothing is trained, no weights are loaded", title_justify="left")
        table.add_column("stage or arm")
        for heading in ("steps", "rows", "trained", "share", "memory"):
            table.add_column(heading, justify="right")
        for lines in (self.stages, self.arms):
            for line in lines:
                table.add_row(line.name, *_cells(line))
            table.add_section()
        return table


def _cells(line: Line) -> list[str]:
    found = line.footprint
    known = [UNKNOWN] * 3
    if found is not None:
        known = [f"{found.trained:,}", f"{found.share:.2%}", "≤ " * line.at_most + _size(found.peak)]
    return [UNKNOWN if n is None else f"{n:,}" for n in (line.steps, line.rows)] + known


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def dry_run(recipe: Recipe) -> DryRun:
    """Resolve a recipe for its first seed. Raises InputError for nothing that is merely out of reach."""
    found = DryRun()
    with tempfile.TemporaryDirectory() as name:
        folder, seed = Path(name), recipe.seeds[0]
        if recipe.corpus is not None:
            with _noted(found):
                write_corpus(recipe.corpus, folder / CORPUS, seed)
        reading = _Reading(recipe, folder, found)
        for stage, settings in recipe.stages.items():
            if "data" in settings:
                found.stages.append(_stage(stage, reading))
        shared: dict[tuple[Any, ...], Line] = {}
        for arm in recipe.arms:
            found.arms.append(replace(_arm(arm, reading, seed, shared), name=arm.name))
    return found


@contextmanager
def _noted(found: DryRun) -> Any:
    """Turn what cannot be had into a note."""
    try:
        yield
    except LokuError as error:
        found.note(str(error).replace("\n", " "))


class _Reading:
    """What stages and arms of a recipe have in common: configuration, tokenizer and rows, each found once."""

    def __init__(self, recipe: Recipe, folder: Path, notes: DryRun) -> None:
        self.recipe, self.folder, self.notes = recipe, folder, notes
        self._kept: dict[tuple[str, ...], Any] = {}

    def once(self, make: Any, *key: str) -> Any:
        """Return what `make` returns; None, and a note, where it cannot be had."""
        if key not in self._kept:
            self._kept[key] = None
            with _noted(self.notes):
                self._kept[key] = make()
        return self._kept[key]

    def origin(self, name: str) -> dict[str, Any]:
        """Return the settings that a stage's weights go back to: a new model's, or {"model": folder or hub id}."""
        stage = self.recipe.stages.get(name)
        if stage is None:
            return {"model": located(name, self.recipe, self.folder)}
        return dict(stage) if stage.get("new_model") else self.origin(str(stage["model"]))

    def tokenizer(self, name: str) -> Any:
        """Return a stage's tokenizer, or None."""
        from loku.finetune import tokenizer_texts, train_tokenizer
        from loku.models import load_tokenizer

        found = self.origin(name)

        def make() -> Any:
            if not found.get("new_model"):
                return load_tokenizer(str(found["model"]))
            options = resolve(FinetuneOptions, dict(found), {}, where=f"stage {name}")
            rows = self.rows(str(options.tokenizer_data or options.data), options.data_dir)
            return None if rows is None else train_tokenizer(tokenizer_texts(rows), options.vocab_size)

        return self.once(make, "tokenizer", str(sorted(found.items())))

    def config(self, name: str) -> Any:
        """Return a stage's configuration, or None."""
        from transformers import AutoConfig

        from loku.models import load_config

        found = self.origin(name)

        def make() -> Any:
            given = found.get("new_model")
            if not given:
                try:
                    return load_config(str(found["model"]))
                except InputError:
                    if self.recipe.config is None:
                        raise
                    given = self.recipe.config
                    self.notes.note(
                        f"'{found['model']}' is out of reach: its sizes are those of the recipe's `config:`."
                    )
            settings = dict(read_json(given) if isinstance(given, str) else given)
            if found.get("new_model") and "vocab_size" not in settings:
                tokenizer = self.tokenizer(name)
                asked = resolve(FinetuneOptions, dict(found), {}, where=f"stage {name}").vocab_size
                settings["vocab_size"] = asked if tokenizer is None else len(tokenizer)
            return AutoConfig.for_model(settings.pop("model_type"), **settings)

        return self.once(make, "config", str(sorted(found.items())))

    def rows(self, source: str, data_dir: Any) -> RecordSet | None:
        """Return the rows that a name stands for, or None."""
        place = located(source, self.recipe, self.folder)
        if Path(place).is_relative_to(self.folder / CORPUS) and not (self.folder / CORPUS).exists():
            return None  # the corpus could not be written, which was said
        found: RecordSet | None = self.once(lambda: load_records(place, option="rows", data_dir=data_dir), place)
        return found

    def lengths(self, rows: RecordSet, stage: str, options: TrainingOptions, model: str) -> list[tuple[int, int]]:
        """Return tokens and supervised tokens of every sequence of the rows, the longest first."""
        tokenizer = self.tokenizer(stage)
        if tokenizer is None:
            self.notes.note(f"No tokenizer: lengths are guessed at {CHARACTERS} characters a token.")
            guessed = [pair for row in rows for pair in guess(row, options.max_length)]
            return sorted(guessed, reverse=True)
        template = resolve_template(tokenizer, model, options.prompt_template)
        encoded = Encoder(tokenizer, template, options.max_length).encode_records(rows, option=rows.name)
        pairs = [(len(e.input_ids), sum(label >= 0 for label in e.labels)) for e in encoded.examples]
        return sorted(pairs, reverse=True)


def guess(row: Record, max_length: int) -> list[tuple[int, int]]:
    """Return tokens and supervised tokens of a row's sequences by the length of its texts."""
    if row.text is not None:
        tokens = max(math.ceil(len(row.text) / CHARACTERS), 2)
        whole, rest = divmod(tokens - 1, max_length - 1)
        return [(max_length, max_length - 1)] * whole + ([(rest + 1, rest)] if rest else [])
    answers = [content for role, content in row.messages if role == "assistant"] or [row.answer or ""]
    prompts = [content for role, content in row.messages if role != "assistant"] or [row.question or ""]
    answer = math.ceil(sum(map(len, answers)) / CHARACTERS) + 1
    prompt = math.ceil((sum(map(len, prompts)) + TAGS) / CHARACTERS)
    return [(min(prompt + answer, max_length), min(answer, max_length))]


def _steps(options: TrainingOptions, sequences: int | None) -> int | None:
    if options.max_steps > 0:
        return options.max_steps
    if sequences is None:
        return None
    return math.ceil(options.epochs * steps_per_epoch(sequences, options.batch_size, options.grad_accum))


def _longest(lengths: Sequence[tuple[int, int]] | None, options: TrainingOptions) -> Batch:
    """Return the batch of the longest sequences; of rows that nobody has read, of as long ones as there can be."""
    chosen = (lengths or [(options.max_length, options.max_length)] * options.batch_size)[: options.batch_size]
    return Batch(len(chosen), chosen[0][0], sum(supervised for _, supervised in chosen))


def _stage(name: str, reading: _Reading) -> Line:
    options: FinetuneOptions = resolve(FinetuneOptions, dict(reading.recipe.stages[name]), {}, where=f"stage {name}")
    rows = reading.rows(str(options.data), options.data_dir)
    lengths = None if rows is None else reading.lengths(rows, name, options, str(options.model))
    config = reading.config(name)
    footprint = None if config is None else finetuning_footprint(config, options, _longest(lengths, options))
    return Line(name, _steps(options, _count(lengths)), _count(rows), footprint, at_most=lengths is None)


def _arm(arm: Arm, reading: _Reading, seed: int, shared: dict[tuple[Any, ...], Line]) -> Line:
    """Return an arm's line; arms that differ in what changes neither steps nor memory share one."""
    recipe = reading.recipe
    settings = recipe.settings(arm, recipe.points(arm)[0])
    options = unlearn_options(recipe, settings, reading.folder, seed)
    alike = ("forget_loss", "retain_loss", "retain_weight", "init", "rank", "targets", "tune", "tune_layers", "dtype",
             "batch_size", "grad_accum", "max_steps", "epochs", "forget", "retain", "max_length",
             "activation_checkpointing", "importance_batch_size", "importance_memory")  # fmt: skip
    key = tuple(getattr(options, name) for name in alike)
    if key not in shared:
        shared[key] = _measured(options, reading)
    return shared[key]


def _measured(options: UnlearnOptions, reading: _Reading) -> Line:
    model = str(options.model)
    forget = reading.rows(str(options.forget), options.data_dir)
    lengths = None if forget is None else reading.lengths(forget, TARGET, options, model)
    # Rows sampled from the model itself are as long as they are asked to be.
    retain = [(options.self_length, options.self_length)] * options.self_rows if options.retain == SELF else None
    rows = reading.rows(options.retain, options.data_dir) if options.retain and retain is None else None
    if rows is not None:
        retain = reading.lengths(rows, TARGET, options, model)
    config, footprint = reading.config(TARGET), None
    if config is not None:
        partner = _longest(retain, options) if options.retain else None
        with _noted(reading.notes):
            footprint = unlearning_footprint(config, options, _longest(lengths, options), partner)
    at_most = lengths is None or bool(options.retain and options.retain_weight and retain is None)
    return Line("", _steps(options, _count(lengths)), _count(forget), footprint, at_most)


def _count(found: Sized | None) -> int | None:
    return None if found is None else len(found)
