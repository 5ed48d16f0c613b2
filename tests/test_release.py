"""`loku export`: what is handed over loads anywhere, says its rank and error, and warns of lossy merges."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from builders import tiny_model
from conftest import rows
from loku import cli

PLAIN_PEFT = """
import sys
sys.modules["loku"] = None  # this package must not be needed
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
if adapter != "-":
    model = PeftModel.from_pretrained(model, adapter)
ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.save(model.eval()(ids).logits, out)
"""


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("release")
    for name, data in (("forget", rows(5)), ("retain", rows(8, start=20))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    given = {"model": model_folder, "forget": folder / "forget.jsonl", "retain": folder / "retain.jsonl"}
    options = {"output": folder / "run", "rank": 4, "batch-size": 2, "grad-accum": 1, "learning-rate": "1e-2"}
    flags = [str(part) for name, value in (given | options).items() for part in (f"--{name}", value)]
    status = cli.main(["unlearn", *flags])
    assert status == 0
    return folder / "run"


@torch.no_grad()
def logits(model):
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    return model.eval()(ids).logits


def expected(model_folder, finished):
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), finished / "adapter"))


def in_a_fresh_process(tmp_path, base, adapter):
    out = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-W", "ignore", "-c", PLAIN_PEFT, str(base), str(adapter), str(out)], check=True)
    return torch.load(out, weights_only=True)


def test_an_ordinary_lora_loads_with_plain_peft_alone(capsys, tmp_path, model_folder, finished):
    status, out, _ = run(capsys, "export", finished, "--form", "lora", "--output", tmp_path / "lora")
    assert status == 0
    assert "ordinary LoRA of rank 8" in out
    assert "--max-lora-rank 8" in out
    assert "never the base model with the adapter" in out
    assert torch.equal(in_a_fresh_process(tmp_path, model_folder, tmp_path / "lora"), expected(model_folder, finished))
    card = ModelCard.load(tmp_path / "lora" / "README.md")
    assert card.data.library_name == "peft"
    assert "unlearning" in card.data.tags


def test_a_truncated_lora_says_its_error(capsys, tmp_path, model_folder, finished):
    status, out, _ = run(capsys, "export", finished, "--form", "truncated", "--rank", 2, "--output", tmp_path / "small")
    assert status == 0
    assert "truncated to rank 2: relative error 0." in out
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["r"] == 2
    difference = in_a_fresh_process(tmp_path, model_folder, tmp_path / "small") - expected(model_folder, finished)
    assert 0 < difference.abs().max() < 1


def test_a_merged_model_needs_nothing_else_and_is_scored_again(capsys, tmp_path, model_folder, finished):
    status, out, err = run(capsys, "export", finished, "--output", tmp_path / "merged")
    assert status == 0
    assert "merged model written to" in out
    assert "as trained" in out
    assert "merged in float32" in out
    assert "warning" not in err
    difference = in_a_fresh_process(tmp_path, tmp_path / "merged", "-") - expected(model_folder, finished)
    assert difference.abs().max() < 1e-5
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert ModelCard.load(tmp_path / "merged" / "README.md").data.library_name == "transformers"


def test_a_merge_that_loses_the_update_is_warned_of(capsys, tmp_path, finished, monkeypatch):
    """A stored type that swallows the update gives the target's scores back; the warning must say so."""
    results = json.loads((finished / "results.json").read_text())
    results["sets"]["forget"]["metrics"]["probability"] = {"mean": 0.9, "low": 0.9, "high": 0.9}
    copy = tmp_path / "copy"
    (copy / "adapter").mkdir(parents=True)
    for file in finished.glob("*.*"):
        (copy / file.name).write_bytes(file.read_bytes())
    for file in (finished / "adapter").iterdir():
        (copy / "adapter" / file.name).write_bytes(file.read_bytes())
    (copy / "results.json").write_text(json.dumps(results))
    status, _, err = run(capsys, "export", copy, "--dtype", "bfloat16", "--output", tmp_path / "merged")
    assert status == 0
    assert "warning: merging moved the forget scores (probability)" in err
    assert "Export with --dtype float32" in err
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_a_merge_is_not_scored_when_the_rows_are_gone(capsys, tmp_path, finished):
    copy = shutil.copytree(finished, tmp_path / "copy")
    settings = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(settings.replace("forget.jsonl", "moved.jsonl"))
    status, out, _ = run(capsys, "export", copy, "--output", tmp_path / "merged")
    assert status == 0
    assert "not scored again: --forget '" in out.replace("\n", " ")
    assert (tmp_path / "merged" / "README.md").is_file()


def test_what_cannot_be_exported_is_refused(capsys, tmp_path, model_folder, finished):
    output = ("--output", tmp_path / "out")

    def refused(given, remedy, *arguments):
        status, _, err = run(capsys, "export", *arguments)
        assert status == 2, err
        assert given in err
        assert remedy in err

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "adapter_config.json").write_text((finished / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(finished / "adapter" / "adapter_model.safetensors")
    save_file({k.replace("q_proj", "query"): v for k, v in tensors.items()}, foreign / "adapter_model.safetensors")
    full = tmp_path / "full"
    (full / "model").mkdir(parents=True)

    refused("--output is missing.", "Give a new folder", finished)
    (tmp_path / "file").write_text("precious")
    refused("file' is a file.", "Give a new folder to write.", finished, "--output", tmp_path / "file")
    refused("' lies under '", "Give a path under a folder.", finished, "--output", tmp_path / "file" / "sub")
    for name, content in (("run.json", "{"), ("results.json", "[]"), ("adapter/adapter_config.json", "{")):
        broken = shutil.copytree(finished, tmp_path / "broken" / name)
        (broken / name).write_text(content)
        (broken / "run.json").write_text(content if name == "run.json" else "{}")
        refused(f"The file '{broken / name}' ", "Restore it from a copy, or export another run.", broken, *output)
    refused("is not empty.", "nothing there is overwritten", finished, "--output", finished)
    refused("--rank is missing.", "Give the rank to keep, below 8.", finished, "--form", "truncated", *output)
    refused("--rank 99 is outside 1 to 8.", "give less", finished, "--form", "truncated", "--rank", 99, *output)
    refused("--rank 3 is of no use with --form merged.", "Add --form truncated.", finished, "--rank", 3, *output)
    refused("holds no adapter.", "Give a run folder that finished", tmp_path, *output)
    refused("was run with --tune full.", "there is no adapter to export", full, *output)
    refused("query", "Give the base model", foreign, "--model", model_folder, *output)
    refused(f"which '{model_folder}' does not have.", "with --model.", foreign, "--model", model_folder, *output)
    larger = tmp_path / "larger"
    tiny_model(intermediate_size=64).save_pretrained(larger)
    refused("down_proj' (32 x 48), which '", "Give the base model", finished, "--model", larger, *output)
    shutil.copy(model_folder / "config.json", larger)
    shutil.copy(model_folder / "model.safetensors", larger)
    refused("The tokenizer of", "Save the tokenizer", finished, "--model", larger, *output)
    nameless = tmp_path / "nameless"
    shutil.copytree(finished / "adapter", nameless)
    config = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    refused("The base model is not known.", "Give it with --model.", nameless, *output)
    (nameless / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    refused("is not an ordinary LoRA (use_rslora).", "Give an adapter that `loku` wrote.", nameless, *output)
    refused("holds no config.json.", "written by save_pretrained.", finished, "--model", tmp_path, *output)
    assert not (tmp_path / "out").exists()
