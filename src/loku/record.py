"""The unlearning record: what was asked, done and found, in one JSON file that can be handed over. It holds no texts.

`record.json` lies in the run folder beside `record.salt`, the key of its row hashes: the record can be published
without the salt, and whoever has the salt and a row can tell whether the row was in the forget set.
"""

from __future__ import annotations

import datetime
import functools
import importlib.resources
import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from loku.config import RecordOptions
from loku.data.sources import RecordSet, load_records
from loku.disclosure import (
    SCHEME,
    command_line,
    hashed_set,
    numbers_in,
    public_settings,
    public_verdict,
    read_salt,
    row_fields,
    row_hash,
    write_salt,
)
from loku.errors import InputError
from loku.files import read_object, sha256_file, sha256_json, sha256_text, write_json
from loku.report.artefacts import RESULT_FILES, at, number, section
from loku.report.card import public_name

SCHEMA_VERSION = 1
FILE, SALT, ATTACKS = "record.json", "record.salt", "attacks.json"
HASHED = (*RESULT_FILES.values(), "run.json", "config.yaml", "metrics.jsonl", "curve.jsonl", ATTACKS)
SURVIVED = 0.1  # score up to which an attack counts as survived; see docs/record.md
RESTORE = "Restore the file from a copy, or write the record again with `loku record`."

CLAIM = {
    "statement": "This record is empirical evidence, not a guarantee of deletion.",
    "not_claimed": [
        "That the information is gone from the weights: the figures say how the model answered the questions that were "
        "asked, and which attempts to bring the knowledge back succeeded.",
        "That attacks which were not run would fail.",
        "That other copies are clean: unlearning does not touch the base model, its training data, backups and caches.",
        "That the record is what its maker first wrote: hashes show that files belong together, a signature shows who "
        "vouches for them.",
    ],
}
WHO = [
    {"has": "this record alone", "can": "check its form and its digest, and read what was asked, done and found"},
    {
        "has": "the run folder as well",
        "can": "recompute the hashes of adapter, settings and results, and every figure from the numbers of its rows",
    },
    {"has": "the base model as well", "can": "recompute the hash of its weights"},
    {
        "has": "the forget rows as well, and the other rows that were measured",
        "can": "recompute the hashes of the rows, and measure a chosen share of them again",
    },
    {"has": "the salt as well", "can": "tell row by row whether it was in the forget set"},
    {
        "has": "model, rows and the command",
        "can": "repeat the run: with the same versions, hardware and threads to the bit on a CPU, elsewhere nearly",
    },
]


def write_record(folder: str | Path, forget: RecordSet, *, keep_text: bool = False) -> Path:
    """Write a finished run's record.json, and record.salt where there is none yet. Returns the record's path.

    `forget` are the rows that had to go; their texts enter the record only with `keep_text`.
    """
    folder = Path(folder)
    salt = read_salt(folder / SALT) if (folder / SALT).is_file() else secrets.token_bytes(32)
    record = build_record(folder, forget, salt, keep_text=keep_text)
    check_form(record)
    if not (folder / SALT).is_file():
        write_salt(folder / SALT, salt)
    write_json(folder / FILE, record)
    return folder / FILE


