"""`loku attack` as a user runs it: on runs, adapters and models; resumed; refused before any work."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import loku.attack
from builders import byte_level_tokenizer, tiny_model
from conftest import perturbed, rows
from loku.adapters.export import load_lora, merged_weights
from loku.attack import attack_run
from loku.attack_models import choose
from loku.attacks.suite import FAMILIES, ROLES
from loku.cli import main
from loku.config import AttackOptions
from loku.errors import InputError
from loku.models import load_model, weights_sha256

QUICK = ["--steps", "2", "--every", "2", "--max-rows", "4", "--retain-rows", "2", "--samples", "2"]


def write(path, given):
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, rows, a run with an adapter and one of all weights."""
    folder = tmp_path_factory.mktemp("attack")
    for name, seed in (("target", 0), ("retain-only", 1), ("other", 2)):
        tiny_model(seed=seed).save_pretrained(folder / name)
        byte_level_tokenizer().save_pretrained(folder / name)
    write(folder / "forget.jsonl", [perturbed(row) for row in rows(4)])
    write(folder / "retain.jsonl", rows(6, 20))
    write(folder / "holdout.jsonl", rows(4, 40))
    write(folder / "general.jsonl", rows(3, 60))
    for name, more in (("lora", ["--rank", "2"]), ("full", ["--tune", "full", "--method", "graddiff"])):
        assert not main([
            "unlearn", "--model", str(folder / "target"), "--forget", str(folder / "forget.jsonl"), "--retain",
            str(folder / "retain.jsonl"), "--general", str(folder / "general.jsonl"), "--retain-only-model",
            str(folder / "retain-only"), "--output", str(folder / name), "--max-steps", "2", "--no-evaluate",
            "--learning-rate", "1e-2", "--save-steps", "-1", *more,
        ])  # fmt: skip
    return folder


def read(folder):
    return json.loads((folder / "attacks.json").read_text())


def test_all_attacks_of_a_run(place, tmp_path, capsys):
    before = {path: path.read_bytes() for path in (place / "target").iterdir()}
    arguments = [
        "attack", str(place / "lora"), "--holdout", str(place / "holdout.jsonl"), "--other-base", str(place / "other"),
        "--output", str(tmp_path), *QUICK,
    ]  # fmt: skip
    assert main(arguments) == 0
    said = capsys.readouterr().out
    document = read(tmp_path)
    assert {found["family"] for found in document["attacks"].values()} == set(FAMILIES)
    assert not document["missing"]
    assert not document["failed"]
    for name, found in document["attacks"].items():
        assert set(found["roles"]) == ({"unlearned"} if found["family"] == "adapter" else set(ROLES))
        assert all(name in part for part in (said.split("measurements, about")[0],))  # the cost comes first
        assert all("index" in row for result in found["roles"].values() for row in result["rows"])
    numbers = json.dumps(document)
    assert "town" not in numbers
    assert "Where was" not in numbers
    assert document["summary"]["headline"]["level"] in (
        "not measured",
        "gone",
        "hidden",
        "unclear",
        "damaged",
        "visible",
    )
    assert before == {path: path.read_bytes() for path in (place / "target").iterdir()}

    changed = (tmp_path / "attacks.json").stat().st_mtime_ns
    assert main(arguments) == 0
    again = capsys.readouterr().out
    assert "measurements, about" not in again  # nothing was left to do
    assert (tmp_path / "attacks.json").stat().st_mtime_ns >= changed
    assert read(tmp_path) == document


def test_figures_are_those_of_the_models_themselves(place, tmp_path):
    document = attack_run(
        place / "lora", attacks="adapter,relearn-full", output=str(tmp_path), max_rows=4, retain_rows=2, steps=2
    )
    figures = {name: found["figures"] for name, found in document["summary"]["attacks"].items()}
    plain = figures["none"]
    dropped, whole = figures["adapter-0"], figures["adapter-0.5"]
    assert dropped["unlearned"] == plain["target"]  # without its adapter the model is the target
    assert dropped["target"] == plain["target"]
    assert whole["unlearned"]["probability"] != plain["unlearned"]["probability"] != plain["target"]["probability"]
    learnt = document["attacks"]["relearn-full"]["roles"]["target"]
    assert learnt["curve"]["steps"] == [0, 2]
    assert len(learnt["rows"]) == 3  # one of four was trained on
    lora = load_lora(place / "lora" / "adapter")
    base = load_model(str(place / "target"))
    base.load_state_dict(merged_weights(base, lora.scaled(0.0)))
    assert weights_sha256(base) == weights_sha256(load_model(str(place / "target")))


