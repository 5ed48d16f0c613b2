"""The part of `loku verify` that needs models: hashes of their weights, and a share of the rows measured again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loku.data.sources import RecordSet
from loku.errors import InputError
from loku.evaluation.results import Results
from loku.models import load_adapter, load_model, load_tokenizer, weights_sha256
from loku.progress import progress
from loku.remeasure import GREEDY, choose_rows, compare, measure_again, tolerance_of
from loku.verification import Verification, listed

ROLE_NAMES = {"target": "the target", "unlearned": "the unlearned model", "retain_only": "the retain-only model"}


def check_models(found: Verification, rows: Mapping[str, RecordSet], result: Path | None) -> None:
    """Compare the weights of all models that are there, and measure a share of the rows on each of them again.

    `rows` are the sets that may be measured, `result` the folder of the adapter or model that the run made.
    """
    results = found.results()
    model, record = found.record["model"], found.record["result"]
    if found.options.share:
        for role in (role for role in found.record["figures"] if role not in results):
            found.say(f"figures of {ROLE_NAMES[role]}", None, "its results file cannot be read")
    base = _load(found, "model", "the base model", model.get("dtype") or "auto", found.source("model"))
    if base is not None:
        found.say("weights of the base model", weights_sha256(base) == model["sha256"])
        tokenizer = _tokenizer(found, base)
        if "target" in results:
            _measure(found, "target", base, tokenizer, results["target"], rows)
        if record["form"] == "lora" and result is not None and "unlearned" in results:
            try:
                base = load_adapter(base, str(result))
            except InputError as error:
                found.say("adapter on the base model", False, error.given)
            else:
                _measure(found, "unlearned", base, tokenizer, results["unlearned"], rows)
        del base
    if record["form"] == "model":
        _check_tuned(found, result, results, rows)
    _check_retain_only(found, results, rows)


def _check_tuned(
    found: Verification, folder: Path | None, results: Mapping[str, Results], rows: Mapping[str, RecordSet]
) -> None:
    """Compare and measure a model whose weights were trained themselves."""
    tuned = _load(found, "adapter", "the unlearned model", "auto", None if folder is None else str(folder))
    if tuned is None:
        return
    found.say("weights of the unlearned model", weights_sha256(tuned) == found.record["result"]["sha256"])
    if "unlearned" in results:
        _measure(found, "unlearned", tuned, _tokenizer(found, tuned), results["unlearned"], rows)


def _check_retain_only(found: Verification, results: Mapping[str, Results], rows: Mapping[str, RecordSet]) -> None:
    """Compare and measure the retain-only model, where the run had a model and not only its results."""
    known = results.get("retain_only")
    if known is None:
        return
    source = found.source("retain_only_model")
    if source and not found.options.retain_only_model and Path(str(source)).is_file():
        source = None  # its results were given
    model = _load(found, "retain_only_model", "the retain-only model", str(known.model.get("dtype") or "auto"), source)
    if model is None:
        return
    if known.model.get("sha256"):
        found.say("weights of the retain-only model", weights_sha256(model) == known.model["sha256"])
    _measure(found, "retain_only", model, _tokenizer(found, model), known, rows)


def _load(found: Verification, option: str, name: str, dtype: str, source: Any) -> Any:
    """Load a model from where it is, or note that it was not checked. What was given must be usable."""
    given = getattr(found.options, option)
    places = [str(given)] if given else [str(source), str(found.folder / str(source))] if source else []
    reason = "where it is is not known"
    for place in places:
        if not given and "/" not in place and not Path(place).is_dir():
            continue  # the last part of a path, not the id of some model on the hub
        try:
            return load_model(
                place, dtype=dtype, device=found.options.device, trust_remote_code=found.options.trust_remote_code
            )
        except InputError as error:
            if given:
                raise
            reason = error.given
    found.say(f"weights of {name}", None, reason)
    return None


def _tokenizer(found: Verification, model: Any) -> Any:
    return load_tokenizer(str(model.config.name_or_path), trust_remote_code=found.options.trust_remote_code)


def _measure(
    found: Verification, role: str, model: Any, tokenizer: Any, results: Results, rows: Mapping[str, RecordSet]
) -> None:
    """Measure a share of the rows again on one model, and note how the numbers compare."""
    what = f"figures of {ROLE_NAMES[role]}"
    if not found.options.share:
        found.say(what, None, "--share is 0")
        return
    if results.suite != "own":
        found.say(what, None, f"measured by suite {results.suite}: repeat `loku evaluate`")
        return
    usable = {name: rows[name] for name in results.sets if name in rows}
    lost = [name for name in results.sets if name not in usable]
    chosen = choose_rows(results, found.options.share, found.seed)
    if not usable:
        found.say(what, None, "none of its rows are there as they were")
        return
    tolerance = tolerance_of(results, found.options.tolerance)
    with progress(f"measuring {ROLE_NAMES[role]} again") as update:
        now = measure_again(model, tokenizer, results, usable, chosen, update)
    # How long an answer may be follows from all sets: without one of them others might have been cut elsewhere.
    skip = GREEDY if lost and results.settings.get("max_new_tokens") is None else ()
    outcome = compare(results, now, tolerance, skip)
    detail = (
        f"{outcome.rows} of {sum(len(s.per_example) for s in results.sets.values())} rows (seed {found.seed}), "
        f"{outcome.numbers} numbers, largest difference {outcome.largest:.1g}, tolerance {tolerance:g}"
    )
    wrong = outcome.differences
    if wrong:
        detail += f"; {len(wrong)} differ: {listed(map(str, wrong))}"
        if all(item.metric in GREEDY for item in wrong):
            detail += " (only what hangs on generated words: nearly equal tokens may change places on other hardware)"
    if lost:
        detail += f"; without the sets {', '.join(lost)}"
        detail += ", on which hangs how long answers may be: what is generated was not compared" if skip else ""
    found.say(what, not wrong, detail)
