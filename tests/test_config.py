"""Options: one definition each, recipes below flags, unknown keys refused."""

from __future__ import annotations

import dataclasses

import pytest

from loku import config, training_options
from loku.adapters.initialisers import INITIALISERS
from loku.config import UnlearnOptions, read_recipe, resolve
from loku.errors import InputError
from loku.losses.table import FORGET_LOSSES, RETAIN_LOSSES
from loku.methods import METHODS

OPTION_SETS = [c for c in vars(config).values() if isinstance(c, type) and issubclass(c, config.Options)]


def test_names_agree_with_the_code_they_name():
    assert set(config.FORGET_LOSSES) == set(FORGET_LOSSES)
    assert set(config.RETAIN_LOSSES) == set(RETAIN_LOSSES)
    assert set(config.INITIALISERS) == set(INITIALISERS)


@pytest.mark.parametrize("cls", [c for c in OPTION_SETS if dataclasses.is_dataclass(c)])
def test_every_option_has_help_and_valid_defaults(cls):
    cls().check()
    assert all(f.metadata["help"] for f in cls.fields().values())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_resolves(name):
    options = resolve(UnlearnOptions, {}, {"method": name})
    assert {k: getattr(options, k) for k in METHODS[name].settings} == METHODS[name].settings


def test_trackers_are_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(training_options.TRACKERS) == {"none", "all", *INTEGRATION_TO_CALLBACK}


def test_the_default_options_are_lokus():
    assert {k: getattr(UnlearnOptions(), k) for k in METHODS["loku"].settings} == METHODS["loku"].settings
    assert UnlearnOptions().lora_alpha == 32
    assert UnlearnOptions(rank=4).lora_alpha == 8
    assert UnlearnOptions(rank=4, alpha=3.0).lora_alpha == 3


def test_flags_win_over_the_recipe_and_the_recipe_over_the_method():
    options = resolve(UnlearnOptions, {"method": "ga", "init": "fila", "rank": 8}, {"rank": 4})
    assert (options.forget_loss, options.retain_weight, options.init, options.rank) == ("grad_ascent", 0.0, "fila", 4)
    assert resolve(UnlearnOptions, {"method": "ga"}, {"method": "npo"}).forget_loss == "npo"


def test_recipes_are_read(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning-rate: 1e-3\nforget: rows.jsonl\nkeep_text: true\nepochs: 3\n")
    options = resolve(UnlearnOptions, read_recipe(recipe), {})
    assert options.learning_rate == 1e-3
    assert options.keep_text is True
    assert options.epochs == 3.0


@pytest.mark.parametrize(
    ("text", "given", "remedy"),
    [
        ("forgt: x\n", "has the unknown option 'forgt'.", "Did you mean 'forget'?"),
        ("rank: many\n", "gives 'many' for 'rank'.", "'rank' takes int."),
        ("rank: true\n", "gives True for 'rank'.", "'rank' takes int."),
        ("learning_rate: fast\n", "gives 'fast' for 'learning_rate'.", "'learning_rate' takes float."),
        ("forget: 3\n", "gives 3 for 'forget'.", "'forget' takes str or nothing."),
        ("method: lokku\n", "--method 'lokku' is not known.", "Did you mean 'loku'?"),
        ("method: [a]\n", "gives ['a'] for 'method'.", "'method' takes str."),
        ("learning_rate: .nan\n", "--learning-rate nan is not a finite number.", "Give a finite number."),
        ("max_loss: 1e400\n", "--max-loss inf is not a finite number.", "Give a finite number."),
        (f"epochs: 1{'0' * 400}\n", "for 'epochs'.", "'epochs' takes float."),
        ("- a\n", "holds no options.", "Write one `option: value` a line."),
        ("a: [\n", "is not YAML", "Write one `option: value` a line."),
    ],
)
def test_bad_recipes_are_refused(tmp_path, text, given, remedy):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(InputError) as caught:
        resolve(UnlearnOptions, read_recipe(recipe), {}, where=str(recipe))
    assert given in caught.value.given
    assert caught.value.remedy == remedy


def test_a_recipe_that_is_not_utf8_is_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes("forget: Jörg.jsonl\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"recipe\.yaml' is not UTF-8 text \(.*\)\.\nSave it as UTF-8\."):
        read_recipe(recipe)


@pytest.mark.parametrize(
    ("cls", "values", "given", "remedy"),
    [
        (UnlearnOptions, {"alpha": 0.0}, "--alpha 0.0 is too small.", "Give more than 0."),
        (UnlearnOptions, {"epochs": 0.0}, "--epochs 0.0 is too small.", "Give more than 0."),
        (UnlearnOptions, {"max_steps": 0}, "--max-steps 0 is too small.", "Give at least 1, or -1."),
        (UnlearnOptions, {"max_steps": -2}, "--max-steps -2 is too small.", "Give at least 1, or -1."),
        (UnlearnOptions, {"adam_beta2": 1.0}, "--adam-beta2 1.0 is too large.", "Give less than 1."),
        (UnlearnOptions, {"adam_beta2": -0.1}, "--adam-beta2 -0.1 is too small.", "Give at least 0."),
        (UnlearnOptions, {"importance_eps": 0.0}, "--importance-eps 0.0 is too small.", "Give more than 0."),
        (UnlearnOptions, {"max_new_tokens": 0}, "--max-new-tokens 0 is too small.", "Give at least 1."),
        (UnlearnOptions, {"report_to": "tensorbord"}, "'tensorbord' is not known.", "Did you mean 'tensorboard'?"),
        (UnlearnOptions, {"seed": 2**32}, "--seed 4294967296 is too large.", "Give at most 4294967295."),
        (UnlearnOptions, {"seed": -1}, "--seed -1 is too small.", "Give at least 0."),
        (config.ImportanceOptions, {"importance_eps": 0.0}, "--importance-eps 0.0 is too", "Give more than 0."),
        (config.ImportanceOptions, {"seed": 2**32}, "--seed 4294967296 is too large.", "Give at most"),
        (config.EvaluateOptions, {"max_new_tokens": 0}, "--max-new-tokens 0 is too small.", "Give at least 1."),
        (config.EvaluateOptions, {"seed": 2**32}, "--seed 4294967296 is too large.", "Give at most"),
        (config.DemoOptions, {"seed": 2**32}, "--seed 4294967296 is too large.", "Give at most"),
        (
            UnlearnOptions,
            {"forget_weight": 0.0, "retain_weight": 0.0},
            "--forget-weight 0 and --retain-weight 0 leave nothing to train.",
            "Give one of them a larger weight.",
        ),
    ],
)
def test_values_that_no_run_can_use_are_refused(cls, values, given, remedy):
    with pytest.raises(InputError) as caught:
        resolve(cls, {}, values)
    assert given in caught.value.given
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("cls", [c for c in OPTION_SETS if dataclasses.is_dataclass(c)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_number_may_be_infinite_or_none(cls, value):
    for name, field in cls.fields().items():
        if "float" in str(field.type):
            with pytest.raises(InputError, match=r"is not a finite number\.\nGive a finite number\."):
                resolve(cls, {}, {name: value})


def test_values_at_the_bounds_are_taken():
    resolve(UnlearnOptions, {}, {"adam_beta2": 0.0, "max_steps": -1, "seed": 2**32 - 1, "epochs": 0.1, "alpha": 0.5})
    resolve(UnlearnOptions, {}, {"max_steps": 1, "retain_weight": 0.0})
    resolve(UnlearnOptions, {"method": "ga"}, {})
