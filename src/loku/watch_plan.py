"""What `--eval-steps` measures, and the forget level: checked before any work, measured before the training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loku.adapters.anchor import target_model
from loku.assessment_rows import AssessmentRows
from loku.config import UnlearnOptions
from loku.data.records import Record
from loku.errors import InputError, suggestion
from loku.evaluation.results import Results
from loku.job import Job
from loku.levels import FIGURES, KEPT_SETS, QA_FIGURES, TEXT_FIGURES, Best, Level, best_rule
from loku.models import check_fits, load_model
from loku.progress import console
from loku.runs import RunFolder
from loku.watching import EL_NGRAM, Rows, Watch, extraction, measure_sets

NO_LEVEL = (
    "Give --retain-only-model (a model trained without the forget rows), or --holdout (rows of the same kind that were "
    "never trained on), or the figures themselves with --level."
)
TARGET_ON_HOLDOUT = "the target on the holdout rows"


@dataclass(frozen=True)
class WatchPlan:
    """The encoded rows of `--eval-steps`, and where the level comes from: figures, a model, or holdout rows."""

    sets: dict[str, Rows]
    text: bool
    holdout: Rows | None = None
    level: Level | None = None
    retain_only_model: str | None = None

    @property
    def has_level(self) -> bool:
        """Whether there is something to take the level from."""
        return bool(self.level or self.retain_only_model or self.holdout)


def plan_watch(job: Job, options: UnlearnOptions, rows: AssessmentRows) -> WatchPlan | None:
    """Encode and check what is measured while training; None without --eval-steps. Raises InputError before any work.

    The level is that of --level, else of the retain-only model on the forget rows, else of the target on --holdout
    (from `rows.target`, where it was measured before).
    Running text has the level of TDEC's rule: MA and, with --stop-at level, EL_10.
    """
    if not options.eval_steps:
        return None
    given = {"forget": job.forget, "retain": rows.retain or job.retain, "general": rows.general}
    records = {name: list(found)[: options.eval_rows] for name, found in given.items() if found is not None}
    sets: dict[str, Rows] = {name: _encoded(job, found, f"--{name}") for name, found in records.items()}
    text = records["forget"][0].is_text
    plan = WatchPlan(sets, text, level=_given_level(options, text=text))
    _check_long_enough(sets["forget"], "--forget", options, text=text and "el_10" in (options.level or TEXT_FIGURES))
    if plan.level is None:
        plan = _with_source(plan, job, options, rows, records["forget"])
    goal = "--stop-at level" if options.stop_at == "level" else "--keep best" if options.keep == "best" else None
    if goal and not plan.has_level:
        raise InputError(f"{goal} has no level of unseen text to compare with.", NO_LEVEL)
    if options.keep == "best" and set(options.level) == {"el_10"} and options.stop_at != "level":
        raise InputError(
            "--keep best compares with a level of el_10 alone, which is measured for --stop-at level only.",
            "Add another figure, such as --level ma=0.3,el_10=0.1, or --stop-at level.",
        )
    if options.keep == "best" and not any(name in sets for name in KEPT_SETS):
        raise InputError("--keep best has no rows to see utility on.", "Give --retain or --general rows.")
    return plan


def make_watch(plan: WatchPlan, model: nn.Module, job: Job, run: RunFolder, options: UnlearnOptions) -> Watch:
    """Measure the level, with the target model's weights in place, and return what measures while training."""
    level = plan.level
    if level is None and plan.has_level:
        level = _measured_level(plan, model, job, options)
    if level is not None:
        console.print(f"level: {level.describe()}")
    share = options.keep_utility if options.keep == "best" else None
    watch = Watch(
        run.path, job.tokenizer, plan.sets, every=options.eval_steps, text=plan.text, level=level,
        stop=options.stop_at == "level", share=share,
    )  # fmt: skip
    run.update(level=level and level.to_json(), stopped=None, best=None)
    return watch


def conclude_watch(watch: Watch, run: RunFolder) -> None:
    """Say in run.json, and to the user, where the training stopped and which weights were kept."""
    level, row, best = watch.level, watch.curve[-1], watch.best()
    if watch.stopped:
        assert level is not None
        run.update(stopped={"step": row["step"], "rule": level.describe(), "level": level.figures})
        console.print(f"stopped at step {row['step']}, at the forget level: {level.describe()}")
        if row["step"] == 0:
            console.print("The target knows the forget rows no better than that: there was nothing to unlearn.")
    elif watch.stop:
        console.print("The forget level was not reached: the training went on to its last step.")
    if best is not None:
        _conclude_best(watch, best, run)


def _conclude_best(watch: Watch, best: Best, run: RunFolder) -> None:
    """Say which measurement was kept by which rule, and what that means."""
    assert watch.level is not None
    assert watch.share is not None
    row = next(row for row in watch.curve if row["step"] == best.step)
    found = {
        "step": best.step,
        "rule": best_rule(watch.level, watch.share),
        "meets_rule": best.meets,
        "at_level": watch.level.reached(row["forget"]),
        "distance": best.distance if math.isfinite(best.distance) else None,
        "utility": best.utility,
    }
    run.update(best=found)
    if not best.meets:
        console.print(f"No measurement kept {watch.share:.0%} of the target's utility: the last step is kept.")
        return
    figures = ", ".join(f"{name} {row['forget'][name]:.3g}" for name in watch.level.figures if name in row["forget"])
    console.print(f"kept step {best.step}: forget {figures} ({found['rule']})")
    if not found["at_level"]:
        console.print("It has not reached the forget level: what reached it had lost more, or came too late.")


