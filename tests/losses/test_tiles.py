"""Tiles of the vocabulary, and half-precision products with float32 results."""

import pytest
import torch

import scores_reference as slow
from loku.losses import tiles
from loku.losses.head import scores_from_hidden
from loku.losses.tiles import add_product, default_tile, keeps_half

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def combined(scores):
    """One scalar that depends on every field, each position with a weight of its own."""
    fields = scores if isinstance(scores, dict) else {name: getattr(scores, name) for name in slow.FIELDS}
    generator = torch.Generator().manual_seed(0)
    total = 0
    for name in slow.FIELDS:
        values = fields[name]
        total = total + (torch.randn(len(values), generator=generator).to(values) * values).sum()
    return total


def test_the_default_tile_follows_the_hidden_size():
    assert [default_tile(d) for d in (8, 1024, 2048, 4096)] == [2048, 1024, 512, 512]
    assert [default_tile(d, torch.bfloat16) for d in (8, 2048, 4096, 8192)] == [512, 512, 256, 256]


def test_on_a_gpu_a_tile_is_what_256_mib_hold():
    assert [default_tile(2048, device="cuda", tokens=n) for n in (160, 1024, 100_000)] == [419_430, 65_536, 4096]
    assert default_tile(4096, torch.bfloat16, "cuda", 160) == 16_384


def test_a_cpu_widens_half_precision():
    assert not keeps_half(torch.zeros(1, 2, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize(("dtype", "lost"), [(torch.bfloat16, 2**-17), (torch.float16, 2**-21)])
def test_a_float32_factor_is_split_into_two_halves(monkeypatch, dtype, lost):
    def multiply(left, right, *, out):  # what a GPU does: exact products, float32 sums
        assert left.dtype == right.dtype == dtype
        out.copy_(left.double() @ right.double())

    monkeypatch.setattr(tiles, "multiply", multiply)
    generator = torch.Generator().manual_seed(0)
    left, total = torch.rand(5, 64, generator=generator), torch.randn(5, 7, generator=generator)
    rows = torch.randn(64, 7, generator=generator).to(dtype)
    expected = total.double() + left.double() @ rows.double()
    bound = lost * (left.double() @ rows.double().abs()) + 1e-6
    assert add_product(total, left, rows) is total
    assert ((total - expected).abs() <= bound).all()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("tile", [None, 64])
def test_on_a_gpu_half_precision_agrees_with_float64(dtype, softcap, tile):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 9, 32, generator=generator).to(dtype).cuda().requires_grad_()
    weight = (torch.randn(200, 32, generator=generator) / 3).to(dtype).cuda()
    labels = torch.randint(0, 200, (3, 9), generator=generator).cuda()
    labels[:, :3] = -100
    assert keeps_half(hidden, weight)

    scores = scores_from_hidden(hidden, labels, weight, softcap=softcap, need=slow.EXTRAS, tile=tile)
    (gradient,) = torch.autograd.grad(combined(scores), hidden)
    exact = hidden.detach().double().requires_grad_()
    reference = slow.scores(slow.head_logits(exact, weight.double(), None, softcap), labels)
    (expected,) = torch.autograd.grad(combined(reference), exact)
    for name in slow.FIELDS:
        torch.testing.assert_close(getattr(scores, name).double(), reference[name], rtol=2e-6, atol=5e-6)
    torch.testing.assert_close(gradient.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-3)
