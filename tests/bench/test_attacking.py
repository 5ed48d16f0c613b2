"""Attacks in `loku bench`: once on a seed's models, then on each reported run; resumed; only what changed is redone."""

from __future__ import annotations

import json

import pytest
import yaml

from bench_builders import tiny
from loku import cli
from loku.attack_models import named
from loku.attack_sources import every_attack
from loku.attacks import suite
from loku.attacks.summary import summarise
from loku.bench.checks import check_inputs
from loku.bench.compact import compact
from loku.bench.recipe import parse_recipe
from loku.bench.schedule import Schedule
from loku.bench.store import read_collection
from loku.bench.work import run_task
from loku.config import AttackOptions
from loku.errors import InputError
from loku.files import read_json
from loku.models import weights_sha256

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

QUICK = {"steps": 2, "every": 2, "max_rows": 6, "retain_rows": 2}
ATTACK = {"attacks": "none,relearn,quantise,adapter-0", "holdout": "corpus/holdout.jsonl", **QUICK}
ARMS = [
    {"name": "LoRA", "method": "ihl", "learning_rate": 1e-3},
    {"name": "All weights", "method": "graddiff", "learning_rate": 1e-3, "tune": "full"},
    {"name": "Exploding", "method": "graddiff", "learning_rate": 1e-3, "max_loss": 1e-3},
]
MODELS = {"noise_floor": 1, "arms": ARMS}


@pytest.fixture(autouse=True)
def outspoken(monkeypatch):
    """A task silences its process for good: here that is the one that all tests run in."""
    monkeypatch.setattr("loku.bench.work.forward_to", lambda sink: None)


def bench(folder, **changes):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny(**(MODELS | changes))))
    return cli.main(["bench", str(folder / "recipe.yaml"), "--output", str(folder / "out"), "--workers", "1"])


