"""The main job on real files: plan, run folder, resume after a kill, refusals, the Python API."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

import loku
from builders import byte_level_tokenizer, tiny_model
from conftest import rows
from loku import cli, training
from loku.adapters.initialisers import INITIALISERS
from loku.errors import DivergenceError, InputError
from loku.models import weights_sha256

FAST = ["--rank", "4", "--batch-size", "2", "--grad-accum", "1", "--learning-rate", "1e-2", "--threads", "1"]


def command(model, forget, retain, output, *more):
    named = {"--model": model, "--forget": forget, "--retain": retain, "--output": output}
    return ["unlearn", *(str(part) for pair in named.items() for part in pair), *FAST, *more]


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@torch.no_grad()
def logits(model, seed=0):
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(seed))
    return model.eval()(ids).logits


def test_a_run_from_files_to_report(capsys, tmp_path, model_folder, forget_file, retain_file):
    status, out, _ = run(capsys, *command(model_folder, forget_file, retain_file, tmp_path / "run", "--keep-text"))
    assert status == 0
    for told in (
        "5 rows",
        "8 rows",
        "LoRA rank 4, alpha 8, started by fila",
        "% of the model",
        "steps: 15",
        "1 x ihl + 1 x nll",
    ):
        assert told in out
    assert "An adapter can be removed" in out
    folder = tmp_path / "run"
    expected = {
        "config.yaml", "run.json", "metrics.jsonl", "checkpoints", "adapter", "importance.safetensors", "results.json",
        "results.target.json", "examples.jsonl", "examples.target.jsonl", "report.html",
            "record.json", "record.salt", "prompt_template.json",
    }  # fmt: skip
    assert {p.name for p in folder.iterdir()} == expected
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["steps"] == 15 == len((folder / "metrics.jsonl").read_text().splitlines())
    assert record["model"]["sha256"] == weights_sha256(type(tiny_model()).from_pretrained(model_folder))
    assert record["data"]["forget"]["rows"] == 5
    assert record["adapter"]["rank"] == 8
    assert len(record["importance"]["layers"]) == 14
    assert {"importance", "initialisation", "training", "evaluation", "total"} <= set(record["seconds"])
    assert yaml.safe_load((folder / "config.yaml").read_text())["forget_loss"] == "ihl"
    base = type(tiny_model()).from_pretrained(model_folder)
    before = logits(base)
    plain = PeftModel.from_pretrained(base, folder / "adapter")
    assert (logits(plain) - before).abs().max() > 1e-3
    assert "pickle" not in str([p.suffix for p in folder.rglob("*.bin") if p.name != "training_args.bin"])


def test_texts_are_not_kept_unless_asked_for(capsys, tmp_path, model_folder, forget_file, retain_file):
    assert run(capsys, *command(model_folder, forget_file, retain_file, tmp_path / "run"))[0] == 0
    folder = tmp_path / "run"
    assert not list(folder.glob("examples*"))
    for file in folder.rglob("*"):
        if file.suffix in (".json", ".jsonl", ".yaml", ".html", ".md"):
            assert "In the town of" not in file.read_text(), file


def test_a_finished_run_is_left_alone(capsys, tmp_path, model_folder, forget_file, retain_file):
    arguments = command(model_folder, forget_file, retain_file, tmp_path / "run", "--no-evaluate")
    assert run(capsys, *arguments)[0] == 0
    before = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert "is finished: nothing to do" in out
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_killed_run_resumes_exactly(tmp_path, model_folder, forget_file, retain_file, tune):
    more = ["--no-evaluate", "--save-steps", "3", "--epochs", "40", "--tune", tune]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def launch(folder):
        arguments = command(model_folder, forget_file, retain_file, tmp_path / folder, *more)
        return subprocess.Popen([sys.executable, "-m", "loku", *arguments], env=environment, stdout=subprocess.DEVNULL)

    assert launch("whole").wait() == 0
    killed = launch("killed")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed" / "checkpoints").glob("checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["status"] == "running"
    assert launch("killed").wait() == 0
    name = "adapter/adapter_model.safetensors" if tune == "lora" else "model/model.safetensors"
    whole, resumed = (load_file(tmp_path / folder / name) for folder in ("whole", "killed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    steps = [json.loads(x)["step"] for x in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 121))


def test_a_run_killed_after_its_last_step_takes_no_other(
    capsys, tmp_path, model_folder, forget_file, retain_file, monkeypatch
):
    """Steps end within an epoch, at the full rate: one more would show in the weights."""
    more = ["--no-evaluate", "--max-steps", "4", "--save-steps", "2", "--scheduler", "constant", "--eval-steps", "2"]

    def killed(*_):
        raise KeyboardInterrupt

    whole = command(model_folder, forget_file, retain_file, tmp_path / "whole", *more)
    resumed = command(model_folder, forget_file, retain_file, tmp_path / "resumed", *more)
    assert run(capsys, *whole)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(training, "_export", killed)
        run(capsys, *resumed)
    assert not (tmp_path / "resumed" / "adapter").exists()
    assert run(capsys, *resumed)[0] == 0
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    for file, steps in (("metrics.jsonl", [1, 2, 3, 4]), ("curve.jsonl", [0, 2, 4])):
        lines = (tmp_path / "resumed" / file).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == steps


def test_a_half_written_checkpoint_is_ignored(capsys, tmp_path, model_folder, forget_file, retain_file):
    arguments = command(model_folder, forget_file, retain_file, tmp_path / "run", "--no-evaluate")
    assert run(capsys, *arguments)[0] == 0
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace('"finished"', '"running"'))
    torn = tmp_path / "run" / "checkpoints" / "checkpoint-15"
    (torn / "trainer_state.json").unlink()
    before = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert "resumes after" in out
    assert "importance: reused" in out
    after = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_full_tuning_writes_a_new_model_folder(capsys, tmp_path, model_folder, forget_file, retain_file):
    digest = {p.name: p.read_bytes() for p in model_folder.iterdir()}
    status, out, _ = run(
        capsys, *command(model_folder, forget_file, retain_file, tmp_path / "run", "--tune", "full", "--method", "npo")
    )
    assert status == 0
    assert "all 41,120 weights" in out
    model = type(tiny_model()).from_pretrained(tmp_path / "run" / "model")
    assert (logits(model) - logits(type(model).from_pretrained(model_folder))).abs().max() > 1e-3
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()
    assert (tmp_path / "run" / "results.target.json").is_file()
    assert {p.name: p.read_bytes() for p in model_folder.iterdir()} == digest


def test_retain_self_samples_from_the_model(capsys, tmp_path, model_folder, forget_file):
    arguments = command(
        model_folder, forget_file, "self", tmp_path / "run", "--no-evaluate", "--self-rows", "6", "--self-length", "12"
    )
    assert run(capsys, *arguments)[0] == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["retain"]["rows"] == 6


@pytest.mark.parametrize("init", INITIALISERS)
def test_every_initialiser_runs_and_says_what_it_saw(capsys, tmp_path, model_folder, forget_file, retain_file, init):
    penalty = ("--orthogonality", "0.5") if init in ("reglu", "fila") else ()
    arguments = command(
        model_folder, forget_file, retain_file, tmp_path / "run", "--no-evaluate", "--init", init, "--epochs", "1",
        *penalty,
    )  # fmt: skip
    assert run(capsys, *arguments)[0] == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    needs = INITIALISERS[init].needs
    starts = record["initialisation"]
    assert (starts["initialiser"], len(starts["layers"])) == (init, 14)
    for layer in starts["layers"]:
        assert set(layer) == {"name", "energy_captured", "norm_a", "norm_b"}
        assert (layer["norm_b"] > 0) == (init != "lora")
        assert (layer["energy_captured"] > 0) == (init != "lora")
    assert (record["importance"] is None) == (needs is None)
    assert ("importance" in record["seconds"]) == (needs in ("fisher", "variance"))
    assert ("activations" in record["seconds"]) == (needs == "activations" or bool(penalty))
    if needs in ("fisher", "variance"):
        for layer in record["importance"]["layers"]:
            assert {"eps", "share_below_eps", "rank_correlation_forget_only", "relative_max"} < set(layer)
    elif needs:
        assert record["importance"]["mode"] == "activations"
        assert all(layer["forget"] > layer["retain"] for layer in record["importance"]["layers"] if layer["directions"])
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert ("orthogonality" in first) == bool(penalty)
    assert main_report(tmp_path / "run", capsys).count("model.layers.1.mlp.up_proj") >= 1


def main_report(folder, capsys):
    """The run's report as text."""
    assert run(capsys, "report", folder, "--output", folder / "page.html")[0] == 0
    return (folder / "page.html").read_text()


