"""Options of the unlearning record's verbs, `loku record` and `loku verify`. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from loku.options import Options, option


@dataclass
class RecordOptions(Options):
    """Options of `loku record`."""

    run: str | None = option(None, "folder of a finished run")
    forget: str | None = option(None, "the run's forget rows (default: where config.yaml says they are)")
    keep_text: bool = option(False, "also write the forget rows themselves into the record")
    data_dir: str | None = option(None, "folder with benchmark files (default: $LOKU_DATA_DIR, else the hub)")


@dataclass
class VerifyOptions(Options):
    """Options of `loku verify`."""

    record: str | None = option(None, "record.json, or the run folder that holds it")
    folder: str | None = option(None, "run folder with the files that the record names (default: the record's own)")
    model: str | None = option(None, "base model (default: where the run's config.yaml says it is)")
    adapter: str | None = option(None, "adapter folder, or after --tune full the model's (default: in the run folder)")
    forget: str | None = option(None, "the forget rows (this and the next three: default where the run had them)")
    retain: str | None = option(None, "the retain rows that were measured")
    general: str | None = option(None, "the general-knowledge rows")
    holdout: str | None = option(None, "the holdout rows")
    retain_only_model: str | None = option(None, "the retain-only model (default: where the run had it)")
    salt: str | None = option(None, "key of the row hashes (default: record.salt beside the record)")
    share: float = option(0.2, "share of the rows to measure again; 0 compares hashes only", least=0, most=1)
    tolerance: float | None = option(
        None, "largest difference of a number, times its size where that is above 1 (default: 1e-3, half types 5e-2)",
        above=0,
    )  # fmt: skip
    seed: int | None = option(None, "seed of the choice of rows (default: drawn afresh, and printed)", least=0)
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; by default a GPU when there is one")
    data_dir: str | None = option(None, "folder with benchmark files (default: $LOKU_DATA_DIR, else the hub)")
    trust_remote_code: bool = option(False, "run the model repository's own code")
    json: bool = option(False, "print one JSON object")
