"""Two processes share scoring and generation; both return what one alone returns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest

from loku import cli
from loku.evaluation.results import read_results
from loku.evaluation.sharing import gathered, is_first, own_share

SCRIPT = Path(__file__).with_name("score_in_processes.py")


def test_alone_everything_is_ones_own():
    assert own_share([3, 1, 2]) == [3, 1, 2]
    assert gathered({1: "a"}) == {1: "a"}
    assert is_first()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path, monkeypatch, model_folder, forget_file):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from score_in_processes import work

    command = [sys.executable, str(SCRIPT), str(tmp_path), str(model_folder), str(forget_file)]
    started = [
        subprocess.Popen(command, env=os.environ | {"RANK": rank}, stdout=PIPE, stderr=PIPE, text=True)
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "results written to" in said[0][0]
    assert said[1][0] == ""
    both, alone = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)], work()
    assert [found["first"] for found in both] == [True, False]
    for found in both:
        assert found["answers"] == alone["answers"]
        np.testing.assert_allclose(found["nll"], alone["nll"], rtol=1e-6)
        for one, other in zip(found["logprobs"], alone["logprobs"], strict=True):
            np.testing.assert_allclose(one, other, atol=2e-6)
        for name, (total, reports) in found["told"].items():
            assert total == alone["told"][name][0] == 9
            assert 1 < reports <= (alone["told"][name][1] + 1) // 2 + 2
    arguments = ["--model", str(model_folder), "--forget", str(forget_file), "--output", str(tmp_path / "one")]
    assert cli.main(["evaluate", *arguments]) == 0
    shared, own = (read_results(tmp_path / name / "results.json") for name in ("eval", "one"))
    for row, other in zip(shared.sets["forget"].per_example, own.sets["forget"].per_example, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
