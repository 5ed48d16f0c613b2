"""The documentation is true: the README's Python runs, the paper index agrees with the code, links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from builders import byte_level_tokenizer, tiny_model
from loku.adapters.initialisers import INITIALISERS
from loku.cli import VERBS
from loku.config import UnlearnOptions
from loku.losses.table import FORGET_LOSSES, RETAIN_LOSSES
from loku.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readmes_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert code
    scope = {"model": tiny_model(), "tokenizer": byte_level_tokenizer()}
    for block in code:
        exec(block, scope)
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


def test_the_readme_names_every_verb_and_public_name():
    import loku

    text = (ROOT / "README.md").read_text()
    assert all(f"`loku {verb}`" in text for verb in VERBS)
    assert all(f"`{name}`" in text for name in loku.__all__)


def test_the_paper_index_agrees_with_the_defaults_and_their_sources():
    text = (ROOT / "docs" / "paper_index.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text.split("## Defaults")[1], flags=re.MULTILINE))
    sourced = {n: f for n, f in UnlearnOptions.fields().items() if f.metadata["source"]}
    assert set(table) == set(sourced)
    for name, field in sourced.items():
        assert table[name] == f"{field.default} | {field.metadata['source']}"


def test_the_paper_index_names_every_method_with_its_paper():
    text = (ROOT / "docs" / "paper_index.md").read_text().split("## Building blocks")[0]
    for name, method in METHODS.items():
        line = next(line for line in text.splitlines() if f"`{name}`" in line)
        assert method.source.rsplit(" ", 1)[-1] in line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_readmes_tree_names_real_places():
    tree = (ROOT / "README.md").read_text().split("src/loku/\n")[1].split("```")[0]
    for name in re.findall(r"^  ((?:[\w.*/]+ )+)", tree, flags=re.MULTILINE):
        for part in name.split():
            assert list((ROOT / "src" / "loku").glob(part.rstrip("/"))), part


def test_recipes_resolve():
    from loku.config import FinetuneOptions, read_recipe, resolve

    for recipe in sorted((ROOT / "recipes").rglob("*.yaml")):
        if recipe.parent.name in ("bench", "full"):  # no list of options: tests/bench/test_recipes.py
            continue
        values = read_recipe(recipe)
        cls = UnlearnOptions if "forget" in values else FinetuneOptions
        resolve(cls, values, {}, where=str(recipe))


@pytest.mark.parametrize("kind", ["Forget losses", "Retain losses"])
def test_the_losses_page_agrees_with_the_code(kind):
    losses = {"Forget losses": FORGET_LOSSES, "Retain losses": RETAIN_LOSSES}[kind]
    text = (ROOT / "docs" / "losses.md").read_text().split(f"## {kind}")[1].split("\n## ")[0].split("\n*Other")[0]
    table = {name: options for name, options in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, flags=re.MULTILINE)}
    assert set(table) == set(losses)
    for name, loss in losses.items():
        told = dict(re.findall(r"`(\w+)` ([\w.]+)", table[name]))
        assert told == {option: str(default) for option, default in loss.options.items()}
        source = re.search(r"arXiv\s+(\d{4}\.\d{5})", loss.function.__doc__)
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert source is None or source[1] in line or name == "dpo"


def test_the_tables_of_the_pages_say_what_the_json_says():
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0


def test_the_evaluation_page_names_every_suite_attack_and_extra():
    from loku.evaluation.extras import EXTRAS
    from loku.evaluation.membership import ATTACKS, REFERENCE_ATTACK
    from loku.evaluation.results import SUITES
    from loku.evaluation.tdec import LEVELS

    text = (ROOT / "docs" / "evaluation.md").read_text()
    for name in (*SUITES, *ATTACKS, REFERENCE_ATTACK, *LEVELS.values()):
        assert f"`{name}`" in text
    assert all(f"--extras {name}" in text for name in EXTRAS)


def test_the_initialisers_page_agrees_with_the_code():
    text = (ROOT / "docs" / "initialisers.md").read_text()
    table = dict(re.findall(r"^\| `(\w[\w-]*)` \|.*\| ([^|]+) \|$", text, flags=re.MULTILINE))
    assert set(table) == set(INITIALISERS)
    for name, initialiser in INITIALISERS.items():
        told = dict(re.findall(r"`(\w+)` ([\d.]+)", table[name]))
        assert told == {option: str(number.default) for option, number in initialiser.options.items()}