def test_it_goes_on_where_it_was_killed(place, tmp_path, monkeypatch, capsys):
    from loku.attacks import suite

    options = ["attack", str(place / "full"), "--output", str(tmp_path), "--attacks", "quantise,prune-0.1", *QUICK]
    plain, calls = suite._rounded, []

    def killed(setting, model, *, kind):
        calls.append(kind)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return plain(setting, model, kind=kind)

    monkeypatch.setattr(suite, "_rounded", killed)
    assert main(options) == 130
    half = read(tmp_path)
    assert {name: list(found["roles"]) for name, found in half["attacks"].items()} == {
        "none": ["retain_only", "target"], "int8": ["retain_only", "target"], "int4": ["retain_only"],
        "nf4": ["retain_only"], "prune-0.1": ["retain_only"],
    }  # fmt: skip
    assert main(options) == 0
    assert len(calls) == 5 + 5
    whole = read(tmp_path)
    for name, found in half["attacks"].items():
        for role, result in found["roles"].items():
            assert whole["attacks"][name]["roles"][role] == result  # not run again
    capsys.readouterr()
    assert main([*options, "--attacks", "lens"]) == 0  # more is added
    assert set(read(tmp_path)["attacks"]) == {*whole["attacks"], "lens"}
    assert "lens" in capsys.readouterr().out


def test_an_adapter_or_two_models_without_a_run(place, tmp_path, capsys):
    given = ["--forget", str(place / "forget.jsonl"), "--attacks", "quantise", *QUICK]
    target, adapter = str(place / "target"), str(place / "lora" / "adapter")
    assert main(["attack", "--model", target, "--adapter", adapter, "--output", str(tmp_path / "a"), *given]) == 0
    assert "no robustness score" in capsys.readouterr().err
    alone = read(tmp_path / "a")
    assert set(alone["attacks"]["int4"]["roles"]) == {"target", "unlearned"}
    assert alone["summary"]["attacks"]["int4"]["score"]["reason"] == "there is no retain-only model to compare with"
    assert alone["summary"]["headline"]["level"] == "not measured"

    model = load_model(target)
    model.load_state_dict(merged_weights(model, load_lora(adapter)))
    model.save_pretrained(tmp_path / "merged")
    byte_level_tokenizer().save_pretrained(tmp_path / "merged")
    merged = ["attack", "--model", str(tmp_path / "merged"), "--target-model", target]
    assert main([*merged, "--json", *given]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed[printed.index("\n{") :])
    for role in ("target", "unlearned"):
        ours, theirs = (item["attacks"]["int4"]["roles"][role]["rows"] for item in (found, alone))
        assert [row["probability"] for row in ours] == pytest.approx([row["probability"] for row in theirs], rel=1e-4)

    more = ["--retain-only-model", str(place / "retain-only")]
    assert (
        main(["attack", "--model", target, "--adapter", adapter, "--output", str(tmp_path / "a"), *more, *given]) == 0
    )
    assert set(read(tmp_path / "a")["attacks"]["int4"]["roles"]) == set(ROLES)


def test_a_recipe_may_name_the_run(place, tmp_path):
    recipe = tmp_path / "attack.yaml"
    recipe.write_text(f"run: {place / 'full'}\nattacks: prune-0.2\nprune_rates: '0.2'\nmax_rows: 4\nretain_rows: 2\n")
    assert main(["attack", str(recipe), "--output", str(tmp_path / "out")]) == 0
    assert set(read(tmp_path / "out")["attacks"]) == {"none", "prune-0.2"}


