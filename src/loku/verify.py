"""`loku verify`: what a record says, compared with what is there: hashes first, then a share of the figures."""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loku.config import VerifyOptions
from loku.data.sources import RecordSet, load_records
from loku.disclosure import keyed_hash, row_hash
from loku.errors import InputError, LokuError
from loku.files import sha256_file
from loku.options import flag
from loku.progress import console
from loku.record import FILE, adapter_settings_sha256, digest_of, facts, form_errors, read_record, settings_of
from loku.remeasure import figures_that_do_not_follow
from loku.report.artefacts import at
from loku.verification import Verification, listed
from loku.verify_models import check_models

SCHEMA_VERSION = 1
# Parts of a record that follow from the run folder. `reproduce` and `claim` are words; the digest watches over them.
DERIVED = (
    "model", "method", "settings", "training", "figures", "verdict", "attacks", "versions", "hardware",
)  # fmt: skip


def verify_from_options(options: VerifyOptions) -> None:
    """Run `loku verify`: check, print every comparison, and raise LokuError when something differs."""
    found = verify(options)
    count = Counter(check.status for check in found.checks)
    if options.json:
        json.dump(outcome(found), sys.stdout, indent=2, allow_nan=False)
        sys.stdout.write("\n")
    else:
        for check in found.checks:
            line = f"{check.status:<12} {check.what}" + (f": {check.detail}" if check.detail else "")
            console.print(line, style="bold red" if check.status == "different" else None, markup=False)
        console.print(", ".join(f"{count[name]} {name}" for name in ("equal", "different", "not checked")))
        console.print(found.record["claim"]["statement"] if at(found.record, "claim", "statement") else "")
    if count["different"]:
        names = [check.what for check in found.checks if check.status == "different"]
        raise LokuError(
            f"The record '{found.path}' differs from what is there in {len(names)} points: {listed(names)}.",
            "Ask its maker which of the two is right, and rely on neither until then.",
        )


def outcome(found: Verification) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {
        "schema_version": SCHEMA_VERSION,
        "record": str(found.path),
        "digest": found.record.get("digest"),
        "share": found.options.share,
        "seed": found.seed,
        "checks": [asdict(check) for check in found.checks],
    } | dict(Counter(check.status.replace(" ", "_") for check in found.checks))


def verify(options: VerifyOptions) -> Verification:
    """Compare a record with what is there. Raises InputError for a record or places that cannot be used at all."""
    path = Path(options.record or "")
    path = path / FILE if path.is_dir() else path
    record = read_record(path)
    _check_places(options)
    seed = options.seed if options.seed is not None else secrets.randbelow(2**31)
    found = Verification(options, record, path, Path(options.folder or path.parent), seed)
    errors = form_errors(record)
    found.say("form", not errors, listed(errors))
    found.say("digest", record.get("digest") == digest_of(record), "SHA-256 over the record itself")
    if not errors:
        _check_files(found)
        _check_facts(found)
        _check_rows_of_figures(found)
        adapter = _check_result(found)
        rows = _check_data(found)
        check_models(found, rows, adapter)
    return found


def _check_places(options: VerifyOptions) -> None:
    """Raise InputError for a place that was given and does not exist."""
    for name in ("folder", "adapter"):
        given = getattr(options, name)
        if given and not Path(given).is_dir():
            raise InputError(f"{flag(name)} '{given}' is not a folder.", "Check the path, or leave it out.")
    if options.salt and not Path(options.salt).is_file():
        raise InputError(f"--salt '{options.salt}' does not exist.", "Give the record.salt of the record.")


def _check_files(found: Verification) -> None:
    """Compare the hashes of the run folder's files; where none is there, the record stands alone."""
    files = found.record["files"]
    alone = not any((found.folder / name).is_file() for name in files)
    for name, sha in files.items():
        file = found.folder / name
        if file.is_file():
            found.say(f"file {name}", sha256_file(file) == sha)
        else:
            found.say(f"file {name}", None if alone else False, "is not there")


def _check_facts(found: Verification) -> None:
    """Derive from the run folder again what the record says of the run."""
    if not (found.folder / "run.json").is_file():
        found.say("statements", None, "they follow from the run folder, which is not there")
        return
    try:
        again = facts(found.folder)
    except InputError as error:
        found.say("statements", False, error.given)
        return
    for name in DERIVED:
        wrong = _unequal(found.record[name], again[name], name)
        found.say(f"statements: {name}", not wrong, listed(wrong))
    named = {key: found.record["result"].get(key) for key in ("form", "sha256", "rank")}
    found.say("statements: result", named == {key: again["result"].get(key) for key in named})


def _unequal(recorded: Any, again: Any, where: str) -> list[str]:
    """Return where two values differ. Of names that are paths only the last part counts: folders may move."""
    if isinstance(recorded, Mapping) and isinstance(again, Mapping):
        names = list(dict.fromkeys([*recorded, *again]))
        return [line for name in names for line in _unequal(recorded.get(name), again.get(name), f"{where}.{name}")]
    if isinstance(recorded, str) and isinstance(again, str):
        recorded, again = (re.sub(r"[^\s'\"]*/", "", text) for text in (recorded, again))
    return [] if recorded == again else [f"{where}: {recorded!r} recorded, {again!r} there"]


