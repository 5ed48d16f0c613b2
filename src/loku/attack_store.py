"""attacks.json: what attacks found, model by model; written after each of them, added to when called again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loku.attacks.suite import Attack, Result
from loku.errors import InputError
from loku.files import check_output_folder, read_object, write_json
from loku.runs import hardware, versions

SCHEMA_VERSION = 1
OTHER = "Choose another --output folder: nothing there is overwritten."


class AttackStore:
    """The file, or memory alone without a path. `request` says what the attacks are on; see `Sources.request`.

    Raises InputError when the file holds attacks on other models or rows, or with other common settings. Sets and
    models that were not given before may be added.
    """

    def __init__(self, path: Path | None, request: Mapping[str, Mapping[str, Any]]) -> None:
        self.path = path
        self.document: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION, "kind": "attacks", **{part: dict(request[part]) for part in request},
            "attacks": {}, "missing": {}, "failed": {}, "summary": {}, "versions": versions(), "hardware": hardware(),
        }  # fmt: skip
        if path is None:
            return
        check_output_folder(path.parent)
        if path.is_file():
            self._read(path, request)

    def _read(self, path: Path, request: Mapping[str, Mapping[str, Any]]) -> None:
        found = read_object(path, "Restore it from a copy, or move it away.")
        if found.get("schema_version") != SCHEMA_VERSION or found.get("kind") != "attacks":
            raise InputError(f"'{path}' is not an attacks.json that this version of loku reads.", OTHER)
        for part, values in request.items():
            known = found.get(part, {})
            other = [name for name, value in values.items() if name in known and _id(known[name]) != _id(value)]
            if other:
                raise InputError(f"'{path}' holds attacks on something else (other {part}: {', '.join(other)}).", OTHER)
            found[part] = {**known, **values}
        self.document |= found

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """The finished attacks: family, settings and, by role, their results."""
        found: dict[str, dict[str, Any]] = self.document["attacks"]
        return found

    def has(self, name: str, role: str, kept: int = 0) -> bool:
        """Whether an attack on a model is done; with `kept` retain rows beside it, if any are to be measured."""
        found = self.results.get(name, {}).get("roles", {}).get(role)
        if found is None or not kept or "beside" not in found:
            return found is not None
        return bool(found.get("kept") or any(figure.startswith("retain_") for figure in found["beside"]))

    def check(self, chosen: Sequence[Attack]) -> None:
        """Raise InputError when an attack was done with other settings."""
        for item in chosen:
            known = self.results.get(item.name, {}).get("settings", {})
            other = [name for name, value in item.settings.items() if known and known.get(name) != value]
            if other:
                raise InputError(
                    f"'{self.path}' holds '{item.name}' with other settings ({', '.join(other)}: "
                    f"{known.get(other[0])} there, {item.settings[other[0]]} here).",
                    OTHER,
                )

    def add(self, item: Attack, role: str, result: Result) -> None:
        """Add an attack's result on one model, and write."""
        entry = self.results.setdefault(
            item.name, {"family": item.family, "settings": dict(item.settings), "roles": {}}
        )
        entry["roles"][role] = result
        self.document["failed"].pop(f"{item.name} ({role})", None)
        self._write()

    def fail(self, item: Attack, role: str, reason: str) -> None:
        """Note why an attack failed on one model, and write; it is tried again next time."""
        self.document["failed"][f"{item.name} ({role})"] = reason
        self._write()

    def conclude(self, missing: Mapping[str, str | None], summary: Mapping[str, Any]) -> None:
        """Write the summary, and why what is missing could not run."""
        self.document |= {"missing": dict(missing), "summary": dict(summary)}
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.document)


def _id(value: Any) -> Any:
    """Return what a model or set is known by: its hash, whatever it is called."""
    return value.get("sha256", value) if isinstance(value, Mapping) else value
