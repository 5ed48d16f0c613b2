"""`loku reference`: the target's recipe without the forget rows, measured, cached, and taken by `loku unlearn`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from conftest import rows
from loku import cli
from loku.data.sources import load_records
from loku.errors import InputError
from loku.models import load_tokenizer
from loku.retain_only import without

FAST = ("--batch-size", 2, "--grad-accum", 1, "--learning-rate", "1e-2", "--threads", 1, "--epochs", 2)
SETTINGS = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def written(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def whole(tmp_path):
    return written(tmp_path / "whole.jsonl", rows(12))


@pytest.fixture
def target(capsys, tmp_path, model_folder, whole):
    folder = tmp_path / "target"
    assert run(capsys, "finetune", "--model", model_folder, "--data", whole, *FAST, "--output", folder)[0] == 0
    return folder


def test_rows_are_left_out_by_what_they_say(capsys):
    full = load_records(rows(6))
    asked = [
        {"question": "WHERE was  person 4 born?", "answer": "In the town of E28."},
        {"question": "q", "answer": "a"},
    ]
    kept = without(full, load_records(asked))
    assert [record.index for record in kept] == [0, 1, 2, 3, 5]
    assert "warning: 1 of 2 forget rows do not stand in --data word for word" in capsys.readouterr().err
    assert kept.sha256 != full.sha256
    assert kept.sha256 != without(full, load_records(rows(1))).sha256
    with pytest.raises(
        InputError, match=r"None of the 2 forget rows stands in --data.*\nGive the rows that the target"
    ):
        without(full, load_records(rows(2, start=50)))
    with pytest.raises(InputError, match=r"holds nothing but forget rows.\nGive all rows"):
        without(full, load_records(rows(9)))


def test_the_targets_recipe_without_the_forget_rows(capsys, tmp_path, model_folder, target, retain_file):
    forget = written(tmp_path / "forget.jsonl", rows(5))
    arguments = ("reference", "--like", target, "--forget", forget, "--retain", retain_file, "--max-new-tokens", 4)
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    (folder,) = tmp_path.glob("target-retain-only-*")
    assert f"use it: loku unlearn ... --retain-only-model {folder}" in out
    assert "on 7 rows" in out
    assert "verdict" not in out
    assert "retain-only" in out
    # As many steps as the target's, with the same schedule, on the kept rows alone: that training by hand.
    assert [line["learning_rate"] for line in log(folder)] == [line["learning_rate"] for line in log(target)]
    kept = written(tmp_path / "kept.jsonl", rows(7, start=5))
    by_hand = ("--model", model_folder, "--data", kept, *FAST, "--max-steps", 12, "--warmup-steps", 6)
    assert run(capsys, "finetune", *by_hand, "--output", tmp_path / "by-hand")[0] == 0
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "by-hand"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    results = json.loads((folder / "results.json").read_text())
    assert results["verdict"] is None
    assert set(results["sets"]) == {"forget", "retain"}
    record = json.loads((folder / "run.json").read_text())
    assert record["data"]["left_out"]["rows"] == 5
    # Asked again it is there; nothing is trained or measured.
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert f"the retain-only model is there already: {folder}" in out
    assert "the same was measured before" in out
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == before
    # Other forget rows or settings are another model; other rows to measure are not.
    other = written(tmp_path / "other.jsonl", rows(3))
    assert run(capsys, "reference", "--like", target, "--forget", other)[0] == 0
    assert run(capsys, "reference", "--like", target, "--forget", forget, "--epochs", 1)[0] == 0
    assert len(list(tmp_path.glob("target-retain-only-*"))) == 3
    unlearn = (
        "unlearn", "--model", target, "--forget", forget, "--retain", retain_file, "--rank", 4, "--batch-size", 5,
        "--grad-accum", 1, "--max-steps", 1, "--threads", 1, "--max-new-tokens", 4, "--retain-only-model", folder,
    )  # fmt: skip
    status, out, _ = run(capsys, *unlearn, "--output", tmp_path / "run")
    assert status == 0
    assert f"the retain-only model was measured before on these rows: {folder / 'results.json'}" in out
    copied = tmp_path / "run" / "results.retain_only.json"
    assert copied.read_bytes() == (folder / "results.json").read_bytes()
    # Not of these weights, or not with these settings: measured again, with the same figures.
    status, out, _ = run(capsys, *unlearn, "--max-length", 400, "--output", tmp_path / "longer")
    assert status == 0
    assert "was measured before" not in out
    again = json.loads((tmp_path / "longer" / "results.retain_only.json").read_text())
    assert again["sets"]["forget"]["per_example"] == results["sets"]["forget"]["per_example"]
    shutil.copy(target / "model.safetensors", folder / "model.safetensors")
    status, out, _ = run(capsys, *unlearn, "--output", tmp_path / "changed")
    assert status == 0
    assert "was measured before" not in out
    changed = json.loads((tmp_path / "changed" / "results.retain_only.json").read_text())
    assert changed["sets"]["forget"]["per_example"] != results["sets"]["forget"]["per_example"]


def test_an_interrupted_reference_goes_on(capsys, tmp_path, target):
    forget = written(tmp_path / "forget.jsonl", rows(5))
    arguments = ("reference", "--like", target, "--forget", forget, "--max-new-tokens", 4, "--output", tmp_path / "ref")
    assert run(capsys, *arguments, "--output", tmp_path / "whole-ref")[0] == 0
    assert run(capsys, *arguments)[0] == 0
    (tmp_path / "ref" / "model.safetensors").unlink()
    (tmp_path / "ref" / "results.json").unlink()
    assert run(capsys, *arguments)[0] == 0  # from its last checkpoint
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole-ref", "ref"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (tmp_path / "ref" / "results.json").is_file()
    written(forget, rows(4))
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "holds a run on other input (changed since: train, left_out)." in err


def test_a_new_models_reference_shares_the_targets_vocabulary(capsys, tmp_path, whole):
    (tmp_path / "model.json").write_text(json.dumps(SETTINGS | {"num_attention_heads": 4}))
    new = ("--new-model", tmp_path / "model.json", "--vocab-size", 300, "--data", whole, *FAST)
    assert run(capsys, "finetune", *new, "--output", tmp_path / "target")[0] == 0
    forget = written(tmp_path / "forget.jsonl", rows(5))
    ref = tmp_path / "ref"
    arguments = ("reference", "--like", tmp_path / "target", "--forget", forget, "--max-new-tokens", 4, "--output", ref)
    assert run(capsys, *arguments)[0] == 0
    assert load_tokenizer(str(tmp_path / "target")).get_vocab() == load_tokenizer(str(ref)).get_vocab()


def test_bad_input_is_refused_before_any_work(capsys, tmp_path, model_folder, target, whole):
    forget = written(tmp_path / "forget.jsonl", rows(5))

    def refused(given, remedy, *arguments):
        before = set(tmp_path.iterdir())
        status, _, err = run(capsys, "reference", *arguments)
        assert status == 2, err
        assert given in err
        assert remedy in err
        assert set(tmp_path.iterdir()) == before

    refused("--data is missing.", "Give all rows", "--forget", forget, "--output", tmp_path / "x")
    refused("--forget is missing.", "must not learn", "--like", target)
    refused("--output is missing.", "or the target's with --like", "--data", whole, "--forget", forget)
    refused("holds no config.yaml of `loku finetune`.", "Give the folder", "--like", model_folder, "--forget", forget)
    strange = written(tmp_path / "strange.jsonl", rows(2, start=70))
    refused("None of the 2 forget rows stands in --data", "in the same format", "--like", target, "--forget", strange)
    refused("--retain", "none.jsonl", "--like", target, "--forget", forget, "--retain", tmp_path / "none.jsonl")
