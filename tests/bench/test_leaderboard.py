"""The leaderboard: rows, cells, and what the Markdown and the page say."""

from __future__ import annotations

import re
from statistics import mean, stdev

import pytest

from bench_builders import figures, models_record, run_record, tiny
from loku.bench.leaderboard import columns_of, leaderboard_rows, write_leaderboard
from loku.bench.recipe import parse_recipe
from loku.bench.rows import markdown, spread

TARGET = figures(forget__probability=0.9, model_utility=0.8, forget_quality=1e-9)
RETAIN = figures(forget__probability=0.2, model_utility=0.8)
CURVE = {"steps": [0, 2], "means": {"learned": {"exact_match": [0.0, 1.0]}, "rest": {"exact_match": [0.1, 0.7]}}}


def models():
    found = []
    for seed in (0, 1):
        record = models_record(seed, target=TARGET, retain_only=RETAIN)
        record["models"]["retain-only-2"] = {"sha256": "b", "figures": figures(forget__probability=0.25)}
        found.append(record)
    return found


def runs():
    return [
        run_record(
            "IHL", 0, figures(forget__probability=0.1, model_utility=0.7), relearning=CURVE, stopped={"step": 8}
        ),
        run_record("IHL", 1, figures(forget__probability=0.2, model_utility=0.6), relearning={"error": "It blew up."}),
        run_record("GA", 0, None, peak_memory_bytes=7e8),
        run_record("GA", 1, figures(forget__probability=0.0, model_utility=0.0)),
    ]


def rows():
    return {row.label: row for row in leaderboard_rows(models(), runs(), ["GA", "IHL", "NPO"])}


def test_the_target_comes_first_and_the_retain_only_models_last():
    found = leaderboard_rows(models(), runs(), ["GA", "IHL", "NPO"])
    assert [(row.label, row.role) for row in found] == [
        ("target", "target"), ("GA", "unlearned"), ("IHL", "unlearned"),
        ("retain-only, other seeds", "noise"), ("retain-only", "retain_only"),
    ]  # fmt: skip
    assert leaderboard_rows([], [], ["GA"]) == []


def test_values_are_those_of_the_runs():
    found = rows()
    assert found["IHL"].values["forget prob."] == [0.1, 0.2]
    assert found["IHL"].mean("utility") == pytest.approx(0.65)
    assert found["IHL"].values["steps"] == [8, 100]
    assert found["IHL"].values["relearned rest, acc."] == [0.7]
    assert found["IHL"].values["distance"] == pytest.approx([(0.1 + 0.1) / 2, (0.0 + 0.2) / 2])
    assert found["target"].values["distance"] == pytest.approx([0.35, 0.35])
    assert found["retain-only, other seeds"].values["distance"] == pytest.approx([0.05, 0.05])
    assert "distance" not in found["retain-only"].values
    assert "seconds" not in found["target"].values


def test_a_run_that_blew_up_is_counted_and_has_no_figures():
    row = rows()["GA"]
    assert row.diverged == 1
    assert row.values["forget prob."] == [0.0]
    assert row.values["distance"] == pytest.approx([1.0, 0.5])
    assert row.values["steps"] == [100]
    assert row.values["peak MB"] == [500]


@pytest.mark.parametrize("values", [[0.123, 0.456], [12.34, 45.67], [123.4, 456.7], [0.0, 0.0], [-0.5, 0.25]])
def test_cells_are_mean_and_standard_deviation(values):
    largest = max(map(abs, values))
    digits = 0 if largest >= 100 else 1 if largest >= 10 else 2
    assert spread(values) == f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def test_other_cells():
    assert spread([]) == "-"
    assert spread([0.25]) == "0.25"
    assert spread([1e-9, 3e-5]) == "1e-09 to 3e-05"
    assert spread([2e-9]) == "2e-09"


def test_columns_without_a_value_are_left_out():
    columns = columns_of(leaderboard_rows(models(), runs(), ["IHL"]))
    assert columns == [
        "forget prob.", "utility", "forget quality", "distance", "relearned rest, acc.", "steps", "seconds", "peak MB",
    ]  # fmt: skip


@pytest.mark.parametrize(("metric", "heading"), [("ma", "MA"), ("regurgitation", "forget regurgitation")])
def test_a_suite_with_a_utility_of_its_own_has_its_column_and_its_plot(tmp_path, metric, heading):
    def of(known, utility):
        return figures(**{f"forget__{metric}": known, "utility": utility})

    records = [models_record(0, target=of(0.99, 1.0), retain_only=of(0.1, 0.9))]
    run = run_record("IHL", 0, of(0.2, 0.7))
    found = {row.label: row for row in leaderboard_rows(records, [run], ["IHL"])}
    assert found["IHL"].values["utility"] == [0.7]
    assert {heading, "utility"} <= set(columns_of(list(found.values())))
    recipe = parse_recipe(tiny(arms=[{"name": "IHL", "method": "ihl"}], seeds=[0]), "r.yaml")
    html = write_leaderboard(recipe, records, [run], {}, tmp_path).read_text()
    assert "<svg" in html
    assert "No figure of forgetting" not in html


def test_markdown_has_a_line_a_row():
    found = leaderboard_rows(models(), runs(), ["GA", "IHL"])
    lines = markdown(found, columns_of(found)).splitlines()
    assert len(lines) == 2 + 5
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith("| GA (1 diverged) | 0.00 | 0.00 | - |")
    assert lines[4].startswith("| IHL | 0.15 ± 0.07 | 0.65 ± 0.07 |")


def test_the_files_say_what_was_chosen(tmp_path):
    recipe = parse_recipe(
        tiny(arms=[{"name": "GA", "method": "ga"}, {"name": "IHL", "method": "ihl"}], seeds=[0, 1]), "r.yaml"
    )
    scores = [{"point": {"learning_rate": 1e-3}, "score": [0.1]}, {"point": {"learning_rate": 2e-3}, "score": [0.2]}]
    choices = {"IHL": {"point": {"learning_rate": 1e-3}, "tuned_as": "IHL", "scores": scores}}
    page = write_leaderboard(recipe, models(), runs(), choices, tmp_path)
    text = (tmp_path / "leaderboard.md").read_text()
    assert "# A tiny benchmark" in text
    assert "seeds 0, 1" in text
    assert "IHL: learning_rate 0.001" in text
    html = page.read_text()
    assert "(1 diverged)" in html
    assert re.search(r'<tr class="ref"><th scope="row" class="c-target">target</th><td class="n">0.90', html)
    assert "learning_rate 0.001" in html
    assert "<script" not in html


def test_nothing_done_yet_is_a_page_too(tmp_path):
    page = write_leaderboard(parse_recipe(tiny(), "r.yaml"), [], [], {}, tmp_path)
    assert "No run is done." in page.read_text()
    assert "Nothing was tuned." in page.read_text()
