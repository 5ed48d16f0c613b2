"""The suites of `loku evaluate`: from options to checked rows, and from rows to results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loku.config import EvaluateOptions
from loku.data.prompts import Template
from loku.data.sources import RecordSet, Rows, load_records, load_rows
from loku.errors import InputError
from loku.evaluation.assembly import Identity, read_target, suite_results
from loku.evaluation.cache import BatchCache
from loku.evaluation.extras import parse_extras
from loku.evaluation.lume import COLUMNS, DOCUMENT, evaluate_lume, lume_source, membership_source
from loku.evaluation.lume import MAX_LENGTH as LUME_MAX_LENGTH
from loku.evaluation.lume import NEW_TOKENS as LUME_NEW_TOKENS
from loku.evaluation.muse import evaluate_muse, load_muse
from loku.evaluation.own import evaluate_own
from loku.evaluation.reference import load_reference
from loku.evaluation.results import Results
from loku.evaluation.rwku import NEW_TOKENS as RWKU_NEW_TOKENS
from loku.evaluation.rwku import evaluate_rwku, load_rwku
from loku.evaluation.tdec import MAX_LENGTH as TDEC_MAX_LENGTH
from loku.evaluation.tdec import evaluate_tdec
from loku.evaluation.tofu import MAX_LENGTH as TOFU_MAX_LENGTH
from loku.evaluation.tofu import evaluate_tofu, load_sets
from loku.evaluation.utility import add_utility, load_tasks, parse_utility
from loku.models import load_model
from loku.options import flag

OWN_MAX_LENGTH = 500  # tokens
MAX_ROWS = 300  # of suites own, tofu and tdec: TOFU's ds_size


@dataclass(frozen=True)
class Loaded:
    """A model with what belongs to it."""

    model: Any
    tokenizer: Any
    template: Template
    sha256: str
    cache: BatchCache | None = None


@dataclass(frozen=True)
class Work:
    """A suite with its rows read and checked: their hashes by set, and what is left to do once a model is there."""

    hashes: dict[str, str]
    run: Callable[[Loaded, Any], Results]
    check: Callable[[], object] = list  # what is checked, at some cost, before the model is loaded


def check_suite(options: EvaluateOptions) -> None:
    """Raise InputError when an option that the suite needs is missing, or one that others need has no meaning."""
    if options.suite == "own" and not options.forget:
        raise InputError("--forget is missing.", "Suite own measures your rows; or choose --suite tofu.")
    if options.suite == "tdec" and not options.data:
        raise InputError("--data is missing.", "Suite tdec measures texts that must go: a file with a `text` column.")
    if options.suite == "utility" and not options.utility:
        raise InputError("--utility is missing.", "Name tasks, such as lambada_openai or lambada=rows.jsonl.")
    parse_extras(options.extras)
    for name in ("extras", "reference_model"):
        if getattr(options, name) and options.suite not in ("own", "tofu"):
            raise InputError(
                f"{flag(name)} was given with --suite {options.suite}.", "Only suites own and tofu have such figures."
            )


def prepare_suite(options: EvaluateOptions) -> Work:
    """Read and check the rows of the suite that the options name. Raises InputError when they cannot be used."""
    work = _SUITES[options.suite](options)
    return _with_utility(options, work) if options.utility else work


def _hashes(data: dict[str, Any]) -> dict[str, str]:
    return {name: found.sha256 for name, found in data.items()}


def _identity(options: EvaluateOptions, loaded: Loaded) -> Identity:
    return Identity(options.model, loaded.sha256, options.seed)


def _common(options: EvaluateOptions, loaded: Loaded) -> dict[str, Any]:
    """Return what suites own and tofu are told alike."""
    judge = None
    if options.reference_model:
        judge = load_model(
            options.reference_model,
            dtype=options.dtype,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
            quantised=True,
        )
    return {
        "max_rows": options.max_rows or MAX_ROWS,
        "max_new_tokens": options.max_new_tokens,
        "template": loaded.template,
        "keep_text": options.keep_text,
        "reference": options.reference,
        "target": options.target,
        "seed": options.seed,
        "model_name": options.model,
        "model_sha256": loaded.sha256,
        "cache": loaded.cache,
        "extras": parse_extras(options.extras),
        "reference_model": judge,
    }


def _records(options: EvaluateOptions, *names: str) -> dict[str, RecordSet]:
    return {
        name: load_records(getattr(options, name), option=f"--{name}", data_dir=options.data_dir)
        for name in names
        if getattr(options, name)
    }


def _own(options: EvaluateOptions) -> Work:
    sets = _records(options, "forget", "retain", "holdout", "general")
    length = options.max_length or OWN_MAX_LENGTH

    def run(loaded: Loaded, progress: Any) -> Results:
        common = _common(options, loaded)
        return evaluate_own(
            loaded.model,
            loaded.tokenizer,
            forget=sets["forget"],
            retain=sets.get("retain"),
            holdout=sets.get("holdout"),
            general=sets.get("general"),
            max_length=length,
            progress=progress,
            **common,
        )

    return Work(_hashes(sets), run)


def _tofu(options: EvaluateOptions) -> Work:
    chosen = [part.strip() for part in options.sets.split(",")]
    given = _records(options, "holdout")
    sets = load_sets(options.forget_split, options.data_dir, (*chosen, *given), given)

    def run(loaded: Loaded, progress: Any) -> Results:
        return evaluate_tofu(
            loaded.model,
            loaded.tokenizer,
            max_length=options.max_length or TOFU_MAX_LENGTH,
            forget_split=options.forget_split,
            sets=tuple(sets),
            sources=sets,
            progress=progress,
            **_common(options, loaded),
        )

    return Work(_hashes(sets), run)


def _tdec(options: EvaluateOptions) -> Work:
    sets = _records(options, "data", "holdout")
    validation: dict[str, RecordSet] = {}
    for source in filter(None, (part.strip() for part in (options.validation or "").split(","))):
        name = Path(source.split("[")[0]).name.split(".")[0]
        if name in validation or name in ("forget", "holdout"):
            raise InputError(f"--validation has two sets of the name '{name}'.", "Rename one of the files.")
        validation[name] = load_records(source, option="--validation", data_dir=options.data_dir)
    target = read_target(options.target) if options.target else None

    def run(loaded: Loaded, progress: Any) -> Results:
        return evaluate_tdec(
            loaded.model,
            loaded.tokenizer,
            data=sets["data"],
            holdout=sets.get("holdout"),
            validation=validation,
            max_rows=options.max_rows or MAX_ROWS,
            max_length=options.max_length or TDEC_MAX_LENGTH,
            target=target,
            identity=_identity(options, loaded),
            cache=loaded.cache,
            progress=progress,
        )

    named = {"forget" if name == "data" else name: found for name, found in sets.items()}
    return Work(_hashes(named | validation), run)


def _muse(options: EvaluateOptions) -> Work:
    data, warnings = load_muse(options.corpus, options.data_dir)
    reference = load_reference(options.reference).results if options.reference else None
    if options.reference and reference is None:
        raise InputError(
            f"--reference '{options.reference}' is a log.", "Give the retain-only model's results.json of suite muse."
        )
    if reference is not None:
        _check_muse_reference(reference, options, data)

    def run(loaded: Loaded, progress: Any) -> Results:
        return evaluate_muse(
            loaded.model,
            loaded.tokenizer,
            data,
            corpus=options.corpus,
            max_rows=options.max_rows,
            max_length=options.max_length or None,
            keep_text=options.keep_text,
            reference=reference,
            identity=_identity(options, loaded),
            cache=loaded.cache,
            warnings=warnings,
            progress=progress,
        )

    return Work(_hashes(data), run)


def _check_muse_reference(reference: Results, options: EvaluateOptions, data: Mapping[str, Rows]) -> None:
    """Raise InputError for results of another suite, of the other corpus or of other membership texts."""
    corpus = reference.settings.get("corpus", options.corpus)
    if reference.suite != "muse" or corpus != options.corpus:
        what = f"of suite '{reference.suite}'" if reference.suite != "muse" else f"of the corpus {corpus}"
        raise InputError(
            f"--reference '{options.reference}' is {what}.",
            "Give the retain-only model's results.json of suite muse and this corpus.",
        )
    other = [
        name
        for name in ("forget", "holdout")
        if name in data and reference.data.get(name, {}).get("sha256", data[name].sha256) != data[name].sha256
    ]
    if other:
        raise InputError(
            f"--reference '{options.reference}' was measured on other rows ({', '.join(other)}).",
            "Evaluate the retain-only model on the same files.",
        )


def _lume(options: EvaluateOptions) -> Work:
    given = {name: getattr(options, name) or lume_source(name, options.data_dir) for name in ("forget", "retain")}
    data = {
        name: load_rows(source, COLUMNS, option=f"--{name}", data_dir=options.data_dir)
        for name, source in given.items()
    }
    sources = {
        name: getattr(options, name) or membership_source(name, options.data_dir) for name in ("members", "nonmembers")
    }
    documents = {
        name: load_rows(source, DOCUMENT, option=f"--{name}", data_dir=options.data_dir)
        for name, source in sources.items()
        if source
    }

    def run(loaded: Loaded, progress: Any) -> Results:
        return evaluate_lume(
            loaded.model,
            loaded.tokenizer,
            forget=data["forget"],
            retain=data["retain"],
            members=documents.get("members"),
            nonmembers=documents.get("nonmembers"),
            mmlu=options.mmlu,
            max_rows=options.max_rows,
            max_new_tokens=options.max_new_tokens or LUME_NEW_TOKENS,
            max_length=options.max_length or LUME_MAX_LENGTH,
            keep_text=options.keep_text,
            identity=_identity(options, loaded),
            cache=loaded.cache,
            progress=progress,
        )

    return Work(_hashes(data | documents), run)


def _rwku(options: EvaluateOptions) -> Work:
    data = load_rwku(options.data_dir)

    def run(loaded: Loaded, progress: Any) -> Results:
        return evaluate_rwku(
            loaded.model,
            loaded.tokenizer,
            loaded.template,
            data,
            max_rows=options.max_rows,
            max_new_tokens=options.max_new_tokens or RWKU_NEW_TOKENS,
            keep_text=options.keep_text,
            identity=_identity(options, loaded),
            cache=loaded.cache,
            progress=progress,
        )

    return Work(_hashes(data), run)


def _utility(options: EvaluateOptions) -> Work:
    """The suite without rows of its own: --utility adds its tasks to it."""

    def run(loaded: Loaded, progress: Any) -> Results:
        return suite_results(
            loaded.model,
            "utility",
            _identity(options, loaded),
            started=time.monotonic(),
            data={},
            rows={},
            settings={"max_rows": options.max_rows},
            sets={},
            summary={},
        )

    return Work({}, run)


def _with_utility(options: EvaluateOptions, work: Work) -> Work:
    """Return work that also measures the tasks of --utility."""
    utility = parse_utility(options.utility)
    tasks: list[Any] = []

    def check() -> None:
        work.check()
        tasks[:] = [load_tasks(utility)]

    def run(loaded: Loaded, progress: Any) -> Results:
        started = time.monotonic()
        results = work.run(loaded, progress)
        if not tasks:
            check()
        add_utility(
            results,
            loaded.model,
            loaded.tokenizer,
            utility,
            tasks[0],
            max_rows=options.max_rows,
            max_new_tokens=options.max_new_tokens,
            keep_text=options.keep_text,
            seed=options.seed,
            progress=progress,
            cache=loaded.cache,
        )
        results.seconds = round(time.monotonic() - started, 3)
        return results

    return Work(work.hashes | utility.hashes, run, check)


_SUITES: dict[str, Callable[[EvaluateOptions], Work]] = {
    "own": _own,
    "tofu": _tofu,
    "tdec": _tdec,
    "muse": _muse,
    "lume": _lume,
    "rwku": _rwku,
    "utility": _utility,
}
