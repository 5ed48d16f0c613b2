"""What may be published: names without places, keyed hashes, and the command that repeats a run."""

from __future__ import annotations

import shlex

import pytest

from loku.cli import build_parser
from loku.config import UnlearnOptions, resolve
from loku.data.sources import load_records
from loku.disclosure import command_line, numbers_in, public_settings, public_verdict, read_salt, row_fields
from loku.errors import InputError
from loku.report.card import public_source


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("/home/mira/case-17/forget.jsonl", "forget.jsonl"),
        ("case-17/forget.jsonl[0:5]", "forget.jsonl[0:5]"),
        ("./rows.json.gz", "rows.json.gz"),
        ("C:\\Users\\mira\\rows.csv", "rows.csv"),
        ("tofu/forget10", "tofu/forget10"),
        ("owner/name:train", "owner/name:train"),
        ("rows in memory", "rows in memory"),
    ],
)
def test_a_sources_place_is_not_published(name, public):
    assert public_source(name) == public


def test_settings_lose_their_places_and_nothing_else():
    settings = {"model": "/m/target", "forget": "/d/f.jsonl", "output": "/o", "data_dir": "/b", "rank": 4, "seed": 1}
    assert public_settings(settings) == {"model": "target", "forget": "f.jsonl", "rank": 4, "seed": 1}


def test_a_verdict_names_models_without_their_places():
    verdict = {"level": "x", "sentence": "told from '/m/retain' and '/m/retain-2'", "rests_on": "/m/retain"}
    found = public_verdict(verdict, ["/m/retain", "/m/retain-2"])
    assert found == {"level": "x", "sentence": "told from 'retain' and 'retain-2'", "rests_on": "retain"}
    assert public_verdict(None, []) is None


@pytest.mark.parametrize("method", ["loku", "npo", "ihl"])
def test_the_command_resolves_to_the_settings_that_it_was_made_of(method):
    given = {
        "model": "target", "forget": "my rows.jsonl", "retain": "self", "method": method, "rank": 4, "save_steps": -1,
        "forget_options": {"beta": 0.2}, "evaluate": False, "keep_text": True, "learning_rate": 3e-5, "alpha": 7.0,
        "importance_eps": 1e-4,
    }  # fmt: skip
    if method != "npo":
        given.pop("forget_options")
    wanted = resolve(UnlearnOptions, {}, given).as_dict()
    line = command_line(wanted, {"device": "cpu", "threads": 2})
    flags = vars(build_parser().parse_args(shlex.split(line)[1:]))
    assert flags.pop("verb") == "unlearn"
    flags.pop("recipe")
    found = resolve(UnlearnOptions, {}, flags).as_dict()
    assert found == wanted | {"threads": 2, "output": "again"}


def test_only_numbers_of_nested_values_are_kept():
    value = {"a": 1, "b": "Ulm", "c": {"d": 0.5, "e": ["Ulm"], "f": float("nan")}, "g": None, "h": True}
    assert numbers_in(value) == {"a": 1.0, "c": {"d": 0.5, "e": []}}
    assert numbers_in([1, "Ulm", [0.5]]) == [1.0, [0.5]]
    assert numbers_in("Ulm") is None


def test_a_rows_fields_are_those_that_say_something():
    (record,) = load_records([{"prompt": "Who?", "completion": "Mira.", "id": 7}])
    assert row_fields(record) == {"question": "Who?", "answer": "Mira.", "verbatim": True}


@pytest.mark.parametrize("content", ["", "zz", "ab12", "\N{SNOWMAN}"])
def test_what_is_no_salt_is_refused(tmp_path, content):
    (tmp_path / "salt").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read"):
        read_salt(tmp_path / "salt")
