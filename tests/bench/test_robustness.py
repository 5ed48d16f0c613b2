"""Tables of attacks: the worst of each family, what could not tell, levels, the noise floor, every attack by itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest

from bench_builders import figures, models_record, run_record, tiny
from loku.bench.compact import compact
from loku.bench.leaderboard import write_leaderboard
from loku.bench.recipe import parse_recipe
from loku.bench.robustness import (
    DAMAGED,
    LEVELS,
    RETAIN,
    WORST,
    attack_lines,
    retained,
    robustness_columns,
    robustness_rows,
    worst_of_families,
)
from loku.bench.store import read_collection, write_collection

ROOT = Path(__file__).resolve().parents[2]
FAMILY = {
    "none": "none",
    "relearn-lora": "relearn",
    "relearn-full": "relearn",
    "int4": "quantise",
    "adapter-0": "adapter",
}


def score(value):
    reason = None if value is not None else "it cannot tell"
    return {"score": value, "low": value, "high": value, "raw": value, "gap": 0.123456789, "reason": reason}


def found(level="gone", damaged=None, member=0.4, worst=None, **scores):
    """What a record keeps of attacks; `relearn_lora` stands for relearn-lora."""
    attacks = {}
    for name, value in scores.items():
        label = name.replace("_", "-")
        attacks[label] = {
            "family": FAMILY[label], "metric": "exact_match", "rows": 8, "score": score(value), "damaged": None,
            "means": {"target": 1.0, "unlearned": value or 0.0, "retain_only": 0.0}, "seconds": 1.5,
            "beside": {"retain_rougeL_recall": 0.9, "retain_exact_match": 0.8, "repetition": 0.1},
        }  # fmt: skip
    attacks["membership"] = {
        "family": "membership", "seconds": 0.5, "damaged": None, "beside": {},
        "membership": {"loss": {"auc": {}, "score": score(member)}, "zlib": {"auc": {}, "score": score(None)}},
    }  # fmt: skip
    known = [value for name, value in scores.items() if value is not None and name != "adapter_0"]
    headline = {"level": level, "sentence": "", "worst": "x", "score": score(max(known)) if known else None}
    return {"metric": "exact_match", "damaged": damaged, "headline": headline, "attacks": attacks, "failed": {}}


def records():
    half = figures(forget__probability=0.5)
    models = [models_record(seed, target=half, retain_only=half) for seed in (0, 1)]
    models[0]["attacks"] = {"retain-only-2": found("unclear", none=0.0, relearn_lora=0.05)}
    runs = [
        run_record("IHL", 0, half, attacks=found("hidden", none=0.1, relearn_lora=0.2, relearn_full=0.6, int4=None)),
        run_record("IHL", 1, half, attacks=found("gone", none=0.0, relearn_lora=0.4, relearn_full=0.2, int4=0.3)),
        run_record("GA", 0, None),
        run_record("GA", 1, half, attacks=found("damaged", "it is broken", none=0.0, adapter_0=1.0, member=None)),
    ]
    return models, runs


def rows():
    return {row.label: row for row in robustness_rows(*records(), ["GA", "IHL", "NPO"])}


def test_cells_are_the_worst_of_a_family_over_seeds():
    row = rows()["IHL"]
    assert row.values["relearn"] == [0.6, 0.4]
    assert row.cell("relearn") == f"{mean([0.6, 0.4]):.2f} ± {stdev([0.6, 0.4]):.2f}"
    assert row.cell("membership") == "0.40 ± 0.00"
    assert row.values[WORST] == [0.6, 0.4]
    assert row.cell(RETAIN) == "0.80 ± 0.00"
    assert row.cell(LEVELS) == "hidden 1, gone 1"
    assert row.cell(DAMAGED) == "0"


def test_seeds_on_which_an_attack_could_not_tell_are_no_zeros():
    row = rows()["IHL"]
    assert row.values["quantise"] == [0.3]
    assert row.cell("quantise") == "0.30 (1)"
    assert rows()["GA"].cell("quantise") == "-"
    assert rows()["GA"].cell("membership") == "-"


def test_an_adapter_attack_is_no_part_of_the_worst_and_diverged_runs_are_counted():
    row = rows()["GA"]
    assert row.values["adapter"] == [1.0]
    assert row.values[WORST] == [0.0]
    assert row.diverged == 1
    assert row.cell(DAMAGED) == "1"
    assert row.cell(LEVELS) == "damaged 1"


def test_arms_keep_their_order_and_the_noise_floor_comes_last():
    assert list(rows()) == ["GA", "IHL", "retain-only, other seeds"]
    assert [row.role for row in rows().values()] == ["unlearned", "unlearned", "noise"]
    assert robustness_columns(list(rows().values())) == [
        LEVELS, DAMAGED, WORST, RETAIN, "none", "relearn", "quantise", "adapter", "membership",
    ]  # fmt: skip
    models, runs = records()
    for record in (*models, *runs):
        record.pop("attacks", None)
    assert robustness_rows(models, runs, ["GA", "IHL"]) == []
    assert robustness_columns([]) == []


def test_the_retain_figure_is_of_the_kind_that_is_scored_by():
    one = found(none=0.0)
    assert retained(one) == 0.8
    assert retained(one | {"metric": "rougeL_recall"}) == 0.9
    assert worst_of_families(found(none=None, member=None)) == {}


def test_every_attack_has_a_line_of_its_own():
    lines = {line[0]: line[1:] for line in attack_lines(*records(), ["GA", "IHL"])}
    assert list(lines) == ["none", "relearn-full", "relearn-lora", "int4", "adapter-0"]
    assert lines["none"] == ["3 of 3", "1.00", "0.00", f"{mean([0.0, mean([0.1, 0.0])]):.2f}", "IHL (0.05)"]
    assert lines["int4"] == ["1 of 2", "1.00", "0.00", "0.30", "IHL (0.30)"]
    assert attack_lines([], [], []) == []


def test_the_collection_carries_them_rounded(tmp_path):
    models, runs = records()
    write_collection([compact(record) for record in (*models, *runs)], tmp_path / "runs.jsonl")
    kept = read_collection(tmp_path / "runs.jsonl")
    assert kept[2]["attacks"]["attacks"]["none"]["score"]["gap"] == 0.12346
    again = robustness_rows(kept[:2], kept[2:], ["GA", "IHL"])
    assert [(row.label, row.values) for row in again] == [(row.label, row.values) for row in rows().values()]


def test_the_page_says_what_the_scores_mean(tmp_path):
    models, runs = records()
    arms = [{"name": name, "method": "ihl"} for name in ("GA", "IHL")]
    recipe = parse_recipe(tiny(arms=arms, seeds=[0, 1]), "r.yaml")
    page = write_leaderboard(recipe, models, runs, {}, tmp_path).read_text()
    text = (tmp_path / "leaderboard.md").read_text()
    assert "## Robustness" in text
    assert "0 is as forgotten as in the retain-only model" in text
    assert 'href="#robustness"' in page
    assert "hidden 1, gone 1" in page
    assert "0.30 (1)" in page
    plain = write_leaderboard(recipe, [], [run_record("GA", 0, None)], {}, tmp_path / "plain").read_text()
    assert "obustness" not in plain


@pytest.fixture
def generator(monkeypatch):
    """benchmarks/robustness.py, under a name that hides no other module."""
    spec = importlib.util.spec_from_file_location("robustness_tables", ROOT / "benchmarks" / "robustness.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_docs_is_made_of_the_collection(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "RESULTS", tmp_path)
    assert {make() for make in generator.BLOCKS.values()} == {generator.MISSING}
    models, runs = records()
    write_collection([compact(record) for record in (*models, *runs)], tmp_path / "attacks-fiction.jsonl")
    arms, attacks, *others = (make() for make in generator.BLOCKS.values())
    assert set(others) == {generator.MISSING}
    assert arms.splitlines()[0].startswith("| model | levels | damaged | worst | retain | none | relearn | quantise |")
    assert [line.split(" | ")[0] for line in arms.splitlines()[2:]] == [
        "| IHL", "| GA (1 diverged)", "| retain-only, other seeds",
    ]  # fmt: skip
    assert "| int4 | 1 of 2 | 1.00 | 0.00 | 0.30 | IHL (0.30) |" in attacks
    text = (ROOT / "docs" / "robustness.md").read_text()
    assert all(f"<!-- {name} -->" in text for name in generator.BLOCKS)
