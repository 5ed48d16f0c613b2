"""A record under verification: where the things are that it speaks of, and the comparisons made so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loku.config import VerifyOptions
from loku.disclosure import read_salt
from loku.errors import InputError
from loku.evaluation.results import Results, read_results
from loku.files import sha256_text
from loku.record import SALT, settings_of
from loku.report.artefacts import RESULT_FILES

SHOWN = 3  # differences that one line names
Status = Literal["equal", "different", "not checked"]


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, how it ended, and what there is to say."""

    what: str
    status: Status
    detail: str = ""


@dataclass
class Verification:
    """A record with the places of what it speaks of, and the checks made so far."""

    options: VerifyOptions
    record: dict[str, Any]
    path: Path
    folder: Path
    seed: int
    checks: list[Check] = field(default_factory=list)

    def say(self, what: str, same: bool | None, detail: str = "") -> bool:
        """Note a check; `same` None means that it could not be made. Returns whether it ended as equal."""
        status: Status = "not checked" if same is None else "equal" if same else "different"
        self.checks.append(Check(what, status, detail))
        return bool(same)

    @property
    def salt(self) -> bytes | None:
        """The key of the row hashes, where it is known and the right one."""
        path = self.salt_path
        if path is None:
            return None
        salt = read_salt(path)
        return salt if sha256_text(salt.hex()) == self.record["salt"]["sha256"] else None

    @property
    def salt_path(self) -> Path | None:
        """Where the salt lies, if anywhere."""
        if self.options.salt:
            return Path(self.options.salt)
        found = [place / SALT for place in (self.path.parent, self.folder) if (place / SALT).is_file()]
        return found[0] if found else None

    def results(self) -> dict[str, Results]:
        """Return the results files that can be read; what is wrong with others shows in their hashes."""
        found = {}
        for role in self.record["figures"]:
            try:
                found[role] = read_results(self.folder / RESULT_FILES[role])
            except InputError:
                continue
        return found

    def source(self, option: str) -> Any:
        """Return what an option names: as given to `loku verify`, else as the run's config.yaml has it."""
        return getattr(self.options, option) or settings_of(self.folder).get(option)


def listed(items: Iterable[str]) -> str:
    """Return the first items as one text, and how many more there are."""
    names = list(items)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return "; ".join(names[:SHOWN]) + more