def refresh_record(folder: str | Path) -> Path | None:
    """Put the attacks that a run folder now holds into its record, and leave everything else as it was.

    Other hashes are not taken again, so that a file that was changed since is still found by `loku verify`. Returns
    None where there is no record.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    record = read_record(path)
    record["attacks"] = attacks_of(Path(folder) / ATTACKS)
    record["files"] = {name: sha for name, sha in record["files"].items() if name != ATTACKS} | hashes_of(
        folder, [ATTACKS]
    )
    record["changed"] = _now()
    record["digest"] = digest_of(record)
    check_form(record)
    write_json(path, record)
    return path


def record_from_options(options: RecordOptions) -> Path:
    """Run `loku record`: write the record of a finished run anew. Raises InputError for anything else."""
    folder = Path(options.run or "")
    if not (folder / "run.json").is_file():
        raise InputError(f"'{options.run}' is not a run folder: it has no run.json.", "Give one of `loku unlearn`.")
    run = read_object(folder / "run.json", RESTORE)
    if run.get("status") != "finished" or not section(run, "adapter"):
        raise InputError(f"The run in '{options.run}' is not finished.", "Repeat its command: it goes on where it was.")
    source = options.forget or settings_of(folder).get("forget")
    if not source:
        raise InputError("The run's forget rows were given in memory.", "Give the same rows with --forget.")
    forget = load_records(source, option="--forget", data_dir=options.data_dir or settings_of(folder).get("data_dir"))
    if forget.sha256 != at(run, "data", "forget", "sha256"):
        raise InputError(f"The rows of --forget '{source}' are not those of the run.", "Give the run's own rows.")
    return write_record(folder, forget, keep_text=options.keep_text)


def build_record(folder: Path, forget: RecordSet, salt: bytes, *, keep_text: bool = False) -> dict[str, Any]:
    """Return the record of a finished run; see docs/record.md and the JSON schema for what it says."""
    run = read_object(folder / "run.json", RESTORE)
    trained = {name: hashed_set(entry, salt) for name, entry in section(run, "data").items()}
    file = Path(forget.name)
    if forget.origin == "file" and file.is_file() and not trained["forget"]["keyed"]:
        trained["forget"]["file_sha256"] = sha256_file(file)
    trained["forget"]["row_hashes"] = [row_hash(record, salt) for record in forget]
    if keep_text:
        trained["forget"]["text"] = [row_fields(record) for record in forget]
    measured = section(_results(folder).get("unlearned"), "data")
    record = {
        "schema_version": SCHEMA_VERSION,
        "kind": "unlearning record",
        "made": _now(),
        "claim": CLAIM,
        "data": {"trained": trained, "measured": {name: hashed_set(entry, salt) for name, entry in measured.items()}},
        "salt": {"scheme": SCHEME, "sha256": sha256_text(salt.hex()), "file": SALT},
        **facts(folder),
        "files": hashes_of(folder),
    }
    return record | {"digest": digest_of(record)}


def facts(folder: Path) -> dict[str, Any]:
    """Return what follows from the files of a run folder alone: `loku verify` derives it again and compares."""
    run, results = read_object(folder / "run.json", RESTORE), _results(folder)
    names = {str(at(found, "model", "name")) for found in results.values()} | {str(at(run, "model", "name"))}
    settings = public_settings(settings_of(folder))
    return {
        "model": section(run, "model") | {"name": public_name(str(at(run, "model", "name")))},
        "result": result_of(folder, section(run, "adapter")),
        "method": section(run, "method"),
        "settings": settings,
        "training": {name: run.get(name) for name in ("seed", "steps", "trainable", "started", "seconds")},
        "figures": {role: figures_of(found, RESULT_FILES[role]) for role, found in results.items()},
        "verdict": public_verdict(at(results.get("unlearned"), "verdict"), names),
        "attacks": attacks_of(folder / ATTACKS),
        "versions": section(run, "versions"),
        "hardware": section(run, "hardware"),
        "reproduce": {"command": command_line(settings, section(run, "hardware")), "verify": f"loku verify {FILE}"}
        | {"who": WHO},
    }


def result_of(folder: Path, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run made: of an adapter the hashes of its two files, of a model that of its weights."""
    if adapter.get("form") == "model":
        return {"form": "model", "folder": "model", "sha256": adapter.get("sha256"), "rank": None}
    config = folder / "adapter" / "adapter_config.json"
    return {
        "form": "lora",
        "folder": "adapter",
        "sha256": adapter.get("sha256"),
        "config_sha256": adapter_settings_sha256(config) if config.is_file() else None,
        "rank": adapter.get("rank"),
    }


def adapter_settings_sha256(config: Path) -> str:
    """Return the hash of an adapter_config.json's content, but for where its base model lies."""
    found = read_object(config, RESTORE)
    return sha256_json({name: value for name, value in found.items() if name != "base_model_name_or_path"})


