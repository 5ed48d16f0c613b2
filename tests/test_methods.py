"""The methods by name: complete, and what they say is what they do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loku.adapters.initialisers import INITIALISERS
from loku.config import UnlearnOptions
from loku.losses.table import FORGET_LOSSES, RETAIN_LOSSES
from loku.methods import METHODS
from loku.objective import forget_term


def test_the_methods_of_the_papers_are_there():
    assert list(METHODS)[:7] == ["loku", "ihl", "vila", "reglu", "npo", "graddiff", "ga"]
    assert METHODS["loku"].settings == {
        "forget_loss": "ihl",
        "retain_loss": "nll",
        "retain_weight": 1.0,
        "init": "fila",
    }
    assert METHODS["ihl"].settings == METHODS["loku"].settings | {"init": "lora"}
    assert METHODS["vila"].settings == METHODS["loku"].settings | {"init": "vila", "retain_weight": 1.3}
    assert METHODS["reglu"].settings == METHODS["loku"].settings | {"init": "reglu", "orthogonality": 0.5}
    assert METHODS["graddiff"].settings == METHODS["ga"].settings | {"retain_weight": 1.0}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_described_and_sets_every_switch(name):
    method = METHODS[name]
    assert all((method.family, method.needs, method.cost, method.when, method.source))
    assert "arXiv" in method.source
    switches = {"forget_loss", "retain_loss", "retain_weight", "init"}
    assert switches <= set(method.settings) <= set(UnlearnOptions.fields())
    assert method.settings["forget_loss"] in FORGET_LOSSES
    assert method.settings["retain_loss"] in RETAIN_LOSSES
    UnlearnOptions(method=name, **method.settings).check()
    forget_term(method.settings["forget_loss"], method.settings.get("forget_options"))


def test_every_named_loss_has_a_method():
    assert {method.settings["forget_loss"] for method in METHODS.values()} == set(FORGET_LOSSES)
    assert {method.settings["retain_loss"] for method in METHODS.values()} == set(RETAIN_LOSSES)


@pytest.mark.parametrize("name", METHODS)
def test_needs_and_cost_agree_with_the_settings(name):
    method = METHODS[name]
    forget, retain = FORGET_LOSSES[method.settings["forget_loss"]], RETAIN_LOSSES[method.settings["retain_loss"]]
    assert (method.needs == "forget rows only") == (method.settings["retain_weight"] == 0)
    assert ("one forward pass" in method.cost) == (method.settings["retain_weight"] == 0)
    measured = INITIALISERS[method.settings["init"]].needs
    assert ("importance pass" in method.cost) == (measured in ("fisher", "variance"))
    assert ("rows of each set" in method.cost) == (measured == "activations")
    assert ("reference" in method.cost) == ("reference" in forget.needs)
    assert ("refusals" in method.needs) == ("alternate" in {*forget.needs, *retain.needs})
    live = {"reference_logits", "reference_hidden"} & {*forget.needs, *retain.needs}
    assert ("of the target model" in method.cost) == bool(live)


def test_the_list_of_methods_needs_no_torch():
    code = "import sys, loku.methods\nassert not {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