def test_a_killed_importance_pass_goes_on_and_ends_the_same(tmp_path, model_folder, forget_file, retain_file, capsys):
    arguments = command(model_folder, forget_file, retain_file, tmp_path / "run", "--no-evaluate", "--epochs", "1")
    code = (
        "import sys, loku.adapters.partial as partial, loku.adapters.importance as importance\n"
        "partial.SAVE_SHARE = 0\n"
        "importance.estimate_importance.__kwdefaults__['save_seconds'] = 0\n"
        "plain, calls = importance.backward, []\n"
        "def dying(*a, **k):\n"
        "    calls.append(1)\n"
        "    return plain(*a, **k) if len(calls) < 2 else sys.exit(9)\n"
        "importance.backward = dying\n"
        "from loku.cli import main\n"
        f"main({[str(a) for a in arguments]!r} + ['--importance-batch-size', '2'])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    kept = tmp_path / "run" / "importance.safetensors.partial"
    assert [p.name for p in kept.iterdir()] == ["state-0.safetensors"]
    assert run(capsys, *arguments, "--importance-batch-size", "2")[0] == 0
    assert not kept.exists()
    whole = command(model_folder, forget_file, retain_file, tmp_path / "whole", "--no-evaluate", "--epochs", "1")
    assert run(capsys, *whole, "--importance-batch-size", "2")[0] == 0
    one, other = (load_file(tmp_path / name / "importance.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_fila_two_sided_reads_filas_file(capsys, tmp_path, model_folder, forget_file, retain_file):
    file = tmp_path / "importance.safetensors"
    more = ("--no-evaluate", "--epochs", "1", "--importance", str(file))
    run(capsys, *command(model_folder, forget_file, retain_file, tmp_path / "one", *more))
    _, out, _ = run(
        capsys, *command(model_folder, forget_file, retain_file, tmp_path / "two", *more, "--init", "fila-two-sided")
    )
    assert f"importance: reused from {file}" in out
    status, _, err = run(
        capsys, *command(model_folder, forget_file, retain_file, tmp_path / "three", *more, "--init", "vila")
    )
    assert (status, "made for something else (" in err) == (2, True)


@pytest.mark.parametrize(
    ("flags", "given", "remedy"),
    [
        (["--init-options", "beta=0.5"], "The initialiser has no option 'beta'.", "It has none."),
        (
            ["--init", "reglu", "--init-options", "beta=2"],
            "The initialiser's option 'beta' is 2.",
            "Give a number from 0 to 1.",
        ),
        (["--orthogonality", "0.5", "--tune", "full"], "--orthogonality is of no use with --tune full.", "It looks at"),
        (["--importance-memory", "1e-6"], "--importance-memory 1e-06 GiB is too small for the layer", "Give at least"),
    ],
)
def test_impossible_starts_are_refused_before_any_work(
    capsys, tmp_path, model_folder, forget_file, retain_file, flags, given, remedy
):
    status, _, err = run(capsys, *command(model_folder, forget_file, retain_file, tmp_path / "run", *flags))
    assert status == 2
    assert given in err
    assert remedy in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--init", "reglu"], ["--init", "lora", "--orthogonality", "0.5"]])
def test_what_looks_at_retain_rows_needs_some(capsys, tmp_path, model_folder, forget_file, flags):
    arguments = [
        "unlearn", "--model", model_folder, "--forget", forget_file, "--output", tmp_path / "run", *FAST,
        "--retain-weight", "0", *flags,
    ]  # fmt: skip
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "and --retain is missing." in err


@pytest.mark.parametrize("method", ["ihl", "npo", "graddiff", "ga"])
def test_every_method_runs(capsys, tmp_path, model_folder, forget_file, retain_file, method):
    arguments = command(
        model_folder, forget_file, retain_file, tmp_path / "run", "--no-evaluate", "--method", method, "--epochs", "1"
    )
    assert run(capsys, *arguments)[0] == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["method"]["name"] == method
    assert record["importance"] is None
    assert record["adapter"]["rank"] == 4


def test_an_importance_file_is_reused_and_checked(capsys, tmp_path, model_folder, forget_file, retain_file):
    file = tmp_path / "importance.safetensors"
    status, _, _ = run(
        capsys,
        "importance",
        "--model",
        model_folder,
        "--forget",
        forget_file,
        "--retain",
        retain_file,
        "--output",
        file,
    )
    assert status == 0
    more = ("--no-evaluate", "--importance", str(file))
    status, out, _ = run(capsys, *command(model_folder, forget_file, retain_file, tmp_path / "run", *more))
    assert status == 0
    assert f"importance: reused from {file}" in out
    status, _, err = run(
        capsys, *command(model_folder, forget_file, retain_file, tmp_path / "other", *more, "--importance-eps", "1e-5")
    )
    assert status == 2
    assert "was made for something else (eps differ)" in err
    assert "Give the file made for this model and these rows" in err
    more = ("--no-evaluate", "--importance", str(file), "--targets", "q_proj")
    status, _, err = run(capsys, *command(model_folder, forget_file, retain_file, tmp_path / "other", *more))
    assert status == 2
    assert "(targets differ)" in err
    file.write_text("something else")
    status, _, err = run(capsys, *command(model_folder, forget_file, retain_file, tmp_path / "other", *more))
    assert status == 2
    assert "is not an importance file" in err
    assert not (tmp_path / "other").exists()


def test_bad_input_is_refused_before_any_work(capsys, tmp_path, model_folder, forget_file, retain_file):
    def refused(given, remedy, *arguments):
        status, _, err = run(capsys, *arguments)
        assert status == 2, err
        assert given in err
        assert remedy in err
        assert not (tmp_path / "run").exists()

    def unlearn(**changed):
        values = {
            "model": model_folder,
            "forget": forget_file,
            "retain": retain_file,
            "output": tmp_path / "run",
        } | changed
        return [
            "unlearn",
            *(part for k, v in values.items() if v is not None for part in (f"--{k.replace('_', '-')}", v)),
        ]

    empty, broken, columns = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl", tmp_path / "columns.jsonl"
    empty.write_text("")
    broken.write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    columns.write_text('{"qestion": "a", "anser": "b"}\n')
    other, used = tmp_path / "other", tmp_path / "used"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    used.mkdir()
    (used / "config.yaml").write_text("forget: something else\n")

    refused("forget.json' does not exist.", "Did you mean 'forget.jsonl'", *unlearn(forget=tmp_path / "forget.json"))
    refused("empty.jsonl' is empty.", "Give a file with rows.", *unlearn(forget=empty))
    refused("line 2 is not JSON", "Write one JSON object a line", *unlearn(forget=broken))
    refused("has the column 'anser', which is not known.", "Did you mean 'answer'?", *unlearn(forget=columns))
    refused("--forget is missing.", "Give the rows that must go", *unlearn(forget=None))
    refused("--retain is missing.", "`--retain self` to sample them", *unlearn(retain=None))
    refused("5 forget rows also stand in the retain set", "Take them out", *unlearn(retain=forget_file))
    refused("has no answer token left", "Raise --max-length", *unlearn(max_length=4))
    refused("matches no linear layer", "Did you mean 'q_proj'?", *unlearn(targets="q_prj"))
    refused("--rank 99 is above the size of the layer", "Choose a rank of at most 16", *unlearn(rank=99))
    refused("is not empty and holds no run.", "Choose a new folder", *unlearn(output=other))
    refused("holds another run", "Choose another folder", *unlearn(output=used))
    refused("--device 'qpu' is not a device.", "Give cpu", *unlearn(device="qpu"))
    refused("--init fila compares the forget", "--init lora", *unlearn(retain=None, retain_weight=0))
    refused("--prompt-template 'none.json' does not exist.", "Give a JSON file", *unlearn(prompt_template="none.json"))
    refused("--init 'filla' is not known.", "Did you mean 'fila'?", *unlearn(init="filla"))
    refused("--retain-only-model './none' does not exist", "Check the path", *unlearn(retain_only_model="./none"))
    refused("There is no reference 'none.json'", "Give the results.json", *unlearn(retain_only_model="none.json"))
    refused("none.csv' does not exist.", "Give a file", *unlearn(holdout=tmp_path / "none.csv"))
    refused("empty.jsonl' is empty.", "Give a file with rows.", *unlearn(general=empty))
    assert (other / "thesis.txt").read_text() == "precious"


def test_a_run_on_rows_that_changed_since_is_refused(capsys, tmp_path, model_folder, forget_file, retain_file):
    arguments = command(model_folder, forget_file, retain_file, tmp_path / "run", "--no-evaluate", "--max-steps", "2")
    assert run(capsys, *arguments)[0] == 0
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace('"finished"', '"running"'))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    forget_file.write_text("".join(json.dumps(row) + "\n" for row in rows(6)))
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "holds a run on other input (changed since: forget)." in err
    assert "Choose another folder, or give what that run was given to resume it." in err
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_bad_input_of_importance_is_refused_before_any_work(capsys, tmp_path, model_folder, forget_file, retain_file):
    def refused(given, remedy, **changed):
        output = tmp_path / "new" / "importance.safetensors"
        values = {"model": model_folder, "forget": forget_file, "retain": retain_file, "output": output} | changed
        flags = [part for name, value in values.items() if value is not None for part in (f"--{name}", value)]
        status, _, err = run(capsys, "importance", *flags)
        assert status == 2, err
        assert given in err
        assert remedy in err
        assert not output.parent.exists()

    refused("--model is missing.", "Give a model folder", model=None)
    refused("' is a folder.", "Give a file name ending in .safetensors.", output=tmp_path)
    refused("--forget is missing.", "Give the rows that must go", forget=None)
    refused("--retain is missing.", "Give rows that must stay", retain=None)
    refused("5 forget rows also stand in the retain set", "Take them out", retain=forget_file)
    refused("matches no linear layer", "Did you mean 'q_proj'?", targets="q_prj")
    refused("holds no config.json.", "written by save_pretrained", model=tmp_path)


def test_models_that_cannot_be_used_are_refused(capsys, tmp_path, model_folder, forget_file, retain_file):
    def refused(model, given, remedy):
        status, _, err = run(capsys, *command(model, forget_file, retain_file, tmp_path / "run"))
        assert status == 2, err
        assert given in err
        assert remedy in err

    def copy(name, **changes):
        folder = tmp_path / name
        folder.mkdir()
        for file in model_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        for file, change in changes.items():
            path = folder / f"{file}.json"
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
        return folder

    quantised = copy("quantised", config=lambda c: c | {"quantization_config": {"quant_method": "bitsandbytes"}})
    no_end = copy("no-end", tokenizer_config=lambda c: {k: v for k, v in c.items() if k != "eos_token"})
    refused(quantised, "is quantised (bitsandbytes)", "Give the floating-point model")
    refused(no_end, "has no end-of-sequence token.", "Set one (tokenizer.eos_token = ...)")
    refused(tmp_path, "holds no config.json.", "Give a folder written by save_pretrained.")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "adapter", "is an adapter, not a model.", "Give its base model")
    refused("nobody/nothing", "The model 'nobody/nothing' cannot be loaded", "give a local folder")


def test_chat_rows_without_a_chat_template_are_refused(capsys, tmp_path, model_folder, retain_file):
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    status, _, err = run(capsys, *command(model_folder, chat, retain_file, tmp_path / "run"))
    assert status == 2
    assert "the tokenizer has no chat template." in err
    assert "Set tokenizer.chat_template" in err


def test_the_python_api_on_a_model_in_memory(tmp_path):
    model, tokenizer = tiny_model(), byte_level_tokenizer()
    before, digest = logits(model), weights_sha256(model)
    result = loku.unlearn(
        model, tokenizer, forget=rows(4), retain=rows(6, start=10), output=tmp_path / "run", rank=4, learning_rate=1e-2
    )
    assert (logits(result.model) - before).abs().max() > 1e-4
    with loku.target_model(result.model):
        assert torch.equal(logits(result.model), before)
    assert weights_sha256(tiny_model()) == digest
    plain = PeftModel.from_pretrained(tiny_model(), result.adapter)
    assert (logits(plain) - logits(result.model)).abs().max() < 1e-5


def test_a_model_that_carries_an_adapter_is_refused_until_it_is_unloaded(tmp_path):
    model, tokenizer = tiny_model(), byte_level_tokenizer()
    given = {"forget": rows(4), "retain": rows(6, start=10), "rank": 4, "max_steps": 1}
    first = loku.unlearn(model, tokenizer, output=tmp_path / "one", **given)
    for carrying in (model, first.model):
        with pytest.raises(
            InputError, match=r"The model carries an adapter already\.\nGive it without: `model = model\.un"
        ):
            loku.unlearn(carrying, tokenizer, output=tmp_path / "two", **given)
    assert not (tmp_path / "two").exists()
    second = loku.unlearn(first.model.unload(), tokenizer, output=tmp_path / "two", **given)
    one, two = (load_file(result.adapter / "adapter_model.safetensors") for result in (first, second))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_weights_that_are_not_finite_are_not_handed_over(tmp_path, monkeypatch):
    def poisons(model, *_):
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad)[0, 0] = float("nan")

    monkeypatch.setattr("loku.training._train", poisons)
    with pytest.raises(
        DivergenceError, match=r"The trained weight '.*lora_A.*' is not finite\.\nLower --learning-rate"
    ):
        loku.unlearn(
            tiny_model(), byte_level_tokenizer(), rows(4), rows(6, start=10), tmp_path / "run", rank=4, init="lora"
        )
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "stopped"
    assert "is not finite" in record["error"]
    assert not (tmp_path / "run" / "adapter").exists()


