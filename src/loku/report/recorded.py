"""The unlearning record in a report: what it claims and does not, what it names, and who can check it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loku.report.artefacts import at, number, section
from loku.report.numerals import count, figure, moment

MARKS = {"survived": "good", "not survived": "bad", "undecided": "part"}


def recorded(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what the page shows of a record.json, or None where there is none."""
    if record is None:
        return None
    forget = section(record, "data", "trained", "forget")
    hashes = forget.get("row_hashes")
    facts = [
        ("Made", moment(at(record, "changed") or at(record, "made"))),
        ("Digest", at(record, "digest")),
        ("Asked to forget", f"{count(number(forget.get('rows')))} rows of {forget.get('name')}"),
        ("Hash of the rows" + (", keyed" if forget.get("keyed") else ""), forget.get("sha256")),
        ("Row hashes", f"{len(hashes)}, keyed with a salt that is not in the record" if hashes else None),
        ("Texts", "in the record, as asked" if "text" in forget else "none"),
        ("Base model", at(record, "model", "sha256")),
        ("Adapter" if at(record, "result", "form") == "lora" else "New model", at(record, "result", "sha256")),
    ]
    who = at(record, "reproduce", "who")
    return {
        "statement": at(record, "claim", "statement"),
        "not_claimed": [str(text) for text in at(record, "claim", "not_claimed") or ()],
        "facts": [(name, str(text)) for name, text in facts if text],
        "attacks": attack_rows(section(record, "attacks")),
        "rule": at(record, "attacks", "rule"),
        "worst": at(record, "attacks", "worst"),
        "headline": at(record, "attacks", "headline", "sentence"),
        "not_run": [str(name) for name in at(record, "attacks", "not_run") or ()],
        "who": [(str(item.get("has")), str(item.get("can"))) for item in who or () if isinstance(item, Mapping)],
        "command": at(record, "reproduce", "command"),
        "verify": at(record, "reproduce", "verify"),
    }


def attack_rows(attacks: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a line for every attack: its name, how it ended, and the score with its interval."""
    rows = []
    for name, entry in section(attacks, "attacks").items():
        value, low, high = (number(at(entry, "score", key)) for key in ("value", "low", "high"))
        between = "" if low is None or high is None else f"{figure(low, 2)} to {figure(high, 2)}"
        outcome = str(at(entry, "outcome"))
        rows.append(
            {
                "name": name,
                "outcome": outcome,
                "tone": MARKS.get(outcome, "none"),
                "score": figure(value, 2),
                "interval": between,
            }
        )
    return rows
