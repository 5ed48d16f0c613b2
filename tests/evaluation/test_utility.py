"""--utility: what is asked for, and what cannot be; needs no lm-eval."""

from __future__ import annotations

import json

import pytest

from builders import byte_level_tokenizer, tiny_model
from loku import cli
from loku.errors import InputError
from loku.evaluation import utility
from loku.evaluation.assembly import Identity, suite_results
from loku.evaluation.results import read_results, write_results
from loku.evaluation.utility import add_utility, load_tasks, parse_utility, utility_figures

TALK = [{"context": "Hi", "reply": "Ho"}, {"context": ["Hi", "Ho"], "reply": "Hi"}]


@pytest.fixture
def folder(tmp_path):
    made = {
        "talk": TALK,
        "lambada": [{"text": "She wrote it."}],
        "one": [{"text": " word "}],
        "pubmed": [{"question": "Is it?", "context": ["It", "is."], "final_decision": "Yes "}],
        "bare": [{"question": "Is it?", "final_decision": "yes"}],
        "odd": [{"question": "Is it?", "abstract": "It.", "final_decision": "perhaps"}],
        "empty": [{"text": " "}],
    }
    for name, rows in made.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(utility, "lm_eval_version", lambda: "0.4.13")


def test_what_is_asked_for(folder, installed):
    found = parse_utility(f"piqa, lambada={folder}/lambada.jsonl,pubmedqa={folder}/pubmed.jsonl")
    assert found.names == ("piqa",)
    assert list(found.local) == ["lambada", "pubmedqa_pubmed"]
    assert found.local["pubmedqa_pubmed"][1].rows == (
        {"question": "Is it?", "context": "It\nis.", "final_decision": "yes"},
    )
    hashes = found.hashes
    assert set(hashes) == {"piqa", "lambada", "pubmedqa_pubmed"}


@pytest.mark.parametrize(
    ("asked", "given", "remedy"),
    [
        ("lamda={}/lambada.jsonl", "'lamda={}/lambada.jsonl' is of no known kind.", "Did you mean 'lambada'?"),
        ("lambada", "'lambada' needs rows.", "Write lambada=FILE"),
        ("piqa,piqa", "names 'piqa' twice.", "Name each task once"),
        ("dialogue={0}/talk.jsonl,dialogue={0}/talk.jsonl", "names 'dialogue_talk' twice.", "rename one"),
        ("lambada={}/one.jsonl", "row 0 has no word before its last.", "two words"),
        ("pubmedqa={}/bare.jsonl", "row 0 has no context.", "`context` (or `abstract`)"),
        ("pubmedqa={}/odd.jsonl", "row 0 has no answer yes, no or maybe.", "`final_decision`"),
        ("perplexity={}/empty.jsonl", "row 0 is empty.", "Leave empty rows out."),
        ("perplexity={}/none.jsonl", "does not exist.", ""),
    ],
)
def test_what_cannot_be_used_is_refused(folder, installed, asked, given, remedy):
    with pytest.raises(InputError) as refused:
        parse_utility(asked.format(folder))
    assert given.format(folder) in str(refused.value)
    assert remedy in str(refused.value)


def test_without_the_package_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setattr(utility, "lm_eval_version", lambda: "")
    for asked in ("piqa", f"perplexity={folder}/lambada.jsonl"):
        with pytest.raises(InputError, match=r"package lm_eval, which is not installed\.\npip install lm-eval, or"):
            parse_utility(asked)
    found = parse_utility(f"dialogue={folder}/talk.jsonl")  # needs none
    assert load_tasks(found) is None


def test_dialogues_are_added_to_results(folder, tmp_path):
    asked = parse_utility(f"dialogue={folder}/talk.jsonl")
    bare = suite_results(
        tiny_model(),
        "utility",
        Identity("m"),
        started=0,
        data={},
        rows={},
        settings={},
        sets={},
        summary={"other": 1.0},
    )
    found = add_utility(bare, tiny_model(), byte_level_tokenizer(), asked, max_new_tokens=4, keep_text=True)
    assert set(found.summary) == {"other", "dialogue_talk_f1", "dialogue_talk_f1_stderr"}
    assert set(utility_figures(found)) == {"dialogue_talk_f1", "dialogue_talk_f1_stderr"}
    assert found.data["dialogue_talk"]["rows"] == found.sets["dialogue_talk"].rows == 2
    assert len(found.texts) == 2
    assert read_results(write_results(found, tmp_path)).summary == found.summary


def test_the_suite_of_its_own(folder, tmp_path, model_folder, capsys):
    arguments = ["--model", model_folder, "--suite", "utility", "--output", tmp_path / "out"]
    assert cli.main(["evaluate", *map(str, arguments)]) == 2
    assert "--utility is missing.\nName tasks" in capsys.readouterr().err
    arguments += ["--utility", f"dialogue={folder}/talk.jsonl", "--max-new-tokens", 4]
    assert cli.main(["evaluate", *map(str, arguments)]) == 0
    assert "dialogue_talk_f1: " in capsys.readouterr().out
    assert cli.main(["evaluate", *map(str, arguments)]) == 0
    assert "the same was measured before" in capsys.readouterr().out


def test_with_another_suite(folder, model_folder, forget_file, capsys):
    arguments = ["--model", model_folder, "--forget", forget_file, "--utility", f"dialogue={folder}/talk.jsonl"]
    arguments += ["--max-new-tokens", 3, "--json"]
    assert cli.main(["evaluate", *map(str, arguments)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["sets"]) == {"forget", "dialogue_talk"}
    assert {"dialogue_talk_f1"} <= set(found["summary"])
