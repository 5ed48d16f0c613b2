"""The rules that choose a grid point, against obvious references."""

from __future__ import annotations

import random

import pytest

from bench_builders import figures, models_record, run_record
from loku.bench.tuning import COMPARED, PERCENT, SAID_BY, choose, distance, score, steps_taken

DRAW = random.Random(0)


def drawn():
    return {"values": {name: {"mean": DRAW.random()} for name in (*COMPARED, "forget.perplexity")}, "verdict": None}


def test_the_distance_is_the_mean_difference_over_what_both_have():
    for _ in range(20):
        ours, theirs = drawn(), drawn()
        del ours["values"]["model_utility"]
        names = [name for name in COMPARED if name not in ("model_utility", *SAID_BY)]
        scale = {name: 100 if name in PERCENT else 1 for name in names}
        apart = [abs(ours["values"][n]["mean"] - theirs["values"][n]["mean"]) / scale[n] for n in names]
        expected = sum(apart) / len(apart)
        assert distance(ours, theirs) == pytest.approx(expected, abs=1e-12)
    assert distance(theirs, theirs) == 0.0
    assert distance(None, theirs) == 1.0


def test_what_another_figure_says_counts_once():
    ours, theirs = figures(forget__ma=0.1, utility=0.8), figures(forget__ma=0.2, utility=1.0)
    assert distance(ours, theirs) == pytest.approx((0.1 + 0.2) / 2)
    both = [
        {**f, "values": f["values"] | figures(forget__exact_memorisation=m)["values"]}
        for f, m in ((ours, 0.9), (theirs, 0.1))
    ]
    assert distance(*both) == distance(ours, theirs)
    ours, theirs = figures(retain__knowledge=0.5, utility=0.8), figures(retain__knowledge=1.0, utility=1.0)
    assert distance(ours, theirs) == 0.5


def test_nothing_in_common_is_as_far_as_can_be():
    assert distance(figures(a=0.1), figures(b=0.1)) == 1.0


def test_closest_takes_the_least_mean_distance_to_the_retain_only_model_of_the_same_seed():
    for _ in range(20):
        models = {seed: models_record(seed, target=drawn(), retain_only=drawn()) for seed in (10, 11)}
        points = [{"learning_rate": rate} for rate in (1, 2, 3)]
        runs = [[run_record("A", seed, drawn()) for seed in (10, 11)] for _ in points]
        costs = [
            sum(distance(run["figures"], models[run["seed"]]["models"]["retain-only"]["figures"]) for run in group) / 2
            for group in runs
        ]
        chosen, scores = choose("closest", points, runs, models)
        assert chosen == points[costs.index(min(costs))]
        assert [entry["score"][0] for entry in scores] == pytest.approx(costs)
        assert [entry["point"] for entry in scores] == points


def test_a_run_that_blew_up_is_the_worst():
    models = {10: models_record(10, target=drawn(), retain_only=figures(forget__probability=0.9))}
    runs = [[run_record("A", 10, None)], [run_record("A", 10, figures(forget__probability=0.0))]]
    assert choose("closest", [{"rate": 1}, {"rate": 2}], runs, models)[0] == {"rate": 2}


def test_the_first_of_equals_wins():
    models = {10: models_record(10, target=drawn(), retain_only=figures(model_utility=0.5))}
    runs = [[run_record("A", 10, figures(model_utility=value))] for value in (0.7, 0.6, 0.6)]
    assert choose("closest", [{"r": 1}, {"r": 2}, {"r": 3}], runs, models)[0] == {"r": 2}


def test_level_wants_the_level_reached_then_utility_then_few_steps():
    def run(step, utility):
        stopped = {"stopped": {"step": step}} if step else {}
        return [run_record("A", 10, figures(model_utility=utility), **stopped)]

    points = [{"r": i} for i in range(4)]
    runs = [run(None, 0.9), run(50, 0.5), run(60, 0.604), run(40, 0.601)]
    chosen, scores = choose("level", points, runs, {})
    assert chosen == {"r": 3}  # utilities that round alike are told apart by the steps
    assert [entry["score"] for entry in scores] == [[1, -0.9, 100], [0, -0.5, 50], [0, -0.6, 60], [0, -0.6, 40]]
    assert score("level", [run_record("A", 10, None)], {})[:2] == (1.0, 0.0)


def test_steps_are_those_taken():
    assert steps_taken({"steps": 100}) == 100
    assert steps_taken({"steps": 100, "stopped": {"step": 0}}) == 0
    assert steps_taken({}) == 0
