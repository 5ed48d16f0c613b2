"""Fisher importance against a float64 reference by autograd, both modes, every layer kind."""

from __future__ import annotations

import re

import pytest
import torch

from builders import ARCHITECTURES, byte_level_tokenizer, tiny_model
from loku.adapters.importance import Importance, LayerImportance, estimate_importance, sample_retain
from loku.adapters.layers import is_transposed, target_layers
from loku.data.encoding import IGNORE, Example
from loku.errors import DivergenceError, InputError

PAD = byte_level_tokenizer().pad_token_id


def examples(count, seed=0, longest=9):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(4, longest + 1, (1,), generator=generator))
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        start = int(torch.randint(1, length - 1, (1,), generator=generator))
        made.append(Example(index, ids, [IGNORE] * start + ids[start:], start, start))
    return made


def reference(model, layers, forget, retain, *, batch_size=None, eps=None, relative_eps=0.01):
    """Full float64 Fisher matrices by plain autograd; batch_size None takes one gradient per example."""
    model = model.double()

    def fisher(data):
        total = {name: 0.0 for name in layers}
        tokens = 0
        step = batch_size or 1
        for start in range(0, len(data), step):
            chunk = data[start : start + step]
            loss, count = 0.0, 0
            for example in chunk:
                output = model(torch.tensor([example.input_ids])).logits[0, :-1].log_softmax(-1)
                for position, label in enumerate(example.labels[1:]):
                    if label != IGNORE:
                        loss, count = loss - output[position, label], count + 1
            gradients = torch.autograd.grad(loss / count, [layer.weight for layer in layers.values()])
            for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
                oriented = gradient.T if is_transposed(layer) else gradient
                total[name] = total[name] + count * oriented.square()
            tokens += count
        return {name: value / tokens for name, value in total.items()}

    model.requires_grad_(True)
    fisher_f, fisher_r = fisher(forget), fisher(retain)
    rows = {}
    for name in layers:
        epsilon = eps if eps is not None else relative_eps * fisher_r[name].mean()
        rows[name] = (fisher_f[name] / (fisher_r[name] + epsilon)).sum(1), fisher_f[name].sum(1), fisher_r[name].sum(1)
    return rows


def assert_same(importance, expected):
    for name, (relative, forget, retain) in expected.items():
        layer = importance.layers[name]
        torch.testing.assert_close(layer.relative.double(), relative, rtol=2e-4, atol=0)
        torch.testing.assert_close(layer.forget.double(), forget, rtol=2e-4, atol=1e-12)
        torch.testing.assert_close(layer.retain.double(), retain, rtol=2e-4, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_default_mode_is_the_per_example_fisher(architecture):
    model = tiny_model(architecture)
    layers = target_layers(model)
    forget, retain = examples(5), examples(7, seed=1)
    importance = estimate_importance(model, layers, forget, retain, pad_id=PAD, batch_size=3)
    assert_same(importance, reference(model, layers, forget, retain))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_official_mode_squares_batch_means(architecture):
    model = tiny_model(architecture)
    layers = target_layers(model)
    forget, retain = examples(6), examples(6, seed=1)
    importance = estimate_importance(model, layers, forget, retain, pad_id=PAD, batch_size=4, mode="official")
    assert_same(importance, reference(model, layers, forget, retain, batch_size=4, eps=1e-5))
    assert all(layer.eps == 1e-5 for layer in importance.layers.values())


def test_default_mode_does_not_depend_on_the_batch_size():
    model = tiny_model()
    layers = target_layers(model)
    one = estimate_importance(model, layers, examples(6), examples(6, 1), pad_id=PAD, batch_size=1)
    six = estimate_importance(model, layers, examples(6), examples(6, 1), pad_id=PAD, batch_size=6)
    for name in layers:
        torch.testing.assert_close(one.layers[name].relative, six.layers[name].relative, rtol=1e-4, atol=0)


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    estimate_importance(model, target_layers(model), examples(2), examples(2), pad_id=PAD)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_frozen_model_under_no_grad_and_with_checkpointing_gives_the_same():
    model = tiny_model()
    layers = target_layers(model)
    expected = estimate_importance(model, layers, examples(4), examples(4, 1), pad_id=PAD)
    model.requires_grad_(False)
    with torch.no_grad():
        frozen = estimate_importance(model, layers, examples(4), examples(4, 1), pad_id=PAD)
    model.activation_checkpointing_enable()
    model.train()
    checkpointed = estimate_importance(model, layers, examples(4), examples(4, 1), pad_id=PAD)
    for name in layers:
        assert torch.equal(frozen.layers[name].relative, expected.layers[name].relative)
        torch.testing.assert_close(checkpointed.layers[name].relative, expected.layers[name].relative)


def test_accumulation_is_float32_for_half_precision_models():
    model = tiny_model().bfloat16()
    importance = estimate_importance(model, target_layers(model), examples(4), examples(4, 1), pad_id=PAD)
    exact_model = tiny_model()
    exact = estimate_importance(exact_model, target_layers(exact_model), examples(4), examples(4, 1), pad_id=PAD)
    for name, layer in importance.layers.items():
        assert layer.relative.dtype == torch.float32
        assert torch.corrcoef(torch.stack([layer.forget.log(), exact.layers[name].forget.log()]))[0, 1] > 0.95


def test_eps_override_and_share_below_eps():
    model = tiny_model()
    layers = target_layers(model)
    importance = estimate_importance(model, layers, examples(3), examples(3, 1), pad_id=PAD, eps=1e9)
    assert all(layer.share_below_eps == 1.0 for layer in importance.layers.values())
    # With a huge eps only the forget set counts: the finding about the released recipe.
    assert all(layer.rank_correlation_forget_only() > 0.999 for layer in importance.layers.values())


def test_a_non_finite_gradient_is_refused():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(DivergenceError, match=r"The Fisher information of layer '.*' is not finite\.\nIts gradients"):
        estimate_importance(model, target_layers(model), examples(2), examples(2, 1), pad_id=PAD)


def test_saving_and_loading_keeps_everything(tmp_path):
    layer = LayerImportance(*(torch.rand(4) for _ in range(4)), 1e-7, 0.25)
    saved = Importance({"a.b": layer}, {"model": "abc", "seed": 3})
    saved.save(tmp_path / "sub" / "importance.safetensors")
    loaded = Importance.load(tmp_path / "sub" / "importance.safetensors")
    assert loaded.provenance == saved.provenance
    assert torch.equal(loaded.layers["a.b"].relative, layer.relative)
    assert loaded.layers["a.b"].eps == 1e-7
    assert loaded.layers["a.b"].share_below_eps == 0.25


def test_a_missing_or_foreign_importance_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"does not exist\.\nMake one with `loku importance`"):
        Importance.load(tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match=re.escape("is not an importance file") + r".*\nMake one"):
        Importance.load(tmp_path / "x.safetensors")


def test_the_retain_sample_is_seeded_and_large_enough():
    forget, retain = examples(4), examples(300, seed=2)
    assert len(sample_retain(retain, forget, "official", 0)) == 4
    assert len(sample_retain(retain, forget, "default", 0)) == 256
    assert sample_retain(retain, forget, "default", 0) == sample_retain(retain, forget, "default", 0)
    assert sample_retain(retain, forget, "default", 0) != sample_retain(retain, forget, "default", 1)
    assert sample_retain(retain[:3], forget, "default", 0) == retain[:3]
