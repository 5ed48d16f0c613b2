"""Every suite, `--extras` too: asked again nothing is computed, interrupted it goes on, two processes share it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
from safetensors.numpy import load_file

from builders import byte_level_tokenizer, tiny_model
from loku.config import EvaluateOptions
from loku.data.prompts import TagTemplate
from loku.evaluation import generation, gradients, sampling, scoring
from loku.evaluation.cache import BatchCache
from loku.suites import Loaded
from suite_cases import cases, make_files, measure, small_batches

SUITES = ("own", "tdec", "muse", "lume", "rwku")
SCRIPT = Path(__file__).with_name("suites_in_processes.py")


@pytest.fixture
def data(tmp_path):
    make_files(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def computed(monkeypatch):
    """Count the batches that are really computed; raise KeyboardInterrupt after `stop` of them."""
    counts = {"stop": None, "scored": 0, "decoded": 0, "gradients": 0}

    def watch(module, name, kind):
        real = getattr(module, name)

        def counted(*arguments, **options):
            if counts["stop"] == counts["scored"] + counts["decoded"] + counts["gradients"]:
                raise KeyboardInterrupt
            counts[kind] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    watch(scoring, "tree_statistics", "scored")
    watch(generation, "decode", "decoded")
    watch(sampling, "decode", "decoded")
    watch(gradients, "_norm", "gradients")
    small_batches(monkeypatch)
    return counts


def total(counts):
    return sum(counts[kind] for kind in ("scored", "decoded", "gradients"))


def loaded(folder, *, keep_text=False):
    return Loaded(
        tiny_model(), byte_level_tokenizer(), TagTemplate(), "a", BatchCache(folder, "a", keep_text=keep_text)
    )


def options_of(name, model_folder, data, **more):
    return EvaluateOptions(**(cases(model_folder, data)[name] | more))


@pytest.mark.parametrize("name", SUITES)
def test_asked_again_only_the_answers_of_suite_own_are_decoded_again(name, tmp_path, model_folder, data, computed):
    options = options_of(name, model_folder, data)
    first = measure(options, loaded(tmp_path / "cache"))
    once = dict(computed)
    assert total(once) > 2
    assert once["decoded"] > 0
    assert measure(options, loaded(tmp_path / "cache")) == first
    assert computed["scored"] == once["scored"]
    assert computed["gradients"] == once["gradients"] == (8 if name == "own" else 0)
    again = computed["decoded"] - once["decoded"]
    assert again < once["decoded"] if name == "own" else again == 0  # its answers are texts: see the next test
    assert measure(options, loaded(tmp_path / "other")) == first


@pytest.mark.parametrize("name", SUITES)
def test_with_texts_kept_nothing_is_computed_again(name, tmp_path, model_folder, data, computed):
    options = options_of(name, model_folder, data, keep_text=True)
    first = measure(options, loaded(tmp_path / "cache", keep_text=True))
    once = total(computed)
    assert measure(options, loaded(tmp_path / "cache", keep_text=True)) == first
    assert total(computed) == once


@pytest.mark.parametrize("name", SUITES[1:])
def test_an_interrupted_suite_goes_on(name, tmp_path, model_folder, data, computed):
    options = options_of(name, model_folder, data)
    whole = measure(options, loaded(tmp_path / "whole"))
    needed = total(computed)
    computed["stop"] = 2 * needed - 1
    with pytest.raises(KeyboardInterrupt):
        measure(options, loaded(tmp_path / "cache"))
    computed["stop"] = None
    before = total(computed)
    assert measure(options, loaded(tmp_path / "cache")) == whole
    assert total(computed) - before == 1


def test_no_text_and_no_token_id_is_kept(tmp_path, model_folder, data, computed):
    for name in SUITES:
        measure(options_of(name, model_folder, data), loaded(tmp_path / "cache"))
    for file in (tmp_path / "cache").iterdir():
        for parts in load_file(file).values():
            assert parts.dtype.kind in "fb" or parts.dtype == np.int64
        assert file.name.startswith(("scores-", "judged-", "gradient-", "sampled-"))


def test_another_reference_is_judged_again(tmp_path, model_folder, data, computed):
    options = options_of("rwku", model_folder, data)
    measure(options, loaded(tmp_path / "cache"))
    once = computed["decoded"]
    file = data / "rwku" / "forget_level1.jsonl"
    file.write_text(file.read_text().replace("born", "painted"))
    measure(options, loaded(tmp_path / "cache"))
    assert once < computed["decoded"] < 2 * once


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path, monkeypatch, model_folder, data):
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(model_folder), str(data)]
    started = [
        subprocess.Popen(command, env=os.environ | {"RANK": rank}, stdout=PIPE, stderr=PIPE, text=True)
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    small_batches(monkeypatch)
    for name in SUITES:
        options = options_of(name, model_folder, data)
        alone = json.loads(json.dumps(measure(options, loaded(tmp_path / "alone"))))
        for found in both:
            assert found["figures"][name].keys() == alone.keys()
            for part, rows in alone.items():
                pairs = [(found["figures"][name][part], rows)] if part == "summary" else zip(
                    found["figures"][name][part], rows, strict=True
                )  # fmt: skip
                for ours, theirs in pairs:
                    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), (name, part)
        batches = [found["batches"][name] for found in both]
        assert all(batches), (name, batches)  # both had work
