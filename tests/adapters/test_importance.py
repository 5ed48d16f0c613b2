"""Fisher importance against a float64 reference by autograd, both modes, every layer kind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from builders import ARCHITECTURES, byte_level_tokenizer, tiny_model
from loku.adapters import fisher as fisher_module
from loku.adapters import importance as importance_module
from loku.adapters import partial as partial_module
from loku.adapters.fisher import RetainPass, layer_groups
from loku.adapters.importance import VECTORS, Importance, LayerImportance, estimate_importance, sample_retain
from loku.adapters.layers import is_transposed, target_layers
from loku.adapters.variance import estimate_variance
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
        R = fisher_f[name] / (fisher_r[name] + epsilon)
        rows[name] = R.sum(1), R.sum(0), fisher_f[name].sum(1), fisher_r[name].sum(1)
    return rows


def assert_same(importance, expected):
    for name, (relative, columns, forget, retain) in expected.items():
        layer = importance.layers[name]
        torch.testing.assert_close(layer.columns.double(), columns, rtol=2e-4, atol=0)
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


def same_bits(one, other):
    for name, layer in one.layers.items():
        for part in VECTORS:
            assert torch.equal(getattr(layer, part), getattr(other.layers[name], part))
        assert (layer.eps, layer.share_below_eps) == (other.layers[name].eps, other.layers[name].share_below_eps)


def close(one, other, rtol=1e-5):
    for name, layer in one.layers.items():
        for part in VECTORS:
            torch.testing.assert_close(getattr(layer, part), getattr(other.layers[name], part), rtol=rtol, atol=0)


def estimate(model, forget=None, retain=None, **options):
    layers = target_layers(model)
    return estimate_importance(
        model, layers, forget or examples(5), retain or examples(7, 1), **({"pad_id": PAD, "batch_size": 2} | options)
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", ["default", "official"])
def test_layer_groups_give_the_same_within_a_smaller_memory(architecture, mode, monkeypatch):
    model = tiny_model(architecture)
    layers = target_layers(model)
    matrices = []
    monkeypatch.setattr(
        importance_module,
        "RetainPass",
        lambda group, scratch: (
            matrices.append(sum(layer.weight.numel() * 4 for layer in group.values())) or RetainPass(group, scratch)
        ),
    )
    whole = estimate(model, mode=mode)
    largest = max(4 * layer.weight.numel() for layer in layers.values())
    grouped = estimate(model, mode=mode, memory=1.5 * largest / 2**30)
    assert len(matrices) > 4
    assert max(matrices[1:]) <= 1.5 * largest
    assert list(grouped.layers) == list(layers)
    same_bits(whole, grouped)


def test_gradients_stop_at_the_first_layer_of_a_group():
    model = tiny_model()
    last = dict(list(target_layers(model).items())[-3:])
    seen = []
    hook = model.model.layers[0].register_full_backward_hook(lambda *_: seen.append(1))
    estimate_importance(model, last, examples(3), examples(3, 1), pad_id=PAD)
    hook.remove()
    assert not seen


@pytest.mark.parametrize("memory", [1e-6, 0.0])
def test_too_little_memory_is_refused(memory):
    with pytest.raises(
        InputError, match=r"--importance-memory .* GiB is too small for the layer '.*'.*\nGive at least"
    ):
        layer_groups(target_layers(tiny_model()), memory)


class Killed(Exception):  # noqa: N818 - it is no error
    pass


@pytest.mark.parametrize("mode", ["default", "official"])
@pytest.mark.parametrize("kill_at", [1, 4, 6, 9, 12, 14])
def test_a_killed_pass_goes_on_to_the_same_bits(tmp_path, mode, kill_at, monkeypatch):
    monkeypatch.setattr(partial_module, "SAVE_SHARE", 0)  # saves after every batch
    model = tiny_model()
    largest = max(4 * layer.weight.numel() for layer in target_layers(model).values())
    options = {"mode": mode, "memory": 7 * largest / 2**30, "partial": tmp_path / "partial", "save_seconds": 0}
    expected = estimate(model, mode=mode, memory=options["memory"])
    calls, ran = [], []

    def kill(done, total):
        calls.append(done)
        if len(calls) == kill_at:
            raise Killed

    with pytest.raises(Killed):
        estimate(model, progress=kill, **options)
    handle = model.register_forward_hook(lambda *_: ran.append(1))
    resumed = estimate(model, **options)
    handle.remove()
    same_bits(expected, resumed)
    assert not (tmp_path / "partial").exists()
    total = 2 * (3 + 4)  # two groups, batches of two of 5 forget and 7 retain examples
    assert total - kill_at <= len(ran) <= total - kill_at + 1


def test_the_sums_of_another_pass_are_not_used(tmp_path):
    model = tiny_model()

    def kill(done, total):
        if done > 4:
            raise Killed

    with pytest.raises(Killed):
        estimate(model, progress=kill, partial=tmp_path / "partial", save_seconds=0)
    other = examples(5, seed=9)
    same_bits(estimate(model, other), estimate(model, other, partial=tmp_path / "partial", save_seconds=0))
    with pytest.raises(Killed):
        estimate(model, progress=kill, partial=tmp_path / "partial", save_seconds=0)
    changed = tiny_model()
    with torch.no_grad():
        changed.model.embed_tokens.weight[5] += 0.1
    same_bits(estimate(changed), estimate(changed, partial=tmp_path / "partial", save_seconds=0))


def test_a_torn_file_of_a_killed_pass_is_ignored(tmp_path):
    model = tiny_model()
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "state-0.safetensors").write_bytes(b"torn")
    same_bits(estimate(model), estimate(model, partial=tmp_path / "partial"))


@pytest.mark.slow
def test_two_processes_add_up_to_one(tmp_path):
    script = Path(__file__).parent / "importance_in_processes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, str(script), str(tmp_path)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    model = tiny_model()
    for mode in ("default", "official"):
        options = {"pad_id": PAD, "mode": mode, "batch_size": 2}
        whole = estimate(model, examples(7), examples(9, 1), **options)
        variance = estimate_variance(
            model, target_layers(model), examples(7), examples(9, 1), rank=4, scaling=2.0, **options
        )
        for rank in range(2):
            close(whole, Importance.load(tmp_path / f"{mode}-{rank}.safetensors"))
            close(variance, Importance.load(tmp_path / f"variance-{mode}-{rank}.safetensors"), rtol=1e-4)
    assert not (tmp_path / "partial").exists()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpointed_activations_give_the_same_and_are_recomputed(architecture):
    model = tiny_model(architecture)
    expected = estimate(model)
    model.activation_checkpointing_enable()
    forwards = []
    first = next(iter(target_layers(model).values()))
    handle = first.register_forward_hook(lambda *_: forwards.append(1))
    close(expected, estimate(model))
    handle.remove()
    assert len(forwards) == 2 * (3 + 4)  # every batch twice
    model.activation_checkpointing_enable({"use_reentrant": True})
    close(expected, estimate(model))
    assert not any(module.training for module in model.modules())


def test_tiles_of_rows_change_nothing(monkeypatch):
    model = tiny_model()
    whole = estimate(model)
    monkeypatch.setattr(fisher_module, "TILE", 100)
    close(whole, estimate(model))


def test_a_layer_used_twice_is_refused():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(InputError, match=r"'model\.layers\.0\.mlp\.up_proj' is used twice in one pass\.\nLeave it out"):
        estimate(model)


def test_a_layer_that_does_not_see_whole_sequences_is_refused():
    model = tiny_model()
    layer = model.model.layers[1].mlp.down_proj
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight)
    handle = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :2],))
    model.model.layers[1].mlp.register_forward_hook(
        lambda _, inputs, output: torch.nn.functional.pad(output, (0, 0, 0, inputs[0].shape[1] - 2))
    )
    with pytest.raises(InputError, match=r"does not see whole sequences \(its input has shape .*\)\.\nLeave it out"):
        estimate(model)
    handle.remove()


def test_only_answer_positions_go_through_the_head():
    model = tiny_model()
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[-2]))
    data = examples(4)
    estimate(model, data, data, batch_size=4)
    handle.remove()
    assert seen == [sum(label != IGNORE for e in data for label in e.labels[1:])] * 2


def test_rows_without_a_supervised_token_change_nothing():
    model = tiny_model()
    silent = Example(99, [5, 6, 7, 8], [IGNORE] * 4, 3, 3)
    close(estimate(model), estimate(model, [*examples(5), silent], [*examples(7, 1), silent]))


def test_two_dimensional_layers_count(monkeypatch):
    """Some blocks flatten the batch before a linear layer."""
    model = tiny_model()
    expected = estimate(model)
    layer = model.model.layers[0].mlp.up_proj
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: plain(x.reshape(-1, x.shape[-1])).reshape(x.shape))
    assert layer is mlp.up_proj
    close(expected, estimate(model))


def reference_variance(model, layers, forget, retain, *, rank, scaling, sigma=0.05, seed=0):
    """Variance of the factors' gradients by autograd through an explicit adapter that is cancelled at its start."""
    model = model.double()
    factors = {}
    for name, layer in layers.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        out, inner = layer.weight.T.shape if is_transposed(layer) else layer.weight.shape
        A = (sigma * torch.randn(rank, inner, generator=generator)).double().requires_grad_()
        B = (sigma * torch.randn(out, rank, generator=generator)).double().requires_grad_()
        factors[name] = (A, B)
        A0, B0 = A.detach().clone(), B.detach().clone()
        layer.register_forward_hook(
            lambda _, x, y, A=A, B=B, A0=A0, B0=B0: y + scaling * (x[0] @ A.T @ B.T - x[0] @ A0.T @ B0.T)
        )

    def moments(data):
        sums = {name: [torch.zeros_like(f.detach()) for f in (*pair, *pair)] for name, pair in factors.items()}
        tokens = 0
        for example in data:
            output = model(torch.tensor([example.input_ids])).logits[0, :-1]
            labels = torch.tensor(example.labels[1:])
            count = int((labels != IGNORE).sum())
            loss = torch.nn.functional.cross_entropy(output, labels, ignore_index=IGNORE)
            for name, pair in factors.items():
                for place, gradient in enumerate(torch.autograd.grad(loss, pair, retain_graph=True)):
                    sums[name][place] += count * gradient
                    sums[name][place + 2] += count * gradient.square()
            tokens += count
        return {
            name: [(s / tokens - (f / tokens).square()).clamp(min=0) for f, s in zip(v[:2], v[2:], strict=True)]
            for name, v in sums.items()
        }

    found_f, found_r = moments(forget), moments(retain)
    result = {}
    for name in layers:
        F_f, F_r = (found[name][1] @ found[name][0] for found in (found_f, found_r))
        R = F_f / (F_r + 0.01 * F_r.mean())
        result[name] = (R.sum(1), R.sum(0), F_f.sum(1), F_r.sum(1))
    return result


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi"])
def test_vila_is_the_variance_of_the_factors_gradients(architecture):
    model = tiny_model(architecture)
    layers = target_layers(model)
    forget, retain = examples(4), examples(5, seed=1)
    found = estimate_variance(model, layers, forget, retain, pad_id=PAD, rank=3, scaling=2.0, batch_size=2)
    for name, expected in reference_variance(model, layers, forget, retain, rank=3, scaling=2.0).items():
        layer = found.layers[name]
        for mine, theirs in zip((layer.relative, layer.columns, layer.forget, layer.retain), expected, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=0)


