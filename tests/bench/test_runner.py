"""`loku bench` from recipe to page: what it writes, interruptions at any point, failures, refusals."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import Future
from pathlib import Path

import pytest
import yaml

from bench_builders import STAGE, TINY, figures, models_record, put, run_record, tiny, write_recipe
from conftest import rows
from loku import cli
from loku.bench import runner
from loku.bench.checks import check_inputs
from loku.bench.models import build_models, unlearn_options
from loku.bench.recipe import parse_recipe
from loku.bench.runner import Grid
from loku.bench.schedule import Schedule
from loku.bench.store import Task, read_collection
from loku.bench.trial import run_trial
from loku.bench.workers import Outcome, Processes, Workers, cores, default_count, workers
from loku.errors import InputError
from loku.runs import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
WHOLE = {
    "arms": [
        {"name": "IHL", "method": "ihl"},
        {"name": "Exploding", "method": "graddiff", "learning_rate": 1e-3, "max_loss": 1e-3},
        {"name": "Level", "method": "ga", "learning_rate": 0.3, "eval_steps": 1, "stop_at": "level"},
    ],
    "tuning": {"seeds": [7], "grid": {"learning_rate": [1e-3, 2e-3]}},
    "relearn": {"steps": 1, "every": 1},
    "noise_floor": 1,
}
CHANGING = ("seconds", "peak_memory_bytes")


def run(capsys, *arguments):
    status = cli.main(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def lasting(value):
    """A record without what differs from run to run."""
    if isinstance(value, dict):
        return {k: lasting(v) for k, v in value.items() if k not in CHANGING}
    return [lasting(item) for item in value] if isinstance(value, list) else value


def results(folder):
    return lasting(read_collection(folder / "runs.jsonl"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The output folder of a benchmark that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    status = cli.main(["bench", str(write_recipe(folder, **WHOLE)), "--output", str(folder / "out"), "--workers", "2"])
    assert status == 0
    return folder / "out"


def test_a_run_says_what_it_was_made_of_and_what_it_cost(whole):
    models, *runs = read_collection(whole / "runs.jsonl")
    assert [record["arm"] for record in runs] == ["IHL", "Exploding", "Level"]
    record = runs[0]
    assert record["versions"]["loku"]
    assert record["hardware"]["threads"] == 1
    assert record["seed"] == 0
    assert record["seconds"]["all"] >= record["seconds"]["training"] > 0
    assert record["peak_memory_bytes"] > 1e8
    assert record["settings"]["learning_rate"] in (1e-3, 2e-3)
    for digest in (
        record["data"]["forget"]["sha256"], record["data"]["retain"]["sha256"], record["adapter"]["sha256"],
        record["models"]["target"], record["models"]["retain-only"], record["measured"]["retain"],
        models["trained_on"]["target"], models["models"]["retain-only-2"]["sha256"],
    ):  # fmt: skip
        assert re.fullmatch(r"[0-9a-f]{64}", digest)
    assert record["data"]["forget"]["sha256"] == record["measured"]["forget"] == models["data"]["forget"]
    assert record["data"]["retain"]["sha256"] != record["measured"]["retain"]
    assert models["models"]["retain-only-2"]["sha256"] != record["models"]["retain-only"]
    assert record["relearning"]["steps"] == [0, 1]
    assert set(record["relearning"]["means"]) == {"learned", "rest"}
    tuning = [json.loads(path.read_text()) for path in (whole / "runs" / "ihl").rglob("seed-7.json")]
    assert len(tuning) == 2
    assert all(found["figures"] and "relearning" not in found for found in tuning)  # no choice looks at it


def test_a_run_that_blows_up_is_a_result(whole):
    record = read_collection(whole / "runs.jsonl")[2]
    assert record["figures"] is None
    assert "loss" in record["error"]
    assert record["data"]["forget"]["rows"] > 0
    assert record["seconds"]["all"] > 0
    assert "Exploding (1 diverged)" in (whole / "leaderboard.md").read_text()
    assert "(1 diverged)" in (whole / "leaderboard.html").read_text()


def test_a_run_may_stop_at_the_retain_only_models_level(whole):
    record = read_collection(whole / "runs.jsonl")[3]
    assert record["curve"][0]["step"] == 0
    assert record["stopped"]["step"] == record["curve"][-1]["step"] <= 3
    assert "retain-only" in record["stopped"]["rule"]


def test_nothing_but_results_is_left(whole):
    assert sorted(path.name for path in whole.iterdir()) == [
        ".lock", "chosen.json", "leaderboard.html", "leaderboard.md", "models", "recipe.yaml", "runs", "runs.jsonl",
    ]  # fmt: skip
    assert {path.suffix for path in (whole / "runs").rglob("*") if path.is_file()} == {".json"}
    assert not list(whole.rglob("*.work"))
    chosen = json.loads((whole / "chosen.json").read_text())
    assert chosen["rule"] == "closest"
    assert len(chosen["arms"]["IHL"]["scores"]) == 2
    assert chosen["arms"]["Level"] == {"point": {}, "tuned_as": "Level", "scores": []}
    text = (whole / "leaderboard.md").read_text()
    assert "| retain-only, other seeds |" in text
    assert "relearned rest, acc." in text


def test_a_second_call_runs_nothing(capsys, monkeypatch, whole):
    before = (whole / "runs.jsonl").read_bytes()
    monkeypatch.setattr(runner, "check_inputs", lambda *_: pytest.fail("nothing is left to check for"))
    status, out, _ = run(capsys, whole / "recipe.yaml", "--output", whole)
    assert status == 0
    assert "7 done." in out
    assert "about 0.00 core-hours" in out
    assert (whole / "runs.jsonl").read_bytes() == before


def alive(mark):
    """The processes that were started with an environment variable of this value."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def until(condition, what, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} within {seconds} s"
        time.sleep(0.02)


