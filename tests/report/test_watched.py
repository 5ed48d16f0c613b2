"""The curve of `--eval-steps` in the report: figures, level, marks, and what is said of them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

from loku.report.html import write_report
from loku.report.svg import VARIABLES
from loku.report.watched import step_marks, watched_charts, watched_notes

ROWS = [
    {
        "step": step,
        "seconds": 0.1 * step,
        "forget": {"probability": 0.9 - 0.02 * step, "exact_memorisation": 0.8},
        "retain": {"probability": 0.95},
    }
    for step in range(0, 31, 5)
]
RUN = {
    "level": {"source": "the target on the holdout rows", "figures": {"probability": 0.35}},
    "stopped": {"step": 30, "rule": "probability <= 0.35"},
    "best": {"step": 20, "rule": "the nearest", "meets_rule": True, "at_level": False, "utility": 0.95},
}


def test_each_figure_is_drawn_with_its_level_and_the_marked_steps() -> None:
    drawn = watched_charts(ROWS, RUN)
    assert [chart.caption for chart in drawn] == [
        "Answer probability, forget set: 0.900 at step 0, 0.300 at step 30; level 0.350; stopped at step 30; kept at "
        "step 20.",
        "Exact memorisation, forget set: 0.800 at step 0, 0.800 at step 30; stopped at step 30; kept at step 20.",
        "Answer probability, retain set: 0.950 at step 0, 0.950 at step 30; stopped at step 30; kept at step 20.",
    ]
    for chart in drawn:
        text = "".join(ET.fromstring(chart.svg).itertext())
        assert "stopped" in text
        assert "kept" in text
        assert not [colour for colour in VARIABLES if colour in chart.svg], "a stand-in colour was left"
    rules = [chart.svg.count("var(--retain-only)") for chart in drawn]
    assert rules == [1, 0, 0]


def test_one_measurement_and_none() -> None:
    assert watched_charts([], RUN) == []
    assert "0.900 at step 0, 0.900 at step 0." in watched_charts(ROWS[:1], None)[0].caption


def test_texts_show_memorisation_and_extraction_where_they_were_measured() -> None:
    rows = [row | {"forget": {"probability": 0.5, "ma": 0.6}} for row in ROWS]
    rows[-1]["forget"] = {"probability": 0.1, "ma": 0.2, "el_10": 0.01}
    run = {"level": {"source": "x", "figures": {"ma": 0.3, "el_10": 0.05}}}
    captions = [chart.caption for chart in watched_charts(rows, run)]
    assert captions[1] == "Memorisation accuracy, forget set: 0.600 at step 0, 0.200 at step 30; level 0.300."
    assert captions[2].startswith("Extraction likelihood, 10-grams, forget set: 0.010 at step 30")


def test_what_happened_is_said() -> None:
    notes = " ".join(watched_notes(RUN))
    assert "from: the target on the holdout rows." in notes
    assert "The training stopped at step 30: probability <= 0.35." in notes
    assert "Step 20 was kept: the nearest" in notes
    assert "It has not reached the level." in notes
    missed = watched_notes({"best": {"step": 30, "rule": "the nearest", "meets_rule": False}})
    assert missed == ["No measurement met the rule (the nearest): the last step was kept."]
    assert watched_notes(None) == []
    assert step_marks({"stopped": {"step": 5}, "best": {"step": 5}}) == {"stopped, kept": 5.0}


def test_the_page_holds_the_curve(make_run, tmp_path) -> None:
    folder = make_run()
    page = write_report([folder], tmp_path / "without.html").read_text()
    assert "Measured while training" not in page
    (folder / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | RUN))
    page = write_report([folder], tmp_path / "with.html").read_text()
    assert "Measured while training" in page
    assert "Answer probability, forget set: 0.900 at step 0" in page
    assert "The training stopped at step 30" in page
    assert "curve.jsonl" in page  # among the hashes
