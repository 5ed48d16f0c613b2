"""The main job in Python: a model, a forget set and a retain set in; an adapter (or a new model) and a report out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loku.assessment import assess, check_rows
from loku.assessment_rows import load_assessment_rows
from loku.config import UnlearnOptions, resolve
from loku.data.sources import RecordSet
from loku.errors import InputError
from loku.job import UnlearnResult, prepare
from loku.methods import METHODS
from loku.runs import RunFolder
from loku.training import run_job


def unlearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: str | Path | Iterable[Mapping[str, Any]] | RecordSet,
    retain: str | Path | Iterable[Mapping[str, Any]] | RecordSet | None,
    output: str | Path,
    options: UnlearnOptions | None = None,
    **settings: Any,
) -> UnlearnResult:
    """Remove the forget set from a model in memory by training an adapter (or, with tune="full", its weights).

    `forget` and `retain` are rows (dicts), files or names as on the command line; retain="self" samples retain text
    from the model. `settings` are fields of `UnlearnOptions`, such as method="npo" or epochs=3; without any they are
    LoKU's. The run folder `output` is resumed when it holds an interrupted run with the same settings.

    The given model's weights are not written, except with tune="full", which trains the model that was given. As with
    PEFT, the adapter is attached to the model that was given: use `target_model` to see it as it was, or `unload()` to
    have it back.

    The run folder then holds everything that `loku unlearn` writes; evaluate=False leaves out measuring and report.

    Raises InputError before any work when something given cannot be used, DivergenceError when training blows up.

    Example: see the README, whose code is run by the tests.
    """
    if options is not None and settings:
        raise InputError(
            f"unlearn() got options, and {', '.join(settings)} as well.", "Give one: settings alone, or all in options."
        )
    options = resolve_options(settings) if options is None else with_its_method(options)
    options.check()
    run = RunFolder.check(output, options.as_dict())
    extra = load_assessment_rows(options)
    job = prepare(model, tokenizer, forget, retain, options)
    check_rows(extra, job, options)
    result = run_job(job, run, options, extra)
    assess(result, job, run, options, extra)
    return result


def with_its_method(options: UnlearnOptions) -> UnlearnOptions:
    """Return options with their method's settings in place of the class's defaults, which are LoKU's.

    So `UnlearnOptions(method="npo")` is NPO, and what was set beside the method to something else than its default
    stays. Options that `resolve` made hold their method's settings already.
    """
    named = METHODS.get(str(options.method))
    if named is None or options.resolved:
        return options
    defaults = UnlearnOptions()
    left = {n: value for n, value in named.settings.items() if getattr(options, n) == getattr(defaults, n)}
    return dataclasses.replace(options, **left)


def resolve_options(settings: Mapping[str, Any]) -> UnlearnOptions:
    """Return the options of a call from Python: LoKU's defaults, the method's settings, what was given."""
    options: UnlearnOptions = resolve(UnlearnOptions, {}, dict(settings), where="unlearn()")
    return options
