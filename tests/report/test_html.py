from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loku.errors import InputError
from loku.report.html import write_report

VOID = {"meta", "br", "hr", "img", "input", "link"}
FOLDABLE = ["results.target.json", "results.retain_only.json", "metrics.jsonl", "config.yaml", "examples.jsonl"]


class Checker(HTMLParser):
    """Every opened tag is closed in order; ids are unique; references inside the page exist."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.references: list[str] = []
        self.columns: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def _note(self, tag: str, attributes: dict[str, str | None]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img"), tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        assert "src" not in attributes
        self.tags.append(tag)
        if identifier := attributes.get("id"):
            self.ids.append(identifier)
        if href := attributes.get("href"):
            (self.references if href.startswith("#") else self.links).append(href.removeprefix("#"))
        for name in ("aria-labelledby", "aria-describedby"):
            self.references += (attributes.get(name) or "").split()


def check_page(path: Path) -> str:
    """Check one page's form and return its text."""
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert set(checker.references) <= set(checker.ids)
    assert set(checker.links) <= {"https://arxiv.org/abs/2408.06621"}
    assert "url(" not in text
    assert "@import" not in text
    assert text.count("<h1>") == 1
    assert checker.tags.count("table") == checker.tags.count("caption")
    return text


def words(text: str) -> str:
    """The page without tags and with plain spaces."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text.replace("&#39;", "'")))


def test_a_complete_run_shows_every_part(make_run: Callable[..., Path], tmp_path: Path) -> None:
    output = write_report([make_run()], tmp_path / "deep" / "report.html")
    text = check_page(output)
    plain = words(text)
    assert "Unlearning fiction/forget in fiction-target" in plain
    assert "Suppressed" in plain
    assert "This rests on: the retain-only model" in plain
    assert "no proof and no guarantee" in plain
    assert "An adapter can be removed" in plain
    assert "The aim is not zero" in plain
    for heading in ("Key figures", "Truth ratios", "Training", "Importance by layer", "Costs", "Settings and data"):
        assert f">{heading}</h2>" in text
    assert text.count('<svg xmlns="http://www.w3.org/2000/svg"') == 4  # truth ratios, two curves, importance
    assert "model.layers.2.mlp.down_proj" in plain
    assert "learning_rate: 0.001" in plain
    assert "c" * 64 in plain
    assert "2.13.0" in plain
    assert "Missing, and to be minded" not in plain


def test_forget_quality_stands_only_beside_utility_and_fluency(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    plain = words(check_page(write_report([run], tmp_path / "with.html")))
    assert "Forget quality p-value" in plain
    assert "model_utility_arithmetic" in plain
    assert " forget_quality " in plain
    assert "a broken model can score high" in plain
    results = json.loads((run / "results.json").read_text())
    for metric in ("repetition", "token_entropy"):
        del results["sets"]["forget"]["metrics"][metric]
    (run / "results.json").write_text(json.dumps(results))
    plain = words(check_page(write_report([run], tmp_path / "without.html")))
    assert "Forget quality p-value" not in plain
    assert " forget_quality " not in plain
    assert "Forget quality was measured but is not shown" in plain


def test_texts_are_escaped(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    attack = "<script>alert('1')</script><img src=x onerror=alert(1)>"
    rows = [{"set": "forget", "index": 0, "question": attack, "answer": attack, "generation": attack}]
    (run / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.yaml").write_text(f"model: {attack}\n")
    record = json.loads((run / "run.json").read_text())
    record["importance"]["layers"][0]["name"] = f"model.layers.0.{attack}"
    record["model"]["name"] = record["method"]["name"] = record["command"] = attack
    (run / "run.json").write_text(json.dumps(record))
    results = json.loads((run / "results.json").read_text())
    results["verdict"] = {"level": attack, "sentence": attack, "rests_on": attack}
    results["sets"][attack] = results["sets"].pop("world_facts")
    (run / "results.json").write_text(json.dumps(results))
    for folders in ([run], [run, make_run("ihl")]):
        text = check_page(write_report(folders, tmp_path / "report.html", title=attack))
        assert "<script" not in text
        assert "<img" not in text
        assert "&lt;script&gt;" in text


def test_without_texts_the_report_says_how_to_keep_them(make_run: Callable[..., Path], tmp_path: Path) -> None:
    text = check_page(write_report([make_run(texts=False)], tmp_path / "report.html"))
    assert "<code>--keep-text</code>" in text
    assert "Mira Voss" not in text


@pytest.mark.parametrize("missing", [*FOLDABLE, "everything"])
def test_missing_pieces_are_stated(make_run: Callable[..., Path], tmp_path: Path, missing: str) -> None:
    run = make_run()
    stated = {
        "results.target.json": "The target was not evaluated before unlearning",
        "results.retain_only.json": "No retain-only results",
        "metrics.jsonl": "No training curves",
        "config.yaml": "There is no config.yaml",
        "examples.jsonl": "What was forgotten",
        "everything": "No figures: the model was not evaluated.",
    }
    for path in run.iterdir():
        if path.name == missing or (missing == "everything" and path.name != "run.json"):
            path.unlink()
    if missing == "everything":
        (run / "run.json").write_text("{}")
    assert stated[missing] in words(check_page(write_report([run], tmp_path / "report.html")))


def test_an_unfinished_run_says_so(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "stopped", "importance": None, "seconds": {}}))
    with (run / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 61, "forget_loss": NaN, "retain_loss": null}\n{"step": 62, "for')
    plain = words(check_page(write_report([run], tmp_path / "report.html")))
    assert "The run is not finished" in plain
    assert "No importances were measured" in plain
    assert "The last line of metrics.jsonl is incomplete" in plain
    assert "Times were not recorded" in plain


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("default", "the mean squared gradient of the loss"),
        ("variance, default", "the variance of the gradients of small random adapter factors"),
        ("activations", "the output directions that the forget rows use most"),
        (None, "No importances were measured"),
    ],
)
def test_every_initialisers_start_is_shown(make_run: Callable[..., Path], tmp_path: Path, mode: str, told: str) -> None:
    run = make_run()
    record = json.loads((run / "run.json").read_text())
    layers = record["importance"]["layers"]
    starts = [{key: layer.pop(key) for key in ("energy_captured", "norm_a", "norm_b")} for layer in layers]
    starts = [{"name": layer["name"]} | start for layer, start in zip(layers, starts, strict=True)]
    record["importance"] = {"mode": mode, "layers": layers} if mode else None
    record["initialisation"] = {"initialiser": "some-start", "options": {}, "layers": starts}
    (run / "run.json").write_text(json.dumps(record))
    text = check_page(write_report([run], tmp_path / "report.html"))
    plain = words(text)
    assert told in plain
    assert "some-start" in plain
    for column in ("Energy captured", "‖A‖", "‖B‖"):
        assert column in plain
    assert ("Rank corr. with forget-only" in plain) == bool(mode)
    assert ("activations in the chosen directions" in plain) == (mode == "activations")
    record["importance"] = record["initialisation"] = 7
    (run / "run.json").write_text(json.dumps(record))
    check_page(write_report([run], tmp_path / "report.html"))


def test_evaluation_folder(make_results: Callable[..., dict], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(
        json.dumps(make_results("loku") | {"verdict": None, "warnings": ["Few rows."]})
    )
    plain = words(check_page(write_report([tmp_path], tmp_path / "report.html")))
    assert "Evaluation of fiction/forget in fiction-target" in plain
    assert "Evaluated model" in plain
    assert "No verdict" in plain
    assert "There is no run.json: this is an evaluation" in plain
    assert "Evaluation: Few rows." in plain
    assert "Training" not in plain


def test_odd_values_do_not_stop_the_report(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    results = json.loads((run / "results.json").read_text())
    results["sets"]["retain"] = None
    results["sets"]["forget"]["per_example"] = [{"index": 0, "truth_ratio": 1e9}, {"index": 1, "truth_ratio": 0.0}, 3]
    results["sets"]["forget"]["metrics"] |= {"probability": {"mean": None}, "new_metric": {"mean": 12345.6}}
    (run / "results.json").write_text(json.dumps(results | {"data": [], "versions": None}))
    plain = words(check_page(write_report([run], tmp_path / "report.html")))
    assert "new_metric" in plain
    assert "12 346" in plain


def test_comparison(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [make_run(method) for method in ("ga", "graddiff", "npo", "ihl", "loku")]
    text = check_page(write_report(runs, tmp_path / "report.html"))
    plain = words(text)
    assert "5 runs compared: unlearning fiction/forget" in plain
    rows = re.findall(r'<th scope="row" class="c-\w+">([^<]+)</th>', text)
    assert rows == ["Target", "ga", "graddiff", "npo", "ihl", "loku", "Retain-only"]
    assert "Read together" in plain
    assert plain.index("Utility") < plain.index("Forget quality p")
    assert text.count('<svg xmlns="http://www.w3.org/2000/svg"') == 6  # the scatter and five truth ratios
    assert "learning_rate" in plain
    assert "Better than retain-only is no virtue." in plain
    assert re.search(r"graddiff: answer probability 0\.0\d \(retain-only 0\.4\d\)", plain)
    assert "<h3>Mind</h3>" not in text


def test_every_run_is_judged_by_its_own_retain_only_model(make_run: Callable[..., Path], tmp_path: Path) -> None:
    first, second = make_run("loku"), make_run("loku", "again")
    own = json.loads((second / "results.json").read_text())
    own["model"] = {"name": "other", "sha256": "f" * 64}
    (second / "results.retain_only.json").write_text(json.dumps(own))  # it knows just as much
    plain = words(check_page(write_report([first, second], tmp_path / "report.html")))
    assert "loku (again): answer probability" not in plain
    assert "compared with different models as retain-only model" in plain


def test_comparison_says_what_is_not_comparable(make_run: Callable[..., Path], tmp_path: Path) -> None:
    first, second = make_run("loku"), make_run("loku", "again")
    record = json.loads((second / "run.json").read_text())
    record["data"]["forget"]["sha256"] = "e" * 64
    (second / "run.json").write_text(json.dumps(record))
    for run in (first, second):
        (run / "results.retain_only.json").unlink()
    (second / "results.json").unlink()
    plain = words(check_page(write_report([first, second], tmp_path / "report.html", title="Two runs")))
    assert "Two runs" in plain
    assert "loku (again)" in plain
    assert "do not share one forget set" in plain
    assert "No run holds results of the retain-only model" in plain
    assert "loku (again): there is no results.json" in plain


def test_no_torch_is_needed() -> None:
    code = "import loku.report.html, loku.report.card, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_damaged_folder_stops_before_anything_is_written(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    (run / "results.json").write_text('{"sets": ')
    with pytest.raises(InputError, match="is not readable JSON"):
        write_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
