"""A benchmark's recipe: what it says, and every refusal with its two halves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench_builders import TINY, tiny, write_recipe
from loku.bench.extending import read_yaml
from loku.bench.recipe import Arm, load_recipe, parse_recipe
from loku.bench.store import run_file
from loku.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
GRID = {"learning_rate": [1e-3, 3e-3]}
TUNED = {"seeds": [5], "grid": GRID}
MATRIX = {"name": "{method}, rank {rank}", "matrix": {"method": ["ihl", "graddiff"], "rank": [4, 8]}}


def unlearn(**changes):
    return TINY["unlearn"] | changes


def stages(**changes):
    return TINY["stages"] | changes


@pytest.mark.parametrize(
    ("changes", "given", "remedy"),
    [
        ({"arm": []}, "r.yaml has the unknown entry 'arm'.", "Did you mean 'arms'?"),
        ({"name": "a/b"}, "r.yaml has the name 'a/b'.", "Give letters"),
        ({"name": ".."}, "r.yaml has the name '..'.", "Give letters"),
        ({"stages": {"base": {"model": "x"}}}, "r.yaml has no stage 'target'.", "Name the model"),
        ({"stages": stages(target={"model": "x", "epochs": 2})}, "stage 'target' has no data.", "Give data"),
        ({"stages": stages(target={"model": "x", "data": "d", "epoch": 2})}, "unknown option 'epoch'.", "'epochs'?"),
        ({"stages": stages(target={"model": "x", "data": "d", "seed": 2})}, "sets 'seed', which the b", "Leave it out"),
        ({"stages": stages(target={"data": "d"})}, "stage 'target' has no model.", "Give model, or new_model"),
        ({"stages": stages(target={"model": "target", "data": "d"})}, "which does not come before it.", "./target."),
        ({"stages": {"target": {"model": "pre", "data": "d"}, "pre": {"model": "x"}}}, "from the stage 'pre'", "first"),
        ({"stages": stages(target={"model": "target"})}, "starts from the stage 'target'", "Put that stage first"),
        ({"stages": stages(corpus={"model": "x"})}, "has a stage called 'corpus'.", "Give it a name"),
        ({"stages": []}, "r.yaml is no mapping.", "Write `name: value` lines there."),
        ({"unlearn": unlearn(forgets="x")}, "has the unknown option 'forgets'.", "Did you mean 'forget'?"),
        ({"unlearn": {"retain": "x"}}, "r.yaml has no forget set.", "Give unlearn: {forget: ...}."),
        ({"unlearn": unlearn(seed=1)}, "arm 'IHL' sets 'seed', which the benchmark sets itself.", "Leave it out."),
        ({"unlearn": unlearn(output="x")}, "arm 'IHL' sets 'output', which the benchmark sets", "Leave it out."),
        ({"unlearn": unlearn(rank=0)}, "arm 'IHL': --rank 0", "Give"),
        ({"arms": []}, "r.yaml, arms is no list.", "Give at least one arm"),
        ({"arms": [{"name": "A", "method": "ihk"}]}, "arm 'A': the method 'ihk' is not known.", "Did you mean 'ihl'?"),
        ({"arms": [{"name": "A"}, {"name": "a"}]}, "r.yaml has two arms called 'A'.", "Give every arm a name"),
        ({"arms": [{"name": "!!"}]}, "two arms called '!!'.", "Give every arm a name"),
        ({"arms": [MATRIX | {"name": "all"}]}, "r.yaml has two arms called 'all'.", "Give every arm a name"),
        ({"arms": [MATRIX | {"name": "{rnk}"}]}, "the arm name '{rnk}', which names no option", "in braces"),
        ({"arms": [MATRIX | {"name": "{rank"}]}, "the arm name '{rank', which names no option", "in braces"),
        ({"arms": [{"matrix": {"rank": 4}}]}, "matrix 'rank' is 4.", "Give a list of values."),
        ({"arms": [{"name": "A", "forget": "x"}]}, "arm 'A' sets 'forget', which all arms must share.", "unlearn"),
        ({"arms": [{"name": "A", "eval_rows": 1}]}, "sets 'eval_rows', which all arms must share.", "unlearn"),
        ({"arms": [{"name": "A", "retain": "x"}], "measure": {}}, "arm 'A' sets 'retain', and is", "measure: {retain"),
        ({"arms": [{"rank": 4}]}, "has an arm without name and method: {'rank': 4}.", "Give it a name"),
        ({"measure": {"memorised": {"forget.probabilty": 0.8}}}, "unknown entry 'forget.probabilty'.", "probability'?"),
        ({"measure": {"suite": "muse", "memorised": {"forget.ma": 0.8}}}, "entry 'forget.ma'.", "knowmem_forget"),
        ({"measure": {"forget": "x"}}, "measure has the unknown entry 'forget'.", "retain"),
        ({"seeds": []}, "r.yaml, seeds is [].", "Give a list of different whole numbers"),
        ({"seeds": [1, 1]}, "r.yaml, seeds is [1, 1].", "Give a list of different whole numbers"),
        ({"seeds": [True]}, "r.yaml, seeds is [True].", "Give a list of different whole numbers"),
        ({"seeds": [2**32]}, "r.yaml, seeds is [4294967296].", "Give a list of different whole numbers"),
        ({"tuning": {"grid": {}}}, "r.yaml, tuning seeds is None.", "Give a list"),
        ({"tuning": TUNED | {"seeds": [0, 5]}}, "r.yaml tunes on seeds that it reports ([0]).", "Tune on other seeds."),
        ({"tuning": {"seeds": [5], "choose": "best"}}, "tuning chooses by 'best'.", "Valid names are: closest, level."),
        ({"tuning": {"seeds": [5], "grid": {"rank": 4}}}, "grid 'rank' is 4.", "Give a list of values."),
        ({"tuning": {"seeds": [5], "grid": {"rnk": [4, 8]}}}, "has the unknown option 'rnk'.", "Did you mean 'rank'?"),
        ({"tuning": {"seeds": [5], "grid": {"max_length": [9]}}}, "'max_length', which all arms must share", "unlearn"),
        ({"tuning": TUNED | {"choose": "level"}}, "tuned by choose: level, but does not stop", "stop_at: level"),
        ({"tuning": {"seeds": [5]}}, "r.yaml, tuning has no grid.", "Give grid: {learning_rate"),
        ({"tuning": TUNED | {"at": {"rnk": 2}}}, "tuning: at has the unknown entry 'rnk'.", "Did you mean 'rank'?"),
        ({"tuning": TUNED | {"at": {"rank": 2}}, "arms": [MATRIX]}, "to be tuned at {'rank': 2}", "Add that arm"),
        ({"noise_floor": -1}, "r.yaml, noise_floor is -1.", "Give a whole number, 0 or more."),
        ({"noise_floor": 1, "stages": {"target": {"model": "x"}}}, "has a noise_floor, but trains no", "Leave noise"),
        ({"corpus": {"kind": "fictoin"}}, "has a corpus of kind 'fictoin'.", "Did you mean 'fiction'?"),
        ({"corpus": {"kind": "fiction", "size": 4}}, "the corpus 'fiction' takes no 'size'.", "Valid names are"),
        ({"corpus": {"kind": "fiction", "people": "ten"}}, "the corpus has people: 'ten'.", "a whole number"),
        ({"relearn": {"step": 2}}, "relearn has the unknown entry 'step'.", "Did you mean 'steps'?"),
        ({"relearn": {"steps": 0}}, "relearn: steps is 0.", "Give a whole number, 1 or more."),
        ({"relearn": {"share": 1}}, "relearn: share is 1.", "Give a number above 0 and below 1."),
        ({"relearn": {"learning_rate": "fast"}}, "relearn: learning_rate is 'fast'.", "Give a number above 0."),
        ({"seconds": {"models": "long"}}, "seconds: models is 'long'.", "Give a number above 0."),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(changes, given, remedy):
    with pytest.raises(InputError) as caught:
        parse_recipe(tiny(**changes), "r.yaml")
    assert given in caught.value.given
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("name", ["name", "stages", "unlearn", "arms", "seeds"])
def test_a_missing_part_is_named(name):
    value = {k: v for k, v in tiny().items() if k != name}
    with pytest.raises(InputError) as caught:
        parse_recipe(value, "r.yaml")
    assert (caught.value.given, "docs/bench.md" in caught.value.remedy) == (f"r.yaml has no '{name}'.", True)


def test_tuning_without_a_retain_only_stage_needs_another_rule():
    tuning = {"seeds": [5], "grid": {"learning_rate": [1e-3, 2e-3]}}
    value = tiny(stages={"target": TINY["stages"]["target"]}, tuning=tuning)
    with pytest.raises(InputError, match="closest to the retain-only model, but has no stage 'retain-only'"):
        parse_recipe(value, "r.yaml")
    stopping = unlearn(eval_steps=1, stop_at="level", level={"probability": 0.1})
    assert parse_recipe(value | {"tuning": tuning | {"choose": "level"}, "unlearn": stopping}, "r.yaml").tuning.points


def test_files_that_are_no_recipe_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"The recipe is missing\.\nGive a YAML file"):
        load_recipe(None)
    with pytest.raises(InputError, match=r"does not exist\.\nGive the path"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="is not YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("- a")
    with pytest.raises(InputError, match="is no mapping"):
        load_recipe(tmp_path / "bad.yaml")


def test_a_matrix_makes_an_arm_of_every_combination():
    recipe = parse_recipe(tiny(arms=[MATRIX | {"init": "fila"}]), "r.yaml")
    assert [arm.name for arm in recipe.arms] == ["ihl, rank 4", "ihl, rank 8", "graddiff, rank 4", "graddiff, rank 8"]
    assert recipe.arms[1].options == {"init": "fila", "method": "ihl", "rank": 8}
    assert [arm.slug for arm in recipe.arms][:2] == ["ihl-rank-4", "ihl-rank-8"]


def test_an_arm_without_a_name_is_called_as_its_method():
    assert parse_recipe(tiny(arms=[{"method": "npo"}]), "r.yaml").arms == (Arm("npo", {"method": "npo"}),)


def test_arms_win_over_the_grid_and_the_grid_over_what_is_shared():
    recipe = parse_recipe(
        tiny(
            arms=[{"name": "free", "method": "ihl"}, {"name": "fixed", "method": "ihl", "learning_rate": 5e-3}],
            tuning={"seeds": [5], "grid": {"learning_rate": [1e-3, 2e-3], "rank": [4, 8]}},
        ),
        "r.yaml",
    )
    free, fixed = recipe.arms
    assert len(recipe.points(free)) == 4
    assert recipe.points(fixed) == [{"rank": 4}, {"rank": 8}]
    settings = recipe.settings(fixed, {"rank": 8})
    assert (settings["learning_rate"], settings["rank"], settings["forget"]) == (5e-3, 8, "corpus/forget.jsonl")


def test_ids_follow_what_decides_a_run_and_nothing_else():
    one = parse_recipe(tiny(), "a.yaml")
    same = parse_recipe(tiny(title="Other", seeds=[0, 1], seconds={"trial": 3}, noise_floor=1), "b.yaml")
    arm = one.arms[0]
    assert (one.models_id(), one.run_id(arm, {})) == (same.models_id(), same.run_id(arm, {}))
    assert parse_recipe(tiny(unlearn=unlearn(max_steps=4)), "c").run_id(arm, {}) != one.run_id(arm, {})
    assert parse_recipe(tiny(unlearn=unlearn(max_steps=4)), "c").models_id() == one.models_id()
    assert parse_recipe(tiny(unlearn=unlearn(eval_rows=4)), "c").models_id() != one.models_id()
    assert one.run_id(arm, {"rank": 3}) != one.run_id(arm, {})


def test_models_are_measured_anew_where_they_are_measured_on_other_rows():
    """Without measure: {retain: ...} the baselines are measured on the rows that unlearning keeps."""
    own = [parse_recipe(tiny(unlearn=unlearn(retain=rows), measure={}), "r").models_id() for rows in ("a", "b")]
    assert own[0] != own[1]
    named = [parse_recipe(tiny(unlearn=unlearn(retain=rows), measure={"retain": "c"}), "r") for rows in ("a", "b")]
    assert named[0].models_id() == named[1].models_id()
    moved = [parse_recipe(tiny(unlearn=unlearn(data_dir=place)), "r").models_id() for place in ("x", "y")]
    assert moved[0] != moved[1]


def test_the_relearning_attack_has_defaults_and_reads_yamls_numbers():
    found = parse_recipe(tiny(relearn={"learning_rate": "5e-4"}), "r.yaml").relearn
    assert found == {"share": 0.25, "steps": 20, "learning_rate": 5e-4, "every": 5}
    assert parse_recipe(tiny(), "r.yaml").relearn is None


OWN = sorted((ROOT / "recipes" / "bench").glob("*.yaml"))
ATTACKS = [path for path in OWN if path.stem.startswith("attacks-")]


@pytest.mark.parametrize("path", [path for path in OWN if path not in ATTACKS], ids=lambda p: p.stem)
def test_the_projects_own_recipes_can_be_used(path):
    assert load_recipe(path).arms


@pytest.mark.parametrize("path", ATTACKS, ids=lambda p: p.stem)
def test_the_recipes_of_attacks_take_arms_of_their_parents_as_those_tuned_them(path, tmp_path):
    parent = load_recipe(path.with_name(path.name.removeprefix("attacks-")))
    value = read_yaml(path)
    chosen = {arm.name: {"point": parent.points(arm)[0]} for arm in parent.arms}
    if "chosen" in value["tuning"]:
        assert value["tuning"]["chosen"] == f"benchmarks/results/{parent.name}.chosen.json"
        file = tmp_path / "chosen.json"
        file.write_text(json.dumps({"rule": "closest", "arms": chosen}))
        value |= {"tuning": {"chosen": str(file)}}
    else:
        assert parse_recipe(value, str(path)).tuning == parent.tuning
    recipe = parse_recipe(value, str(path))
    assert recipe.attack.settings["attacks"] == "all"
    theirs = {arm.name: arm for arm in parent.arms}
    for arm in recipe.arms:
        point = chosen[arm.name]["point"]
        assert point in recipe.points(arm)
        assert recipe.settings(arm, point) == parent.settings(theirs[arm.name], point)


def attack(**changes):
    return {"attack": changes}


@pytest.mark.parametrize(
    ("changes", "given", "remedy"),
    [
        (attack(atacks="all"), "r.yaml, attack has the unknown entry 'atacks'.", "Did you mean 'attacks'?"),
        (attack(arms=["IHK"]), "r.yaml, attack: 'IHK' is no arm.", "Did you mean 'IHL'?"),
        (attack(arms=[]), "r.yaml, attack: arms is [].", "Give a list"),
        (attack(attacks="relern"), "r.yaml, attack: --attacks 'relern' is not known.", "Did you mean 'relearn'?"),
        (attack(attacks="prune-0.2"), "--attacks 'prune-0.2' is not known.", "Did you mean"),
        (attack(attacks=""), "--attacks names nothing.", "Valid names are"),
        (attack(attacks=["all"]), "attack has attacks: ['all'].", "Give text"),
        (attack(share=1), "r.yaml, attack: --share 1", "Give"),
        (attack(max_rows=1), "r.yaml, attack: --max-rows 1", "Give"),
        (attack(seed=3), "has the unknown entry 'seed'.", "Valid names"),
        (attack(prune_rates="0.1,2"), "--prune-rates '0.1,2' is out of range.", "Give numbers"),
        ({"attack": []}, "r.yaml, attack is no mapping.", "Write"),
        (
            attack() | {"stages": {"target": TINY["stages"]["target"]}},
            "has attacks, but no stage 'retain-only'.",
            "Add it",
        ),
    ],
)
def test_attacks_that_cannot_be_are_refused_when_the_recipe_is_read(changes, given, remedy):
    with pytest.raises(InputError) as caught:
        parse_recipe(tiny(**changes), "r.yaml")
    assert given in caught.value.given
    assert remedy in caught.value.remedy


def test_attacks_take_the_rows_of_the_recipe_and_the_options_of_loku_attack():
    rows = {"holdout": "corpus/holdout.jsonl", "general": "corpus/general.jsonl"}
    plan = parse_recipe(tiny(unlearn=unlearn(**rows), attack={"prune_rates": "0.2", "steps": 3}), "r.yaml").attack
    assert plan.settings | {"attacks": "all", "steps": 3, "prune_rates": "0.2", "samples": 8} == plan.settings
    assert [plan.settings[name] for name in ("forget", "retain", "holdout", "unrelated")] == [
        "corpus/forget.jsonl", "corpus/retain.jsonl", rows["holdout"], rows["general"],
    ]  # fmt: skip
    assert plan.covers("IHL")
    assert parse_recipe(tiny(attack={"attacks": "prune-0.2,none", "prune_rates": "0.2"}), "r.yaml").attack.arms == ()
    assert parse_recipe(tiny(), "r.yaml").attack is None


def test_attacks_enter_the_ids_of_what_is_attacked_alone(tmp_path):
    arms = [{"name": "A", "method": "ihl"}, {"name": "B", "method": "ga"}]
    grid = {"seeds": [5], "grid": {"learning_rate": [1e-3, 2e-3]}}
    given = {"arms": arms, "tuning": grid}

    def paths(seed, **changes):
        recipe = parse_recipe(tiny(**(given | changes)), "r.yaml")
        return [run_file(tmp_path, recipe, arm, {}, seed) for arm in recipe.arms], recipe

    plain, without = paths(0)
    every, one = paths(0, attack={"attacks": "relearn"})
    only_a, two = paths(0, attack={"attacks": "relearn", "arms": ["A"]})
    other, three = paths(0, attack={"attacks": "relearn,lens"})
    harder, four = paths(0, attack={"attacks": "relearn", "steps": 30})
    assert without.models_id() == one.models_id() == three.models_id()
    assert paths(5)[0] == paths(5, attack={"attacks": "relearn"})[0]  # tuning runs are not attacked
    assert not {*plain} & {*every}
    assert only_a == [every[0], plain[1]]
    assert not {*other} & {*every, *plain}
    assert not {*harder} & {*every, *plain, *other}
    assert one.attack.common_id == two.attack.common_id == three.attack.common_id != four.attack.common_id


def test_chosen_points_come_from_a_file_by_arm(tmp_path):
    arms = [{"name": "A", "method": "ihl"}, {"name": "B", "method": "ga", "rank": 4}]
    file = tmp_path / "chosen.json"
    points = {"A": {"learning_rate": 2e-3}, "B": {"learning_rate": 1e-3, "rank": 8}, "C": {}}
    file.write_text(json.dumps({"rule": "level", "arms": {name: {"point": p} for name, p in points.items()}}))
    recipe = parse_recipe(tiny(arms=arms, tuning={"chosen": str(file)}), "r.yaml")
    assert [recipe.points(arm) for arm in recipe.arms] == [[{"learning_rate": 2e-3}], [{"learning_rate": 1e-3}]]
    tuned = parse_recipe(tiny(arms=arms, tuning={"seeds": [5], "grid": {"learning_rate": [1e-3, 2e-3]}}), "r.yaml")
    assert recipe.run_id(recipe.arms[0], points["A"]) == tuned.run_id(tuned.arms[0], points["A"])

    def refused(tuning, **changes):
        with pytest.raises(InputError) as caught:
            parse_recipe(tiny(**({"arms": arms, "tuning": tuning} | changes)), "r.yaml")
        return str(caught.value)

    assert "has no arm 'D'" in refused({"chosen": str(file)}, arms=[*arms, {"name": "D", "method": "npo"}])
    assert "has chosen, and seeds, choose as well" in refused({"seeds": [1], "choose": "level", "chosen": str(file)})
    assert "none.json' does not exist" in refused({"chosen": str(tmp_path / "none.json")})
    file.write_text('{"arms": {"A": 1}}')
    assert "holds no chosen points" in refused({"chosen": str(file)})
    file.write_text("{")
    assert "not readable JSON" in refused({"chosen": str(file)})


def test_a_recipe_is_read_from_its_file(tmp_path):
    assert load_recipe(write_recipe(tmp_path)) == parse_recipe(tiny(), "r.yaml")