def test_the_python_api_refuses_unknown_settings(tmp_path):
    with pytest.raises(InputError, match=r"unlearn\(\) has the unknown option 'rnk'\.\nDid you mean 'rank'\?"):
        loku.unlearn(tiny_model(), byte_level_tokenizer(), forget=rows(2), retain=rows(2, 9), output=tmp_path, rnk=4)


def test_public_names_exist():
    assert all(callable(getattr(loku, name)) for name in loku.__all__)
    assert set(loku.__all__) == set(loku._HOMES)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        loku.nothing  # noqa: B018


def test_options_are_all_or_nothing_and_bring_their_methods_losses(tmp_path):
    from loku.config import UnlearnOptions, resolve
    from loku.unlearning import with_its_method

    assert with_its_method(UnlearnOptions(method="npo")).forget_loss == "npo"
    assert with_its_method(UnlearnOptions(method="npo")).init == "lora"
    own = with_its_method(UnlearnOptions(method="npo", forget_loss="simnpo", retain_weight=2.0))
    assert (own.forget_loss, own.retain_weight, own.init) == ("simnpo", 2.0, "lora")
    assert with_its_method(UnlearnOptions()) == UnlearnOptions()
    resolved = resolve(UnlearnOptions, {}, {"method": "ihl", "init": "fila"})
    assert with_its_method(resolved) is resolved  # said so on purpose
    with pytest.raises(InputError, match=r"unlearn\(\) got options, and method, rank as well"):
        loku.unlearn(None, None, [], [], tmp_path / "run", UnlearnOptions(), method="ga", rank=4)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("training", [True, False])
