"""`loku evaluate` asked again: answered at once, gone on with, or measured anew, and what its cache may hold."""

from __future__ import annotations

import json

import pytest
from safetensors.numpy import load_file

from builders import tiny_model
from conftest import rows
from loku import cli, evaluate
from loku.evaluation import cache, generation, scoring


@pytest.fixture
def call(capsys, tmp_path, model_folder, forget_file):
    """Run `loku evaluate` into one folder; return what it said."""

    def run(*more, status=0, output="eval"):
        arguments = ("evaluate", "--model", model_folder, "--forget", forget_file, "--max-new-tokens", 6, "--output")
        assert cli.main([str(a) for a in (*arguments, tmp_path / output, *more)]) == status
        return capsys.readouterr().out

    return run


@pytest.fixture
def work(monkeypatch):
    """Counts of what is done from now on: models loaded, batches scored, batches continued."""
    done = {"loaded": 0, "scored": 0, "continued": 0}

    def counted(module, name, what):
        function = getattr(module, name)

        def count(*arguments, **options):
            done[what] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, count)

    counted(evaluate, "load_model", "loaded")
    counted(scoring, "tree_statistics", "scored")
    counted(generation, "decode", "continued")
    return done


def spent(work):
    """Which of the three were done since this was last asked."""
    found = tuple(int(count > 0) for count in work.values())
    work.update(dict.fromkeys(work, 0))
    return found


def results(tmp_path, output="eval"):
    return json.loads((tmp_path / output / "results.json").read_text())


def test_the_same_call_is_answered_without_the_model(call, work, tmp_path):
    assert "results written to" in call()
    assert spent(work) == (1, 1, 1)
    before = results(tmp_path)
    assert "the same was measured before: results are in" in call()
    assert spent(work) == (0, 0, 0)
    assert json.loads(call("--json")) == before == results(tmp_path)
    assert spent(work) == (0, 0, 0)


def test_other_settings_are_measured_from_the_same_scores(call, work, tmp_path):
    call()
    spent(work)
    call("--seed", 7)
    assert spent(work) == (1, 0, 1)
    assert results(tmp_path)["settings"]["seed"] == 7
    call("--no-cache", "--seed", 7)
    assert spent(work) == (1, 1, 1)
    call("--max-rows", 2)
    assert spent(work) == (1, 1, 1)


def test_changed_results_or_models_are_measured_anew(call, work, tmp_path, model_folder):
    call()
    file = tmp_path / "eval" / "results.json"
    file.write_text(file.read_text().replace('"seconds"', '"seconds "'))
    spent(work)
    call()
    assert spent(work) == (1, 0, 1)
    (tmp_path / "eval" / "cache" / "finished.json").write_text("{")
    call()
    assert spent(work) == (1, 0, 1)
    other = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(other)
    for part in model_folder.glob("tokenizer*"):
        (other / part.name).write_bytes(part.read_bytes())
    assert cli.main(["evaluate", "--model", str(other), "--forget", str(tmp_path / "forget.jsonl"), "--output",
                     str(tmp_path / "eval")]) == 2  # fmt: skip


def test_an_interrupted_evaluation_goes_on(call, work, monkeypatch, tmp_path):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generation, "decode", killed)
        call(status=130)
    assert not (tmp_path / "eval" / "results.json").exists()
    spent(work)
    call()
    assert spent(work) == (1, 0, 1)
    call(output="at_once")
    one, other = results(tmp_path), results(tmp_path, "at_once")
    assert one["sets"] == other["sets"]


def test_no_text_is_kept_unless_texts_are_asked_for(call, work, tmp_path):
    call()
    kept = sorted(file.name.split("-")[0] for file in (tmp_path / "eval" / "cache" / "batches").iterdir())
    assert set(kept) == {"scores"}
    for file in (tmp_path / "eval" / "cache").rglob("*.json"):
        assert set(json.loads(file.read_text())) == {"request", "results.json", "examples.jsonl"}
    call("--keep-text", output="texts")
    spent(work)
    (tmp_path / "texts" / "examples.jsonl").unlink()
    call("--keep-text", output="texts")
    assert spent(work) == (1, 0, 0)
    assert len((tmp_path / "texts" / "examples.jsonl").read_text().splitlines()) == len(rows(5))
    (file,) = (tmp_path / "texts" / "cache" / "batches").glob("continuations-*")
    assert set(load_file(file)) == {"ids", "counts"}


def test_without_a_cache_nothing_is_kept(call, tmp_path):
    call("--no-cache")
    assert [file.name for file in (tmp_path / "eval").iterdir()] == ["results.json"]


def test_another_version_of_the_numbers_is_another_cache(call, work, monkeypatch):
    call()
    spent(work)
    monkeypatch.setattr(cache, "VERSION", 0)
    call("--seed", 7)
    assert spent(work) == (1, 1, 1)
