"""What of rows, names and settings may be published: keyed hashes instead of texts, names instead of paths."""

from __future__ import annotations

import dataclasses
import hmac
import json
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loku.config import UnlearnOptions, resolve
from loku.data.records import Record
from loku.errors import InputError
from loku.files import json_line, replace_file
from loku.options import flag
from loku.report.artefacts import number
from loku.report.card import public_name, public_source

FEW_ROWS = 20  # the hash of a smaller set is keyed, too: so little text could be guessed as a whole
SCHEME = (
    "HMAC-SHA256 of the row's fields as canonical JSON (sorted keys, no blanks, UTF-8), keyed with the salt's bytes"
)
MODELS = ("model", "retain_only_model", "level_model")  # settings that name models; DATA name rows or other files
DATA = ("forget", "retain", "holdout", "general", "importance", "prompt_template", "refusals")
LEFT_OUT = ("output", "data_dir", "report_to")  # where things lie on one machine


def numbers_in(value: object) -> Any:
    """Return the numbers of a nested value under their names, and nothing else: texts do not get into a record."""
    if isinstance(value, Mapping):
        kept = {str(name): numbers_in(item) for name, item in value.items()}
        return {name: item for name, item in kept.items() if item is not None}
    if isinstance(value, list):  # curves and the like; a text among them is left out
        return [item for item in map(numbers_in, value) if item is not None]
    return number(value)


def row_fields(record: Record) -> dict[str, Any]:
    """Return the fields of a row that say something, without its place in the file."""
    return {name: value for name, value in dataclasses.asdict(record).items() if name != "index" and value}


def row_hash(record: Record, salt: bytes) -> str:
    """Return the keyed hash of a row: HMAC-SHA256(salt, canonical JSON of `row_fields`)."""
    return hmac.digest(salt, json_line(row_fields(record)).encode(), "sha256").hex()


def hashed_set(entry: Mapping[str, Any], salt: bytes) -> dict[str, Any]:
    """Return counts, public name and hash of a set of rows; the hash of a small set is keyed."""
    keyed = int(entry.get("rows") or 0) < FEW_ROWS
    plain = str(entry.get("sha256"))
    found = {**entry, "name": public_source(str(entry.get("name")))}
    return found | {"sha256": keyed_hash(plain, salt) if keyed else plain, "keyed": keyed}


def keyed_hash(sha256: str, salt: bytes) -> str:
    """Return the keyed hash of a hash, both in hexadecimal."""
    return hmac.digest(salt, sha256.encode(), "sha256").hex()


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's settings without where things lie: of paths only the last part stays."""
    found = {name: value for name, value in settings.items() if name not in LEFT_OUT}
    for names, shorten in ((MODELS, public_name), (DATA, public_source)):
        found |= {name: shorten(str(found[name])) for name in names if found.get(name)}
    return found


def command_line(settings: Mapping[str, Any], hardware: Mapping[str, Any]) -> str:
    """Return the call that repeats a run: every setting that is not its method's default, and the threads."""
    standard = resolve(UnlearnOptions, {}, {"method": settings.get("method", "loku")}).as_dict()
    given = {n: v for n, v in settings.items() if n != "method" and n in standard and v != standard[n]}
    if hardware.get("device") == "cpu":
        given["threads"] = settings.get("threads") or hardware.get("threads")
    given = {"method": settings.get("method")} | given
    if not settings.get("model") or not settings.get("forget"):
        options = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"loku.unlearn(model, tokenizer, forget, retain, output, {options})"
    parts = ["loku", "unlearn"]
    for name, value in given.items():
        if isinstance(value, bool):
            parts.append(flag(name) if value else flag(f"no_{name}"))
        elif isinstance(value, Mapping):
            parts += [flag(name), ",".join(f"{key}={json.dumps(item)}" for key, item in value.items())]
        elif value is not None:
            parts += [flag(name), str(value)]
    return shlex.join([*parts, "--output", "again"])


def read_salt(path: str | Path) -> bytes:
    """Read a record's salt. Raises InputError when the file holds none."""
    try:
        salt = bytes.fromhex(Path(path).read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        salt = b""
    if len(salt) < 16:
        raise InputError(f"The salt '{path}' cannot be read.", "Give the record.salt that belongs to the record.")
    return salt


def write_salt(path: Path, salt: bytes) -> None:
    """Write the salt for its owner's eyes."""
    replace_file(path, lambda temporary: Path(temporary).write_text(salt.hex() + "\n", encoding="ascii"))
    os.chmod(path, 0o600)


def public_verdict(verdict: object, names: Iterable[str]) -> dict[str, str] | None:
    """Return a verdict that names models as the public may know them."""
    if not isinstance(verdict, Mapping):
        return None
    found = {str(key): str(value) for key, value in verdict.items()}
    for name in sorted(names, key=len, reverse=True):
        found = {key: text.replace(name, public_name(name)) for key, text in found.items()}
    return found