def test_the_models_modes_are_its_own_again(tmp_path, training):
    model = tiny_model("gpt2", resid_pdrop=0.5).train(training)
    result = loku.unlearn(
        model, byte_level_tokenizer(), rows(3), rows(3, 20), tmp_path / "run", rank=2, max_steps=1, evaluate=False,
        device="cpu",
    )  # fmt: skip
    assert result.model.training == training
    assert {module.training for module in result.model.modules()} == {training}


def test_a_model_that_diverged_is_given_back_without_its_adapter(tmp_path):
    model = tiny_model().eval()
    before, given = logits(model), {"rank": 2, "evaluate": False, "device": "cpu", "learning_rate": 1e-3}
    arguments = (model, byte_level_tokenizer(), rows(3), rows(3, 20))
    with pytest.raises(DivergenceError):
        loku.unlearn(*arguments, tmp_path / "a", max_loss=1e-6, **given)
    assert not any("lora_" in name for name, _ in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert torch.equal(logits(model), before)
    loku.unlearn(*arguments, tmp_path / "b", max_steps=1, **given)  # and may be tried again


def test_threads_are_set_before_the_record_says_how_many(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        result = loku.unlearn(
            tiny_model(), byte_level_tokenizer(), rows(2), rows(2, 20), tmp_path / "run", rank=2, max_steps=1,
            evaluate=False, threads=1, device="cpu",
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert result.record["hardware"]["threads"] == 1


def test_prompts_and_names_with_brackets_are_printed_as_they_are(
    capsys, tmp_path, forget_file, retain_file, model_folder
):
    template = tmp_path / "llama[2].json"
    tags = {"question_start_tag": "[INST] ", "question_end_tag": " [/INST]", "answer_tag": " "}
    template.write_text(json.dumps(tags))
    arguments = command(model_folder, forget_file, retain_file, tmp_path / "out[final]", "--no-evaluate")
    status, out, err = run(capsys, *arguments, "--max-steps", "1", "--prompt-template", template)
    assert status == 0, err
    assert "[/INST]" in out
    assert "out[final]" in out


def test_a_model_stored_in_float16_is_trained_in_bfloat16(capsys, tmp_path, forget_file, retain_file):
    tiny_model().half().save_pretrained(tmp_path / "half")
    byte_level_tokenizer().save_pretrained(tmp_path / "half")
    arguments = command(tmp_path / "half", forget_file, retain_file, tmp_path / "run", "--no-evaluate")
    measured = ("--model", tmp_path / "half", "--forget", forget_file, "--retain", retain_file)
    assert run(capsys, "importance", *measured, "--output", tmp_path / "i.safetensors")[0] == 0
    status, out, err = run(capsys, *arguments, "--max-steps", "1", "--importance", tmp_path / "i.safetensors")
    assert status == 0, err
    assert "reused from" in out
    assert "trained in bfloat16" in out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["model"]["dtype"] == "bfloat16"


def test_numpy_numbers_are_numbers(tmp_path):
    result = loku.unlearn(
        tiny_model(), byte_level_tokenizer(), rows(2), rows(2, 20), tmp_path / "run", rank=np.int64(2), max_steps=1,
        learning_rate=np.float64(1e-4), evaluate=False, device="cpu",
    )  # fmt: skip
    assert yaml.safe_load((result.folder / "config.yaml").read_text())["learning_rate"] == 1e-4


def test_rotary_frequencies_are_not_rounded_with_the_weights(tmp_path):
    from loku.config import UnlearnOptions
    from loku.job import load_target

    tiny_model().half().save_pretrained(tmp_path)
    options = UnlearnOptions(model=str(tmp_path))
    model = load_target(options)
    assert (model.dtype, options.dtype) == (torch.bfloat16, "bfloat16")
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_an_importance_file_from_before_tokens_were_known_serves(
    capsys, tmp_path, model_folder, forget_file, retain_file
):
    from loku.adapters.importance import Importance

    arguments = command(model_folder, forget_file, retain_file, tmp_path / "a", "--no-evaluate", "--max-steps", "1")
    assert run(capsys, *arguments)[0] == 0
    found = Importance.load(tmp_path / "a" / "importance.safetensors")
    del found.provenance["tokens"]
    found.save(tmp_path / "old.safetensors")
    again = command(model_folder, forget_file, retain_file, tmp_path / "b", "--no-evaluate", "--max-steps", "1")
    status, out, err = run(capsys, *again, "--importance", tmp_path / "old.safetensors")
    assert status == 0, err
    assert "reused from" in out


def test_an_exported_model_keeps_the_runs_template_when_its_file_is_gone(
    capsys, tmp_path, model_folder, forget_file, retain_file
):
    template = tmp_path / "q.json"
    template.write_text(json.dumps({"question_start_tag": "Q: ", "answer_tag": "A: "}))
    arguments = command(model_folder, forget_file, retain_file, tmp_path / "run", "--max-steps", "1")
    assert run(capsys, *arguments, "--prompt-template", template)[0] == 0
    template.unlink()
    status, out, err = run(capsys, "export", tmp_path / "run", "--output", tmp_path / "merged")
    assert status == 0, err
    assert "forget probability" in out  # scored again, with the same prompts
    assert json.loads((tmp_path / "merged" / "prompt_template.json").read_text())["question_start_tag"] == "Q: "
