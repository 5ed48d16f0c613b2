"""What is committed of a run: what tables need, rounded, and nothing that only the run's own JSON needs."""

from __future__ import annotations

from loku.bench.compact import compact

VALUES = {
    "forget.probability": {"mean": 0.123456789, "low": 0.1, "high": 0.2},
    "forget.predictive_entropy": {"mean": 1.0, "low": 1.0, "high": 1.0},
}


def test_a_run_keeps_the_figures_of_the_tables():
    figures = {"values": VALUES, "verdict": "broken"}
    curve = [{"step": 2, "seconds": 1.5, "forget": {"probability": 0.5, "extraction_strength": 1.0}, "retain": {}}]
    record = {
        "arm": "a",
        "seed": 0,
        "figures": figures,
        "curve": curve,
        "settings": {"rank": 8},
        "models": {"target": "x"},
    }
    found = compact(record)
    assert found["figures"] == {
        "values": {"forget.probability": {"mean": 0.12346, "low": 0.1, "high": 0.2}},
        "verdict": "broken",
    }
    assert found["curve"] == [{"step": 2, "probability": 0.5}]
    assert found["settings"] == {"rank": 8}
    assert record["figures"]["values"] is VALUES  # the record itself is left as it is


def test_a_diverged_run_has_no_figures():
    assert compact({"arm": "a", "figures": None, "error": "blew up"}) == {
        "arm": "a",
        "figures": None,
        "error": "blew up",
    }


def test_models_keep_theirs():
    models = {"target": {"sha256": "x", "figures": {"values": VALUES, "verdict": None}}}
    found = compact({"seed": 0, "models": models})
    assert list(found["models"]["target"]["figures"]["values"]) == ["forget.probability"]