def start(recipe, output, mark):
    command = [sys.executable, "-m", "loku", "bench", str(recipe), "--output", str(output), "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "LOKU_TEST_MARK": mark}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A suite that runs in the background of a shell ignores Ctrl-C, and what it starts would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads are here
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="looks for processes in /proc; needs Linux")
def test_killed_and_interrupted_it_goes_on_to_the_same_results(capsys, tmp_path, whole):
    recipe, output, mark = write_recipe(tmp_path, **WHOLE), tmp_path / "out", uuid.uuid4().hex
    # Killed outright while models are made: the workers go with it.
    process = start(recipe, output, mark)
    until(lambda: list(output.glob("models/*/seed-*/target/config.yaml")), "target model begun")
    process.kill()
    process.communicate()
    until(lambda: not alive(mark), "end of the workers", 20)
    assert not (output / "leaderboard.html").exists()
    # Ctrl-C while runs are made, which reaches all processes of the terminal.
    process = start(recipe, output, mark)
    until(lambda: list(output.glob("runs/*/*/*.work/checkpoints/checkpoint-*")), "run with a checkpoint")
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: what was written is kept; run the same command again to go on" in err
    assert "Traceback" not in err
    assert (output / "leaderboard.html").is_file()
    until(lambda: not alive(mark), "end of the workers", 20)
    # What a kill at the worst moment leaves: a folder without settings, and one with half a checkpoint.
    plan = Schedule(parse_recipe(yaml.safe_load(recipe.read_text()), "r"), str(output))
    work = next(task for task in plan.ready() if task.arm is not None).path.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    for path in work.iterdir():
        path.unlink() if path.is_file() else None
    (work / ".config.yaml.x").write_text("half")
    (work / "checkpoints" / "checkpoint-9").mkdir(parents=True, exist_ok=True)
    status, out, _ = run(capsys, recipe, "--output", output, "--workers", 2)
    assert status == 0
    assert re.search(r"[1-6] done\.", out)
    assert results(output) == results(whole)
    assert not list(output.rglob("*.work"))


