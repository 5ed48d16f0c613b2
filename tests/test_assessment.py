"""Evidence after a run: what the retain-only reference may be, and rows that cannot be measured."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest

from builders import byte_level_tokenizer, tiny_model
from conftest import perturbed, rows
from evaluation_builders import small_log
from loku import cli
from loku.assessment import print_table
from loku.evaluation.metrics import Interval
from loku.evaluation.results import Results, SetResults
from loku.files import read_json, sha256_file


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_retain_only_model_of_another_vocabulary_is_refused(capsys, tmp_path, model_folder, forget_file, retain_file):
    other = byte_level_tokenizer(350)
    tiny_model(vocab_size=len(other)).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    arguments = ("--model", model_folder, "--forget", forget_file, "--retain", retain_file, "--rank", 4)
    status, _, err = run(
        capsys, "unlearn", *arguments, "--retain-only-model", tmp_path / "other", "--output", tmp_path / "run"
    )
    assert status == 2
    assert f"--retain-only-model '{tmp_path / 'other'}' has another vocabulary than the target model." in err
    assert "Train both from the same model and tokenizer" in err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def common(tmp_path, model_folder, retain_file):
    """A quick run on rows that truth ratios can be measured on."""
    forget = tmp_path / "perturbed.jsonl"
    forget.write_text("".join(json.dumps(perturbed(row)) + "\n" for row in rows(5)))
    return (
        "--model", model_folder, "--forget", forget, "--retain", retain_file, "--rank", 4, "--max-steps", 1,
        "--batch-size", 2, "--grad-accum", 1, "--threads", 1, "--max-new-tokens", 4,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["retain90.json", "retain90.json.gz"])
def test_an_official_log_is_a_reference(capsys, tmp_path, common, name):
    content = json.dumps(small_log(rows=5)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    output = tmp_path / "run"
    status, out, err = run(capsys, "unlearn", *common, "--retain-only-model", tmp_path / name, "--output", output)
    assert status == 0
    results = read_json(output / "results.json")
    assert f"verdict: {results['verdict']['level']}. {results['verdict']['sentence']}" in out
    assert results["summary"]["forget_quality_rows"] == 5
    assert results["reference"] == {"name": "retain90", "kind": "retain-only", "sha256": sha256_file(tmp_path / name)}
    assert f"'retain90' (sha256 {sha256_file(tmp_path / name)[:12]})" in results["verdict"]["rests_on"]
    assert "warning: The forget rows are not the same questions: 5 of 5 answers differ" in err
    assert not (output / "results.retain_only.json").exists()
    assert (output / "report.html").is_file()


def test_the_verdict_rests_on_the_results_file_that_can_be_hashed(capsys, tmp_path, common, model_folder):
    clean = shutil.copytree(model_folder, tmp_path / "clean")
    forget = common[3]
    assert run(capsys, "evaluate", "--model", clean, "--forget", forget, "--max-rows", 100, "--output", clean)[0] == 0
    given = clean / "results.json"
    given.write_text(given.read_text().replace("\n", "\n "))  # laid out by someone else: still the same file
    for output, reference in ((tmp_path / "one", given), (tmp_path / "two", clean)):
        assert run(capsys, "unlearn", *common, "--retain-only-model", reference, "--output", output)[0] == 0
        digest = sha256_file(output / "results.retain_only.json")
        results = read_json(output / "results.json")
        assert results["reference"]["sha256"] == digest
        assert f"(sha256 {digest[:12]})" in results["verdict"]["rests_on"]
    assert (tmp_path / "one" / "results.retain_only.json").read_bytes() == given.read_bytes()


def test_packed_results_are_a_reference(capsys, tmp_path, common, model_folder):
    assert (
        run(capsys, "evaluate", "--model", model_folder, "--forget", common[3], "--output", tmp_path / "clean")[0] == 0
    )
    packed = tmp_path / "clean.json.gz"
    packed.write_bytes(gzip.compress((tmp_path / "clean" / "results.json").read_bytes()))
    output = tmp_path / "run"
    assert run(capsys, "unlearn", *common, "--retain-only-model", packed, "--output", output)[0] == 0
    copy = output / "results.retain_only.json"
    assert copy.read_bytes() == (tmp_path / "clean" / "results.json").read_bytes()
    assert read_json(output / "results.json")["reference"]["sha256"] == sha256_file(copy)


def test_rows_that_cannot_be_measured_are_refused_before_any_work(capsys, tmp_path, common):
    def refused(given, remedy, *arguments):
        status, _, err = run(capsys, "unlearn", *common, "--output", tmp_path / "run", *arguments)
        assert status == 2, err
        assert given in err
        assert remedy in err
        assert not (tmp_path / "run").exists()

    def written(name, row):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
        return tmp_path / name

    question = written("question.jsonl", {"question": "Where was she born? " * 90, "answer": "In Ulm."})
    refused("--holdout row 0 has no answer token left", "Raise --max-length", "--holdout", question)
    refused("--general row 0 has no answer token left", "Raise --max-length", "--general", question)
    asked = written("asked.jsonl", rows(1)[0] | {"paraphrased_question": "Where was she born? " * 90})
    refused("--general row 0 has no answer token left", "Raise --max-length", "--general", asked)
    text = written("text.jsonl", {"text": "The quick brown fox jumps over the lazy dog. " * 40})
    refused("tokens, but the model reads 256 at most.", "Give --max-length 256 or less", "--general", text)
    assert run(capsys, "unlearn", *common, "--output", tmp_path / "run", "--general", text, "--max-length", 256)[0] == 0


def test_a_retain_only_model_that_cannot_be_loaded_is_refused(capsys, tmp_path, common, model_folder):
    other = shutil.copytree(model_folder, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "t5"}))
    output = ("--output", tmp_path / "run")
    status, _, err = run(capsys, "unlearn", *common, "--retain-only-model", other, *output)
    assert status == 2
    assert f"The model '{other}' (t5) is not a causal language model." in err
    assert not (tmp_path / "run").exists()


def test_the_table_has_one_order_and_says_what_is_no_virtue(capsys):
    def results(forget):
        found = {"probability": Interval(forget, forget - 0.01, forget + 0.01)}
        return Results("own", {}, {}, {}, {"forget": SetResults(1, found)}, {})

    models = {"unlearned": results(0.1), "retain_only": results(0.3), "target": results(0.9)}
    print_table(models)
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()][:2] == [
        ["target", "unlearned", "retain-only"],
        ["forget", "probability", "0.900", "0.100", "0.300"],
    ]
    assert "Better than retain-only is no virtue here: answer probability 0.10 (retain-only 0.30)." in out
    print_table(models | {"unlearned": results(0.29)})
    assert "virtue" not in capsys.readouterr().out
    print_table({"target": results(0.9), "unlearned": results(0.1)})
    assert "virtue" not in capsys.readouterr().out
