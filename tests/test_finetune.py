"""`loku finetune`: new and given models, masks, resume, refusals; retain rows sampled from the model itself."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from builders import byte_level_tokenizer, tiny_model
from conftest import rows
from loku import cli, finetune
from loku.data.prompts import TagTemplate
from loku.data.records import parse_rows
from loku.errors import InputError
from loku.models import load_model, load_tokenizer
from loku.retain_self import sample_retain


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


SETTINGS = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FAST = ("--batch-size", 4, "--grad-accum", 1, "--warmup-steps", 5, "--learning-rate", "1e-2", "--threads", 1)


def test_a_new_model_memorises_its_rows(capsys, tmp_path, forget_file):
    (tmp_path / "model.json").write_text(json.dumps(SETTINGS))
    status, out, _ = run(
        capsys, "finetune", "--new-model", tmp_path / "model.json", "--vocab-size", 300, "--data", forget_file,
        "--output", tmp_path / "target", "--epochs", 60, "--save-steps", -1, *FAST,
    )  # fmt: skip
    assert status == 0
    assert "on 5 rows" in out
    log = [json.loads(line) for line in (tmp_path / "target" / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.1 < log[0]["loss"]
    model, tokenizer = load_model(str(tmp_path / "target")), load_tokenizer(str(tmp_path / "target"))
    ids = tokenizer("Question: Where was person 2 born?\nAnswer:", return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert tokenizer.decode(answer[0], skip_special_tokens=True).endswith("In the town of C14.")


def test_a_given_model_is_trained_and_an_interrupted_run_resumes(capsys, tmp_path, model_folder, forget_file):
    common = ("finetune", "--model", model_folder, "--data", forget_file, "--epochs", 4, *FAST)
    assert run(capsys, *common, "--output", tmp_path / "whole")[0] == 0
    assert run(capsys, *common, "--output", tmp_path / "again")[0] == 0
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    (tmp_path / "again" / "model.safetensors").unlink()
    assert run(capsys, *common, "--output", tmp_path / "again")[0] == 0  # from its last checkpoint
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_run_killed_after_its_last_step_takes_no_other(capsys, tmp_path, model_folder, forget_file, monkeypatch):
    def arguments(name):
        steps = ["--max-steps", 2, "--save-steps", 1, "--scheduler", "constant", "--learning-rate", "1e-2"]
        given = ["--model", model_folder, "--data", forget_file, "--output", tmp_path / name]
        return ["finetune", *given, "--batch-size", 2, "--grad-accum", 1, "--threads", 1, *steps]

    def killed(*_):
        raise KeyboardInterrupt

    assert run(capsys, *arguments("whole"))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "check_finite", killed)
        run(capsys, *arguments("resumed"))
    assert not (tmp_path / "resumed" / "model.safetensors").exists()
    assert run(capsys, *arguments("resumed"))[0] == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_on_rows_that_changed_since_is_refused(capsys, tmp_path, model_folder, forget_file):
    arguments = ("finetune", "--model", model_folder, "--data", forget_file, "--max-steps", 1, *FAST)
    assert run(capsys, *arguments, "--output", tmp_path / "target")[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "target").rglob("*") if p.is_file()}
    forget_file.write_text("".join(json.dumps(row) + "\n" for row in rows(6)))
    status, _, err = run(capsys, *arguments, "--output", tmp_path / "target")
    assert status == 2
    assert "holds a run on other input (changed since: train)." in err
    assert {p: p.read_bytes() for p in (tmp_path / "target").rglob("*") if p.is_file()} == before


def test_target_and_retain_only_share_a_tokenizer(capsys, tmp_path, forget_file, retain_file):
    (tmp_path / "model.json").write_text(json.dumps(SETTINGS))
    status, _, _ = run(
        capsys, "finetune", "--new-model", tmp_path / "model.json", "--vocab-size", 300, "--data", forget_file,
        "--tokenizer-data", retain_file, "--output", tmp_path / "one", "--max-steps", 1, *FAST,
    )  # fmt: skip
    assert status == 0
    status, _, _ = run(
        capsys, "finetune", "--new-model", tmp_path / "model.json", "--vocab-size", 300, "--data", retain_file,
        "--output", tmp_path / "two", "--max-steps", 1, *FAST,
    )  # fmt: skip
    assert status == 0
    assert load_tokenizer(str(tmp_path / "one")).get_vocab() == load_tokenizer(str(tmp_path / "two")).get_vocab()


def test_bad_input_is_refused(capsys, tmp_path, model_folder, forget_file):
    def refused(given, remedy, *arguments):
        status, _, err = run(capsys, "finetune", "--output", tmp_path / "out", *arguments)
        assert status == 2, err
        assert given in err
        assert remedy in err
        assert not (tmp_path / "out").exists()

    settings = tmp_path / "settings.json"
    data = ("--data", forget_file)
    refused("--data is missing.", "Give the rows to learn")
    refused("--model is missing.", "or --new-model", *data)
    refused("--model and --new-model were both given.", "Give one", *data, "--model", model_folder, "--new-model", "x")
    refused("cannot be read", "Give a JSON file", *data, "--new-model", tmp_path / "none.json")
    settings.write_text("{}")
    refused("has no model_type.", "Add one", *data, "--new-model", settings)
    settings.write_text('{"model_type": "lama"}')
    refused("model_type 'lama' is not known to transformers.", "Give one such as llama", *data, "--new-model", settings)


def test_sampled_retain_rows_are_seeded_and_do_not_repeat_the_forget_set():
    model, tokenizer = tiny_model(), byte_level_tokenizer()
    forget = parse_rows(rows(3), "rows")
    before = torch.random.get_rng_state()
    options = {"rows": 5, "length": 10, "seed": 3}
    one = sample_retain(model, tokenizer, TagTemplate(), forget, **options)
    two = sample_retain(model, tokenizer, TagTemplate(), forget, **options)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [record.text for record in one] == [record.text for record in two]
    assert len(one) == 5
    assert all(record.text.startswith("Question:") for record in one)


def test_a_model_that_only_recites_the_forget_set_gives_no_retain_rows(monkeypatch):
    model, tokenizer = tiny_model(), byte_level_tokenizer()
    forget = parse_rows([{"question": "q", "answer": "one two three four five six"}], "rows")
    monkeypatch.setattr("loku.retain_self._sample", lambda *_: ["she said: One two, three four FIVE!"] * 4)
    with pytest.raises(InputError, match=r"found only 0 of 2 sampled texts.*\nGive retain rows of your own"):
        sample_retain(model, tokenizer, TagTemplate(), forget, rows=2, length=4, seed=0)


def test_a_run_that_blows_up_writes_no_model(capsys, tmp_path, model_folder, forget_file):
    arguments = ("finetune", "--model", model_folder, "--data", forget_file, "--output", tmp_path / "target")
    status, _, err = run(capsys, *arguments, *FAST, "--learning-rate", "1e20", "--epochs", 20, "--warmup-steps", 0)
    assert status == 1
    assert "error: The " in err
    assert "Lower --learning-rate" in err
    assert not (tmp_path / "target" / "model.safetensors").exists()


def test_a_finished_run_is_left_alone(capsys, tmp_path, model_folder, forget_file):
    arguments = ("finetune", "--model", model_folder, "--data", forget_file, "--max-steps", 1, *FAST)
    assert run(capsys, *arguments, "--output", tmp_path / "target")[0] == 0
    before = (tmp_path / "target" / "model.safetensors").stat().st_mtime_ns
    status, out, _ = run(capsys, *arguments, "--output", tmp_path / "target")
    assert status == 0
    assert "is finished: nothing to do." in out
    assert (tmp_path / "target" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "The settings of --new-model make no"),
        ({"model_type": "llama", "hidden_size": "wide"}, "The settings of --new-model make no llama"),
        ({"model_type": "t5"}, "t5"),
        ({"model_type": "lama"}, "model_type 'lama' is not known to transformers."),
    ],
)
def test_settings_that_make_no_model_are_refused(capsys, tmp_path, forget_file, settings, given):
    file = tmp_path / "model.json"
    file.write_text(json.dumps({"num_hidden_layers": 1, "intermediate_size": 16} | settings))
    status, _, err = run(
        capsys, "finetune", "--new-model", file, "--data", forget_file, "--output", tmp_path / "target", *FAST
    )
    assert status == 2
    assert given in err
    assert not (tmp_path / "target").exists()