def test_failures_are_reported_and_repeated_by_the_next_call(capsys, tmp_path, whole):
    output = tmp_path / "out"
    (output / "models").parent.mkdir()
    os.symlink(whole / "models", output / "models")
    (tmp_path / "broken.safetensors").write_text("no tensors")
    arms = [
        {"name": "Broken", "method": "loku", "importance": str(tmp_path / "broken.safetensors")},
        {"name": "IHL", "method": "ihl", "learning_rate": 1e-3},
    ]
    recipe = write_recipe(tmp_path, arms=arms, relearn=WHOLE["relearn"])
    plan = Schedule(parse_recipe(yaml.safe_load(recipe.read_text()), "r"), str(output))
    ihl = plan.final(plan.recipe.arms[1])[0]
    ihl.path.mkdir(parents=True)  # its result cannot be written there
    status, out, err = run(capsys, recipe, "--output", output, "--workers", 1)
    assert status == 1
    assert "failed Broken, seed 0: " in out
    assert "failed IHL, seed 0: IsADirectoryError" in out
    assert f"See '{ihl.error_file}'." in out.replace("\n", " ").replace("  ", " ")
    assert "2 of the runs failed: " in err
    assert "run the same command again to repeat them" in err
    assert "IsADirectoryError" in ihl.error_file.read_text()
    assert (output / "leaderboard.html").is_file()
    ihl.path.rmdir()
    status, _, err = run(capsys, recipe, "--output", output, "--only", "IHL", "--workers", 1)
    assert (status, err.count("error")) == (0, 0)
    assert not ihl.error_file.exists()
    assert [record["arm"] for record in results(output)[1:]] == ["IHL"]


def test_a_worker_that_is_killed_takes_no_other_with_it(tmp_path):
    plan = Schedule(parse_recipe(tiny(seeds=[0, 1]), "r"), str(tmp_path))
    with workers("local", 2) as found:
        first, second = (found.submit(plan.models(seed)) for seed in (0, 1))
        until(lambda: (tmp_path / "models").is_dir() and len(multiprocessing.active_children()) == 2, "two workers")
        victim = multiprocessing.active_children()[0]
        os.kill(victim.pid, signal.SIGKILL)
        outcomes = {first.result(120).status, second.result(120).status}
        assert outcomes == {"failed", "done"}
        lost = next(outcome for outcome in (first.result(), second.result()) if outcome.status == "failed")
        assert "its process ended (exit code -9)." in lost.given
        assert "Run the same command again" in lost.remedy


@pytest.mark.parametrize("keep", [False, True])
def test_processes_are_new_for_each_task_or_kept(tmp_path, monkeypatch, keep):
    context = multiprocessing.get_context("forkserver")
    processes, plan = Processes(context, keep=keep), Schedule(parse_recipe(tiny(), "r"), str(tmp_path))
    (tmp_path / "models").write_text("no folder can be made here")
    seen = []
    for _ in range(2):
        outcome = processes.run(plan.models(0))
        assert (outcome.status, "NotADirectoryError" in outcome.given) == ("failed", True)
        assert outcome.remedy.startswith("It happened here: ")  # the reason cannot be written there, either
        seen.append({process.pid for process in processes.alive})
    assert (len(seen[0]), seen[1]) == ((1, seen[0]) if keep else (0, set()))
    processes.end()
    processes.join()
    assert processes.run(plan.models(0)).status == "failed"
    assert not any(process.is_alive() for process in processes.alive)


def test_where_nobody_says_a_gpu_has_one_worker(monkeypatch):
    import torch

    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert default_count(gpu=True) == (1 if there else cores())
        assert default_count(gpu=False) == cores() >= 1


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'")
def test_a_ray_cluster_gives_the_same_figures(tmp_path, whole):
    rate = json.loads((whole / "chosen.json").read_text())["arms"]["IHL"]["point"]["learning_rate"]
    arms = [{"name": "IHL", "method": "ihl", "learning_rate": rate}]
    recipe = write_recipe(tmp_path, arms=arms, relearn=WHOLE["relearn"])
    command = [sys.executable, "-m", "loku", "bench", str(recipe), "--output", str(tmp_path / "out")]
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, "--backend", "ray", "--workers", "2"], env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (_, theirs), ours = results(tmp_path / "out"), results(whole)[1]
    assert theirs["figures"] == ours["figures"]
    assert theirs["relearning"] == ours["relearning"]
    assert theirs["adapter"] == ours["adapter"]


def test_ray_that_is_not_there_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = run(capsys, write_recipe(tmp_path), "--backend", "ray", "--output", tmp_path / "out")
    assert (status, "Ray is not installed" in err, "pip install ray, or '.[ray]'" in err) == (2, True, True)
    status, _, err = run(capsys, write_recipe(tmp_path), "--ray-address", "auto", "--output", tmp_path / "out")
    assert (status, "--ray-address auto is of no use" in err, "Add --backend ray" in err) == (2, True, True)
    assert not (tmp_path / "out").exists()


