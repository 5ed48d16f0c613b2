"""Compression: the nearest level of each group, the smallest weights gone, and the stored weights untouched."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from attacks_builders import anchored
from builders import tiny_model
from loku.attacks.compression import (
    GROUP,
    NF4,
    changed_weights,
    prune_smallest,
    quantiser,
    round_to_bits,
    round_to_nf4,
)
from loku.attacks.relearning import linear_layers
from loku.errors import InputError

SHAPES = [(3, 64), (2, 130), (5, 1), (1, 63)]


def test_every_change_works_on_conv1d():
    model = tiny_model("gpt2")
    for change in (lambda W: prune_smallest(W, 0.5), quantiser("int4")[0], quantiser("nf4")[0]):
        before = [layer.weight.clone() for layer in linear_layers(model)]
        with changed_weights(model, change):
            changed = [layer.weight.clone() for layer in linear_layers(model)]
        for one, other in zip(before, changed, strict=True):
            assert torch.equal(other, change(one.T.contiguous()).T)


def weights(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def nearest(W, levels, group):
    """Float64 reference: every weight becomes the nearest of its group's scaled levels."""
    found = np.zeros(W.shape)
    for row in range(W.shape[0]):
        for start in range(0, W.shape[1], group):
            part = W[row, start : start + group].double().numpy()
            choices = np.array(levels) * np.abs(part).max()
            found[row, start : start + group] = choices[np.abs(part[:, None] - choices).argmin(axis=1)]
    return torch.from_numpy(found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 64), (4, 7), (2, 16)])
def test_rounding_takes_the_nearest_level(shape, bits, group):
    W, most = weights(shape), 2 ** (bits - 1) - 1
    levels = [level / most for level in range(-most, most + 1)]
    assert torch.allclose(round_to_bits(W, bits, group).double(), nearest(W, levels, group), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_takes_the_nearest_level(shape):
    W = weights(shape, seed=1)
    assert torch.allclose(round_to_nf4(W).double(), nearest(W, NF4, GROUP), atol=1e-6)
    assert len(set(NF4)) == 16
    assert sorted(NF4) == list(NF4)


@pytest.mark.parametrize("change", [lambda W: round_to_bits(W, 4), round_to_nf4, lambda W: prune_smallest(W, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_zero_and_the_type_stays(change, dtype):
    W = torch.zeros(2, 70, dtype=dtype)
    assert torch.equal(change(W), W)
    assert change(weights((2, 70)).to(dtype)).dtype == dtype


@pytest.mark.parametrize(("rate", "zeros"), [(0.1, 12), (0.5, 64), (0.999, 127), (0.001, 0)])
def test_pruning_removes_exactly_the_smallest(rate, zeros):
    W = weights((4, 32))
    pruned = prune_smallest(W, rate)
    gone = pruned == 0
    assert int(gone.sum()) == zeros
    assert torch.equal(pruned[~gone], W[~gone])
    if zeros:
        assert W[gone].abs().max() <= W[~gone].abs().min()


def test_pruning_counts_exactly_among_equal_weights():
    assert int((prune_smallest(torch.ones(4, 5), 0.3) == 0).sum()) == 6


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi", "qwen3"])
def test_the_stored_weights_come_back_and_were_never_written(architecture):
    model = tiny_model(architecture)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    head = model.get_output_embeddings().weight
    seen = []

    def change(W):
        seen.append(tuple(W.shape))
        return round_to_bits(W, 4)

    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with changed_weights(model, change):
            assert not torch.allclose(model(input_ids=ids).logits, plain)
            assert torch.equal(head, before["lm_head.weight" if "lm_head.weight" in before else next(iter(before))][1])
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert len(seen) == len(linear_layers(model))
    if architecture == "gpt2":  # groups run along the input there, too
        assert seen[0] == (96, 32)
    with pytest.raises(ZeroDivisionError), changed_weights(model, lambda W: W * (1 / 0)):
        pass
    assert all(p.data_ptr() == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())


def test_an_adapter_has_to_be_merged_first():
    with pytest.raises(InputError, match="carries an adapter"), changed_weights(anchored(tiny_model()), torch.clone):
        pass


def test_quantisers_are_known_by_name(monkeypatch):
    W = weights((4, 128))
    for kind, bits in (("int8", 8), ("int4", 4)):
        assert torch.equal(quantiser(kind)[0](W), round_to_bits(W, bits))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # not installed
    change, who = quantiser("nf4")
    assert "built-in" in who
    assert torch.equal(change(W), round_to_nf4(W))
    with pytest.raises(InputError, match="'int5' is not known"):
        quantiser("int5")


def test_bitsandbytes_is_used_where_it_runs(monkeypatch):
    library = ModuleType("bitsandbytes")
    library.functional = SimpleNamespace(
        quantize_4bit=lambda W, blocksize, quant_type: ((W, blocksize, quant_type), None),
        dequantize_4bit=lambda packed, state: round_to_nf4(packed[0], packed[1]),
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    change, who = quantiser("nf4")
    assert who == "bitsandbytes"
    W = weights((2, 128))
    assert torch.equal(change(W), round_to_nf4(W))
