from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loku.errors import InputError
from loku.report.artefacts import at, number, read_folder, read_folders, section


def _damage(run: Path, name: str, text: str) -> Path:
    (run / name).write_text(text)
    return run


@pytest.mark.parametrize(
    ("name", "text", "given", "remedy"),
    [
        ("results.json", "{", "results.json' is not readable JSON", "Restore the file from a copy.*loku evaluate"),
        ("run.json", "[1]", "run.json' holds a list, not a JSON object", "Restore the file from a copy.*loku unlearn"),
        (
            "run.json",
            '{"schema_version": 9}',
            "schema_version 9; this version of loku reads 1",
            "version of loku that wrote",
        ),
        ("metrics.jsonl", '{"step": \n{"step": 2}\n', "Line 1 of the file .*metrics.jsonl' is not readable", "Restore"),
        ("examples.jsonl", "3\n", "Line 1 of the file .*examples.jsonl' is not a JSON object", "Restore the file"),
    ],
)
def test_damaged_files(make_run: Callable[..., Path], name: str, text: str, given: str, remedy: str) -> None:
    with pytest.raises(InputError, match=given) as caught:
        read_folder(_damage(make_run(), name, text))
    caught.match(remedy)


def test_bytes_that_are_no_text(make_run: Callable[..., Path]) -> None:
    run = make_run()
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not UTF-8 text") as caught:
        read_folder(run)
    caught.match("Restore the file from a copy")


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no folder '.*absent'") as caught:
        read_folder(tmp_path / "absent")
    caught.match("Give a run folder made by `loku unlearn`")
    with pytest.raises(InputError, match=r"holds neither run.json nor results.json") as caught:
        read_folder(tmp_path)
    caught.match("or a folder written by `loku evaluate`")


def test_none_and_twice(make_run: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="No run folder was given") as caught:
        read_folders([])
    caught.match("Give one run folder, or several")
    run = make_run()
    with pytest.raises(InputError, match="was given twice") as caught:
        read_folders([run, run / "."])
    caught.match("Give each run folder once")


def test_a_cut_last_line_is_dropped_and_said(make_run: Callable[..., Path]) -> None:
    folder = read_folder(_damage(make_run(), "metrics.jsonl", '{"step": 1}\n{"st'))
    assert folder.curves == [{"step": 1}]
    assert folder.problems == ["The last line of metrics.jsonl is incomplete and was left out."]


def test_unusual_line_breaks_inside_texts_do_not_cut_them(make_run: Callable[..., Path]) -> None:
    folder = read_folder(_damage(make_run(), "examples.jsonl", '{"answer": "a\u2028b"}\n'))
    assert folder.examples["unlearned"] == [{"answer": "a\u2028b"}]


@pytest.fixture
def nested() -> dict:
    return {"a": {"b": 1, "c": [2]}}


def test_access(nested: dict) -> None:
    assert at(nested, "a", "b") == 1
    assert at(nested, "a", "c", "d") is None
    assert at(None, "a") is None
    assert section(nested, "a", "c") == {}
    assert [number(value) for value in (1, 2.5, True, "3", None, float("nan"), float("inf"))] == [1, 2.5, *[None] * 5]