def test_a_failing_attack_is_said_and_the_others_go_on(place, tmp_path, monkeypatch, capsys):
    from loku.attacks import activations

    def fails(*_):
        raise InputError("There is no logit lens on this model.", "Leave it out.")

    with monkeypatch.context() as patch:
        patch.setattr(activations, "lens", fails)
        options = ["attack", str(place / "full"), "--output", str(tmp_path), "--attacks", "lens,prune-0.1", *QUICK]
        assert main(options) == 0
    assert "lens failed on the target model: There is no logit lens" in capsys.readouterr().err
    assert set(read(tmp_path)["failed"]) == {f"lens ({role})" for role in ROLES}
    assert set(read(tmp_path)["attacks"]) == {"none", "prune-0.1"}
    assert main(options) == 0  # tried again
    assert not read(tmp_path)["failed"]
    assert set(read(tmp_path)["attacks"]["lens"]["roles"]) == set(ROLES)


def test_only_what_the_attacks_do_is_timed_before_them_and_a_failed_try_ends_nothing(
    place, tmp_path, monkeypatch, capsys
):
    from loku.attacks import suite

    def no_memory(*_, **more):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(suite, "relearn", no_memory)
    options = ["attack", str(place / "full"), *QUICK]
    assert main([*options, "--output", str(tmp_path / "a"), "--attacks", "prune-0.1"]) == 0
    assert "?" not in capsys.readouterr().out.split("measurements")[0]
    assert main([*options, "--output", str(tmp_path / "b"), "--attacks", "prune-0.1,relearn-full"]) == 0
    said = capsys.readouterr()
    assert "and what is not known in all" in said.out
    assert "relearn-full failed on the target model: RuntimeError('out of memory')" in said.err
    assert set(read(tmp_path / "b")["attacks"]) == {"none", "prune-0.1"}


def test_an_attack_may_raise_what_it_likes(place, tmp_path, monkeypatch, capsys):
    from loku.attacks import activations

    def fails(*_):
        raise IndexError("index out of range in self")

    monkeypatch.setattr(activations, "lens", fails)
    options = ["attack", str(place / "full"), "--output", str(tmp_path), "--attacks", "lens,prune-0.1", *QUICK]
    assert main(options) == 0
    assert "lens failed on the target model: IndexError" in capsys.readouterr().err
    assert set(read(tmp_path)["attacks"]) == {"none", "prune-0.1"}


def test_retain_rows_that_come_later_reach_the_attacks_that_are_done(place, tmp_path):
    given = [
        "--model",
        place / "other",
        "--target-model",
        place / "target",
        "--retain-only-model",
        place / "retain-only",
    ]
    given += ["--forget", place / "forget.jsonl", "--output", tmp_path, "--attacks", "prune-0.1", *QUICK]
    common = ["attack", *map(str, given)]
    assert main(common) == 0
    without = read(tmp_path)
    assert not any(name.startswith("retain_") for name in without["attacks"]["none"]["roles"]["target"]["beside"])
    assert main([*common, "--retain", str(place / "retain.jsonl")]) == 0
    found = read(tmp_path)
    for name in ("none", "prune-0.1"):
        for result in found["attacks"][name]["roles"].values():
            assert any(figure.startswith("retain_") for figure in result["beside"])
    before = (tmp_path / "attacks.json").read_bytes()
    assert main([*common, "--retain", str(place / "retain.jsonl")]) == 0
    assert read(tmp_path)["attacks"] == json.loads(before)["attacks"]  # not run again


def test_intervals_follow_the_seed(place, tmp_path, monkeypatch):
    plain, seeds = loku.attack.summarise, []

    def summarise(results, *, seed):
        seeds.append(seed)
        return plain(results, seed=seed)

    monkeypatch.setattr(loku.attack, "summarise", summarise)
    attack_run(place / "full", attacks="prune-0.1", output=str(tmp_path), max_rows=4, retain_rows=2, seed=7)
    assert seeds == [7]


def test_examples_of_few_shot_prompts_are_not_asked_for(place):
    from loku.attack_sources import find_sources, load_setting
    from loku.attacks import prompting
    from loku.attacks.suite import _prompted

    options = AttackOptions(run=str(place / "full"), max_rows=6, retain_rows=6)
    setting, asked = load_setting(find_sources(options), options), []

    def answer_all(model, tokenizer, questions):
        asked.append([item.index for item in questions])
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompting, "answer_all", answer_all)
        _prompted(setting, tiny_model(), form="few-shot")
    assert len(setting.kept) == 6
    assert len(asked[1]) == 6 - prompting.SHOTS


