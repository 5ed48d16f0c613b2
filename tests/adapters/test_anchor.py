"""The anchored adapter: nothing changes at the start, the base is never written, the anchor stays frozen."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from builders import ARCHITECTURES, tiny_model
from loku.adapters.anchor import (
    ANCHOR,
    TRAINED,
    activate,
    attach,
    is_anchored,
    lora_layers,
    restore,
    save_checkpoint,
    target_model,
)
from loku.adapters.export import load_lora, merged_weights, portable_lora, save_merged, truncate
from loku.adapters.initialisers import Factors, fila, lora
from loku.adapters.layers import target_layers, weight
from loku.errors import InputError
from loku.models import weights_sha256

RANK, ALPHA = 4, 8.0

# Largest change of a logit when the adapters are attached: rounding of the base's own type. Logits are of size 1.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def ids(seed=0):
    return torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(seed))


def anchored(architecture="llama", dtype=torch.float32, init="fila"):
    model = tiny_model(architecture).to(dtype)
    layers = target_layers(model)
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for name, layer in layers.items():
        W = weight(layer)
        rows = torch.rand(len(W), generator=generator) + 0.05
        factors[name] = fila(W, rows, rank=RANK, scaling=2.0) if init == "fila" else lora(W, rank=RANK)
    return attach(model, layers, factors, rank=RANK, alpha=ALPHA)


def train(model, steps=3, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for step in range(steps):
        model(input_ids=ids(step), labels=ids(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(ids(9)).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attaching_changes_no_logit(architecture, dtype):
    before = logits(tiny_model(architecture).to(dtype))
    after = logits(anchored(architecture, dtype))
    assert (after - before).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_base_is_untouched_and_anchor_frozen_after_training(architecture):
    base = tiny_model(architecture)
    expected, digest = logits(base), weights_sha256(base)
    model = anchored(architecture)
    with target_model(model):
        assert torch.equal(logits(model), expected)
    anchor_before = {n: p.clone() for n, p in model.named_parameters() if f".{ANCHOR}." in n}
    train(model)
    assert (logits(model) - expected).abs().max() > 1e-3  # it did learn
    with target_model(model):
        assert torch.equal(logits(model), expected)
    for name, parameter in model.named_parameters():
        if name in anchor_before:
            assert torch.equal(parameter, anchor_before[name])
            assert not parameter.requires_grad
        assert parameter.requires_grad == (f".{TRAINED}." in name)
    assert weights_sha256(model.unload()) == digest


def test_target_model_freezes_the_anchor_again_even_after_an_error():
    model = anchored()
    with pytest.raises(ZeroDivisionError), target_model(model):
        1 / 0  # noqa: B018
    assert not any(p.requires_grad for n, p in model.named_parameters() if f".{ANCHOR}." in n)
    assert all(layer.active_adapters == [TRAINED, ANCHOR] for layer in lora_layers(model).values())


def test_plain_lora_needs_no_anchor():
    model = anchored(init="lora")
    assert not is_anchored(model)
    assert torch.equal(logits(model), logits(tiny_model()))


def test_gradients_equal_those_of_an_edited_base():
    model = anchored()
    model(input_ids=ids(), labels=ids()).loss.backward()
    edited = tiny_model()
    reference = attach(
        edited,
        target_layers(edited),
        {n: Factors(x.lora_A[TRAINED].weight.detach().clone(), x.lora_B[TRAINED].weight.detach().clone() * 0, 0.0)
         for n, x in lora_layers(model).items()},
        rank=RANK,
        alpha=ALPHA,
    )  # fmt: skip
    with torch.no_grad():
        for name, layer in lora_layers(reference).items():
            source = lora_layers(model)[name]
            A, B = source.lora_A[TRAINED].weight, source.lora_B[TRAINED].weight
            layer.base_layer.weight -= 2.0 * B @ A
            layer.lora_B[TRAINED].weight.copy_(B)
    reference(input_ids=ids(), labels=ids()).loss.backward()
    for name, layer in lora_layers(model).items():
        for part in ("lora_A", "lora_B"):
            mine = getattr(layer, part)[TRAINED].weight.grad
            theirs = getattr(lora_layers(reference)[name], part)[TRAINED].weight.grad
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_saving_and_restoring_is_bit_equal(tmp_path):
    model = train(anchored())
    save_checkpoint(model, tmp_path)
    fresh = anchored()
    assert not torch.equal(logits(fresh), logits(model))
    restore(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    assert not any(p.requires_grad for n, p in fresh.named_parameters() if f".{ANCHOR}." in n)


def test_restoring_a_torn_checkpoint_is_refused(tmp_path):
    model = anchored()
    save_checkpoint(model, tmp_path)
    (tmp_path / ANCHOR / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks 'adapter_model.safetensors' of the adapter 'anchor'"):
        restore(model, tmp_path)


def test_restoring_another_models_checkpoint_is_refused(tmp_path):
    save_checkpoint(anchored("gpt2"), tmp_path)
    with pytest.raises(
        InputError, match=r"belongs to another model \(.*transformer\.h\.0.*\)\.\nChoose another --output"
    ):
        restore(anchored(), tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_export_is_an_ordinary_lora_of_twice_the_rank(architecture, tmp_path):
    model = train(anchored(architecture))
    expected = logits(model)
    lora_export = portable_lora(model)
    assert lora_export.rank == 2 * RANK
    lora_export.save(tmp_path, base_model=None)
    plain = PeftModel.from_pretrained(tiny_model(architecture), tmp_path)
    assert (logits(plain) - expected).abs().max() <= 2e-5
    again = load_lora(tmp_path)
    assert all(torch.equal(again.delta(name), lora_export.delta(name)) for name in again.A)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neo", "qwen3"])
def test_merging_adds_the_change_and_leaves_the_base_alone(architecture, tmp_path):
    model = train(anchored(architecture))
    expected = logits(model)
    base = tiny_model(architecture)
    digest = weights_sha256(base)
    save_merged(base, portable_lora(model), tmp_path)
    assert weights_sha256(base) == digest
    merged = type(base).from_pretrained(tmp_path)
    assert (logits(merged) - expected).abs().max() <= 2e-5
    assert set(merged_weights(base, portable_lora(model))) == set(base.state_dict())


def test_a_half_precision_export_keeps_a_small_update():
    model = train(anchored(), steps=1, lr=1e-5)
    exact = portable_lora(model)
    name = next(iter(exact.A))
    half = 2.0 * (exact.B[name].bfloat16().float() @ exact.A[name].bfloat16().float())
    assert (half - exact.delta(name)).norm() <= 0.02 * exact.delta(name).norm()


def test_truncation_is_the_best_of_its_rank_and_says_its_error():
    exact = portable_lora(train(anchored()))
    smaller = truncate(exact, RANK)
    lost = total = 0.0
    for name in exact.A:
        S = torch.linalg.svdvals(exact.delta(name).double())
        lost, total = lost + float(S[RANK:].square().sum()), total + float(S.square().sum())
        assert smaller.lora.A[name].shape[0] == RANK
    assert smaller.error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    measured = sum(float((smaller.lora.delta(n) - exact.delta(n)).square().sum()) for n in exact.A)
    assert (measured / total) ** 0.5 == pytest.approx(smaller.error, rel=1e-3)
    assert smaller.worst >= smaller.error
    assert truncate(exact, 2 * RANK).error < 1e-6


@pytest.mark.parametrize("rank", [0, 9])
def test_truncation_to_an_impossible_rank_is_refused(rank):
    with pytest.raises(InputError, match=rf"--rank {rank} is outside 1 to 8\.\nThis adapter has rank 8; give less\."):
        truncate(portable_lora(anchored()), rank)


def test_loading_something_else_as_an_adapter_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"not an adapter folder: .*\nGive the `adapter` folder of a finished run\."):
        load_lora(tmp_path)


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, checkpointed = anchored(), anchored()
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        model.train()(input_ids=ids(), labels=ids()).loss.backward()
    activate(plain)
    gradients = {n: p.grad for n, p in checkpointed.named_parameters() if p.grad is not None}
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-7)