def _check_rows_of_figures(found: Verification) -> None:
    """Work out every mean and interval from the numbers of its rows again."""
    for role, results in found.results().items():
        what = f"figures of {role}, from the numbers of its rows"
        if results.suite != "own":
            found.say(what, None, f"suite {results.suite} has its own means")
            continue
        wrong = figures_that_do_not_follow(results)
        found.say(what, not wrong, listed(wrong))


def _check_result(found: Verification) -> Path | None:
    """Compare the adapter's two files; return the folder of what the run made, if it is there."""
    result = found.record["result"]
    places = [found.folder / result["folder"], found.folder]
    if found.options.adapter:
        places = [Path(found.options.adapter)]
    wanted = "adapter_config.json" if result["form"] == "lora" else "config.json"
    folder = next((place for place in places if (place / wanted).is_file()), None)
    if result["form"] == "model":  # its hash is that of the weights, which are loaded later
        return folder
    if folder is None:
        lost = bool(found.options.adapter) or (found.folder / "run.json").is_file()
        found.say("adapter", False if lost else None, "is not there")
        return None
    weights = folder / "adapter_model.safetensors"
    found.say("weights of the adapter", weights.is_file() and sha256_file(weights) == result["sha256"])
    try:
        settings = adapter_settings_sha256(folder / wanted)
    except InputError as error:
        found.say("settings of the adapter", False, error.given)
    else:
        found.say("settings of the adapter", settings == result.get("config_sha256"))
    return folder


def _check_data(found: Verification) -> dict[str, RecordSet]:
    """Compare hashes of sets and rows; return the sets that were measured and are what they were."""
    salt, path = found.salt, found.salt_path
    found.say("salt", None if path is None else salt is not None, "" if path else "is not there")
    usable = {}
    trained, measured = found.record["data"]["trained"], found.record["data"]["measured"]
    results = found.results().get("unlearned")
    forget = _rows(found, "forget", at(results and results.data, "forget", "name"))
    if isinstance(forget, str):
        found.say("forget rows", None, forget)
    else:
        _check_forget(found, forget, trained["forget"], salt)
    for name, entry in measured.items():
        plain = at(results and results.data, name, "sha256")
        rows = forget if name == "forget" else _rows(found, name, at(results and results.data, name, "name"))
        if isinstance(rows, str):
            if name != "forget":
                found.say(f"{name} rows", None, rows)
            continue
        same = _same_set(rows, entry, salt, plain)
        if name != "forget":
            found.say(f"{name} rows", same, "the hash is keyed, and the salt is not known" if same is None else "")
        if same is not False:
            usable[name] = rows
    return usable


def _check_forget(found: Verification, rows: RecordSet, entry: Mapping[str, Any], salt: bytes | None) -> None:
    """Compare the forget set as a whole, its file, and every row."""
    same = _same_set(rows, entry, salt, at(settings_of_run(found.folder), "data", "forget", "sha256"))
    found.say("forget rows", same, "the hash is keyed, and the salt is not known" if same is None else "")
    if entry.get("file_sha256") and Path(rows.name).is_file():
        found.say("file of the forget rows", sha256_file(rows.name) == entry["file_sha256"])
    if salt is None:
        found.say("hash of each forget row", None, "needs the salt")
        return
    here, there = [row_hash(record, salt) for record in rows], entry["row_hashes"]
    changed = [str(place) for place, sha in enumerate(here) if sha not in set(there)]
    gone = [str(place) for place, sha in enumerate(there) if sha not in set(here)]
    parts = [
        f"rows that are not in the record: {listed(changed)}" if changed else "",
        f"rows of the record that are gone: {listed(gone)}" if gone else "",
        "the order or the number of rows differs" if here != there and not changed and not gone else "",
    ]
    found.say("hash of each forget row", here == there, "; ".join(filter(None, parts)) or f"{len(here)} rows")


def settings_of_run(folder: Path) -> dict[str, Any]:
    """Return a run folder's run.json, or nothing where there is none that can be read."""
    try:
        value = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _same_set(rows: RecordSet, entry: Mapping[str, Any], salt: bytes | None, plain: str | None) -> bool | None:
    """Say whether rows are those of the record; a keyed hash needs the salt, or the plain hash of the run folder."""
    if not entry["keyed"]:
        return rows.sha256 == entry["sha256"]
    if salt is not None:
        return keyed_hash(rows.sha256, salt) == entry["sha256"]
    return None if plain is None else rows.sha256 == plain


def _rows(found: Verification, name: str, recorded: object) -> RecordSet | str:
    """Return a set's rows from where they are, or a sentence that says why not."""
    given = getattr(found.options, name, None)
    if given:
        return load_records(given, option=flag(name), data_dir=found.options.data_dir)
    source = recorded or settings_of(found.folder).get(name)
    if not source:
        return f"where they are is not known: give {flag(name)}"
    data_dir = found.options.data_dir or settings_of(found.folder).get("data_dir")
    for place in (str(source), str(found.folder / str(source)), str(found.folder / Path(str(source)).name)):
        try:
            return load_records(place, option=flag(name), data_dir=data_dir)
        except InputError:
            continue
    return f"'{source}' cannot be read: give {flag(name)}"
