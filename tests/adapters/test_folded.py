"""Folded layers: values and gradients are PEFT's, in float64; the base is never written; special cases stay PEFT's."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from builders import ARCHITECTURES, tiny_model
from loku.adapters.anchor import ANCHOR, TRAINED, attach, lora_layers, target_model
from loku.adapters.folded import folded
from loku.adapters.initialisers import fila, initial_factors
from loku.adapters.layers import target_layers, weight


def adapted(architecture="llama", *, anchored=True, rank=4, dtype=torch.float64):
    model = tiny_model(architecture).to(dtype)
    layers = target_layers(model)
    if anchored:
        factors = {n: fila(weight(x), torch.ones(len(weight(x))), rank=rank, scaling=2.0) for n, x in layers.items()}
    else:
        factors = initial_factors(layers, "lora", rank=rank, scaling=2.0)
    found = attach(model, layers, factors, rank=rank, alpha=2.0 * rank)
    for name, parameter in found.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
        if ".lora_B.default" in name:  # as after some training
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return found


def run(model, tokens):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 300, (2, tokens), generator=generator)
    logits = model(ids).logits
    parameters = [p for p in model.parameters() if p.requires_grad]
    return logits.detach(), torch.autograd.grad(logits.square().mean(), parameters)


@pytest.mark.parametrize("tokens", [3, 40], ids=["few tokens: by parts", "many tokens: summed"])
@pytest.mark.parametrize("anchored", [True, False], ids=["anchored", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_and_gradients_are_pefts(architecture, anchored, tokens):
    model = adapted(architecture, anchored=anchored)
    expected, gradients = run(model, tokens)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with folded(model):
        found, folded_gradients = run(model, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(folded_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def uses_folding(model):
    """Whether a pass makes any of our Function's nodes."""
    seen, queue = set(), [model(torch.arange(2, 8).unsqueeze(0)).logits.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        queue += [following for following, _ in node.next_functions]
    return any("Folded" in type(node).__name__ for node in seen)


def test_it_is_used_while_the_context_lasts_and_gone_after_an_error():
    model = adapted()
    assert not uses_folding(model)

    def breaks():
        with folded(model):
            assert uses_folding(model)
            with folded(model):  # within another, nothing changes
                assert uses_folding(model)
            assert uses_folding(model)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        breaks()
    assert not uses_folding(model)
    assert all("forward" not in vars(layer) for layer in lora_layers(model).values())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_sums_that_are_kept_are_right_and_go_with_the_context(architecture, monkeypatch):
    model = adapted(architecture)
    ids = torch.arange(2, 8).unsqueeze(0)
    with torch.no_grad():
        expected = model(ids).logits
    with folded(model, keep=True):
        for _ in range(2):
            with torch.no_grad():
                torch.testing.assert_close(model(ids).logits, expected, rtol=1e-10, atol=1e-12)
        made = []
        monkeypatch.setattr("loku.adapters.folded._stacked", lambda *_: made.append(1))
        with torch.no_grad():
            model(ids)
        assert not made  # nothing is added up again
        monkeypatch.undo()
        assert uses_folding(model)  # gradients take the usual way
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
        changed = model(ids).logits
        with folded(model, keep=True):
            torch.testing.assert_close(model(ids).logits, changed, rtol=1e-10, atol=1e-12)


def test_a_kept_sum_is_not_used_for_other_adapters():
    model, ids = adapted(), torch.arange(2, 8).unsqueeze(0)

    def logits():
        with torch.no_grad():
            return model(ids).logits

    def choose(names):
        for layer in lora_layers(model).values():
            layer.set_adapter(names)

    both = logits()
    choose([TRAINED])
    one = logits()
    with target_model(model):
        none = logits()
    assert not torch.allclose(one, both)
    with folded(model, keep=True):
        for names, expected in (([TRAINED, ANCHOR], both), ([TRAINED], one), ([TRAINED, ANCHOR], both)):
            choose(names)
            torch.testing.assert_close(logits(), expected, rtol=1e-10, atol=1e-12)
            with target_model(model):
                torch.testing.assert_close(logits(), none, rtol=1e-10, atol=1e-12)


def test_sums_are_not_kept_where_they_take_too_much(monkeypatch):
    monkeypatch.setattr("loku.adapters.folded.KEPT_BYTES", 100)
    model, ids = adapted(), torch.arange(2, 8).unsqueeze(0)
    used = []
    original = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: used.append(1) or original(*a, **k))
    with folded(model, keep=True), torch.no_grad():
        model(ids)
    assert not used  # six tokens: the parts are cheaper than the sum


def test_with_adapters_off_the_model_is_the_base():
    model = adapted()
    ids = torch.arange(2, 12).unsqueeze(0)
    base = tiny_model().double()
    with folded(model), target_model(model), torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}], ids=str)
def test_other_kinds_of_adapter_run_as_peft_has_them(settings):
    config = LoraConfig(r=4, target_modules=["q_proj", "gate_proj"], **settings)
    base = tiny_model()
    if "lora_bias" in settings:
        for name in ("q_proj", "gate_proj"):
            for module_name, module in base.named_modules():
                if module_name.endswith(name):
                    module.bias = torch.nn.Parameter(torch.zeros(module.out_features))
    model = get_peft_model(base, config)
    with folded(model):
        assert not uses_folding(model)


def test_half_precision_runs_as_peft_has_it():
    model = adapted(dtype=torch.bfloat16)
    with folded(model):
        assert not uses_folding(model)


def test_autocast_runs_as_peft_has_it():
    model = adapted(dtype=torch.float32)
    with folded(model), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not uses_folding(model)


def test_a_model_without_adapters_is_left_alone():
    model = tiny_model()
    with folded(model):
        assert not uses_folding(model)