def _encoded(job: Job, records: Sequence[Record], option: str) -> list[Any]:
    rows = [job.encoder.encode(record, option) for record in records]
    check_fits(job.model, job.tokenizer, max(len(window.input_ids) for row in rows for window in row))
    return rows


def _given_level(options: UnlearnOptions, *, text: bool) -> Level | None:
    """Return the level that was given as figures."""
    known = [name for name in FIGURES if text or name not in TEXT_FIGURES]
    for name, value in options.level.items():
        if name not in known:
            raise InputError(f"--level names '{name}', which is not measured.", suggestion(name, known))
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"--level {name}={value} is no level.", "Give a number from 0 to 1.")
    figures = {name: float(value) for name, value in options.level.items()}
    return Level(figures, tuple(figures), "given") if figures else None


def _with_source(
    plan: WatchPlan, job: Job, options: UnlearnOptions, rows: AssessmentRows, forget: Sequence[Record]
) -> WatchPlan:
    """Add where the level comes from, and check that it can."""
    if rows.retain_only_model is not None:
        return WatchPlan(plan.sets, plan.text, retain_only_model=rows.retain_only_model)
    results = rows.reference.results if rows.reference is not None else None
    if results is not None and not plan.text:
        figures = _figures_of(results, "forget", forget, QA_FIGURES)
        if figures is not None:
            return WatchPlan(plan.sets, plan.text, level=Level(figures, QA_FIGURES, "the retain-only model's results"))
    if rows.holdout is None:
        return plan
    holdout = list(rows.holdout)[: options.eval_rows]
    if holdout[0].is_text != plan.text:
        raise InputError(
            "--holdout and --forget are not of the same kind: one is running text.",
            "Give holdout rows like the forget rows: their level is to be compared.",
        )
    encoded = _encoded(job, holdout, "--holdout")
    _check_long_enough(encoded, "--holdout", options, text=plan.text)
    if rows.target is not None and plan.text:  # EL_10 of unseen text is the dearest figure there is
        figures = _figures_of(rows.target, "holdout", holdout, ("probability", *TEXT_FIGURES))
        if figures is not None:
            return WatchPlan(plan.sets, plan.text, level=Level(figures, TEXT_FIGURES, TARGET_ON_HOLDOUT))
    return WatchPlan(plan.sets, plan.text, holdout=encoded)


def _check_long_enough(rows: Rows, option: str, options: UnlearnOptions, *, text: bool) -> None:
    if text and options.stop_at == "level" and all(len(row[0].input_ids) <= EL_NGRAM for row in rows):
        raise InputError(
            f"{option} holds no text of more than {EL_NGRAM} tokens: EL_{EL_NGRAM} does not exist for it.",
            "Give longer texts, or other figures with --level, such as ma=0.3.",
        )


def _figures_of(
    results: Results, name: str, records: Sequence[Record], figures: Sequence[str]
) -> dict[str, float] | None:
    """Return a set's means over these rows from a results file, or None where it lacks a row or a figure."""
    found = results.sets.get(name)
    rows: dict[int, Mapping[str, float]] = {int(row["index"]): row for row in found.per_example} if found else {}
    indices = [record.index for record in records]
    if not all(index in rows and all(figure in rows[index] for figure in figures) for index in indices):
        return None
    return {figure: sum(rows[index][figure] for index in indices) / len(indices) for figure in figures}


def _measured_level(plan: WatchPlan, model: nn.Module, job: Job, options: UnlearnOptions) -> Level:
    """Measure the level: the retain-only model on the forget rows, or the target on the holdout rows."""
    extracts = plan.text and options.stop_at == "level"
    if plan.retain_only_model is not None:
        other = load_model(
            plan.retain_only_model,
            dtype=options.dtype,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
        found = _level_figures(other, job.tokenizer, plan.sets["forget"], text=plan.text, extracts=extracts)
        source = "the retain-only model on the forget rows"
    else:
        assert plan.holdout is not None
        with target_model(model) as target:
            found = _level_figures(target, job.tokenizer, plan.holdout, text=plan.text, extracts=extracts)
        source = TARGET_ON_HOLDOUT
    names = ("probability", *TEXT_FIGURES) if plan.text else QA_FIGURES
    rule = TEXT_FIGURES if plan.text else QA_FIGURES
    figures = {name: found[name] for name in names if name in found}
    return Level(figures, tuple(name for name in rule if name in figures), source)


def _level_figures(model: nn.Module, tokenizer: Any, rows: Rows, *, text: bool, extracts: bool) -> dict[str, float]:
    found, scores = measure_sets(model, tokenizer, {"holdout": rows}, text=text)
    more = extraction(model, tokenizer, rows, scores["holdout"]) if extracts else {}
    return found["holdout"] | more
