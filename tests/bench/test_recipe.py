"""A benchmark's recipe: what it says, and every refusal with its two halves."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench_builders import TINY, tiny, write_recipe
from loku.bench.recipe import Arm, load_recipe, parse_recipe
from loku.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
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
        ({"measure": {"forget": "x"}}, "measure has the unknown entry 'forget'.", "retain"),
        ({"seeds": []}, "r.yaml, seeds is [].", "Give a list of different whole numbers"),
        ({"seeds": [1, 1]}, "r.yaml, seeds is [1, 1].", "Give a list of different whole numbers"),
        ({"seeds": [True]}, "r.yaml, seeds is [True].", "Give a list of different whole numbers"),
        ({"seeds": [2**32]}, "r.yaml, seeds is [4294967296].", "Give a list of different whole numbers"),
        ({"tuning": {"grid": {}}}, "r.yaml, tuning seeds is None.", "Give a list"),
        ({"tuning": {"seeds": [0, 5]}}, "r.yaml tunes on seeds that it reports ([0]).", "Tune on other seeds."),
        ({"tuning": {"seeds": [5], "choose": "best"}}, "tuning chooses by 'best'.", "Valid names are: closest, level."),
        ({"tuning": {"seeds": [5], "grid": {"rank": 4}}}, "grid 'rank' is 4.", "Give a list of values."),
        ({"tuning": {"seeds": [5], "grid": {"rnk": [4, 8]}}}, "has the unknown option 'rnk'.", "Did you mean 'rank'?"),
        ({"tuning": {"seeds": [5], "grid": {"max_length": [9]}}}, "'max_length', which all arms must share", "unlearn"),
        ({"tuning": {"seeds": [5], "choose": "level"}}, "tuned by choose: level, but does not stop", "stop_at: level"),
        ({"tuning": {"seeds": [5], "at": {"rank": 2}}, "arms": [MATRIX]}, "to be tuned at {'rank': 2}", "Add that arm"),
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


def test_the_relearning_attack_has_defaults_and_reads_yamls_numbers():
    found = parse_recipe(tiny(relearn={"learning_rate": "5e-4"}), "r.yaml").relearn
    assert found == {"share": 0.25, "steps": 20, "learning_rate": 5e-4, "every": 5}
    assert parse_recipe(tiny(), "r.yaml").relearn is None


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "bench").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_projects_own_recipes_can_be_used(path):
    assert load_recipe(path).arms


def test_a_recipe_is_read_from_its_file(tmp_path):
    assert load_recipe(write_recipe(tmp_path)) == parse_recipe(tiny(), "r.yaml")
