"""`loku evaluate` by hand: suites, references, official logs, one JSON object, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from builders import byte_level_tokenizer, tiny_model
from conftest import perturbed, rows
from loku import cli
from loku.data.sources import RecordSet
from loku.errors import InputError
from loku.evaluation.own import evaluate_own


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def data_dir(tmp_path):
    """A folder like LOKU_DATA_DIR, with rows made here."""
    folder = tmp_path / "data" / "tofu"
    folder.mkdir(parents=True)
    sets = {
        "forget01_perturbed": rows(6),
        "retain_perturbed": rows(6, 30),
        "real_authors_perturbed": rows(4, 60),
        "world_facts_perturbed": rows(4, 70),
    }
    for name, data in sets.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(perturbed(row)) + "\n" for row in data))
    return folder.parent


def test_tofu_with_a_reference(capsys, tmp_path, model_folder, data_dir):
    common = (
        "evaluate",
        "--model",
        model_folder,
        "--suite",
        "tofu",
        "--forget-split",
        "forget01",
        "--data-dir",
        data_dir,
    )
    assert run(capsys, *common, "--output", tmp_path / "retain")[0] == 0
    status, out, _ = run(
        capsys, *common, "--reference", tmp_path / "retain" / "results.json", "--output", tmp_path / "eval"
    )
    assert status == 0
    assert "model utility" in out
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert set(results["sets"]) == {"forget", "retain", "real_authors", "world_facts"}
    assert results["summary"]["forget_quality"] == 1.0  # the same model
    assert results["summary"]["forget_quality_rows"] == 6
    assert results["reference"]["sha256"]
    assert not list((tmp_path / "eval").glob("examples*"))


def test_target_model_and_retain_only_stand_side_by_side(capsys, tmp_path, model_folder, forget_file):
    other = tmp_path / "other"
    tiny_model(seed=3).save_pretrained(other)
    byte_level_tokenizer().save_pretrained(other)
    common = ("evaluate", "--forget", forget_file)
    for model, name in ((model_folder, "target"), (other, "reference")):
        assert run(capsys, *common, "--model", model, "--output", tmp_path / name)[0] == 0
    beside = ("--target", tmp_path / "target" / "results.json", "--reference", tmp_path / "reference")
    status, out, _ = run(capsys, *common, "--model", other, *beside, "--output", tmp_path / "eval")
    assert status == 0
    means = [
        json.loads((tmp_path / name / "results.json").read_text())["sets"]["forget"]["metrics"]["rougeL_recall"]["mean"]
        for name in ("target", "eval", "reference")
    ]
    lines = [line.split() for line in out.splitlines()]
    assert ["target", "model", "retain-only"] in lines
    assert ["forget", "ROUGE-L", *(f"{mean:.3f}" for mean in means)] in lines


def test_any_subset_of_the_tofu_sets(capsys, tmp_path, model_folder, data_dir):
    status, out, _ = run(
        capsys, "evaluate", "--model", model_folder, "--suite", "tofu", "--forget-split", "forget01",
        "--data-dir", data_dir, "--sets", "forget,retain", "--json",
    )  # fmt: skip
    assert status == 0
    results = json.loads(out)
    assert set(results["sets"]) == {"forget", "retain"}
    assert "model_utility" not in results["summary"]


def test_own_rows_with_holdout_and_texts(capsys, tmp_path, model_folder, forget_file, retain_file):
    holdout = tmp_path / "holdout.jsonl"
    holdout.write_text("".join(json.dumps(row) + "\n" for row in rows(5, 40)))
    status, out, _ = run(
        capsys, "evaluate", "--model", model_folder, "--suite", "own", "--forget", forget_file, "--retain", retain_file,
        "--holdout", holdout, "--keep-text", "--output", tmp_path / "eval",
    )  # fmt: skip
    assert status == 0
    assert "verdict:" in out
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert 0 <= results["summary"]["mia_auc"] <= 1
    assert {"probability", "rougeL_recall", "exact_memorisation", "extraction_strength", "repetition"} <= set(
        results["sets"]["forget"]["metrics"]
    )
    assert results["summary"]["retain_perplexity"] > 1
    texts = [json.loads(line) for line in (tmp_path / "eval" / "examples.jsonl").read_text().splitlines()]
    assert {row["set"] for row in texts} == {"forget", "retain", "holdout"}


def test_without_a_reference_the_verdict_claims_no_indistinguishability(capsys, tmp_path, model_folder, forget_file):
    status, out, _ = run(capsys, "evaluate", "--model", model_folder, "--forget", forget_file, "--json")
    assert status == 0
    assert "indistinguishability not measured" in json.loads(out)["verdict"]["sentence"].lower()


def test_what_cannot_be_evaluated_is_refused(capsys, tmp_path, model_folder, forget_file):
    def refused(given, remedy, *arguments):
        status, _, err = run(capsys, "evaluate", *arguments)
        assert status == 2, err
        assert given in err
        assert remedy in err

    model = ("--model", model_folder)
    refused("--model is missing.", "Give a model folder")
    refused("--forget is missing.", "Suite own measures your rows", *model)
    refused("--output is missing.", "or --json to print it", *model, "--forget", forget_file)
    refused("--retain-logs was given without --from-logs.", "Use --reference", *model, "--retain-logs", "x.json")
    refused("--suite 'tofo' is not known.", "Did you mean 'tofu'?", *model, "--suite", "tofo")
    refused(
        "holds no adapter_config.json.", "Give the `adapter` folder", *model, "--forget", forget_file, "--json",
        "--adapter", tmp_path,
    )  # fmt: skip
    refused("none.json", "results.json", *model, "--forget", forget_file, "--json", "--reference", "none.json")
    forget = ("--forget", forget_file, "--output", tmp_path / "out")
    refused("There is no reference 'none.json'", "Give the results.json", *model, *forget, "--reference", "none.json")
    refused("forget.jsonl' is a file.", "Give a folder for results.json.", *model, *forget, "--output", forget_file)
    under = (*model, *forget, "--output", forget_file / "sub")
    refused("' lies under '", "Give a path under a folder.", *under)
    refused("none.csv' does not exist.", "Give a file", *model, *forget, "--holdout", tmp_path / "none.csv")
    refused("--max-rows 0 is too small.", "Give at least 1.", *model, *forget, "--max-rows", 0)
    refused("There is no log file 'none.json'.", "eval_log", "--from-logs", "none.json", *forget)
    assert not (tmp_path / "out").exists()


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_results_of_a_run_are_not_overwritten(capsys, tmp_path, model_folder, forget_file):
    arguments = ("evaluate", "--model", model_folder, "--forget", forget_file, "--output")
    for command in ("unlearn", "demo"):
        folder = tmp_path / command
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"command": command}))
        status, _, err = run(capsys, *arguments, folder)
        assert status == 2
        assert f"--output '{folder}' holds a run of `loku {command}` with its own results." in err
        assert "Choose another folder: nothing there is overwritten." in err
        assert [p.name for p in folder.iterdir()] == ["run.json"]
    (folder / "run.json").write_text("{")
    status, _, err = run(capsys, *arguments, folder)
    assert status == 2
    assert "run.json' is not readable JSON" in err
    # A model's own folder is where its results belong.
    (folder / "run.json").write_text(json.dumps({"command": "finetune"}))
    assert run(capsys, *arguments, folder)[0] == 0
    assert (folder / "results.json").is_file()


def test_results_of_something_else_are_not_overwritten(capsys, tmp_path, model_folder, data_dir, forget_file):
    other = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(other)
    byte_level_tokenizer().save_pretrained(other)
    lora = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "adapter")
    evaluate, output = ("evaluate", "--model", model_folder), ("--output", tmp_path / "eval")
    own, adapter = ("--forget", forget_file), ("--adapter", tmp_path / "adapter")
    tofu = ("--suite", "tofu", "--forget-split", "forget01", "--sets", "forget", "--data-dir", data_dir)
    assert run(capsys, *evaluate, *own, *output)[0] == 0
    assert run(capsys, *evaluate, *own, *output, "--max-rows", 2)[0] == 0  # the same, with other settings
    before = contents(tmp_path / "eval")
    for arguments, names in (
        (("evaluate", "--model", other, *own), "model"),
        ((*evaluate, *own, *adapter), "adapter"),
        ((*evaluate, *own, "--retain", forget_file), "data"),
        ((*evaluate, *tofu), "suite, data"),
    ):
        status, _, err = run(capsys, *arguments, *output)
        assert status == 2, err
        assert f"--output '{tmp_path / 'eval'}' holds results of something else (other {names})." in err
        assert "Choose another folder: nothing there is overwritten." in err
        assert contents(tmp_path / "eval") == before
    with_adapter = (*evaluate, *own, *adapter, "--output", tmp_path / "adapted")
    assert [run(capsys, *with_adapter)[0] for _ in range(2)] == [0, 0]
    assert [run(capsys, *evaluate, *tofu, "--output", tmp_path / "tofu")[0] for _ in range(2)] == [0, 0]


def test_a_quantised_model_may_be_measured(capsys, monkeypatch, tmp_path, model_folder, forget_file):
    folder = shutil.copytree(model_folder, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    arguments = ("evaluate", "--model", folder, "--forget", forget_file, "--json")
    status, _, err = run(capsys, *arguments)  # no library for these weights here: that is all that is said
    assert status == 2
    assert f"The weights of '{folder}' cannot be loaded: " in err
    assert "is quantised" not in err
    placed = []

    def packed(name, *, device_map, **options):
        placed.append(device_map)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder)), {}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", packed)
    assert run(capsys, *arguments, "--device", "cpu")[0] == 0
    assert placed == [{"": torch.device("cpu")}]


def test_sets_without_rows_are_refused():
    none = RecordSet("nothing.jsonl", (), "ab", "memory")
    with pytest.raises(
        InputError, match=r"The forget set 'nothing\.jsonl' has no rows\.\nGive a set with at least one"
    ):
        evaluate_own(tiny_model(), byte_level_tokenizer(), forget=none)


def log(shift):
    """An official log with 4 rows a set, made up here."""

    def part():
        keys = {str(i): i for i in range(4)}
        return {
            "avg_gt_loss": {k: 0.1 + shift + 0.01 * i for k, i in keys.items()},
            "avg_paraphrased_loss": {k: 0.5 + shift + 0.01 * i for k, i in keys.items()},
            "average_perturb_loss": {k: [1.0 + 0.02 * i, 2.0, 3.0] for k, i in keys.items()},
            "rougeL_recall": dict.fromkeys(keys, 0.5),
            "generated_text": {k: [f"Q{i}", "x", f"A{i}"] for k, i in keys.items()},
        }  # fmt: skip

    sets = ("eval_log", "eval_log_forget", "eval_real_author_wo_options", "eval_real_world_wo_options")
    return {f"{name}.json": part() for name in sets}


def test_official_logs_give_one_json_object(capsys, tmp_path):
    (tmp_path / "full.json").write_text(json.dumps(log(0.0)))
    with gzip.open(tmp_path / "retain.json.gz", "wt") as handle:
        json.dump(log(1.0), handle)
    status, out, _ = run(
        capsys,
        "evaluate",
        "--from-logs",
        tmp_path / "full.json",
        "--retain-logs",
        tmp_path / "retain.json.gz",
        "--json",
    )
    assert status == 0
    found = json.loads(out)
    assert {"model_utility", "model_utility_arithmetic", "forget_quality", "sets", "warnings"} <= set(found)
    assert found["forget_quality"] == pytest.approx(2 / 70)  # two samples of 4, wholly apart: 2 / C(8, 4)


def test_official_logs_give_a_table_and_a_file(capsys, tmp_path):
    for name, shift in (("full", 0.0), ("retain", 1.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps(log(shift)))
    logs = ("evaluate", "--from-logs", tmp_path / "full.json", "--retain-logs", tmp_path / "retain.json")
    status, out, _ = run(capsys, *logs, "--output", tmp_path / "eval")
    assert status == 0
    found = json.loads((tmp_path / "eval" / "results_from_logs.json").read_text())
    assert found == json.loads(run(capsys, *logs, "--json")[1])
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:2] == ["rows", "probability"]
    for name, values in found["sets"].items():
        assert [name, "4", *(f"{value:.4f}" for key, value in values.items() if key != "rows")] in lines
    assert ["forget_quality:", f"{2 / 70:.6g}"] in lines
    assert f"results written to {tmp_path / 'eval' / 'results_from_logs.json'}" in out
    assert run(capsys, *logs, "--output", tmp_path / "eval")[0] == 0
    status, _, err = run(capsys, *logs[:3], "--output", tmp_path / "eval")
    assert status == 2
    assert f"--output '{tmp_path / 'eval'}' holds the figures of other logs.\nChoose another folder" in err
    assert json.loads((tmp_path / "eval" / "results_from_logs.json").read_text()) == found
    status, _, err = run(capsys, *logs, "--output", tmp_path / "full.json")
    assert status == 2
    assert "full.json' is a file.\nGive a folder for results_from_logs.json." in err


@pytest.mark.data
@pytest.mark.skipif(
    not (Path(os.environ.get("LOKU_DATA_DIR", "/nonexistent")) / "tofu_official_logs").is_dir(),
    reason="needs the official TOFU logs: set LOKU_DATA_DIR to the folder that holds tofu_official_logs",
)
def test_published_logs_by_hand(capsys):
    logs = Path(os.environ["LOKU_DATA_DIR"]) / "tofu_official_logs"
    names = ("phi_full.eval_log_aggregated.json.gz", "phi_retain90.eval_log_aggregated.json.gz")
    status, out, err = run(
        capsys, "evaluate", "--from-logs", logs / names[0], "--retain-logs", logs / names[1], "--json"
    )
    assert status == 0
    assert json.loads(out)["model_utility"] == pytest.approx(0.5221, abs=5e-5)
    assert json.loads(out)["model_utility_arithmetic"] == pytest.approx(0.5034, abs=5e-5)
    assert "warning" not in err
    status, out, err = run(
        capsys,
        "evaluate",
        "--from-logs",
        logs / names[0],
        "--retain-logs",
        logs / names[1].replace("90", "99"),
        "--json",
    )
    assert status == 0
    assert "warning:" in err
