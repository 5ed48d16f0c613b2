"""Files that are either whole or absent: atomic writes, and hashes."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loku.errors import InputError


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8: that of the file that `write_text` makes of it."""
    return hashlib.sha256(text.encode()).hexdigest()


def json_line(value: Any) -> str:
    """Return a JSON value in canonical form: one line, sorted keys, no blanks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value's canonical form. What JSON lacks (dates, bytes) counts by its repr."""
    line = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=repr)
    return hashlib.sha256(line.encode()).hexdigest()


def _umask() -> int:
    """Return which permissions new files are denied. There is no way to ask but to set it."""
    found = os.umask(0o077)
    os.umask(found)
    return found


def replace_file(path: str | Path, write: Callable[[str], object]) -> None:
    """Let `write` fill a temporary file and move it to `path`: readers see the old content or the new, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    replace_file(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def json_text(value: Any) -> str:
    """Return what `write_json` writes. Raises ValueError for NaN and infinity: they are not JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json_text(value))


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_object(path: str | Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file that must hold one object. Raises InputError, with the remedy given, when it does not."""
    try:
        value = read_json(path)
    except ValueError as error:  # JSON and UTF-8 errors are both ValueErrors
        raise InputError(f"The file '{path}' is not readable JSON ({error}).", remedy) from None
    if not isinstance(value, dict):
        raise InputError(f"The file '{path}' holds a {type(value).__name__}, not a JSON object.", remedy)
    return value


def check_output_folder(path: str | Path, remedy: str = "Give a folder.") -> Path:
    """Raise InputError when `--output` cannot be a folder: it is a file, or would lie under one."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"--output '{path}' is a file.", remedy)
    return _check_parents(path)


def check_output_file(path: str | Path, remedy: str = "Give a file name.", *, option: str = "--output") -> Path:
    """Raise InputError when a path cannot be a file: it is a folder, or would lie under a file."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{option} '{path}' is a folder.", remedy)
    return _check_parents(path, option)


def _check_parents(path: Path, option: str = "--output") -> Path:
    nearest = next((parent for parent in path.parents if parent.exists()), None)
    if nearest is not None and not nearest.is_dir():
        raise InputError(f"{option} '{path}' lies under '{nearest}', which is a file.", "Give a path under a folder.")
    return path
