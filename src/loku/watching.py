"""Evaluation while training: cheap figures every so many steps, early stopping, and the best weights so far."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loku.data.encoding import Example
from loku.errors import InputError
from loku.evaluation import metrics
from loku.evaluation.extraction import measure_extraction
from loku.evaluation.modes import end_ids
from loku.evaluation.passes import Reading, reading_of
from loku.evaluation.scoring import SequenceScore, score
from loku.evaluation.sharing import is_first
from loku.files import replace_file
from loku.levels import Best, Level, best_of

CURVE, BEST = "curve.jsonl", "best"  # a file and a folder in the run folder
EL_NGRAM = 10  # TDEC's stopping rule reads EL_10

Rows = Sequence[Sequence[Example]]  # a set: every row's windows


class Watch(TrainerCallback):
    """Measures sets of rows every `every` steps, before the first and after the last one; nothing is generated.

    Each measurement is a line of curve.jsonl in `folder`: step, seconds of training so far (measurements left out), and
    by set the means over rows of probability exp(-mean NLL), exact memorisation and extraction strength; of running
    text also `ma`, and `el_10` (which does generate) where `stop` asks for it and `ma` is below its level. With `stop`
    the training ends at the first measurement that has reached `level`. With `share` the trainable weights of the best
    measurement (`levels.best_of`) are kept as safetensors under best/, for `restore`.

    Measuring changes nothing: modes and random states are as before, so the training goes the same way without it. Of
    several processes each measures its share; the first one writes. A resumed run goes on in the same file.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Any,
        sets: Mapping[str, Rows],
        *,
        every: int,
        text: bool = False,
        level: Level | None = None,
        stop: bool = False,
        share: float | None = None,
    ) -> None:
        self.folder, self.tokenizer, self.sets = folder, tokenizer, dict(sets)
        self.every, self.text, self.level, self.stop, self.share = every, text, level, stop, share
        self.curve: list[dict[str, Any]] = []
        self.seconds = 0.0  # spent on measuring by this process
        self._reading: Reading | None = None
        self._started = self._before = 0.0
        self._checkpointed: int | None = None  # the best measurement when the last checkpoint was written

    def begin(self, model: nn.Module) -> None:
        """Read what an interrupted run measured, and measure the target. Call it with the target model's weights.

        The file must have been rewound to the checkpoint that the training goes on from.
        """
        file = self.folder / CURVE
        if file.is_file():
            self.curve = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if not self.curve or self.curve[0]["step"] != 0:
            self.curve = []
            file.unlink(missing_ok=True)
            self._before = 0.0
            self._started = time.monotonic()
            self.record(model, 0)
        best = self.best()
        self._checkpointed = best.step if best and best.meets else None
        if self._checkpointed is not None and not self._file(self._checkpointed).is_file():
            raise InputError(
                f"'{self.folder}' lacks the weights of step {self._checkpointed}, the best measurement so far.",
                "Restore the file under best/ from a copy, or choose another --output folder.",
            )
        self._before, self._started, self.seconds = self.curve[-1]["seconds"], time.monotonic(), 0.0

    def record(self, model: nn.Module, step: int) -> None:
        """Measure, write the line, and keep the weights where they are the best so far."""
        start = time.monotonic()
        trained = self._before + start - self._started - self.seconds
        row: dict[str, Any] = {"step": step, "seconds": round(max(0.0, trained), 3)}
        self.curve.append(row | self._measure(model))
        best = self.best()
        if is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            if best is not None and best.meets and best.step == step:  # before the line: a line's weights are there
                self._save(model, step)
            with (self.folder / CURVE).open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(self.curve[-1]) + "\n")
        self.seconds += time.monotonic() - start

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Measure when it is time, and stop the training when the level is reached."""
        assert model is not None
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self.record(model, state.global_step)
            control.should_training_stop = control.should_training_stop or self.stopped

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A resumed run starts from this checkpoint or a later one: older best weights are not needed any more."""
        best = self.best()
        self._checkpointed = best.step if best and best.meets else None
        self._prune()

    @property
    def stopped(self) -> bool:
        """Whether the last measurement has reached the level, and that ends the training."""
        return bool(self.stop and self.level and self.curve and self.level.reached(self.curve[-1]["forget"]))

    def best(self) -> Best | None:
        """Return the best measurement so far, where one is asked for."""
        return None if self.share is None or self.level is None else best_of(self.curve, self.level, self.share)

    def restore(self, model: nn.Module) -> None:
        """Put the best measurement's weights into the model, unless it has them: the last one's are there already."""
        best = self.best()
        if best is None or best.step == self.curve[-1]["step"]:
            return
        weights = load_file(self._file(best.step))
        with torch.no_grad():
            for name, parameter in trained_parameters(model).items():
                parameter.copy_(weights[name])

    def _measure(self, model: nn.Module) -> dict[str, Any]:
        with random_states_kept(model):
            if self._reading is None:
                self._reading = reading_of(model)
            found, scores = measure_sets(model, self.tokenizer, self.sets, text=self.text, reading=self._reading)
            forget = found["forget"]
            if self.stop and self.level and "el_10" in self.level.rule and self.level.may_be_reached(forget):
                forget |= extraction(model, self.tokenizer, self.sets["forget"], scores["forget"])
        return found

    def _save(self, model: nn.Module, step: int) -> None:
        weights = {name: p.detach().cpu().contiguous() for name, p in trained_parameters(model).items()}
        replace_file(self._file(step), lambda path: save_file(weights, path, metadata={"step": str(step)}))
        self._prune(step)

    def _prune(self, newest: int | None = None) -> None:
        """Remove weights that neither this run nor one that resumes from the last checkpoint can ask for."""
        if is_first():
            wanted = {self._file(step).name for step in (newest, self._checkpointed) if step is not None}
            for file in (self.folder / BEST).glob("step-*.safetensors"):
                if file.name not in wanted:
                    file.unlink()

    def _file(self, step: int) -> Path:
        return self.folder / BEST / f"step-{step}.safetensors"


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained: those of the adapter, or the model's own with tune="full"."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def random_states_kept(model: nn.Module) -> Iterator[None]:
    """Leave torch's random states (of the CPU and of the model's device) as they were found."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def measure_sets(
    model: nn.Module,
    tokenizer: Any,
    sets: Mapping[str, Rows],
    *,
    text: bool = False,
    reading: Reading | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, list[list[SequenceScore]]]]:
    """Score the rows of all sets in one pass. Returns each set's figures, and the scores of its rows' windows.

    Figures are means over rows, as `loku evaluate --suite own` has them; those that are not finite are left out. `text`
    says that forget rows are running text: the set's `ma` is the mean over rows of the share of the first window's
    tokens that are the model's first choice, as `measure_extraction` has it.
    """
    windows = [window for rows in sets.values() for row in rows for window in row]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    scored = iter(score(model, windows, pad_id=pad_id, eos_ids=end_ids(model, tokenizer), reading=reading))
    scores = {name: [[next(scored) for _ in row] for row in rows] for name, rows in sets.items()}
    found = {}
    for name, rows in scores.items():
        figures = [row_figures(row) for row in rows]
        if text and name in ("forget", "holdout"):
            for figure, row in zip(figures, rows, strict=True):
                figure["ma"] = metrics.exact_memorisation(row[0].hits)
        found[name] = means(figures)
    return found, scores


def row_figures(windows: Sequence[SequenceScore]) -> dict[str, float]:
    """Return the figures of one row, over all its windows."""
    nll, tokens = sum(part.nll for part in windows), sum(part.tokens for part in windows)
    hits = np.concatenate([part.answer_hits for part in windows])
    strengths = [metrics.extraction_strength(part.answer_hits) for part in windows]
    return {
        "probability": float(metrics.probability(nll / tokens)),
        "exact_memorisation": metrics.exact_memorisation(hits),
        "extraction_strength": sum(strengths) / len(strengths),
    }


def extraction(
    model: nn.Module, tokenizer: Any, rows: Rows, scores: Sequence[Sequence[SequenceScore]]
) -> dict[str, float]:
    """Return {"el_10": mean EL_10} of texts' first windows that have been scored; nothing where all are too short."""
    examples, hits = [row[0] for row in rows], [row[0].hits for row in scores]
    found = measure_extraction(model, tokenizer, examples, ngrams=(EL_NGRAM,), hits=hits)
    return means([{"el_10": row.el[EL_NGRAM]} for row in found if EL_NGRAM in row.el])


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every figure over the rows that have it; means that are not finite are left out."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    found = {name: sum(items) / len(items) for name, items in values.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}
