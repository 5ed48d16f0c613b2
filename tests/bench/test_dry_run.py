"""The dry run: what it resolves from a recipe, and what it says of what it cannot reach."""

import io
import json

import pytest
from rich.console import Console

from builders import byte_level_tokenizer, tiny_model
from conftest import rows
from loku.adapters.layers import target_layers
from loku.bench.dry_run import CHARACTERS, dry_run, guess
from loku.bench.recipe import parse_recipe
from loku.bench.runner import bench
from loku.config import BenchOptions
from loku.data.records import Record


def printed(found):
    """What a terminal shows of a dry run."""
    console = Console(width=120, file=io.StringIO())
    console.print(found.table())
    return console.file.getvalue()


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


@pytest.fixture
def recipe(tmp_path, model_folder):
    """A recipe of two stages and two arms on made-up rows."""
    return {
        "name": "made-up",
        "stages": {
            "target": {"model": str(model_folder), "data": write(tmp_path / "full.jsonl", rows(33)), "epochs": 3,
                       "batch_size": 4, "grad_accum": 2},
            "retain-only": {"model": str(model_folder), "data": write(tmp_path / "most.jsonl", rows(28)),
                            "max_steps": 15},
        },
        "unlearn": {"forget": write(tmp_path / "forget.jsonl", rows(5)),
                    "retain": write(tmp_path / "retain.jsonl", rows(20, 5)), "epochs": 2, "batch_size": 2,
                    "grad_accum": 1, "rank": 4},
        "arms": [{"name": "IHL", "method": "ihl"}, {"name": "GA", "method": "ga", "tune": "full", "max_steps": 7}],
        "seeds": [0],
    }  # fmt: skip


def test_steps_rows_and_trained_weights_of_every_line(recipe):
    found = dry_run(parse_recipe(recipe, "recipe"))
    model = tiny_model()
    every = sum(p.numel() for p in model.parameters())
    trained = sum(4 * sum(layer.weight.shape) for layer in target_layers(model).values())
    # 33 rows: 9 batches of 4, 5 steps of 2 batches, 3 epochs; 5 rows: 3 batches of 2, 2 epochs.
    assert [(line.name, line.steps, line.rows) for line in found.stages] == [
        ("target", 15, 33),
        ("retain-only", 15, 28),
    ]
    assert [(line.name, line.steps, line.rows) for line in found.arms] == [("IHL", 6, 5), ("GA", 7, 5)]
    assert [line.footprint.trained for line in (*found.stages, *found.arms)] == [every, every, trained, every]
    assert not found.notes


def test_what_cannot_be_reached_is_said_and_leaves_a_gap(recipe):
    recipe["stages"] = {"target": {"model": "nobody/no-such-model"}}
    recipe["unlearn"]["retain"] = "nobody/no-such-rows"
    found = dry_run(parse_recipe(recipe, "recipe"))
    assert not found.stages
    assert [(line.steps, line.rows, line.footprint) for line in found.arms] == [(6, 5, None), (7, 5, None)]
    assert "?" in printed(found)
    said = " ".join(found.notes)
    assert "no-such-model" in said
    assert "no-such-rows" in said
    assert "characters a token" in said


def test_arms_that_train_other_layers_have_lines_of_their_own(recipe):
    recipe["arms"] = [
        {"name": "all", "method": "graddiff", "tune": "full"},
        {"name": "last", "method": "graddiff", "tune": "full", "tune_layers": 1},
    ]
    every, last = (line.footprint for line in dry_run(parse_recipe(recipe, "recipe")).arms)
    assert last.trained < every.trained
    assert last.peak < every.peak


def test_rows_that_cannot_be_reached_count_as_long_as_can_be(recipe, tmp_path):
    recipe["arms"].append({"name": "GradDiff", "method": "graddiff"})
    known = dry_run(parse_recipe(recipe, "recipe"))
    recipe["unlearn"]["retain"] = "nobody/no-such-rows"
    retain = dry_run(parse_recipe(recipe, "recipe"))
    recipe["unlearn"]["forget"] = "nobody/none-either"
    recipe["stages"]["target"]["data"] = "nobody/nothing"
    both = dry_run(parse_recipe(recipe, "recipe"))
    for less, more in ((known, retain), (retain, both)):
        for one, other in zip(less.arms, more.arms, strict=True):
            assert other.footprint.trained == one.footprint.trained
            if one.name == "GA" and less is known:  # it reads no retain rows
                assert other.footprint.peak == one.footprint.peak
            else:
                assert other.footprint.peak > one.footprint.peak
    assert [line.at_most for line in (*retain.arms, *retain.stages)] == [True, False, True, False, False]
    assert [line.rows for line in both.arms] == [None] * 3
    assert [line.steps for line in both.arms] == [None, 7, None]
    assert [line.at_most for line in (*known.arms, *known.stages)] == [False] * 5
    assert [line.at_most for line in (*both.arms, *both.stages)] == [True, True, True, True, False]
    assert printed(both).count("≤") == 4
    assert "no-such-rows" in " ".join(both.notes)


