"""Options: one definition each, recipes below flags, unknown keys refused."""

from __future__ import annotations

import dataclasses

import pytest

from loku import config
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
