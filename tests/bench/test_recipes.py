"""The recipes that come with loku: all of them parse, the small ones resolve, and every full-size one runs in small."""

import copy
import dataclasses
import json
import os
from pathlib import Path

import pytest
from transformers import AutoConfig

from builders import ARCHITECTURES, byte_level_tokenizer, tiny_model
from conftest import perturbed, rows
from loku.bench.dry_run import dry_run
from loku.bench.extending import merged, plain_text
from loku.bench.models import build_models
from loku.bench.recipe import load_recipe, parse_recipe
from loku.bench.store import Task, read_record
from loku.bench.trial import run_trial
from loku.config import UnlearnOptions, resolve
from loku.errors import InputError

RECIPES = Path(__file__).parents[2] / "recipes"
FULL = sorted(path.stem for path in (RECIPES / "full").glob("*.yaml"))
SMALL = ["fiction", "mini-lume", "mini-tdec", "mini-tofu-10", "mini-tofu-50"]
EVERY_ARM = ("tofu-phi-1.5-forget01", "tdec-gpt-neo-125m", "muse-news", "lume-olmo-1b")  # one recipe of each benchmark


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch):
    monkeypatch.chdir(RECIPES.parent)  # recipes name prompt templates and model files from there


@pytest.mark.parametrize("name", [f"full/{name}" for name in FULL] + [f"bench/{name}" for name in SMALL])
def test_a_recipe_parses_and_is_called_like_its_file(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.name == name.partition("/")[2]
    assert recipe.arms
    assert not set(recipe.tuning.seeds) & set(recipe.seeds)


def test_the_published_settings_are_as_the_scripts_have_them():
    """A second reading of LoKU's and Jang et al.'s scripts, for the settings that decide a comparison."""
    for model, rate in (("phi-1.5", 2e-4), ("llama-2-7b", 1e-4)):
        splits = (("forget01", "retain99", 40), ("forget05", "retain95", 200), ("forget10", "retain90", 400))
        for split, rows_kept, count in splits:
            recipe = load_recipe(RECIPES / f"full/tofu-{model}-{split}.yaml")
            assert recipe.unlearn["forget"] == f"tofu/{split}_perturbed"
            assert recipe.unlearn["retain"] == f"tofu/{rows_kept}"
            assert any(rows_kept in str(value) for value in recipe.stages["retain-only"].values())
            for arm in recipe.arms:
                options = resolve(UnlearnOptions, recipe.settings(arm, {}), {})
                assert options.batch_size * options.grad_accum == 32
                assert (options.max_steps, options.warmup_steps) == (5 * count // 32, max(1, count // 32))
                assert options.max_length == 500
                if not arm.name.startswith(("VILA", "ReGLU")):
                    assert (options.learning_rate, options.lora_alpha) == (rate, 2 * options.rank)
            assert {arm.options["rank"] for arm in recipe.arms if arm.options["method"] == "ihl"} == {4, 8, 16, 32}
    for size in ("125m", "1.3b", "2.7b"):
        recipe = load_recipe(RECIPES / f"full/tdec-gpt-neo-{size}.yaml")
        options = resolve(UnlearnOptions, dict(recipe.unlearn), {})
        assert (options.batch_size * options.grad_accum, options.max_steps, options.stop_at) == (32, 20, "level")
        assert (options.eval_steps, options.max_length, options.adam_beta2) == (1, 200, 0.98)
        assert ("level" in recipe.unlearn) == (size == "125m")
        assert options.holdout == "tdec/validation/pile"  # the challenge's sequences are no unseen text
    for corpus in ("news", "books"):
        options = resolve(UnlearnOptions, dict(load_recipe(RECIPES / f"full/muse-{corpus}.yaml").unlearn), {})
        assert (options.epochs, options.batch_size * options.grad_accum, options.max_length) == (10, 32, 2048)


@pytest.mark.parametrize("name", ["tofu-phi-1.5-forget10", "tofu-llama-2-7b-forget10", "tdec-gpt-neo-125m"])
def test_full_size_recipes_resolve_offline(name, made_up):
    known = {"phi": (1.418e9, 0.0100), "llama": (6.738e9, 0.0059), "gpt_neo": (0.125e9, 0.0165)}
    recipe = load_recipe(RECIPES / f"full/{name}.yaml")
    chosen = [arm for arm in recipe.arms if arm.name == "ihl from fila, rank 16"]
    found = dry_run(dataclasses.replace(recipe, arms=tuple(chosen), stages={"target": recipe.stages["target"]}))
    footprint = found.arms[0].footprint
    parameters, share = known[recipe.config["model_type"]]
    assert footprint.share == pytest.approx(share, abs=0.0001)
    assert footprint.trained / footprint.share == pytest.approx(parameters, rel=0.01)
    assert "tokenizer" in " ".join(found.notes)


@pytest.mark.data
@pytest.mark.parametrize("name", SMALL)
def test_small_recipes_resolve(name):
    if not os.environ.get("LOKU_DATA_DIR"):
        pytest.skip("LOKU_DATA_DIR is not set")
    recipe = load_recipe(RECIPES / f"bench/{name}.yaml")
    found = dry_run(dataclasses.replace(recipe, arms=recipe.arms[:2]))
    assert not found.notes
    assert all(line.steps and line.rows and line.footprint for line in (*found.stages, *found.arms))


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A data folder with made-up rows under the names of the benchmarks."""
    folder = tmp_path / "data"

    def write(name, items):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(item) + "\n" for item in items))

    for split in ("01", "05", "10"):
        write(f"tofu/forget{split}_perturbed.json", [perturbed(row) for row in rows(4)])
    for split in ("90", "95", "99"):
        write(f"tofu/retain{split}.json", rows(6, 10))
    write("tofu/full.json", rows(16))
    write("tofu/retain_perturbed.json", [perturbed(row) for row in rows(4, 10)])
    for name, start in (("real_authors", 30), ("world_facts", 40)):
        write(f"tofu/{name}_perturbed.json", [perturbed(row) for row in rows(3, start)])
    for draw in range(2):
        texts = [f"seq {draw}-{i} " + " ".join(str(i * j % 7) for j in range(30)) for i in range(3)]
        write(f"tdec/lm_extraction_32_{draw}.jsonl", [{"text": text} for text in texts])
    for name in ("wikitext", "pile"):
        write(f"tdec/validation/{name}.jsonl", [{"text": f"{name} {i} was a king of the north."} for i in range(4)])
    for corpus in ("news", "books"):
        asked = [{"question": f"Who is {i}?", "answer": f"Mira {i}"} for i in range(3)]
        for name in ("forget_qa", "retain_qa", "forget_qa_icl", "retain_qa_icl"):
            write(f"muse/{corpus}/knowmem/{name}.jsonl", asked)
        write(f"muse/{corpus}/verbmem/forget.jsonl", [{"prompt": "It was", "gt": "a dark night"}])
    for name in ("forget", "retain"):
        probes = [(f"{name}{task}{i}{probe}", i, task) for task in "123" for i in "ab" for probe in ("sc1", "qa0")]
        write(
            f"lume/{name}.jsonl", [{"id": n, "input": f"{n}?", "output": i, "task": f"Task{t}"} for n, i, t in probes]
        )
    monkeypatch.setenv("LOKU_DATA_DIR", str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_a_tiny_model_runs_every_full_size_recipe(name, made_up, tmp_path):
    """Models, data sets of the hub, steps and lengths are replaced; everything else is the recipe's."""
    recipe = load_recipe(RECIPES / f"full/{name}.yaml")
    kind = recipe.config["model_type"]
    tiny_model(kind).save_pretrained(tmp_path / "model")
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    if "system_prompt" in Path(recipe.unlearn.get("prompt_template") or os.devnull).read_text():
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
        )
        tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.save_pretrained(tmp_path / "model")
    assert AutoConfig.for_model(**recipe.config).model_type == kind
    short = {"max_steps": 2, "batch_size": 2, "grad_accum": 1, "max_length": 200}
    stages = {
        stage: dict(settings) | {"model": str(tmp_path / "model")} | (short if "data" in settings else {})
        for stage, settings in recipe.stages.items()
    }
    made = {"device": "cpu", "dtype": "float32", "eval_rows": 2, "max_new_tokens": 4} | short
    if name.startswith("muse"):
        made |= {"forget": "tdec/lm_extraction_32_0", "retain": "tdec/validation/pile"}
    arms = {}  # one of those that differ in rank alone
    for arm in recipe.arms:
        options = dict(arm.options) | ({"rank": 4} if "rank" in arm.options else {})
        if "tune_layers" in options:
            options["tune_layers"] = 1
        arms.setdefault(json.dumps(options, sort_keys=True), dataclasses.replace(arm, options=options))
    if name not in EVERY_ARM:  # the arm with most to it: LoKU's own
        arms = {"": next(arm for arm in arms.values() if arm.name.startswith("ihl from fila"))}
    recipe = dataclasses.replace(
        recipe,
        stages=stages,
        unlearn=dict(recipe.unlearn) | made | {"rank": 4},
        measure={k: v for k, v in recipe.measure.items() if k != "memorised"},  # two steps teach nothing
        arms=tuple(arms.values()),
    )
    build_models(Task("models", str(tmp_path / "bench"), 0, recipe))
    for arm in recipe.arms:
        task = Task("trial", str(tmp_path / "bench"), 0, recipe, arm, {})
        run_trial(task)
        record = read_record(task.path)
        assert record["error"] is None
        assert record["figures"]["values"]
        assert record["trainable"]["parameters"] > 0
        if "level" in str(recipe.unlearn.get("stop_at")):
            assert record["curve"]


def test_an_extending_recipe_is_merged_by_name():
    base = {"a": {"x": 1, "y": 2}, "b": [1, 2], "c": {"z": 3}}
    assert merged(base, {"a": {"y": 5}, "b": [3]}) == {"a": {"x": 1, "y": 5}, "b": [3], "c": {"z": 3}}
    assert merged(base, {"a": {"y": None}}) == {"a": {"x": 1}, "b": [1, 2], "c": {"z": 3}}
    assert merged(base, {"a": {"replace": True, "w": 0}}) == {"a": {"w": 0}, "b": [1, 2], "c": {"z": 3}}
    assert merged(base, {"a": None}) == {"b": [1, 2], "c": {"z": 3}}


def test_a_recipe_that_is_kept_stands_alone():
    import yaml

    for name in ("full/tofu-qwen3-0.6b-forget01", "bench/fiction"):
        path = RECIPES / f"{name}.yaml"
        text = plain_text(path)
        assert ("extends:" in path.read_text()) == (text != path.read_text())
        assert parse_recipe(yaml.safe_load(text), str(path)) == load_recipe(path)


def test_recipes_that_extend_each_other_or_nothing_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(InputError, match="extends itself"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("extends: none.yaml\n")
    with pytest.raises(InputError, match="does not exist"):
        load_recipe(tmp_path / "c.yaml")


def test_every_architecture_of_the_full_size_recipes_has_a_tiny_model():
    kinds = {load_recipe(RECIPES / f"full/{name}.yaml").config["model_type"] for name in FULL}
    assert kinds <= set(ARCHITECTURES)
    assert {"phi", "llama", "gpt_neo", "qwen3", "olmo"} <= kinds