def test_a_model_that_can_be_read_has_its_own_sizes(recipe, model_folder):
    config = json.loads((model_folder / "config.json").read_text()) | {"num_hidden_layers": 9}
    found = dry_run(parse_recipe(recipe | {"config": config}, "recipe"))
    assert found.stages[0].footprint.trained == sum(p.numel() for p in tiny_model().parameters())
    assert not found.notes
    recipe["stages"] = {"target": {"model": "nobody/no-such-model"}}
    assert "sizes are those of the recipe" in " ".join(
        dry_run(parse_recipe(recipe | {"config": config}, "recipe")).notes
    )


def test_a_config_stands_in_for_a_model_that_cannot_be_reached(recipe, tmp_path, model_folder):
    known = dry_run(parse_recipe(recipe, "recipe"))
    recipe["stages"] = {"target": {"model": "nobody/no-such-model"}}
    config = json.loads((model_folder / "config.json").read_text())
    for given in (config, write(tmp_path / "config.json", [config])):
        found = dry_run(parse_recipe(recipe | {"config": given}, "recipe"))
        assert [line.footprint.trained for line in found.arms] == [line.footprint.trained for line in known.arms]
        assert [line.footprint.weights for line in found.arms] == [line.footprint.weights for line in known.arms]


def test_a_guess_of_lengths_is_near_the_truth_for_english():
    texts = ["The quick brown fox jumps over the lazy dog. " * n for n in (3, 30)]
    for text in texts:
        found = guess(Record(0, text=text), max_length=100)
        tokens = len(text) / CHARACTERS
        assert abs(sum(supervised for _, supervised in found) - tokens) <= 1
        assert max(length for length, _ in found) <= 100
    ((length, supervised),) = guess(Record(0, question="Where was she born?", answer="In Ulm."), max_length=100)
    assert supervised == 3  # two of text, one end of sequence
    assert length > supervised
    assert guess(Record(0, question="q" * 900, answer="a"), max_length=100)[0][0] == 100


def test_the_verb_prints_a_table_and_writes_nothing(recipe, tmp_path, monkeypatch, capsys):
    import yaml

    from loku.progress import console

    monkeypatch.setattr(console, "width", 120)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    bench(BenchOptions(recipe=str(tmp_path / "recipe.yaml"), output=str(tmp_path / "out"), dry_run=True))
    printed = capsys.readouterr().out
    assert "dry run" in printed
    for word in ("target", "retain-only", "IHL", "GA", "MiB"):
        assert word in printed
    assert not (tmp_path / "out").exists()


def test_a_new_model_has_the_size_of_its_own_tokenizer(recipe, tmp_path):
    new = write(tmp_path / "new.json", [tiny_model().config.to_dict() | {"vocab_size": 7}])
    settings = json.loads((tmp_path / "new.json").read_text())
    del settings["vocab_size"]
    (tmp_path / "new.json").write_text(json.dumps(settings))
    stage = {"new_model": new, "vocab_size": 300, "data": recipe["stages"]["target"]["data"], "max_steps": 5}
    found = dry_run(parse_recipe(recipe | {"stages": {"target": stage}}, "recipe"))
    smaller = tiny_model(vocab_size=300)
    assert found.stages[0].footprint.trained == sum(p.numel() for p in smaller.parameters())
    assert len(byte_level_tokenizer()) != 300  # it is this recipe's tokenizer that counted


def test_a_corpus_that_cannot_be_written_is_said_once(recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("LOKU_DATA_DIR", raising=False)
    recipe["corpus"] = {"kind": "lume", "documents": 2}
    new = tmp_path / "new.json"
    new.write_text(json.dumps(tiny_model().config.to_dict()).replace('"vocab_size"', '"was"'))
    recipe["stages"]["target"] = {
        "new_model": str(new),
        "vocab_size": 300,
        "data": "corpus/train.jsonl",
        "max_steps": 5,
    }
    recipe["unlearn"] |= {"forget": "corpus/forget.jsonl", "retain": "corpus/retain.jsonl[0:5]"}
    found = dry_run(parse_recipe(recipe, "recipe"))
    first, *others = found.notes
    assert "LOKU_DATA_DIR" in first
    assert others == [f"No tokenizer: lengths are guessed at {CHARACTERS} characters a token."] * len(others)
    assert all(line.footprint for line in found.arms)
    assert found.stages[0].footprint.trained == sum(p.numel() for p in tiny_model(vocab_size=300).parameters())
