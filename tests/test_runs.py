"""The run folder: refused when it is another run's, resumed when it is this run's, whole after any kill."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import yaml

from builders import tiny_model
from loku import runs
from loku.config import FinetuneOptions, UnlearnOptions
from loku.errors import InputError
from loku.runs import SETTINGS_WITHOUT_EFFECT, MetricsLog, RunFolder, check_tracker, hardware, peak_memory_bytes

CONFIG = {"model": "tiny", "rank": 4, "learning_rate": 1e-05, "retain": None, "threads": 1, "report_to": "none"}


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(given, remedy, path, config=CONFIG):
    with pytest.raises(InputError) as caught:
        RunFolder.check(path, config)
    assert given in caught.value.given
    assert remedy in caught.value.remedy


def test_looking_writes_nothing(tmp_path):
    run = RunFolder.check(tmp_path / "a" / "run", CONFIG)
    assert not run.finished
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    RunFolder.check(tmp_path / "empty", CONFIG)
    assert not list((tmp_path / "empty").iterdir())


def test_starting_and_finishing(tmp_path):
    run = RunFolder.check(tmp_path / "a" / "run", CONFIG)
    run.start(command="unlearn")
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG
    record = json.loads((run.path / "run.json").read_text())
    assert (record["schema_version"], record["status"], record["command"]) == (1, "running", "unlearn")
    assert {"python", "loku", "torch", "transformers", "peft"} <= set(record["versions"])
    assert {"cpu", "cores", "threads", "device"} == set(record["hardware"])
    run.update(status="finished", seed=3)
    assert RunFolder.check(run.path, CONFIG).finished
    assert RunFolder.check(run.path, CONFIG).record == record | {"status": "finished", "seed": 3}


@pytest.mark.parametrize(
    "options", [UnlearnOptions(), UnlearnOptions(weight_decay=1e-7, retain="self"), FinetuneOptions()]
)
def test_every_option_survives_the_file(tmp_path, options):
    RunFolder.check(tmp_path / "run", options.as_dict()).start("unlearn")
    RunFolder.check(tmp_path / "run", options.as_dict())


def test_the_same_settings_resume_and_keep_start_and_seconds(tmp_path):
    run = RunFolder.check(tmp_path / "run", CONFIG)
    run.start(command="unlearn")
    run.update(started="2020-01-02T03:04:05+00:00")
    with run.timed("training"):
        pass
    run.record["seconds"]["training"] = 5.0
    run.update()
    again = RunFolder.check(tmp_path / "run", dict(reversed(CONFIG.items())))
    again.start(command="unlearn")
    with again.timed("training"):
        pass
    assert again.record["started"] == "2020-01-02T03:04:05+00:00"
    assert again.record["seconds"]["training"] >= 5.0


def test_time_is_counted_even_when_a_phase_fails(tmp_path):
    run = RunFolder.check(tmp_path / "run", CONFIG)
    with pytest.raises(ZeroDivisionError), run.timed("training"):
        1 / 0  # noqa: B018
    assert run.record["seconds"]["training"] >= 0


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"rank": 8}, "rank"),
        ({"rank": 8, "model": "other", "retain": "self"}, "model, rank, retain"),
        ({"new_option": 1}, "new_option"),
        ({f"option{i}": i for i in range(9)}, "option0, option1, option2, option3, option4, option5"),
    ],
)
def test_another_runs_settings_are_refused(tmp_path, changed, names):
    RunFolder.check(tmp_path / "run", CONFIG).start("unlearn")
    before = files(tmp_path)
    given = f"--output '{tmp_path / 'run'}' holds another run (it differs in: {names})."
    refused(given, "or repeat that run's settings to resume it.", tmp_path / "run", CONFIG | changed)
    assert files(tmp_path) == before


def test_settings_without_effect_may_differ(tmp_path):
    RunFolder.check(tmp_path / "run", CONFIG).start("unlearn")
    RunFolder.check(tmp_path / "run", CONFIG | dict.fromkeys(SETTINGS_WITHOUT_EFFECT, "other"))
    assert set(SETTINGS_WITHOUT_EFFECT) <= set(UnlearnOptions.fields())


def test_folders_that_are_no_runs_are_refused(tmp_path):
    refused("--output is missing.", "Give a folder for the run; it is made when it does not exist.", None)
    refused("--output is missing.", "Give a folder for the run", "")
    (tmp_path / "file").write_text("precious")
    refused(f"--output '{tmp_path / 'file'}' is a file.", "Give a folder.", tmp_path / "file")
    refused("file/sub' lies under '", "Give a path under a folder.", tmp_path / "file" / "sub")
    refused("is not empty and holds no run.", "Choose a new folder: nothing there is overwritten.", tmp_path)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("content", ["- a\n", "", "a: [", "ä".encode("latin-1")])
def test_a_config_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("config.yaml' is not the config.yaml of a run.", "Choose a new --output folder.", tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_broken_record_is_refused(tmp_path, content):
    RunFolder.check(tmp_path / "run", CONFIG).start("unlearn")
    (tmp_path / "run" / "run.json").write_bytes(content)
    refused("run.json' ", "Restore it from a copy, or choose a new --output folder.", tmp_path / "run")


def test_a_run_on_other_rows_or_another_model_is_refused(tmp_path):
    run = RunFolder.check(tmp_path / "run", CONFIG)
    data = {"forget": {"sha256": "aa", "rows": 5}, "retain": {"sha256": "bb", "rows": 8}}
    run.check_inputs(data, "cc")
    run.start("unlearn")
    run.check_inputs(data, "cc")
    run.update(data=data, model={"sha256": "cc"})
    again = RunFolder.check(tmp_path / "run", CONFIG)
    again.check_inputs({"forget": {"sha256": "aa", "rows": 6}, "retain": {"sha256": "bb", "rows": 8}}, "cc")
    again.check_inputs(data)
    with pytest.raises(
        InputError, match=r"holds a run on other input \(changed since: retain\)\.\nChoose another folder"
    ):
        again.check_inputs(data | {"retain": {"sha256": "dd"}}, "cc")
    with pytest.raises(InputError, match=r"\(changed since: forget, model\)\."):
        again.check_inputs({"forget": {"sha256": "dd"}}, "ee")
    again.update(model={"name": "tiny"})
    again.check_inputs(data, "ee")


@pytest.mark.parametrize("torn", [None, "", '{"global_step": 1'])
def test_a_half_written_checkpoint_is_dropped(tmp_path, torn):
    run = RunFolder.check(tmp_path / "run", CONFIG)
    assert run.last_checkpoint() is None
    for step in (3, 9, 10, 12):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        (run.checkpoints / f"checkpoint-{step}" / "optimizer.pt").write_text("x")
        if step < 10:
            (run.checkpoints / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        elif torn is not None:
            (run.checkpoints / f"checkpoint-{step}" / "trainer_state.json").write_text(torn)
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-9"
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["checkpoint-3", "checkpoint-9"]


def test_steps_after_the_checkpoint_are_logged_again(tmp_path):
    run = RunFolder.check(tmp_path / "run", CONFIG)
    run.rewind_metrics(None)
    run.start("unlearn")
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 6)]
    run.metrics.write_text("\n".join(lines) + '\n{"step": 6, "lo')  # killed while writing
    run.rewind_metrics(run.checkpoints / "checkpoint-3")
    assert run.metrics.read_text().splitlines() == lines[:3]
    run.curve.write_text('{"step": 0, "forget": {"ma": 1.0}}\n{"step": 2, "forget": {"ma": 0.5}')  # within the line
    run.rewind_metrics(run.checkpoints / "checkpoint-3")
    assert run.curve.read_text() == '{"step": 0, "forget": {"ma": 1.0}}\n'
    run.rewind_metrics(None)
    assert run.metrics.read_text() == ""


def test_a_kill_while_writing_leaves_the_last_record(tmp_path, monkeypatch):
    run = RunFolder.check(tmp_path / "run", CONFIG)
    run.start("unlearn")
    before = files(run.path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("loku.files.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run.update(status="finished")
        with pytest.raises(KeyboardInterrupt):
            run.start("unlearn")
    assert files(run.path) == before
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.update(loss=float("nan"))
    assert files(run.path) == before


def test_losses_are_logged_a_line_a_step_and_what_is_not_finite_as_null(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    log.on_log(None, state, None, logs={"loss": 0.5, "grad_norm": float("inf"), "epoch": 1})
    state.global_step = 2
    log.on_log(None, state, None, logs={"loss": float("nan")})
    log.on_log(None, state, None, logs={"train_runtime": 3.0})
    log.on_log(None, state, None, logs=None)
    state.is_world_process_zero = False
    log.on_log(None, state, None, logs={"loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5, "grad_norm": None, "epoch": 1}, {"step": 2, "loss": None}]


def test_memory_and_processor_are_told():
    assert runs.peak_memory_bytes() > sum(p.nbytes for p in tiny_model().parameters())
    assert runs.hardware()["cpu"]


def test_trackers_that_are_not_installed_are_refused(monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["wandb"])
    for name in ("none", "all", "wandb"):
        check_tracker(name)
    sentence = r"--report-to 'tensorboard' was given, but its package is not installed\.\nInstall it, or leave"
    with pytest.raises(InputError, match=sentence):
        check_tracker("tensorboard")


def test_the_device_in_use_is_what_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    assert [hardware(device)["device"] for device in (None, "cuda:0", "cpu")] == ["a GPU", "a GPU", "cpu"]
    assert [peak_memory_bytes(device) == 7 for device in (None, "cuda", "cpu")] == [True, True, False]
