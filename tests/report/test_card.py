from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from loku.errors import InputError
from loku.report.card import public_name, public_source, write_model_card

HUB = "example-org/Target-1B"


def _card(folder: Path, kind: str = "adapter", base_model: str = HUB, run: Path | None = None, **results: dict) -> str:
    record = json.loads((run / "run.json").read_text()) if run else {}
    options: dict = {"results": None} | results
    path = write_model_card(folder, run=record, kind=kind, base_model=base_model, **options)
    assert path == folder / "README.md"
    return path.read_text(encoding="utf-8")


def test_the_hub_reads_an_adapters_card(
    make_run: Callable[..., Path], make_results: Callable[..., dict], tmp_path: Path
) -> None:
    models = {"results": "loku", "target": "target", "retain_only": "retain_only"}
    text = _card(tmp_path, run=make_run(), **{name: make_results(kind) for name, kind in models.items()})
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "peft"
    assert data["base_model"] == HUB
    assert data["base_model_relation"] == "adapter"
    assert data["tags"] == ["unlearning", "loku", "lora"]
    assert "license" not in data
    assert "| forget | fiction/forget | 40 |" in text
    assert "| Set | Figure | Before | After | Retain-only |" in text
    assert "| Method | loku |" in text
    assert f'base = "{HUB}"' in text
    assert "PeftModel.from_pretrained" in text
    assert "An adapter can be removed" in text
    assert "no guarantee" in text
    assert "arXiv:2408.06621" in text
    assert "Mira Voss" not in text


@pytest.mark.parametrize(
    ("kind", "library", "relation", "statement"),
    [
        ("merged", "transformers", "finetune", "This is the merged model, the form that is released to outsiders"),
        ("model", "transformers", "finetune", "it is what is released to outsiders"),
    ],
)
def test_models(
    make_run: Callable[..., Path], tmp_path: Path, kind: str, library: str, relation: str, statement: str
) -> None:
    text = _card(tmp_path, kind, run=make_run())
    data = ModelCard(text).data.to_dict()
    assert (data["library_name"], data["base_model_relation"]) == (library, relation)
    assert ("lora" in data["tags"]) == (kind == "merged")
    assert statement in text
    assert "PeftModel" not in text
    assert "This model was not evaluated." in text


def test_local_paths_are_not_published(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    record = json.loads((run / "run.json").read_text())
    record["data"]["forget"]["name"] = "/home/somebody/people.jsonl"
    (run / "run.json").write_text(json.dumps(record))
    text = _card(tmp_path, base_model="/home/somebody/models/target", run=run)
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "somebody" not in text
    assert 'base = "path/to/target"' in text
    assert "people.jsonl" in text
    (tmp_path / "acme" / "jane_doe").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_source("acme/jane_doe[0:4]") == "jane_doe[0:4]"  # a folder of save_to_disk, by a relative path
    assert public_source("owner/name:train") == "owner/name:train"
    assert public_source("x" * 300) == "x" * 300
    (tmp_path / "local").mkdir()
    assert public_name(str(tmp_path / "local")) == "local"


def test_names_cannot_break_the_card(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    record = json.loads((run / "run.json").read_text())
    record["data"]["forget"]["name"] = "a|b<script>\nc"
    (run / "run.json").write_text(json.dumps(record))
    assert "a\\|b&lt;script> c" in _card(tmp_path, run=run)


def test_an_empty_run_record_is_enough(tmp_path: Path) -> None:
    text = _card(tmp_path)
    assert "The run record holds no data counts." in text
    assert "## Method and settings" not in text


def test_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model card of kind 'lora'") as caught:
        _card(tmp_path, "lora")
    caught.match("Give one of: adapter, merged, model")
