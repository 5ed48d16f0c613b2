"""The command line: light, strict, and clear about what was wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loku import cli
from loku.config import UnlearnOptions

UNDER_A_FILE = f"--output '{__file__}/x' lies under '{__file__}', which is a file."


def run(capsys, *arguments):
    try:
        status = cli.main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("statement", ["import loku", "import loku.cli; loku.cli.build_parser()"])
def test_importing_and_help_need_no_heavy_library(statement):
    heavy = "{'torch', 'transformers', 'peft', 'datasets', 'scipy', 'pandas', 'numpy', 'altair'}"
    code = f"{statement}\nimport sys\nfound = {heavy} & set(sys.modules)\nassert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(capsys, verb):
    status, out, _ = run(capsys, verb, "--help")
    assert status == 0
    assert f"loku {verb}" in out


def test_help_shows_every_option_with_its_default(capsys):
    _, out, _ = run(capsys, "unlearn", "--help")
    for name in UnlearnOptions.fields():
        assert "--" + name.replace("_", "-") in out
    assert "[0.0001]" in out


@pytest.mark.parametrize(
    ("arguments", "given", "remedy"),
    [
        (["unlern"], "'unlern' is not a verb of loku.", "Did you mean 'unlearn'?"),
        (["unlearn", "--forgt", "x"], "'--forgt' is not an option of `loku unlearn`.", "Did you mean '--forget'?"),
        (["unlearn", "--ran", "4"], "'--ran' is not an option of `loku unlearn`.", "Did you mean '--rank'?"),
        (["methods", "--x"], "'--x' is not an option of `loku methods`.", "Valid names are: --help."),
        (["unlearn", "--epochs", "x"], "argument --epochs: invalid float value: 'x'", "See `loku unlearn --help`."),
        (["unlearn", "--forget-loss", "ilh"], "--forget-loss 'ilh' is not known.", "Did you mean 'ihl'?"),
        (["unlearn", "--rank", "0"], "--rank 0 is too small.", "Give at least 1."),
        (["unlearn", "--learning-rate", "-1"], "--learning-rate -1.0 is too small.", "Give at least 0."),
        (["unlearn", "none.yaml"], "The recipe 'none.yaml' does not exist.", "Give the path of a YAML file"),
        (["unlearn"], "--model is missing.", "Give a model folder or a hub id"),
        (["unlearn", "--model", "./none"], "--model './none' does not exist as a folder.", "Check the path"),
        (["finetune"], "--output is missing.", "Give a folder for the run"),
        (["importance"], "--output is missing.", "Give a file name ending in .safetensors."),
        (["report", "none", "--output", "."], "--output '.' is a folder.", "Give the HTML file to write."),
        (["report", "none", "--output", __file__ + "/x"], UNDER_A_FILE, "Give a path under a folder."),
        (["importance", "--output", __file__ + "/x"], UNDER_A_FILE, "Give a path under a folder."),
        (["report", "none"], "There is no folder 'none'.", "Give a run folder made by"),
        (["export", "none"], "'none' is not a folder.", "Give a run folder of `loku unlearn`"),
    ],
)  # fmt: skip
def test_wrong_usage_is_answered_in_two_halves(capsys, arguments, given, remedy):
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert f"error: {given}" in err
    assert remedy in err
    assert "Traceback" not in err


def test_methods_lists_every_method(capsys):
    from loku.methods import METHODS

    status, out, _ = run(capsys, "methods")
    assert status == 0
    for name, method in METHODS.items():
        assert name in out
        assert method.family.split()[0] in out


def test_version(capsys):
    status, out, _ = run(capsys, "--version")
    assert status == 0
    assert out.startswith("loku 0.")