def refused(capsys, *arguments):
    assert main(["attack", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_used_is_refused_before_any_work(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("loku.attack._work", lambda *_: pytest.fail("work was begun"))
    run, target = place / "lora", place / "target"
    assert "--model is missing" in refused(capsys)
    assert "not a run folder" in refused(capsys, tmp_path)
    assert "--target-model is missing" in refused(capsys, "--model", target)
    assert "both given" in refused(capsys, run, "--model", target)
    assert "--forget is missing" in refused(capsys, "--model", target, "--target-model", target)
    assert "there is no adapter" in refused(capsys, place / "full", "--other-base", place / "other")
    assert "'relern' is not known" in refused(capsys, run, "--attacks", "relern")
    assert "Did you mean 'relearn'" in refused(capsys, run, "--attacks", "relern")
    assert "cannot run: it needs rows that were never trained on" in refused(capsys, run, "--attacks", "membership")
    assert "is out of range" in refused(capsys, run, "--prune-rates", "0.1,1")
    assert "something else than numbers" in refused(capsys, run, "--adapter-scales", "half")
    assert "not what the run unlearned" in refused(capsys, run, "--forget", place / "holdout.jsonl")
    assert "also stand in the retain set" in refused(capsys, run, "--retain", place / "forget.jsonl")
    assert "does not exist" in refused(capsys, run, "--holdout", place / "hold.jsonl")
    assert "--share 1.0" in refused(capsys, run, "--share", "1")
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    record = json.loads((damaged / "run.json").read_text())
    (damaged / "run.json").write_text(json.dumps(record | {"status": "running"}))
    assert "is not finished" in refused(capsys, damaged)


def test_results_of_something_else_are_not_mixed_or_lost(place, tmp_path, capsys):
    options = [place / "full", "--output", tmp_path, "--attacks", "relearn-lora", *QUICK]
    assert main(["attack", *map(str, options)]) == 0
    before = (tmp_path / "attacks.json").read_bytes()
    assert "other common: seed" in refused(capsys, *options, "--seed", "1")
    assert "other models: unlearned" in refused(capsys, place / "lora", *options[1:])
    assert "with other settings (steps: 2 there, 3 here)" in refused(capsys, *options, "--steps", "3")
    assert (tmp_path / "attacks.json").read_bytes() == before
    (tmp_path / "attacks.json").write_text("{}")
    assert "not an attacks.json" in refused(capsys, *options)


def test_the_choice_keeps_the_plan_order_and_always_measures_plainly(place):
    from loku.attack_sources import find_sources, load_setting
    from loku.attacks.suite import plan

    options = AttackOptions(run=str(place / "full"), max_rows=4)
    planned = plan(load_setting(find_sources(options), options))
    assert [item.name for item in choose("lens,int4", planned)] == ["none", "int4", "lens"]
    everything = [item.name for item in choose("all", planned)]
    assert everything == [item.name for item in planned if not item.missing]
    assert not any(item.name.startswith(("adapter", "membership")) for item in choose("all", planned))
    with pytest.raises(InputError, match="there is no adapter"):
        choose("adapter", planned)


def test_the_report_of_a_run_shows_its_attacks(place):
    run = place / "shown"
    assert not main([
        "unlearn", "--model", str(place / "target"), "--forget", str(place / "forget.jsonl"), "--retain",
        str(place / "retain.jsonl"), "--retain-only-model", str(place / "retain-only"), "--output", str(run),
        "--max-steps", "1", "--rank", "2", "--save-steps", "-1", "--eval-rows", "2", "--max-new-tokens", "2",
    ])  # fmt: skip
    assert 'id="attacks"' not in (run / "report.html").read_text()
    assert main(["attack", str(run), "--attacks", "relearn-lora", *QUICK]) == 0
    page = (run / "report.html").read_text()
    assert 'id="attacks"' in page
    assert "relearn-lora-chart" in page


def test_threads_are_set(place, monkeypatch):
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr("loku.attack._work", lambda *_: None)
    monkeypatch.setattr("loku.attack.print_summary", lambda *_: None)
    attack_run(place / "full", threads=1, max_rows=4, json=True)
    assert told == [1]
