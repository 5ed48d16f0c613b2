"""Every initialiser against float64 references, and the pitfalls seen at small size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import byte_level_tokenizer, tiny_model
from loku.adapters.activations import LayerActivations, forget_subspace, pooled_outputs, retain_subspace, share
from loku.adapters.importance import Importance, LayerImportance
from loku.adapters.initialisers import (
    INITIALISERS,
    Factors,
    Initialiser,
    fila,
    fila_official,
    initial_factors,
    initialiser_of,
    lora,
    pissa,
    reglu,
)
from loku.adapters.layers import target_layers
from loku.adapters.layers import weight as weight_of
from loku.data.encoding import Example
from loku.errors import InputError


def weight(rows=24, columns=16, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def row_weights(rows=24, seed=0):
    """Between .1 and 1.1, from a seed: singular values that nearly meet leave single factors to rounding."""
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed)) + 0.1


def weighted_error(W, w, product):
    return float((w.double().unsqueeze(1) * (W.double() - product.double()).square()).sum())


def optimum(W, w, rank):
    """The smallest possible weighted error: the squared tail singular values of diag(sqrt w) W."""
    S = torch.linalg.svdvals(w.double().sqrt().unsqueeze(1) * W.double())
    return float(S[rank:].square().sum())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 20),
    columns=st.integers(2, 20),
    rank=st.integers(1, 8),
    seed=st.integers(0, 999),
    scaling=st.sampled_from([0.5, 2.0]),
)
def test_fila_reaches_the_optimal_weighted_error(rows, columns, rank, seed, scaling):
    rank = min(rank, rows, columns)
    W, w = weight(rows, columns, seed), torch.rand(rows, generator=torch.Generator().manual_seed(seed)) * 5 + 0.01
    A, B, energy = fila(W, w, rank=rank, scaling=scaling)
    best = optimum(W, w, rank)
    total = weighted_error(W, w, torch.zeros_like(W))
    assert weighted_error(W, w, scaling * B @ A) == pytest.approx(best, rel=1e-3, abs=1e-4 * total)
    assert energy == pytest.approx(1 - best / total, abs=1e-4)


def test_fila_equals_the_closed_form_in_float64():
    W, w, rank, s = weight().double(), row_weights().double(), 4, 2.0
    A, B, _ = fila(W, w, rank=rank, scaling=s)
    normal = w / w.mean()
    U, S, Vh = torch.linalg.svd(normal.sqrt().unsqueeze(1) * W, full_matrices=False)
    root = (S[:rank] / s).sqrt()
    expected = (normal.rsqrt().unsqueeze(1) * U[:, :rank] * root) @ (root.unsqueeze(1) * Vh[:rank])
    torch.testing.assert_close(B @ A, expected)


def test_the_scale_of_the_weights_does_not_matter():
    W, w = weight(), row_weights()
    A, B, _ = fila(W, w, rank=4, scaling=2.0)
    for factor in (1e-10, 1e10):
        A2, B2, _ = fila(W, w * factor, rank=4, scaling=2.0)
        torch.testing.assert_close(A2.abs(), A.abs(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(B2.abs(), B.abs(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("w", [torch.zeros(24), torch.cat([torch.zeros(20), torch.ones(4)])])
def test_rows_without_weight_are_harmless(w):
    A, B, energy = fila(weight(), w, rank=6, scaling=2.0)
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()
    assert B.norm() < 10
    assert 0 <= energy <= 1


def test_a_rank_deficient_weight_gives_finite_factors():
    W = weight(24, 2) @ weight(2, 16, seed=1)
    A, B, energy = fila(W, torch.ones(24), rank=8, scaling=2.0)
    torch.testing.assert_close(2.0 * B @ A, W, rtol=1e-4, atol=1e-4)
    assert energy == pytest.approx(1.0)


def test_half_precision_weights_are_factorised_in_float32():
    A, B, _ = fila(weight().bfloat16(), torch.ones(24), rank=16, scaling=2.0)
    assert A.dtype == B.dtype == torch.float32
    torch.testing.assert_close(2.0 * B @ A, weight().bfloat16().float(), rtol=1e-4, atol=1e-4)


def test_official_follows_the_released_recipe():
    W, w, rank, s = weight(), row_weights() * 100, 4, 2.0
    A, B, _ = fila_official(W, w, rank=rank, scaling=s, seed=3)
    D = w.sqrt()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        U, S, V = torch.svd_lowrank(torch.diag(D) @ W, q=rank, niter=2)
    torch.testing.assert_close(A, torch.diag((S / s).sqrt()) @ V.T)
    torch.testing.assert_close(B, torch.diag(1 / (D + 1e-5)) @ U @ torch.diag((S / s).sqrt()))


def test_lora_starts_at_zero_with_kaiming_uniform():
    A, B, energy = lora(weight(24, 64), rank=8, seed=1)
    assert A.shape == (8, 64)
    assert B.shape == (24, 8)
    assert not B.any()
    assert energy == 0
    assert A.abs().max() <= 1 / 8
    assert A.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)


def test_unknown_initialisers_and_missing_importance_are_refused():
    layers = target_layers(tiny_model(), "q_proj")
    with pytest.raises(InputError, match=r"--init 'filla' is not an initialiser\.\nDid you mean 'fila'\?"):
        initial_factors(layers, "filla", rank=4, scaling=2.0)
    for importance in (None, Importance({}, {})):
        with pytest.raises(InputError, match=r"'fila' has no importance for the layer '.*q_proj'\.\nEstimate it for"):
            initial_factors(layers, "fila", rank=4, scaling=2.0, importance=importance)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 20),
    columns=st.integers(2, 20),
    rank=st.integers(1, 8),
    seed=st.integers(0, 999),
    scaling=st.sampled_from([0.5, 2.0]),
)
def test_two_sided_fila_reaches_the_optimal_weighted_error(rows, columns, rank, seed, scaling):
    rank = min(rank, rows, columns)
    generator = torch.Generator().manual_seed(seed)
    W = weight(rows, columns, seed)
    w, v = (torch.rand(size, generator=generator) * 5 + 0.01 for size in (rows, columns))
    A, B, energy = fila(W, w, v, rank=rank, scaling=scaling)
    D, E = w.double().sqrt().unsqueeze(1), v.double().sqrt()
    S = torch.linalg.svdvals(D * W.double() * E)
    best, total = float(S[rank:].square().sum()), float(S.square().sum())
    error = float((D * (W.double() - scaling * B.double() @ A.double()) * E).square().sum())
    assert error == pytest.approx(best, rel=1e-3, abs=1e-4 * total)
    assert energy == pytest.approx(1 - best / total, abs=1e-4)


def test_two_sided_weights_are_the_best_rank_one_approximation_of_the_importance():
    """Of all products of a row and a column factor, that of the marginals has the least KL divergence."""
    R = torch.rand(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3

    def divergence(product):
        return float((R * (R / product).log() - R + product).sum())

    w, v = R.sum(1), R.sum(0)
    best = divergence(torch.outer(w, v) / R.sum())
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-1):
        for _ in range(20):
            a = w * (1 + size * torch.randn(9, generator=generator, dtype=torch.float64)).abs()
            b = v * (1 + size * torch.randn(7, generator=generator, dtype=torch.float64)).abs()
            assert divergence(torch.outer(a, b) / R.sum()) > best


def test_two_sided_with_equal_columns_is_fila_and_scales_do_not_matter():
    W, w = weight(), row_weights()
    one = fila(W, w, rank=4, scaling=2.0)
    two = fila(W, w * 1e-10, torch.full((16,), 1e-12), rank=4, scaling=2.0)
    torch.testing.assert_close(two.B @ two.A, one.B @ one.A, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two.A.norm(dim=1), one.A.norm(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("v", [torch.zeros(16), torch.cat([torch.zeros(12), torch.ones(4)]), torch.full((16,), 1e-30)])
def test_columns_without_weight_are_harmless(v):
    A, B, energy = fila(weight(), row_weights(), v, rank=6, scaling=2.0)
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()
    assert max(A.norm(), B.norm()) < 20
    assert 0 <= energy <= 1


def test_pissa_holds_the_principal_components():
    W = weight().double()
    A, B, energy = pissa(W, rank=4, scaling=2.0)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(2.0 * B @ A, (U[:, :4] * S[:4]) @ Vh[:4])
    assert energy == pytest.approx(float(S[:4].square().sum() / S.square().sum()))
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))  # both carry the root of S / scaling


def outputs(forget=40, retain=60, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LayerActivations(
        torch.randn(forget, width, generator=generator) * torch.linspace(3, 0.1, width),
        torch.randn(retain, width, generator=generator),
    )


@pytest.mark.parametrize("forget", [5, 40])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7])
def test_reglus_directions_are_the_largest_eigenvectors(forget, beta):
    seen = outputs(forget)
    C_f, C_r = (part.double().T @ part.double() / len(part) for part in seen)
    values, vectors = torch.linalg.eigh((1 - beta) * C_f - beta * C_r)
    positive = int((values > values.abs().max() * 1e-10).sum())
    found = min(4, positive)
    Q = forget_subspace(seen, 4, beta=beta).double()
    assert Q.shape == (24, found)
    expected = vectors.flip(1)[:, :found]
    torch.testing.assert_close(Q @ Q.T, expected @ expected.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(Q.T @ Q, torch.eye(found, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scaling", [0.5, 1.0, 2.0, 7.0])
def test_reglus_product_is_the_projected_weight_under_any_scaling(scaling):
    W, seen = weight(), outputs()
    A, B, energy = reglu(W, seen, rank=4, scaling=scaling)
    Q = forget_subspace(seen, 4, beta=0.7)
    torch.testing.assert_close(B[:, : Q.shape[1]], Q)
    torch.testing.assert_close(scaling * B @ A, Q @ Q.T @ W, rtol=1e-5, atol=1e-5)
    assert energy == pytest.approx(float((Q.T @ W).square().sum() / W.square().sum()), rel=1e-5)
    assert share(seen.forget, Q) > share(seen.retain, Q)


def test_reglu_with_too_few_forget_rows_starts_the_rest_as_lora():
    seen = outputs(forget=3)
    A, B, _ = reglu(weight(), seen, rank=8, scaling=2.0, seed=5)
    assert B.any(dim=0).tolist() == [True] * 3 + [False] * 5
    plain = lora(weight(), rank=8, seed=5)
    assert torch.equal(A[3:], plain.A[3:])
    nothing = LayerActivations(torch.zeros(3, 24), torch.zeros(5, 24))
    A, B, energy = reglu(weight(), nothing, rank=8, scaling=2.0, seed=5)
    assert torch.equal(A, plain.A)
    assert not B.any()
    assert energy == 0


def test_the_retain_subspace_holds_the_largest_directions():
    retain = outputs(retain=6).retain
    P = retain_subspace(retain, 4)
    _, vectors = torch.linalg.eigh(retain.T @ retain)
    torch.testing.assert_close(P @ P.T, vectors[:, -4:] @ vectors[:, -4:].T, rtol=0, atol=1e-4)
    assert retain_subspace(retain).shape == (24, 6)
    assert retain_subspace(torch.zeros(5, 24)).shape == (24, 0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_pooled_outputs_leave_padding_out(architecture):
    model = tiny_model(architecture)
    layers = target_layers(model)
    data = [Example(i, list(range(5 + i, 9 + 3 * i)), [-100, *range(6 + i, 9 + 3 * i)], 1, 1) for i in range(5)]
    found = pooled_outputs(model, layers, data, pad_id=byte_level_tokenizer().pad_token_id, batch_size=2)
    for row, example in enumerate(data):
        seen = {}

        def keep(name, seen=seen):
            return lambda _, __, output: seen.update({name: output[0].sum(0)})

        handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
        with torch.no_grad():
            model(torch.tensor([example.input_ids]))
        for handle in handles:
            handle.remove()
        for name in layers:
            torch.testing.assert_close(found[name][row], seen[name], rtol=1e-4, atol=1e-5)
    released = pooled_outputs(model, layers, data, pad_id=1, batch_size=5, padding=True)
    assert not all(torch.allclose(released[name], found[name], atol=1e-4) for name in layers)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def every_kind(layers):
    """Importances and activations of every layer, some rows of no importance at all."""
    generator = torch.Generator().manual_seed(0)
    importance, activations = {}, {}
    for name, layer in layers.items():
        out, inner = weight_of(layer).shape
        vectors = [torch.rand(size, generator=generator) * 1e-10 for size in (out, out, out, inner)]
        vectors[0][: out // 2] = 0
        importance[name] = LayerImportance(*vectors, 1e-12, 0.5)
        activations[name] = LayerActivations(
            torch.randn(6, out, generator=generator), torch.randn(9, out, generator=generator)
        )
    return Importance(importance), activations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("init", INITIALISERS)
def test_every_initialiser_gives_finite_float32_factors_from_tiny_importances(init, architecture, dtype):
    layers = target_layers(tiny_model(architecture).to(dtype))
    importance, activations = every_kind(layers)
    factors = initial_factors(layers, init, rank=4, scaling=2.0, importance=importance, activations=activations, seed=1)
    again = initial_factors(
        dict(list(layers.items())[2:4]), init, rank=4, scaling=2.0, importance=importance, activations=activations,
        seed=1,
    )  # fmt: skip
    assert list(factors) == list(layers)
    for name, (A, B, energy) in factors.items():
        assert A.shape == (4, weight_of(layers[name]).shape[1])
        assert B.shape == (weight_of(layers[name]).shape[0], 4)
        assert A.dtype == B.dtype == torch.float32
        assert torch.isfinite(A).all()
        assert torch.isfinite(B).all()
        assert 0 <= energy <= 1
        assert init.endswith("official") or B.norm() < 100
    assert all(torch.equal(again[name].B, factors[name].B) for name in again)


def test_an_initialiser_of_ones_own():
    layers = target_layers(tiny_model(), "q_proj")

    def zeros(at):
        return Factors(torch.ones(at.rank, at.W.shape[1]) * at.options["size"], torch.zeros(len(at.W), at.rank), 0.0)

    from loku.adapters.initialisers import Number

    own = Initialiser(zeros, options={"size": Number(1.0, 0)})
    factors = initial_factors(layers, own, rank=3, scaling=2.0, options={"size": 2})
    assert all(float(A.mean()) == 2.0 for A, _, _ in factors.values())


@pytest.mark.parametrize(
    ("init", "options", "message"),
    [
        ("fila", {"beta": 0.5}, r"has no option 'beta'\.\nIt has none\."),
        ("reglu", {"betta": 0.5}, r"has no option 'betta'\.\nDid you mean 'beta'\?"),
        ("reglu", {"beta": 1.5}, r"option 'beta' is 1\.5\.\nGive a number from 0 to 1\."),
        ("vila-official", {"sigma": "x"}, r"option 'sigma' is 'x'\.\nGive a number at least 1e-08\."),
        ("vila-official", {"passes": 0}, r"option 'passes' is 0\.\nGive a number at least 1\."),
    ],
)
def test_bad_options_are_refused(init, options, message):
    with pytest.raises(InputError, match=message):
        initialiser_of(init).values(options)


def test_missing_activations_are_refused():
    layers = target_layers(tiny_model(), "q_proj")
    with pytest.raises(InputError, match=r"'reglu' has no activations for the layer '.*q_proj'\.\nCollect them"):
        initial_factors(layers, "reglu", rank=4, scaling=2.0)