def test_vila_official_divides_twice_and_measures_the_changed_model():
    model = tiny_model()
    layers = target_layers(model, "q_proj")
    data = examples(4)
    options = {"pad_id": PAD, "rank": 3, "scaling": 2.0, "mode": "official", "passes": 1}
    found = estimate_variance(model, layers, data, data, **options)
    tokens = sum(label != IGNORE for e in data for label in e.labels[1:])
    # One batch only: its mean gradient has no variance, so everything but rounding cancels.
    assert all(float(layer.forget.max()) < 1e-12 for layer in found.layers.values())
    found = estimate_variance(model, layers, data, data, batch_size=2, **options)
    merged = tiny_model()
    factors = {}
    with torch.no_grad():
        for name, layer in target_layers(merged, "q_proj").items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"0:{name}".encode()))
            A = 0.05 * torch.randn(3, layer.weight.shape[1], generator=generator)
            B = 0.05 * torch.randn(layer.weight.shape[0], 3, generator=generator)
            layer.weight += 2.0 * B @ A
            factors[name] = (A.double(), B.double())
    sums = {name: {"A": [0.0, 0.0], "B": [0.0, 0.0]} for name in layers}
    merged = merged.double()
    adapted = target_layers(merged, "q_proj")
    for start in (0, 2):
        loss, count = 0.0, 0
        for example in data[start : start + 2]:
            labels = torch.tensor(example.labels[1:])
            output = merged(torch.tensor([example.input_ids])).logits[0, :-1]
            loss = loss + torch.nn.functional.cross_entropy(output, labels, ignore_index=IGNORE, reduction="sum")
            count += int((labels != IGNORE).sum())
        gradients = torch.autograd.grad(loss / count, [layer.weight for layer in adapted.values()])
        for (name, (A, B)), g in zip(factors.items(), gradients, strict=True):
            for part, value in (("A", 2.0 * B.T @ g), ("B", 2.0 * g @ A.T)):
                sums[name][part][0] += count * value
                sums[name][part][1] += count * value.square()
    for name in layers:
        F = {part: (s / tokens - (f / tokens).square()) / tokens for part, (f, s) in sums[name].items()}
        expected = (F["B"] @ F["A"]).sum(1)
        # Differences of nearly equal squares: what is left of float32 is less.
        torch.testing.assert_close(found.layers[name].forget.double(), expected, rtol=2e-2, atol=0)
        assert found.layers[name].eps == 1e-5