def figures_of(results: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Return one model's figures: every mean with its interval, and the summary; the rows' numbers stay in `file`."""
    sets = {
        name: {"rows": at(entry, "rows"), "metrics": section(entry, "metrics")}
        for name, entry in section(results, "sets").items()
    }
    model = section(results, "model")
    return {
        "file": file,
        "model": model | {"name": public_name(str(model.get("name")))},
        "suite": results.get("suite"),
        "settings": section(results, "settings"),
        "sets": sets,
        "summary": section(results, "summary"),
    }


def attacks_of(path: Path) -> dict[str, Any]:
    """Return which attacks a model survived, read tolerantly from attacks.json. Only numbers and names are taken.

    The score is 0 for as forgotten as the retain-only model and 1 for as known as in the target. An attack is survived
    when its whole interval lies at or below SURVIVED, not survived when the whole interval lies above it.
    """
    rule = f"survived: the interval of the score ends at or below {SURVIVED}; not survived: it begins above {SURVIVED}"
    none = {"run": False, "rule": rule, "attacks": {}, "worst": None, "headline": None, "not_run": []}
    if not path.is_file():
        return none
    value = read_object(path, RESTORE)
    summary = section(value, "summary")
    found: dict[str, Any] = {}
    for name, entry in (section(summary, "attacks") or section(value, "attacks")).items():
        members = section(entry, "membership")
        for label, member in members.items():
            found[f"{name}: {label}"] = _attack(entry, at(member, "score"), {"auc": at(member, "auc")})
        if not members:
            found[name] = _attack(entry, at(entry, "score") or at(entry, "robustness"), _scored_figures(entry))
    # An adapter that is taken off brings everything back: that is no attack on the merged model.
    scores = {name: entry["score"]["value"] for name, entry in found.items() if entry["family"] != "adapter"}
    known = {name: score for name, score in scores.items() if score is not None}
    worst = at(summary, "headline", "worst")
    headline = {key: at(summary, "headline", key) for key in ("level", "sentence")}
    return none | {
        "run": bool(found),
        "attacks": found,
        "worst": worst if worst in found else max(known, key=lambda name: known[name], default=None),
        "headline": headline if all(isinstance(text, str) for text in headline.values()) else None,
        "not_run": sorted({*section(value, "missing"), *section(value, "failed")}),
    }


def _scored_figures(entry: object) -> Any:
    """Return the figures that an attack is scored by, by model; all of them where it does not say which."""
    figures, metric = section(entry, "figures"), at(entry, "metric")
    return {role: {metric: at(own, metric)} if metric in section(own) else own for role, own in figures.items()}


def _attack(entry: object, score: object, figures: object) -> dict[str, Any]:
    """Return what the record says of one attack: its outcome, score and figures, and what stands beside them."""
    score = score if isinstance(score, Mapping) else {"value": score}
    value = number(score.get("value", score.get("score")))
    low, high = number(score.get("low")), number(score.get("high"))
    outcome = "not survived" if low is not None and low > SURVIVED else "undecided"
    family, damaged = at(entry, "family"), at(entry, "damaged")
    return {
        "family": family if isinstance(family, str) else None,
        "outcome": "survived" if high is not None and high <= SURVIVED else outcome,
        "score": {"value": value, "low": low, "high": high},
        "figures": numbers_in(figures),
        "beside": numbers_in(at(entry, "beside") or at(entry, "utility")),
        "damaged": damaged is not None and damaged is not False,
    }


def settings_of(folder: str | Path) -> dict[str, Any]:
    """Return the content of a run folder's config.yaml, or nothing where there is none that can be read."""
    try:
        found = yaml.safe_load((Path(folder) / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def hashes_of(folder: str | Path, names: Iterable[str] = HASHED) -> dict[str, str]:
    """Return the hashes of those files that are there."""
    return {name: sha256_file(Path(folder) / name) for name in names if (Path(folder) / name).is_file()}


def digest_of(record: Mapping[str, Any]) -> str:
    """Return the hash of a record's content, all but the digest itself."""
    return sha256_json({name: value for name, value in record.items() if name != "digest"})


@functools.cache
def schema() -> dict[str, Any]:
    """Return the JSON schema of records, which is shipped with the package."""
    text = (importlib.resources.files("loku") / "schemas" / "record.schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def form_errors(record: Mapping[str, Any]) -> list[str]:
    """Return where a record breaks the JSON schema, as sentences."""
    import jsonschema

    errors = jsonschema.Draft202012Validator(schema()).iter_errors(record)
    return [f"{error.json_path}: {error.message[:160]}" for error in sorted(errors, key=lambda e: e.json_path)]


def check_form(record: Mapping[str, Any]) -> None:
    """Raise ValueError when a record breaks its own schema."""
    errors = form_errors(record)
    if errors:
        raise ValueError(f"the record breaks its schema: {errors[0]}")


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record. Raises InputError when it is absent, no record, or of another schema version."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no record '{path}'.", "Give the record.json of a run of `loku unlearn`.")
    record = read_object(path, RESTORE)
    if record.get("kind") != "unlearning record":
        raise InputError(f"'{path}' is not an unlearning record.", "Give the record.json of a run of `loku unlearn`.")
    if record.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"The record '{path}' has schema_version {record.get('schema_version')!r}; this version of loku reads "
            f"{SCHEMA_VERSION}.",
            "Use the version of loku that wrote it (see its `versions`).",
        )
    return record


def _results(folder: Path) -> dict[str, dict[str, Any]]:
    return {role: read_object(folder / n, RESTORE) for role, n in RESULT_FILES.items() if (folder / n).is_file()}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