def test_wrong_calls_are_refused(capsys, tmp_path):
    status, _, err = run(capsys)
    assert (status, "The recipe is missing." in err, "Give a YAML file: loku bench" in err) == (2, True, True)
    status, _, err = run(capsys, write_recipe(tmp_path), "--only", "IHK", "--output", tmp_path / "out")
    assert (status, "--only 'IHK' is no arm of tiny." in err, "Did you mean 'IHL'?" in err) == (2, True, True)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_benchmark_is_refused(capsys, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "recipe.yaml").write_text("name: 50\n")
    status, _, err = run(capsys, write_recipe(tmp_path), "--output", output)
    assert status == 2
    assert f"--output '{output}' holds the benchmark '50'." in err.replace("\n", " ")
    assert "Give tiny a folder of its own." in err
    assert [path.name for path in output.iterdir()] == ["recipe.yaml"]


def test_a_dry_run_of_some_arms_shows_these(capsys, tmp_path):
    recipe = write_recipe(tmp_path, **WHOLE)
    status, out, _ = run(capsys, recipe, "--output", tmp_path / "out", "--dry-run", "--only", "Level")
    assert (status, "Level" in out, "Exploding" in out) == (0, True, False)


def test_a_dry_run_checks_and_prints_and_writes_nothing(capsys, tmp_path):
    recipe = write_recipe(tmp_path, **WHOLE, seconds={"models": 360, "trial": 36})
    status, out, _ = run(capsys, recipe, "--output", tmp_path / "out", "--dry-run", "--workers", 2)
    assert status == 0
    assert "3 arms, seeds 0; 2 sets of models, 2 tuning runs, 3 runs; 0 done." in out
    assert "about 0.25 core-hours, on 2 workers" in out
    assert not (tmp_path / "out").exists()


