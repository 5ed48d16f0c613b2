"""What a run is measured on and against beyond its forget and retain rows, read before any work starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loku.config import UnlearnOptions
from loku.data.sources import RecordSet, load_records
from loku.evaluation.reference import Reference, load_reference
from loku.evaluation.results import Results
from loku.models import check_model_source


@dataclass(frozen=True)
class AssessmentRows:
    """Rows and references beyond forget and retain, read before any work starts.

    The retain-only reference is either measured already (`reference`) or a model that is to be measured.
    """

    retain: RecordSet | None = None  # where other rows are to be measured than those trained on
    holdout: RecordSet | None = None
    general: RecordSet | None = None
    target: Results | None = None
    reference: Reference | None = None
    retain_only_model: str | None = None


def load_assessment_rows(options: UnlearnOptions) -> AssessmentRows:
    """Read the holdout and general rows and the retain-only model's results or log (or check that it is a model)."""
    reference, model = None, None
    given = options.retain_only_model
    if given and (given.endswith((".json", ".json.gz")) or Path(given).is_file()):
        reference = load_reference(given)
    elif given:
        model = check_model_source(given, option="--retain-only-model")
    return AssessmentRows(
        holdout=_records(options.holdout, "--holdout", options),
        general=_records(options.general, "--general", options),
        reference=reference,
        retain_only_model=model,
    )


def _records(source: str | None, option: str, options: Any) -> RecordSet | None:
    return load_records(source, option=option, data_dir=options.data_dir) if source else None
