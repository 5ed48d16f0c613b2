"""Runs that differ in their seed alone become one row; two runs of the same rows are compared row by row."""

from __future__ import annotations

import json
import math
import re
import statistics

import pytest

from loku.evaluation.paired import compare
from loku.evaluation.results import parse_results
from loku.report.artefacts import read_folders
from loku.report.compare import comparison
from loku.report.html import write_report
from loku.report.numerals import figure
from loku.report.seeds import paired_rows, seed_groups, spread_text


def same_data(folder):
    """Let a made run stand on the same rows as all others."""
    file = folder / "results.json"
    value = json.loads(file.read_text())
    for item in value["data"].values():
        item["sha256"] = "c" * 64
    file.write_text(json.dumps(value))
    return value


@pytest.fixture
def seeds(make_run):
    folders = [make_run("loku", f"loku-{seed}", seed=seed) for seed in range(3)] + [make_run("npo")]
    return folders, [same_data(folder) for folder in folders]


def test_runs_that_differ_in_their_seed_alone_share_a_row(seeds):
    folders, values = seeds
    runs = read_folders(folders)
    assert seed_groups(runs) == [[0, 1, 2], [3]]
    found = comparison(runs)
    labels = [row.label for row in found["rows"]]
    assert labels == ["Target", "loku, 3 seeds", "npo", "Retain-only"]
    row = found["rows"][1]
    cells = dict(
        zip(zip([g for g, n in found["head"] for _ in range(n)], found["columns"], strict=True), row.cells, strict=True)
    )
    known = [value["sets"]["forget"]["metrics"]["probability"]["mean"] for value in values[:3]]
    assert cells["Forget set", "Probability"] == (
        f"{figure(statistics.mean(known))} ± {figure(statistics.stdev(known))} "
        f"({figure(min(known))}\N{EN DASH}{figure(max(known))})"
    )
    assert cells["Read together", "Forget quality p"].startswith(f"log10 {figure(math.log10(0.013))} ± 0.000 (")
    assert len(found["verdicts"]) == 4  # each run keeps its own
    assert [row.seeds for row in found["rows"]] == [0, 3, 0, 0]


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + "extra: 1\n"),
        lambda folder: (folder / "config.yaml").unlink(),
        lambda folder: (folder / "config.yaml").write_text(
            (folder / "config.yaml").read_text().replace("seed: 1", "seed: 0")
        ),
        lambda folder: (folder / "results.json").write_text(
            (folder / "results.json").read_text().replace("c" * 64, "d" * 64)
        ),
    ],
    ids=["other setting", "no settings", "same seed", "other rows"],
)
def test_runs_that_differ_in_more_stay_apart(seeds, change):
    folders, _ = seeds
    change(folders[1])
    assert seed_groups(read_folders(folders)) == [[0, 2], [1], [3]]


def test_texts_of_a_spread():
    assert spread_text([0.5, None]) == spread_text([]) == figure(None)
    assert spread_text([0.5]) == "0.500"
    assert spread_text([0.25, 0.75]) == f"0.500 ± {figure(math.sqrt(0.125))} (0.250\N{EN DASH}0.750)"
    assert spread_text([1e-4, 1e-2], logarithm=True).startswith(f"log10 {figure(-3.0)} ± {figure(math.sqrt(2))} (")
    assert spread_text([0.0], logarithm=True) == f"log10 {figure(-300.0)}"  # p below what a number holds


def test_two_runs_of_the_same_rows_are_compared(make_run, tmp_path):
    folders = [make_run("loku"), make_run("npo")]
    values = [same_data(folder) for folder in folders]
    rows = paired_rows(read_folders(folders))
    expected = compare(*(parse_results(value, "x") for value in values))["sets"]["forget"]["probability"]
    cells = next(cells for name, metric, cells in rows if (name, metric) == ("Forget set", "Answer probability"))
    assert cells == [
        figure(expected["difference"]),
        f"{figure(expected['low'])} to {figure(expected['high'])}",
        figure(expected["p"]),
        "40",
    ]
    page = write_report(folders, tmp_path / "page.html").read_text()
    assert "Row by row" in page
    assert "npo minus loku" in page
    third = make_run("ga")
    assert paired_rows(read_folders([*folders, third])) == []
    (third / "results.json").unlink()
    assert paired_rows(read_folders([folders[0], third])) == []


def test_other_rows_are_not_compared(make_run, tmp_path):
    folders = [make_run("loku"), make_run("npo")]
    assert paired_rows(read_folders(folders)) == []
    assert "Row by row" not in write_report(folders, tmp_path / "page.html").read_text()


def test_the_page_of_seeds(seeds, tmp_path):
    page = write_report(seeds[0], tmp_path / "page.html").read_text()
    assert "loku, 3 seeds" in page
    assert "Runs that differ in their seed alone share a row" in page
    assert len(re.findall(r'<th scope="row" class="c-run">', page)) == 2