def test_two_at_a_time_in_one_folder_are_refused(capsys, tmp_path):
    fcntl = pytest.importorskip("fcntl", reason="no file locks on this system")
    output = tmp_path / "out"
    output.mkdir()
    with (output / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        status, _, err = run(capsys, write_recipe(tmp_path), "--output", output)
    assert status == 2
    assert "Another loku bench is at work in" in err
    assert "Wait for it, or choose another --output folder." in err
    assert [path.name for path in output.iterdir()] == [".lock"]


BAD_INPUT = [
    ({"stages": TINY["stages"] | {"target": STAGE | {"data": "none.jsonl"}}}, "stage 'target': data 'none.jsonl' does"),
    ({"stages": TINY["stages"] | {"target": STAGE | {"data": "corpus/ful.jsonl"}}}, "data 'corpus/ful.jsonl' does not"),
    ({"stages": TINY["stages"] | {"base": {"model": "./none"}}}, "stage 'base': model './none' does not exist"),
    ({"unlearn": TINY["unlearn"] | {"forget": "bad.jsonl"}}, "unlearn: forget 'bad.jsonl': line 1 is not JSON"),
    ({"unlearn": TINY["unlearn"] | {"holdout": "empty.jsonl"}}, "unlearn: holdout 'empty.jsonl' is empty"),
    ({"unlearn": TINY["unlearn"] | {"retain": "corpus/full.jsonl"}}, "arm 'IHL': "),  # holds the forget rows
    ({"unlearn": TINY["unlearn"] | {"max_length": 3}}, "arm 'IHL': "),
    ({"measure": {"retain": "other.jsonl"}}, "measure: retain 'other.jsonl' does not exist"),
    ({"arms": [{"name": "Wide", "method": "ihl", "rank": 500}]}, "arm 'Wide': --rank 500"),
    ({"arms": [{"name": "Deep", "method": "rmu", "layer": 40}]}, "arm 'Deep': --layer 40 does not exist"),
    ({"arms": [{"name": "Odd", "method": "ihl", "forget_options": {"bta": 1}}]}, "arm 'Odd': "),
    (
        {
            "stages": {"target": TINY["stages"]["target"]},
            "unlearn": TINY["unlearn"] | {"eval_steps": 1, "stop_at": "level"},
        },
        "--stop-at level has no level of unseen text",
    ),
    ({"corpus": {"kind": "fiction", "people": 3}}, "A corpus of 24 world people and 3 fictitious people"),
]


@pytest.mark.parametrize(("changes", "given"), BAD_INPUT, ids=[text[:30] for _, text in BAD_INPUT])
def test_what_cannot_be_used_is_refused_before_anything_is_trained(tmp_path, monkeypatch, changes, given):
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text("{")
    Path("empty.jsonl").write_text("")
    with pytest.raises(InputError) as caught:
        check_inputs(parse_recipe(tiny(**changes), "r.yaml"), str(tmp_path / "out"))
    assert given in caught.value.given
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_a_model_and_rows_of_ones_own_are_checked_without_its_weights(tmp_path, model_folder):
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(4)))
    (tmp_path / "retain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(4, start=20)))
    own = {"forget": str(tmp_path / "forget.jsonl"), "retain": str(tmp_path / "retain.jsonl"), "rank": 2}
    value = tiny(corpus=None, stages={"target": {"model": str(model_folder)}}, unlearn=own, measure={})
    check_inputs(parse_recipe(value, "r.yaml"), str(tmp_path / "out"))
    with pytest.raises(InputError, match="arm 'IHL': --rank 40"):
        check_inputs(parse_recipe(value | {"unlearn": own | {"rank": 40}}, "r.yaml"), str(tmp_path / "out"))
    own_self = own | {"retain": "self", "rank": 40}  # cannot be sampled without weights: found out by its run
    check_inputs(parse_recipe(value | {"unlearn": own_self}, "r.yaml"), str(tmp_path / "out"))


def test_rows_that_changed_are_refused_until_they_are_restored(tmp_path, model_folder):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("forget", "retain", "measured", "validation")}
    for count, file in enumerate(files.values()):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(4, start=20 * count)))
    value = tiny(
        corpus=None, stages={"target": {"model": str(model_folder)}},
        measure={"retain": str(files["measured"]), "validation": str(files["validation"])},
        tuning={"seeds": [7], "grid": {"learning_rate": [1e-3]}},  # nothing to choose: its seed has no models
        unlearn=TINY["unlearn"] | {"forget": str(files["forget"]), "retain": str(files["retain"]), "max_steps": 1},
    )  # fmt: skip
    recipe, out = parse_recipe(value, "r.yaml"), str(tmp_path / "out")
    build_models(Task("models", out, 0, recipe))
    task = Task("trial", out, 0, recipe, recipe.arms[0], {})
    for file in files.values():
        before = file.read_text()
        file.write_text(before.replace("In the town", "In a town"))
        for refused in (lambda: run_trial(task), lambda: check_inputs(recipe, out)):
            with pytest.raises(InputError) as caught:
                refused()
            given = f"The rows '{file}' are not those of the models of seed 0: they have changed since."
            assert caught.value.given == given
            assert caught.value.remedy == "Restore them, or choose a new --output folder."
        assert not list(Path(out, "runs").rglob("*"))
        file.write_text(before)
    check_inputs(recipe, out)
    run_trial(task)
    assert task.path.is_file()


def test_an_arms_own_rows_are_the_same_on_all_seeds(tmp_path, model_folder):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("forget", "retain", "own")}
    for count, file in enumerate(files.values()):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(4, start=20 * count)))
    value = tiny(
        corpus=None, stages={"target": {"model": str(model_folder)}}, measure={"retain": str(files["retain"])},
        unlearn=TINY["unlearn"] | {"forget": str(files["forget"]), "retain": str(files["retain"]), "max_steps": 1},
        arms=[{"name": "Own", "method": "ihl", "retain": str(files["own"])}], seeds=[0, 1],
    )  # fmt: skip
    recipe, out = parse_recipe(value, "r.yaml"), str(tmp_path / "out")
    for seed in recipe.seeds:
        build_models(Task("models", out, seed, recipe))
    first, second = (Task("trial", out, seed, recipe, recipe.arms[0], {}) for seed in recipe.seeds)
    run_trial(first)
    before = files["own"].read_text()
    files["own"].write_text(before.replace("In the town", "In a town"))
    with pytest.raises(InputError, match=f"The rows '{files['own']}' are not those of the run of seed 0"):
        run_trial(second)
    files["own"].write_text(before)
    run_trial(second)
    assert second.path.is_file()


