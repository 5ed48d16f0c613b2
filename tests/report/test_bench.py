"""The leaderboard's page: names or numbers in the plot, costs, tuning."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from bench_builders import page

SVG = "{http://www.w3.org/2000/svg}"


def plot(html: str) -> list[str]:
    """The texts drawn in the plot."""
    root = ET.fromstring(re.search(r"<svg .*?</svg>", html, flags=re.DOTALL).group())
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def test_few_arms_are_named_in_the_plot(tmp_path: Path) -> None:
    html = page(tmp_path, 5).read_text()
    texts = plot(html)
    assert {"target", "retain-only", "other seeds", "Arm 4 from fila-two-sided, rank 4"} <= set(texts)
    assert 'class="small numbers"' not in html


def test_many_arms_are_numbered_with_a_key(tmp_path: Path) -> None:
    html = page(tmp_path, 24).read_text()
    texts = plot(html)
    assert {"target", "retain-only", *map(str, range(1, 25))} <= set(texts)
    assert not any("Arm" in text for text in texts)
    key = re.search(r'<ol class="small numbers">(.*?)</ol>', html, flags=re.DOTALL).group(1)
    assert re.findall(r"<li>Arm (\d+) ", key) == [str(i) for i in range(24)]
    assert '<span class="number">24</span> Arm 23 from' in html
    said = re.search(r"<desc.*?</desc>", html).group()
    assert "Arm 23 from fila-two-sided, rank 23: utility" in said


def test_the_aim_is_the_retain_only_model_of_the_same_seed(tmp_path: Path) -> None:
    html = page(tmp_path, 2).read_text()
    root = ET.fromstring(re.search(r"<svg .*?</svg>", html, flags=re.DOTALL).group())
    marks = [e.get("transform") for e in root.iter(f"{SVG}path") if "retain-only" in e.get("style", "")]
    rules = [e.get("transform") for e in root.iter(f"{SVG}line") if e.get("stroke-dasharray") == "4,3"]
    heights = [float(re.findall(r"[-\d.]+", place)[1]) for place in marks]
    aims = {float(re.findall(r"[-\d.]+", place)[1]) for place in rules}
    assert len(heights) == 2
    assert min(heights) in aims  # 0.18 lies higher in the plot than the 0.15 of the other seeds
    assert max(heights) not in aims


def test_costs_are_sorted_bars(tmp_path: Path) -> None:
    html = page(tmp_path, 12).read_text()
    costs = html.split('id="costs"')[1].split("</section>")[0]
    assert re.findall(r'scope="row">Arm (\d+) ', costs) == [str(i) for i in range(11, -1, -1)]
    widths = [float(width) for width in re.findall(r"width: ([\d.]+)%", costs)]
    assert widths == sorted(widths)
    assert widths[-1] == 100.0


def test_tuning_says_what_was_chosen_and_as_which_arm(tmp_path: Path) -> None:
    html = page(tmp_path, 2).read_text()
    assert "learning_rate 0.001 (as Arm 0 from fila-two-sided, rank 0)" in html
    assert "0.002 → 0.002" in html
