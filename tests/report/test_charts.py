from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ET

import pytest
from scipy.stats import ks_2samp

from loku.report.charts import Chart, curve, curve_charts, importance, ks_gap, place_of, truth_ratios
from loku.report.figures import Value
from loku.report.scatter import Point, place_labels, scatter
from loku.report.svg import VARIABLES, strip

SAMPLES = {"target": [0.2, 0.5, 0.6], "unlearned": [0.3, 0.7, 0.9, 0.95], "retain_only": [0.6, 0.8, 1.0]}


def check(chart: Chart, name: str) -> ET.Element:
    root = ET.fromstring(chart.svg)
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == f"{name}-title {name}-desc"
    title, description = list(root)[:2]
    assert (title.get("id"), description.get("id")) == (f"{name}-title", f"{name}-desc")
    assert description.text
    assert not [colour for colour in VARIABLES if colour in chart.svg], "a stand-in colour was left"
    assert "font-family" not in chart.svg
    assert 'fill="white"' not in chart.svg
    drawing = re.sub(r"<(title|desc).*?</\1>", "", chart.svg)
    assert not re.search(r"\d\.\d{3,}", drawing), "a coordinate with needless digits"
    return root


def test_truth_ratios_and_the_gap() -> None:
    chart = truth_ratios(SAMPLES, "one")
    check(chart, "one")
    expected = ks_2samp(SAMPLES["unlearned"], SAMPLES["retain_only"]).statistic
    assert f"KS distance): {expected:.2f}" in chart.caption
    _, first, second = ks_gap(SAMPLES["unlearned"], SAMPLES["retain_only"])
    assert abs(first - second) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[0.0], [0.0, 5.0], [1e-9, 1e6], [2.0, 2.0], [1.0]])
def test_truth_ratios_of_odd_samples(values: list[float]) -> None:
    assert "median" in truth_ratios({"unlearned": values}, "odd").caption


def test_two_charts_share_no_id() -> None:
    ids = [re.findall(r'id="([^"]+)"', truth_ratios(SAMPLES, name).svg) for name in ("one", "two")]
    assert not set(ids[0]) & set(ids[1])


def test_curves() -> None:
    chart = curve([(1, 2.0), (2, 1.0), (3, 1.5)], "curve", "forget loss")
    check(chart, "curve")
    assert chart.caption == "Forget loss: 2.000 at step 1, 1.500 at step 3; lowest 1.000, highest 2.000."
    rows = [{"step": 1, "forget_loss": float("nan")}, {"step": 2, "forget_loss": 3.0}, {"step": 3}]
    assert [drawn.caption[:25] for drawn in curve_charts(rows)] == ["Forget loss: 3.000 at ste"]


def test_importance() -> None:
    layers = [
        {"name": f"model.layers.{block}.self_attn.{name}_proj", "forget": 2e-7 * (block + 1), "retain": 1e-7}
        for block in range(3)
        for name in "qv"
    ]
    chart = importance(layers, "heat")
    assert chart is not None
    root = check(chart, "heat")
    assert "Highest in block 2, self_attn.q_proj (6.00), lowest in block 0, self_attn.q_proj (2.00)" in chart.caption
    shades = {element.get("fill-opacity") for element in root.iter() if element.get("fill-opacity")}
    assert len(shades) == 3
    assert (
        importance([{"name": "lm_head", "forget": 1, "retain": 1}, {"name": "h.0.c", "forget": 1, "retain": 0}], "x")
        is None
    )


@pytest.mark.parametrize(
    ("layer", "block", "projection"),
    [
        ("model.layers.11.self_attn.q_proj", 11, "self_attn.q_proj"),
        ("transformer.h.0.attn.c_attn", 0, "attn.c_attn"),
        ("0.q", 0, "q"),
    ],
)
def test_places(layer: str, block: int, projection: str) -> None:
    place = place_of(layer)
    assert place is not None
    assert (place.block, place.projection) == (block, projection)
    assert place_of("lm_head") is None


def test_scatter_names_every_model_and_keeps_labels_apart() -> None:
    points = [Point("a", 0.5, 0.3, "unlearned"), Point("b", 0.5, 0.31, "unlearned"), Point("Target", 0.7, 1, "target")]
    root = check(scatter(points, "scatter", "utility", "forget"), "scatter")
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a", "b", "Target"} <= set(texts)


def test_labels_cover_neither_points_nor_each_other_and_stay_inside() -> None:
    draw = random.Random(0)
    places = [(draw.gauss(250, 12), draw.gauss(220, 8)) for _ in range(20)] + [(310.0, 10.0), (5.0, 250.0)]
    labels = [str(i + 1) for i in range(20)] + ["Target", "retain-only"]
    found = place_labels(places, labels, 320, 260)
    boxes = []
    for (x, y), (dx, dy), label in zip(places, found, labels, strict=True):
        long = 6 * len(label)
        left = x + dx - long if dx < 0 else x + dx
        boxes.append((left, left + long, y + dy - 6, y + dy + 6))
        assert left >= 0
        assert left + long <= 330
        assert not any(left < px < left + long and abs(py - y - dy) < 6 for px, py in places)
    for i, one in enumerate(boxes):
        for two in boxes[:i]:
            apart = one[0] >= two[1] or two[0] >= one[1] or one[2] >= two[3] or two[2] >= one[3]
            assert apart
    assert place_labels([(10, 10)], ["a"], 320, 260) == [(9.0, 0.0)]
    assert place_labels([(318, 10)], ["Target"], 320, 260) == [(-9.0, pytest.approx(0.0))]
    crowd = place_labels([(10.0, 10.0)] * 300, ["a long label"] * 300, 100, 60)
    assert crowd[-1] == (9.0, 0.0)  # no place is left: beside its point


def test_strip() -> None:
    drawn = strip({"target": Value(2.0), "unlearned": Value(0.5, 0.4, 0.6), "retain_only": Value(0.0)})
    root = ET.fromstring(drawn)
    assert root.get("aria-hidden") == "true"
    assert [element.get("cx") for element in root if element.get("cx")] == ["115.0", "60.0"]
