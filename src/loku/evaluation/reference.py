"""The retain-only model's measurements, as the reference that forget quality and the verdict rest on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loku.data.records import Record
from loku.errors import InputError
from loku.evaluation import metrics, open_unlearning
from loku.evaluation.logs import UTILITY_SETS, is_log, log_utility, parse_log, read_json_or_gzip
from loku.evaluation.results import Results, parse_results, results_text
from loku.files import sha256_file, sha256_text

KIND = "retain-only"
GIVE_RESULTS = (
    "Give the results.json of the retain-only model, a folder that holds it, or a log: TOFU's official one, or "
    "open-unlearning's TOFU_EVAL.json."
)


@dataclass(frozen=True)
class Reference:
    """A retain-only model's measurements: per-row truth ratios of the forget set, and what stands beside them.

    `truth_ratios` maps row index to the geometric R. `answers` (official logs only) are the rows' ground truths;
    `results` is there when the reference is a results file. `sha256` is that of the file at `path`, or, for results in
    memory, of the file that `write_results` makes of them.
    """

    name: str
    sha256: str
    truth_ratios: dict[int, float]
    forget_sha256: str | None = None
    answers: tuple[str, ...] = ()
    summary: Mapping[str, float] | None = None
    results: Results | None = None
    path: Path | None = None

    def to_json(self) -> dict[str, str]:
        """Return what a results file says about its reference."""
        return {"name": self.name, "kind": KIND, "sha256": self.sha256}

    def summary_value(self, key: str) -> float | None:
        """Return one of the reference's own summary figures, or None."""
        return (self.summary or {}).get(key)


def load_reference(source: str | Path | Results | Reference) -> Reference:
    """Return a reference from a results.json, a folder that holds one, a log, or Results in memory.

    Logs are official TOFU ones and open-unlearning's TOFU_EVAL.json.

    In a folder results.retain_only.json comes before results.json; the folder of an unlearning run without the former
    is refused, because its results.json is the unlearned model's. Raises InputError for everything else.
    """
    if isinstance(source, Reference):
        return source
    if isinstance(source, Results):
        return _from_results(source, sha256_text(results_text(source)))
    path = Path(source)
    if path.is_dir():
        path = _results_in(path)
    if not path.is_file():
        raise InputError(f"There is no reference '{source}'.", GIVE_RESULTS)
    value = read_json_or_gzip(path)
    if is_log(value):
        return _from_log(value, path)
    if open_unlearning.is_evaluation(value):
        return _from_open_unlearning(value, path)
    return _from_results(parse_results(value, str(path)), sha256_file(path), path)


def _results_in(folder: Path) -> Path:
    own = folder / "results.retain_only.json"
    if own.is_file():
        return own
    if (folder / "run.json").is_file() and (folder / "results.target.json").is_file():
        raise InputError(
            f"The reference '{folder}' is an unlearning run: its results.json is not the retain-only model's.",
            "Evaluate the retain-only model with `loku evaluate`, and give the results.json that it writes.",
        )
    if not (folder / "results.json").is_file():
        raise InputError(f"The reference folder '{folder}' holds no results.json.", GIVE_RESULTS)
    return folder / "results.json"


def _from_results(results: Results, sha256: str, path: Path | None = None) -> Reference:
    return Reference(
        name=str(results.model.get("name") or "retain-only model"),
        sha256=sha256,
        truth_ratios={int(row["index"]): row["truth_ratio"] for row in _forget_rows(results) if "truth_ratio" in row},
        forget_sha256=results.data.get("forget", {}).get("sha256"),
        summary=results.summary,
        results=results,
        path=path,
    )


def _from_log(value: Mapping[str, Any], path: Path) -> Reference:
    forget = parse_log(value, str(path), sets=("forget",))["forget"]
    summary = {}
    try:
        sets = parse_log(value, str(path), sets=UTILITY_SETS)
        summary = {"model_utility": log_utility(sets), "model_utility_arithmetic": log_utility(sets, arithmetic=True)}
    except InputError:
        pass  # a log of the forget set alone is reference enough for forget quality
    return Reference(
        name=path.name.removesuffix(".gz").removesuffix(".json").removesuffix(".eval_log_aggregated"),
        sha256=sha256_file(path),
        truth_ratios=dict(enumerate(forget.truth_ratios().tolist())),
        answers=forget.answers,
        summary=summary,
        path=path,
    )


def _from_open_unlearning(value: Mapping[str, Any], path: Path) -> Reference:
    try:
        answers = open_unlearning.parse_evaluation(value, str(path), ("forget",))["forget"].answers
    except InputError:
        answers = ()  # the truth ratios are there, or else the next line says that they are not
    return Reference(
        name=path.name.removesuffix(".gz").removesuffix(".json"),
        sha256=sha256_file(path),
        truth_ratios=open_unlearning.truth_ratios(value, str(path)),
        answers=answers,
        summary=open_unlearning.reference_summary(value),
        path=path,
    )


def check_reference(
    reference: Reference, records: Sequence[Record], forget_sha256: str, *, option: str = "--reference"
) -> list[str]:
    """Return warnings about comparing forget rows with a reference's, before any work starts.

    Raises InputError when a results file was measured on other forget data or rows. Rows of an official log are only
    known by their texts: different ones are compared with a warning.
    """
    if reference.forget_sha256 is not None and reference.forget_sha256 != forget_sha256:
        raise InputError(
            f"{option} '{reference.name}' was measured on other forget data (sha256 {reference.forget_sha256[:12]} "
            f"there, {forget_sha256[:12]} here).",
            "Evaluate the retain-only model on the same forget set, and give that results.json.",
        )
    if reference.results is not None:
        measured = [int(row["index"]) for row in _forget_rows(reference.results)]
        if measured and sorted(measured) != sorted(record.index for record in records):
            raise InputError(
                f"{option} '{reference.name}' was measured on {len(measured)} forget rows, and they are not the "
                f"{len(records)} rows of this evaluation.",
                "Evaluate the retain-only model with the same forget rows and --max-rows.",
            )
        return []
    return _log_warnings(reference, records)


def _forget_rows(results: Results) -> list[dict[str, float]]:
    forget = results.sets.get("forget")
    return forget.per_example if forget else []


def _log_warnings(reference: Reference, records: Sequence[Record]) -> list[str]:
    if len(reference.truth_ratios) != len(records):
        return [
            f"The forget rows are not the same questions: {len(records)} rows here, {len(reference.truth_ratios)} in "
            f"the log '{reference.name}'. Forget quality compares two different sets."
        ]
    if len(reference.answers) != len(records):  # a log may lack a row's texts and have its truth ratio
        return [f"The log '{reference.name}' lacks texts: its forget rows may be others than these."]
    different = sum(
        _tight(record.answer or "") != _tight(answer) for record, answer in zip(records, reference.answers, strict=True)
    )
    if not different:
        return []
    return [
        f"The forget rows are not the same questions: {different} of {len(records)} answers differ from the log "
        f"'{reference.name}'. Forget quality compares two different sets."
    ]


def _tight(text: str) -> str:
    return re.sub(r"\s+", "", text)


def reference_quality(reference: Reference | None, ratios: Sequence[float]) -> metrics.ForgetQuality | None:
    """Return forget quality against a reference; None when either side has no truth ratios."""
    theirs = [] if reference is None else [value for value in reference.truth_ratios.values() if np.isfinite(value)]
    ours = [value for value in ratios if np.isfinite(value)]
    return metrics.forget_quality(ours, theirs) if ours and theirs else None
