"""The record's section of a report: what it claims, attacks with their outcomes, who can check it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from loku.errors import InputError
from loku.report.html import write_report
from loku.report.recorded import attack_rows, recorded


def _section(run: Path) -> str:
    page = write_report([run], run / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<section id="record".*?</section>', page, flags=re.DOTALL)
    assert found
    return found[0]


def test_the_report_shows_the_record(make_run: Callable[..., Path], make_record: Callable[[Path], Path]) -> None:
    run = make_run()
    record = json.loads(make_record(run).read_text())
    text = _section(run)
    assert "This record is empirical evidence, not a guarantee of deletion." in text
    assert record["digest"] in text
    assert "8, keyed with a salt that is not in the record" in text
    assert record["data"]["trained"]["forget"]["sha256"] in text
    assert "relearning (the worst)" in text
    for outcome, tone in (("not survived", "bad"), ("survived", "good"), ("undecided", "part")):
        assert f'<span class="outcome tone-{tone}">{outcome}</span>' in text
    assert "loku unlearn --method loku --model fiction-target" in text
    assert "loku verify record.json" in text
    assert all(item["has"] in text for item in record["reproduce"]["who"])


def test_a_report_without_attacks_or_record_says_so(
    make_run: Callable[..., Path], make_record: Callable[[Path], Path]
) -> None:
    run = make_run()
    assert "There is no record.json; <code>loku record</code> writes it" in _section(run)
    made = "Attempts to bring the knowledge back (fine-tuning"
    make_record(run)
    assert made not in write_report([run], run / "report.html").read_text()  # they are shown
    (run / "attacks.json").unlink()
    assert made in write_report([run], run / "report.html").read_text()
    value = json.loads((run / "record.json").read_text())
    value["attacks"] = {"run": False, "rule": "", "attacks": {}, "worst": None}
    (run / "record.json").write_text(json.dumps(value))
    assert "No attack was run: whether the knowledge is gone or only hidden is not known." in _section(run)
    (run / "record.json").write_text("{")
    with pytest.raises(InputError, match=r"write it again with `loku record`"):
        write_report([run], run / "report.html")


def test_what_a_record_lacks_does_not_show() -> None:
    assert recorded(None) is None
    shown = recorded({"claim": {"statement": "evidence"}})
    assert shown is not None
    assert shown["statement"] == "evidence"
    assert shown["attacks"] == shown["who"] == shown["not_claimed"] == []
    assert attack_rows({"attacks": {"odd": {"outcome": "new word"}}}) == [
        {"name": "odd", "outcome": "new word", "tone": "none", "score": "\N{EN DASH}", "interval": ""}
    ]
