"""What is ready follows from the files that are there; counts and core-hours add up."""

from __future__ import annotations

import pytest

from bench_builders import figures, models_record, put, run_record, tiny
from loku.bench.recipe import parse_recipe
from loku.bench.schedule import Schedule

GRID = {"seeds": [10, 11], "grid": {"learning_rate": [1e-3, 2e-3]}}
ARMS = [{"name": "IHL r{rank}", "method": "ihl", "matrix": {"rank": [4, 8]}}, {"name": "GA", "method": "ga"}]
HALF, FULL = figures(forget__probability=0.5), figures(forget__probability=1.0)


def schedule(root, only=(), **changes):
    return Schedule(parse_recipe(tiny(**({"arms": ARMS, "seeds": [0, 1]} | changes)), "r.yaml"), str(root), only)


def make(task, found=HALF, **more):
    """Write the result of a task."""
    record = (
        models_record(task.seed, target=FULL, retain_only=HALF)
        if task.arm is None
        else run_record(task.arm.name, task.seed, found, point=dict(task.point))
    )
    put(task.path, record | more)


def labels(tasks):
    return [task.label for task in tasks]


def test_models_come_first_then_the_runs_of_their_seed(tmp_path):
    plan = schedule(tmp_path)
    assert labels(plan.ready()) == ["models of seed 0", "models of seed 1"]
    make(plan.models(1))
    assert labels(plan.ready()) == ["models of seed 0", "IHL r4, seed 1", "IHL r8, seed 1", "GA, seed 1"]
    make(plan.ready()[1])
    assert labels(plan.ready()) == ["models of seed 0", "IHL r8, seed 1", "GA, seed 1"]
    for task in plan.ready():
        make(task)
    for task in plan.ready():
        make(task)
    assert plan.ready() == []
    assert labels(schedule(tmp_path).ready()) == []  # another call sees the same files
    assert [(r["arm"], r["seed"]) for r in plan.finished()] == [
        (arm, seed) for arm in ("IHL r4", "IHL r8", "GA") for seed in (0, 1)
    ]


def test_an_arms_runs_wait_for_its_tuning_alone(tmp_path):
    plan = schedule(tmp_path, tuning=GRID)
    assert labels(plan.ready())[:2] == ["models of seed 10", "models of seed 11"]
    for task in plan.ready():
        make(task)
    tuning = [task for task in plan.ready() if task.arm.name == "GA"]
    assert labels(tuning) == [f"GA (learning_rate {rate}), seed {s}" for rate in (0.001, 0.002) for s in (10, 11)]
    assert plan.chosen(tuning[0].arm) is None
    for task in tuning:  # the second point is as the retain-only model
        make(task, FULL if task.point["learning_rate"] == 1e-3 else HALF)
    point, scores = plan.chosen(tuning[0].arm)
    assert point == {"learning_rate": 2e-3}
    assert [entry["score"] for entry in scores] == [[0.5], [0.0]]
    ready = [task for task in plan.ready() if task.seed in (0, 1)]
    assert labels(ready) == ["GA (learning_rate 0.002), seed 0", "GA (learning_rate 0.002), seed 1"]


def test_arms_may_be_tuned_together(tmp_path):
    plan = schedule(tmp_path, tuning=GRID | {"at": {"rank": 8}})
    four, eight, ga = plan.recipe.arms
    assert plan.recipe.tuned_as(four) == plan.recipe.tuned_as(eight) == eight
    assert plan.recipe.tuned_as(ga) == ga
    assert plan.counts() == {"models": 4, "tuning": 8, "final": 6, "attacks": 0}
    assert schedule(tmp_path, tuning=GRID).counts() == {"models": 4, "tuning": 12, "final": 6, "attacks": 0}
    for seed in (10, 11):
        make(plan.models(seed))
    for group in plan.tuning(eight):
        for task in group:
            make(task, HALF if task.point["learning_rate"] == 1e-3 else FULL)
    assert plan.chosen(four) == plan.chosen(eight)
    assert [task.point for task in plan.final(four)] == [{"learning_rate": 1e-3}] * 2


def test_nothing_is_tuned_where_an_arm_fixes_it(tmp_path):
    plan = schedule(tmp_path, tuning=GRID, arms=[{"name": "GA", "method": "ga", "learning_rate": 1e-3}])
    assert plan.counts() == {"models": 2, "tuning": 0, "final": 2, "attacks": 0}
    assert labels(plan.ready()) == ["models of seed 0", "models of seed 1"]
    assert plan.chosen(plan.recipe.arms[0]) == ({}, [])


def test_only_some_arms(tmp_path):
    plan = schedule(tmp_path, only=("IHL r4",), tuning=GRID | {"at": {"rank": 8}})
    assert plan.counts() == {"models": 4, "tuning": 4, "final": 2, "attacks": 0}  # tuned at rank 8, all the same
    for task in plan.ready():
        make(task)
    assert {task.arm.name for task in plan.ready()} == {"IHL r8"}


def test_core_hours_are_what_is_missing_by_what_was_measured(tmp_path):
    assert schedule(tmp_path).core_hours() is None
    plan = schedule(tmp_path, seconds={"models": 100, "trial": 10})
    assert plan.core_hours() == pytest.approx((2 * 100 + 6 * 10) / 3600)
    for seed in (0, 1):
        make(plan.models(seed), seconds={"all": 36.0})
    for task in plan.ready()[:2]:
        make(task, seconds={"all": 18.0})
    assert plan.done() == 4
    assert plan.core_hours() == pytest.approx(4 * 18 / 3600)
    assert plan.seconds() == {"models": 36.0, "trial": 18.0, "attack": None}


def test_runs_for_tuning_that_are_reported_too_count_once(tmp_path):
    one = {"seeds": [10], "grid": {"learning_rate": [1e-3, 2e-3]}}
    plan = schedule(tmp_path, tuning=one, arms=[{"name": "A", "method": "ga"}, {"name": "B", "method": "ihl"}])
    assert plan.counts() == {"models": 3, "tuning": 4, "final": 4, "attacks": 0}
    while ready := plan.ready():
        for task in ready:
            make(task)
    assert plan.done() == sum(plan.counts().values()) == 11
    assert plan.core_hours() == 0.0


def test_more_retain_only_models_are_made_when_the_recipe_asks_for_more(tmp_path):
    plan = schedule(tmp_path, seeds=[0])
    make(plan.models(0))
    assert plan.ready()[0].arm is not None
    more = schedule(tmp_path, seeds=[0], noise_floor=1)
    assert more.models(0).path == plan.models(0).path
    assert labels(more.ready()) == ["models of seed 0"]


def test_a_noise_floor_is_for_reported_seeds_alone(tmp_path):
    plan = schedule(tmp_path, tuning=GRID, noise_floor=1)
    for seed in (10, 0):
        make(plan.models(seed))
    done = {seed: plan.record(plan.models(seed)) is not None for seed in (10, 0)}
    assert done == {10: True, 0: False}  # a reported seed's models lack the further retain-only one