def test_what_a_killed_run_on_other_rows_left_is_made_anew(tmp_path, model_folder):
    for count, name in enumerate(("forget", "retain")):
        text = "".join(json.dumps(row) + "\n" for row in rows(4, start=20 * count))
        (tmp_path / f"{name}.jsonl").write_text(text)
    value = tiny(
        corpus=None, stages={"target": {"model": str(model_folder)}}, measure={},
        unlearn=TINY["unlearn"] | {"forget": str(tmp_path / "forget.jsonl"), "retain": str(tmp_path / "retain.jsonl")},
    )  # fmt: skip
    recipe, out = parse_recipe(value, "r.yaml"), str(tmp_path / "out")
    build_models(Task("models", out, 0, recipe))
    task = Task("trial", out, 0, recipe, recipe.arms[0], {})
    work = task.path.with_suffix(".work")
    folder = RunFolder.check(work, unlearn_options(recipe, recipe.settings(recipe.arms[0], {}), Path(), 0).as_dict())
    folder.start("unlearn")
    folder.update(data={"forget": {"sha256": "of other rows"}})  # what a killed run left, on an input that is gone
    run_trial(task)
    assert task.path.is_file()
    assert not work.exists()


class FakeWorkers:
    """Workers that write a result at once, or say otherwise."""

    def __init__(self, slots, outcomes=None):
        self.count, self.outcomes, self.seen, self.most = slots, outcomes or {}, [], 0

    def submit(self, task):
        self.seen.append(task.label)
        outcome = self.outcomes.get(task.label, Outcome(task.label))
        if outcome.status == "done":
            record = (
                models_record(task.seed, target=figures(), retain_only=figures())
                if task.arm is None
                else run_record(task.arm.name, task.seed, figures(forget__probability=0.5))
            )
            put(task.path, record)
        future = Future()
        future.set_result(outcome)
        return future

    def workers(self):
        return Workers(self.submit, lambda: self.count)


def grid(tmp_path, minutes=None):
    arms = [{"name": "A", "method": "ihl"}, {"name": "B", "method": "ga"}]
    return Grid(Schedule(parse_recipe(tiny(arms=arms, seeds=[0, 1]), "r"), str(tmp_path)), minutes)


def test_no_more_tasks_are_begun_than_there_are_slots(tmp_path):
    fake, updates = FakeWorkers(1), []
    grid(tmp_path).run(fake.workers(), lambda *update: updates.append(update))
    assert fake.seen[:2] == ["models of seed 0", "models of seed 1"]
    assert len(fake.seen) == 6
    assert [update[:2] for update in updates] == [(i, 6) for i in range(1, 7)]


def test_a_failed_run_is_not_begun_again_and_the_rest_goes_on(tmp_path):
    fake = FakeWorkers(1, {"A, seed 0": Outcome("A, seed 0", "failed", "A, seed 0: out of memory.", "See x.")})
    plan = grid(tmp_path)
    plan.run(fake.workers(), lambda *_: None)
    assert len(fake.seen) == 6
    assert [failure.given for failure in plan.failures] == ["A, seed 0: out of memory."]
    again = FakeWorkers(1)
    grid(tmp_path).run(again.workers(), lambda *_: None)
    assert again.seen == ["A, seed 0"]


def test_an_arm_whose_rows_cannot_be_used_is_left_out_from_then_on(tmp_path):
    fake = FakeWorkers(1, {"A, seed 0": Outcome("A, seed 0", "refused", "No alternates.", "Give some.")})
    plan = grid(tmp_path)
    plan.run(fake.workers(), lambda *_: None)
    assert "A, seed 1" not in fake.seen
    assert {"B, seed 0", "B, seed 1"} <= set(fake.seen)
    assert len(plan.failures) == 1


def test_models_that_cannot_be_made_end_everything(tmp_path):
    fake = FakeWorkers(1, {"models of seed 0": Outcome("m", "refused", "Bad rows.", "Mend them.")})
    with pytest.raises(InputError, match=r"Bad rows\.\nMend them\."):
        grid(tmp_path).run(fake.workers(), lambda *_: None)
    assert fake.seen == ["models of seed 0"]


def test_after_the_time_limit_nothing_is_begun_and_the_next_call_goes_on(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    fake = FakeWorkers(2)

    def minute(*_):
        clock[0] += 60.0

    grid(tmp_path, minutes=1.5).run(fake.workers(), minute)
    assert len(fake.seen) == 4  # two at the start, two after a minute
    grid(tmp_path).run(fake.workers(), minute)
    assert len(fake.seen) == 6