def numbers(value):
    """A record without what differs from run to run."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items() if k not in ("seconds", "peak_memory_bytes")}
    return [numbers(item) for item in value] if isinstance(value, list) else value


def schedule(folder, **changes):
    return Schedule(parse_recipe(tiny(**(MODELS | changes)), "r.yaml"), str(folder / "out"))


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """The folder of a benchmark that was first run without attacks, and when its files were written then."""
    folder = tmp_path_factory.mktemp("attacked")
    assert bench(folder) == 0
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("models/*/*/models.json")}
    assert bench(folder, attack=ATTACK) == 0
    return folder, before


def test_attacks_that_come_later_leave_the_models_as_they_are(attacked):
    folder, before = attacked
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").glob("models/*/*/models.json")} == before
    assert len(list((folder / "out").glob("runs/*/*/seed-0.json"))) == 2 * 3


def test_a_record_holds_figures_and_scores_and_no_rows(attacked):
    models, *runs = read_collection(attacked[0] / "out" / "runs.jsonl")
    lora, full, exploding = runs
    assert "attacks" not in exploding
    names = ["none", "relearn-lora", "relearn-full", "int8", "int4", "nf4"]
    assert set(full["attacks"]["attacks"]) == {*names}  # a model without an adapter has no attacks on it
    assert set(lora["attacks"]["attacks"]) == {*names, "adapter-0"}
    assert list(models["attacks"]) == ["retain-only-2"]
    for found in (lora["attacks"], full["attacks"], models["attacks"]["retain-only-2"]):
        assert found["headline"]["level"]
        assert found["failed"] == {}
        for own in found["attacks"].values():
            assert set(own["means"]) == {"target", "unlearned", "retain_only"}
            assert set(own["score"]) == {"score", "low", "high", "raw", "gap", "reason"}
            assert own["beside"].keys() >= {"retain_rougeL_recall", "repetition"}
            assert own["seconds"] >= 0
    assert lora["seconds"]["attacks"] > 0
    assert '"index"' not in json.dumps([models, *runs])
    dropped, plain = (lora["attacks"]["attacks"][name]["means"] for name in ("adapter-0", "none"))
    assert dropped["unlearned"] == plain["target"]


def test_scores_are_those_of_the_rows_that_were_kept(attacked):
    folder = attacked[0]
    plan = schedule(folder, attack=ATTACK)
    (task,) = plan.attacks()
    own = read_json(task.path.parent / "attacks.json")
    noise = read_json(task.path.parent / "retain-only-2" / "attacks.json")
    assert list(own["models"]) == ["retain_only", "target"]
    models = read_json(plan.models(0).path)["models"]
    assert own["models"]["target"]["sha256"] == models["target"]["sha256"]
    results = {
        name: found | {"roles": own["attacks"][name]["roles"] | found["roles"]}
        for name, found in noise["attacks"].items()
    }
    expected = summarise(results)["attacks"]
    found = read_json(task.path)["models"]["retain-only-2"]["attacks"]
    assert {name: item["score"] for name, item in found.items()} == {n: e["score"] for n, e in expected.items()}
    lines = (folder / "out" / "leaderboard.md").read_text()
    assert "## Robustness" in lines
    assert 'id="robustness"' in (folder / "out" / "leaderboard.html").read_text()


def test_only_what_a_change_touches_is_done_again(attacked):
    folder = attacked[0]
    assert schedule(folder, attack=ATTACK).ready() == []
    assert schedule(folder).ready() == []
    assert schedule(folder, attack=ATTACK | {"arms": ["LoRA"]}).ready() == []
    more = schedule(folder, attack=ATTACK | {"attacks": "none,lens", "arms": ["LoRA"]})
    assert [task.label for task in more.ready()] == ["attacks on the models of seed 0"]  # the run waits for them
    assert more.counts()["attacks"] == 1
    (task,) = more.ready()
    before = read_json(task.path.parent / "attacks.json")
    assert run_task(task).status == "done"
    after = read_json(task.path.parent / "attacks.json")
    assert set(after["attacks"]) == {*before["attacks"], "lens"}
    assert after["attacks"]["int4"] == before["attacks"]["int4"]  # which was not run again
    assert [task.label for task in more.ready()] == ["LoRA, seed 0"]
    floor = schedule(folder, attack=ATTACK, noise_floor=2)
    assert [task.label for task in floor.ready()] == ["models of seed 0"]


def test_a_killed_attack_goes_on_where_it_was(attacked, tmp_path, monkeypatch):
    folder = attacked[0]
    changed = ATTACK | {"samples": 2, "attacks": "quantise"}  # other settings: a store of its own
    plan = schedule(folder, attack=changed)
    (task,) = plan.ready()
    plain, calls = suite._rounded, []

    def killed(setting, model, *, kind):
        calls.append(kind)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return plain(setting, model, kind=kind)

    monkeypatch.setattr(suite, "_rounded", killed)
    with pytest.raises(KeyboardInterrupt):
        run_task(task)
    assert plan.ready() == [task]
    assert run_task(task).status == "done"
    assert len(calls) == 5 + 5  # of nine: four were done, the fifth was repeated
    run = next(item for item in plan.ready() if item.arm.name == "LoRA")
    calls[:] = ["nf4"] * 3
    with pytest.raises(KeyboardInterrupt):  # in the second attack on the run
        run_task(run)
    assert run_task(run).status == "done"
    assert calls[5:] == ["int4", "nf4"]  # int8 was kept, as the weights came out the same
    whole = read_json(schedule(folder, attack=ATTACK).final(run.arm)[0].path)["attacks"]["attacks"]
    again = read_json(run.path)["attacks"]["attacks"]
    for name in ("none", "int8", "int4", "nf4"):
        assert numbers(again[name]) == numbers(whole[name])


def test_an_attack_that_fails_is_recorded_and_the_others_go_on(attacked, monkeypatch):
    folder = attacked[0]

    def fails(setting, model, *, kind):
        raise RuntimeError(f"{kind} met an odd model")

    monkeypatch.setattr(suite, "_rounded", fails)
    plan = schedule(folder, attack=ATTACK | {"attacks": "int4,prune-0.1", "samples": 3, "arms": ["All weights"]})
    while ready := plan.ready():
        assert run_task(ready[0]).status == "done"
    found = compact(plan.finished()[1])["attacks"]
    assert list(found["attacks"]) == ["none", "prune-0.1"]
    assert found["failed"] == {
        f"int4 ({role})": "RuntimeError('int4 met an odd model')" for role in ("retain_only", "target", "unlearned")
    }


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_model_of_a_run_is_left_as_it_was(attacked, tmp_path, monkeypatch, tune):
    from loku.bench import trial

    folder, hashes = attacked[0], []
    plain = trial.attack_run

    def watched(task, result, work):
        hashes.append(weights_sha256(result.model))
        found = plain(task, result, work)
        hashes.append(weights_sha256(result.model))
        return found

    monkeypatch.setattr(trial, "attack_run", watched)
    arm = {"lora": "LoRA", "full": "All weights"}[tune]
    plan = schedule(folder, attack=ATTACK | {"attacks": "relearn,quantise,prune", "samples": 4, "arms": [arm]})
    while ready := [task for task in plan.ready() if task.arm is None or task.arm.name == arm]:
        assert run_task(ready[0]).status == "done"
    assert len(hashes) == 2
    assert hashes[0] == hashes[1]


def test_what_cannot_run_on_the_rows_is_refused_before_anything_is_trained(tmp_path):
    def refused(**attack):
        recipe = parse_recipe(tiny(attack=attack | {"max_rows": 4}), "r.yaml")
        with pytest.raises(InputError) as caught:
            check_inputs(recipe, str(tmp_path))
        return str(caught.value)

    assert "tiny, attack: --attacks 'membership' cannot run: it needs rows that were never" in refused(
        attacks="membership"
    )
    assert "does not exist" in refused(holdout="corpus/none.jsonl")
    assert "also stand in the" in refused(holdout="corpus/forget.jsonl")
    assert "other_base" in refused(other_base=str(tmp_path / "none"))
    assert not list(tmp_path.iterdir())
    full = tiny(attack={"attacks": "adapter"}, arms=[ARMS[1]])
    with pytest.raises(InputError, match="there is no adapter"):
        check_inputs(parse_recipe(full, "r.yaml"), str(tmp_path))


def test_the_names_that_a_recipe_may_use_are_those_of_the_plan():
    options = AttackOptions(prune_rates="0.2", adapter_scales="0.3")
    names = [item.name for item in every_attack(options)]
    assert {item.family for item in every_attack(options)} == set(suite.FAMILIES)
    assert [name for name in names if name.startswith(("prune", "adapter"))] == [
        "prune-0.2", "adapter-0.3", "adapter-0", "adapter-other-base",
    ]  # fmt: skip
    assert [item.name for item in named("lens, quantise", every_attack(options))] == [
        "none", "int8", "int4", "nf4", "lens",
    ]  # fmt: skip
