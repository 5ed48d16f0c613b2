"""The demo holds what it promises, on three seeds; the mini-TOFU recipe runs on real rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loku import cli
from loku.demo import check_memorised
from loku.errors import LokuError
from loku.evaluation.results import read_results
from loku.files import read_json, sha256_file

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("LOKU_DATA_DIR", "/nonexistent"))


def figures(folder):
    places = {"target": folder / "target", "retain-only": folder / "retain-only"}
    places |= {run.name: run for run in (folder / "runs").iterdir()}
    return {name: read_results(place / "results.json") for name, place in places.items()}


def loku(*arguments, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "loku", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_shows_what_it_claims(tmp_path, seed):
    full = seed == 0  # the attacks take a minute: once is enough
    outcome = loku("demo", "--output", "demo", "--seed", seed, *(["--full"] if full else []), cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    found = figures(tmp_path / "demo")

    def accuracy(name, rows):
        return found[name].mean(rows, "exact_match")

    assert accuracy("target", "forget") >= 0.95
    assert accuracy("retain-only", "forget") <= 0.15
    for name in ("ihl", "loku"):
        # .90 to 1.00 on five seeds (docs/results.md), .90 on seed 0
        assert accuracy(name, "retain") >= 0.85
        assert accuracy(name, "forget") <= 0.15
        assert found[name].summary["model_utility"] > found["graddiff"].summary["model_utility"]
        assert found[name].summary["model_utility"] > found["ga"].summary["model_utility"]
    assert (tmp_path / "demo" / "report.html").is_file()
    reference = tmp_path / "demo" / "retain-only" / "results.json"
    for run in (tmp_path / "demo" / "runs").iterdir():
        assert (run / "results.retain_only.json").read_bytes() == reference.read_bytes()
        assert f"(sha256 {sha256_file(reference)[:12]})" in found[run.name].verdict["rests_on"]
        assert (run / "report.html").is_file()
        assert read_json(run / "run.json")["status"] == "finished"
    if full:
        for name in ("ihl", "loku"):
            attacks = read_json(tmp_path / "demo" / "runs" / name / "attacks.json")
            assert {"relearn", "quantise", "prune", "adapter", "prompts", "membership", "probe"} <= {
                found["family"] for found in attacks["summary"]["attacks"].values()
            }
            assert attacks["failed"] == {}
            assert f"under attack, {name}: {attacks['summary']['headline']['level']}" in outcome.stdout
    for told in ("pretrain ", "unlearning by loku", "measuring"):
        assert told in outcome.stderr
    for told in ("target", "retain-only", "graddiff", "report: demo/report.html"):
        assert told in outcome.stdout


def test_a_target_that_did_not_memorise_stops_the_demo(tmp_path, model_folder, forget_file, capsys):
    arguments = ["evaluate", "--model", model_folder, "--forget", forget_file, "--output", tmp_path / "eval"]
    assert cli.main([str(a) for a in arguments]) == 0
    with pytest.raises(LokuError, match=r"memorised only 0% of the forget rows \(seed 7\)\.\nNothing can be unlearnt"):
        check_memorised(read_results(tmp_path / "eval" / "results.json"), seed=7)


def test_the_demo_replaces_nothing_but_a_demo(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert cli.main(["demo", "--output", str(tmp_path)]) == 2
    assert "is not empty and holds no demo.\nChoose a new folder." in capsys.readouterr().err
    assert cli.main(["demo", "--output", str(tmp_path / "thesis.txt")]) == 2
    assert "thesis.txt' is a file.\nChoose a new folder." in capsys.readouterr().err
    assert cli.main(["demo", "--output", str(tmp_path / "thesis.txt" / "sub")]) == 2
    assert "' lies under '" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(
    not (DATA / "tofu").is_dir(), reason="needs real TOFU rows: set LOKU_DATA_DIR to the folder that holds tofu/"
)
def test_the_mini_tofu_recipe_on_real_rows(tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    training = [
        subprocess.Popen(
            [sys.executable, "-m", "loku", "finetune", f"recipes/mini-tofu/{name}.yaml"],
            cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for name in ("target", "retain-only")
    ]  # fmt: skip
    assert [process.wait() for process in training] == [0, 0]
    outcome = loku("unlearn", "recipes/mini-tofu/unlearn.yaml", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    folder = tmp_path / "runs" / "mini-tofu" / "unlearn"
    target, unlearned, retain_only = (
        read_results(folder / f"results{role}.json") for role in (".target", "", ".retain_only")
    )
    assert target.mean("forget", "rougeL_recall") >= 0.9
    assert retain_only.mean("forget", "rougeL_recall") <= 0.5
    assert unlearned.mean("forget", "rougeL_recall") <= 0.5
    assert unlearned.mean("retain", "rougeL_recall") >= 0.8
    assert unlearned.summary["forget_quality_rows"] == 20
    assert unlearned.verdict is not None
    assert "retain-only" in unlearned.verdict["rests_on"]
    assert "Nikolai Abilov" in (folder / "report.html").read_text()
