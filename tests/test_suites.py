"""The benchmark suites, other formats and comparisons of `loku evaluate`, by hand."""

from __future__ import annotations

import json

import pytest

from builders import CORPUS, byte_level_tokenizer, tiny_model
from conftest import perturbed, rows
from loku import cli
from loku.config import EvaluateOptions
from loku.evaluation.results import SUITES
from loku.suites import _SUITES


def run(capsys, *arguments):
    status = cli.main(["evaluate", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def write(path, made):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def test_names_agree():
    assert set(EvaluateOptions.fields()["suite"].metadata["choices"]) == set(SUITES) == set(_SUITES)


@pytest.fixture
def model(model_folder):
    return ("--model", model_folder)


def test_tdec_with_csv_files(capsys, tmp_path, model):
    data = tmp_path / "targets.csv"
    data.write_text(
        "doc_id,corpus,text\n" + "".join(f'{n},x,"{text.replace(chr(34), "")}"\n' for n, text in enumerate(CORPUS))
    )
    wiki = write(tmp_path / "wiki.jsonl", [{"text": f"{text} {text}"} for text in CORPUS])
    arguments = ("--suite", "tdec", "--data", data, "--validation", f"{wiki}[0:2]", "--max-length", 40)
    status, out, _ = run(capsys, *model, *arguments, "--output", tmp_path / "before")
    assert status == 0
    assert "forget el_10" in out
    assert "level_el_10: " in out
    target = tmp_path / "before" / "results.json"
    status, out, _ = run(capsys, *model, *arguments, "--target", target, "--json")
    assert status == 0
    assert set(json.loads(out)["sets"]) == {"forget", "wiki"}
    # The same evaluation may be repeated in its folder; another one is refused.
    assert run(capsys, *model, *arguments, "--output", tmp_path / "before")[0] == 0
    status, _, err = run(capsys, *model, "--suite", "tdec", "--data", data, "--output", tmp_path / "before")
    assert status == 2
    assert "holds results of something else (other data)" in err


def test_lume_muse_and_rwku_from_the_data_folder(capsys, tmp_path, model):
    probes = [
        {"id": f"x{kind}0", "input": "Who wrote it?", "output": "She", "task": f"Task{task}"}
        for task in (1, 2, 3)
        for kind in ("sc", "qa")
    ]
    for name in ("forget", "retain"):
        write(tmp_path / "lume" / f"{name}.jsonl", probes)
    members = write(tmp_path / "members.jsonl", [{"document": "She wrote it."}])
    others = write(tmp_path / "others.jsonl", [{"document": "They did not."}])
    write(tmp_path / "muse" / "news" / "knowmem" / "forget_qa.jsonl", rows(2))
    probe = {"level": "1", "type": "cloze", "query": "Mira was ___.", "answer": "born"}
    write(tmp_path / "rwku" / "neighbor_level1.jsonl", [probe])
    common = (*model, "--data-dir", tmp_path, "--max-new-tokens", 4, "--json", "--suite")
    status, out, _ = run(capsys, *common, "lume", "--members", members, "--nonmembers", others, "--mmlu", 0.5)
    assert status == 0
    assert {"task_aggregate", "mia_score", "mmlu", "final_score", "final_score_without_mmlu"} <= set(
        json.loads(out)["summary"]
    )
    status, out, err = run(capsys, *common, "muse")
    assert status == 0
    assert list(json.loads(out)["summary"]) == ["knowmem_forget"]
    assert "Not measured, since these files are missing: verbmem/forget" in err
    status, out, _ = run(capsys, *common, "rwku", "--keep-text", "--output", tmp_path / "eval")
    assert status == 0
    assert (tmp_path / "eval" / "examples.jsonl").is_file()


@pytest.fixture
def tofu(tmp_path):
    """A data folder like the benchmark's, with rows made here."""
    sets = {
        "forget01_perturbed": rows(4),
        "retain_perturbed": rows(4, 30),
        "real_authors_perturbed": rows(3, 60),
        "world_facts_perturbed": rows(3, 70),
    }
    for name, data in sets.items():
        write(tmp_path / "data" / "tofu" / f"{name}.json", [perturbed(row) for row in data])
    write(tmp_path / "data" / "tofu" / "holdout01.json", rows(4, 90))
    return ("--suite", "tofu", "--forget-split", "forget01", "--data-dir", tmp_path / "data")


def test_other_formats_are_written_and_serve_as_references(capsys, tmp_path, model, tofu):
    sets = ("--sets", "forget,retain,real_authors,world_facts,holdout")
    for form, names in {
        "tofu": ["eval_log_aggregated.json"],
        "open-unlearning": ["TOFU_EVAL.json", "TOFU_SUMMARY.json"],
    }.items():
        folder = tmp_path / form
        status, out, _ = run(capsys, *model, *tofu, *sets, "--write-logs", form, "--output", folder)
        assert status == 0
        assert {path.name for path in folder.iterdir()} == {"cache", "results.json", *names}
        assert "born" not in (folder / names[0]).read_text()  # texts only with --keep-text
        summary = json.loads((folder / "results.json").read_text())["summary"]
        assert {"mia_auc", "mia_auc_zlib", "mia_auc_min_k_plus_plus"} <= set(summary)
        if form == "open-unlearning":
            written = json.loads((folder / names[0]).read_text())["retain_Q_A_ROUGE"]["value_by_index"]["0"]
            assert set(written) == {"rouge1_recall", "rougeL_f1", "rougeL_recall"}
        status, out, _ = run(capsys, "--from-logs", folder / names[0], "--retain-logs", folder / names[0], "--json")
        assert status == 0
        assert json.loads(out)["model_utility"] == pytest.approx(summary["model_utility"])
        status, out, _ = run(capsys, *model, *tofu, "--reference", folder / names[0], "--json")
        assert json.loads(out)["summary"]["forget_quality"] == 1.0
    status, _, _ = run(
        capsys, *model, *tofu, *sets, "--write-logs", "open-unlearning", "--output", tmp_path / "compared",
        "--reference", tmp_path / "tofu" / "results.json",
    )  # fmt: skip
    written = json.loads((tmp_path / "compared" / "TOFU_SUMMARY.json").read_text())
    assert written["mia_reference"] == 0.5  # the reference is the model itself: every row ties
    status, _, _ = run(
        capsys, *model, *tofu, "--holdout", tmp_path / "data/tofu/holdout01.json", "--sets", "forget", "--keep-text",
        "--write-logs", "open-unlearning", "--output", tmp_path / "texts",
    )  # fmt: skip
    assert status == 0
    assert "born" in (tmp_path / "texts" / "TOFU_EVAL.json").read_text()


def test_costly_figures_on_request(capsys, tmp_path, model, model_folder, forget_file):
    holdout = write(tmp_path / "holdout.jsonl", rows(3, 40))
    status, out, _ = run(
        capsys, *model, "--forget", forget_file, "--holdout", holdout, "--extras", "gradient_norm", "--json",
        "--reference-model", model_folder, "--max-new-tokens", 3,
    )  # fmt: skip
    assert status == 0
    found = json.loads(out)
    assert 0 <= found["summary"]["mia_auc_gradient_norm"] <= 1
    assert found["sets"]["forget"]["metrics"]["output_nll"]["mean"] > 0


def test_two_evaluations_are_compared_and_seeds_aggregated(capsys, tmp_path, model, forget_file):
    other = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(other)
    byte_level_tokenizer().save_pretrained(other)
    for name, source in {"a": model[1], "b": other}.items():
        status, _, _ = run(
            capsys, "--model", source, "--forget", forget_file, "--max-new-tokens", 3, "--output", tmp_path / name
        )
        assert status == 0
    files = [tmp_path / "a" / "results.json", tmp_path / "b"]
    status, out, _ = run(capsys, "--compare", *files, "--output", tmp_path / "compared")
    assert status == 0
    assert "probability" in out
    found = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    assert found["sets"]["forget"]["probability"]["rows"] == 5
    status, out, _ = run(capsys, "--seeds", *files, "--json")
    assert status == 0
    assert json.loads(out)["runs"] == 2
    status, out, _ = run(capsys, "--seeds", files[0], "--output", tmp_path / "compared")
    assert status == 0
    assert "seeds.json" in out


def test_what_cannot_be_used_is_refused(capsys, tmp_path, model, forget_file, monkeypatch):
    monkeypatch.delenv("LOKU_DATA_DIR", raising=False)

    def refused(given, remedy, *arguments):
        status, _, err = run(capsys, *arguments)
        assert status == 2, err
        assert given in err
        assert remedy in err

    out = ("--output", tmp_path / "out")
    refused("--data is missing.", "Suite tdec measures texts", *model, "--suite", "tdec", *out)
    (tmp_path / "bare" / "lume").mkdir(parents=True)
    bare = ("--data-dir", tmp_path / "bare")
    refused("--forget is missing.", "or --data-dir with lume/forget.jsonl", *model, "--suite", "lume", *bare, *out)
    refused("cannot be loaded from the hub", "Check the name", *model, "--suite", "rwku", *bare, *out)  # offline
    refused(
        "--corpus 'bbc' is not known.", "Valid names are: books, news.", *model, "--suite", "muse", "--corpus", "bbc"
    )
    refused(
        "--extras was given with --suite rwku.",
        "Only suites own and tofu",
        *model,
        "--suite",
        "rwku",
        "--extras",
        "memo",
    )
    refused("--extras 'meo' is not known.", "Did you mean 'memo'?", *model, "--forget", forget_file, "--extras", "meo")
    refused("--mmlu 1.5 is too large.", "Give at most 1.", *model, "--suite", "lume", "--mmlu", 1.5)
    logs = ("--write-logs", "tofu")
    refused("--write-logs was given with --suite own.", "TOFU's", *model, "--forget", forget_file, *out, *logs)
    refused("--write-logs was given without --output.", "Give a folder", *model, "--suite", "tofu", "--json", *logs)
    refused("--compare got 1 values.", "Give 2.", "--compare", "x.json")
    refused("There is no results file 'x.json'.", "results.json", "--compare", "x.json", "y.json")
    text = write(tmp_path / "text.jsonl", [{"text": "The quick brown fox."}])
    twice = f"{text},{text}"
    refused(
        "two sets of the name 'text'", "Rename", *model, "--suite", "tdec", "--data", text, "--validation", twice, *out
    )
    assert run(capsys, *model, "--forget", forget_file, "--max-new-tokens", 2, "--output", tmp_path / "own")[0] == 0
    reference = ("--reference", tmp_path / "own" / "results.json")
    write(tmp_path / "muse" / "news" / "knowmem" / "forget_qa.jsonl", rows(1))
    refused("is of suite 'own'.", "suite muse", *model, "--suite", "muse", "--data-dir", tmp_path, *out, *reference)
    assert not (tmp_path / "out").exists()
