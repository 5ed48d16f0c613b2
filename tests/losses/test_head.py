"""Scores from hidden states against the float64 reference, and against each architecture's own logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import scores_reference as slow
from builders import ARCHITECTURES, SMALL, tiny_model
from loku.errors import InputError
from loku.losses.head import scores_from_hidden
from loku.losses.lm_head import HeadSpec, last_hidden_state, lm_head_of
from loku.losses.scores import scores_from_logits


def problem(seed=0, rows=2, length=6, vocab=23, d=8, dtype=torch.float32, *, bias=True):
    """Hidden states, labels, weight and bias, all but the labels with gradients, and logits of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, d, generator=generator).to(dtype)
    weight = torch.randn(vocab, d, generator=generator).to(dtype)
    offset = torch.randn(vocab, generator=generator).to(dtype) if bias else None
    labels = torch.randint(0, vocab, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.4] = -100
    labels[:, 1] = torch.randint(0, vocab, (rows,), generator=generator)
    leaves = [t.requires_grad_() if t is not None else None for t in (hidden, weight, offset)]
    return leaves, labels


def combined(scores, seed=0):
    """One scalar that depends on every field, each position with a weight of its own."""
    fields = scores if isinstance(scores, dict) else {name: getattr(scores, name) for name in slow.FIELDS}
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for name in slow.FIELDS:
        values = fields[name]
        total = total + (torch.randn(len(values), generator=generator).to(values.dtype) * values).sum()
    return total


def gradients(value, leaves):
    return torch.autograd.grad(value, [t for t in leaves if t is not None])


def as_double(leaves):
    return [None if t is None else t.detach().double().requires_grad_() for t in leaves]


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tile", [1, 5, 23, 64, None])
def test_values_and_gradients_agree_with_float64(softcap, bias, tile):
    (hidden, weight, offset), labels = problem(bias=bias)
    scores = scores_from_hidden(hidden, labels, weight, offset, softcap=softcap, need=slow.EXTRAS, tile=tile)
    exact = as_double((hidden, weight, offset))
    expected = slow.scores(slow.head_logits(*exact, softcap), labels)
    for name in slow.FIELDS:
        torch.testing.assert_close(getattr(scores, name).double(), expected[name], rtol=2e-6, atol=2e-6)
    for ours, theirs in zip(
        gradients(combined(scores), (hidden, weight, offset)), gradients(combined(expected), exact), strict=True
    ):
        assert (ours.double() - theirs).norm() <= 1e-6 * theirs.norm()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    length=st.integers(2, 7),
    vocab=st.integers(2, 300),
    d=st.integers(1, 9),
    tile=st.integers(1, 320),
    softcap=st.sampled_from([None, 3.0]),
)
def test_agrees_with_the_plain_path_at_any_shape(seed, rows, length, vocab, d, tile, softcap):
    leaves, labels = problem(seed, rows, length, vocab, d, torch.float64)
    tiled = scores_from_hidden(leaves[0], labels, *leaves[1:], softcap=softcap, need=slow.EXTRAS, tile=tile)
    plain = scores_from_logits(slow.head_logits(*leaves, softcap), labels, need=slow.EXTRAS)
    for name in slow.FIELDS:
        torch.testing.assert_close(getattr(tiled, name), getattr(plain, name))
    for name in ("targets", "sequence"):
        assert getattr(tiled, name).equal(getattr(plain, name))
    assert (tiled.batch_size, tiled.vocab_size) == (plain.batch_size, plain.vocab_size)
    for ours, theirs in zip(gradients(combined(tiled), leaves), gradients(combined(plain), leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 3), extra=st.integers(1, 4))
def test_padding_and_row_order_change_nothing(seed, rows, extra):
    (hidden, weight, offset), labels = problem(seed, rows)
    plain = scores_from_hidden(hidden, labels, weight, offset, need=slow.EXTRAS)
    generator = torch.Generator().manual_seed(seed + 1)
    padded = scores_from_hidden(
        torch.cat([hidden, torch.randn(rows, extra, 8, generator=generator) * 50], dim=1),
        torch.cat([labels, torch.full((rows, extra), -100)], dim=1),
        weight,
        offset,
        need=slow.EXTRAS,
    )
    order = torch.randperm(rows, generator=generator)
    permuted = scores_from_hidden(hidden[order], labels[order], weight, offset, need=slow.EXTRAS)
    where = torch.cat([(plain.sequence == row).nonzero().flatten() for row in order])
    for name in slow.FIELDS:
        torch.testing.assert_close(getattr(padded, name), getattr(plain, name), rtol=0, atol=0)
        torch.testing.assert_close(getattr(permuted, name), getattr(plain, name)[where], rtol=1e-6, atol=1e-6)
    state, padded_state = (torch.autograd.grad(combined(s), hidden, retain_graph=True)[0] for s in (plain, padded))
    torch.testing.assert_close(padded_state, state, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("field", ["target", "runner_up", "spread", "mean_logit"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_gradcheck(field, softcap):
    leaves, labels = problem(4, rows=1, length=4, vocab=7, d=3, dtype=torch.float64)

    def score(hidden, weight, bias):
        scores = scores_from_hidden(hidden, labels, weight, bias, softcap=softcap, need=slow.EXTRAS, tile=3)
        return getattr(scores, field)

    assert torch.autograd.gradcheck(score, leaves)


def test_a_memorised_token_keeps_its_gradient():
    """The first steps of unlearning live on 1 - p_y; at 1e-9 it is below float32's resolution of p_y itself."""
    (hidden, weight, _), labels = problem(5, rows=1, length=2, bias=False)
    exact = as_double((hidden, weight))
    z = slow.head_logits(*exact)[0, 0]
    labels[0, 1] = int(z.argmax())
    with torch.no_grad():
        scale = 20 / (z.max() - z.topk(2).values[1])
        hidden *= scale
        exact[0] *= scale
    scores = scores_from_hidden(hidden, labels, weight)
    assert scores.label_prob.item() == 1.0
    ours = torch.autograd.grad((1 + scores.label_prob - scores.runner_up_prob).sum(), hidden)[0]
    expected = slow.scores(slow.head_logits(*exact), labels)
    odds = torch.exp(expected["target"] - expected["runner_up"] - expected["spread"])
    loss = 1 + odds / (1 + odds) - torch.exp(-expected["spread"]) / (1 + odds)
    theirs = torch.autograd.grad(loss.sum(), exact[0])[0]
    assert 0 < theirs.norm() < 1e-6
    assert (ours.double() - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_widely_spread_logits_neither_overflow_nor_underflow(scale):
    """Logits hundreds apart: labels far above all others, and others far below."""
    exact, labels = problem(12, vocab=40, dtype=torch.float64)
    with torch.no_grad():
        exact[0] *= scale
    plain = scores_from_logits(slow.head_logits(*exact), labels, need=slow.EXTRAS)
    expected = gradients(combined(plain), exact)
    for dtype, rounding in ((torch.float64, 1e-9), (torch.float32, 1e-5 * scale)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in exact]
        scores = scores_from_hidden(leaves[0], labels, *leaves[1:], need=slow.EXTRAS, tile=16)
        for name in slow.FIELDS:
            theirs = getattr(plain, name)
            torch.testing.assert_close(getattr(scores, name).double(), theirs, rtol=rounding, atol=rounding)
        for mine, other in zip(gradients(combined(scores), leaves), expected, strict=True):
            assert (mine.double() - other).norm() <= rounding * other.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_give_float32_logits(dtype):
    leaves, labels = problem(6, vocab=200, d=32, dtype=dtype)
    scores = scores_from_hidden(leaves[0], labels, *leaves[1:], need=slow.EXTRAS, tile=64)
    exact = as_double(leaves)
    expected = slow.scores(slow.head_logits(*exact), labels)
    for name in slow.FIELDS:
        assert getattr(scores, name).dtype == torch.float32
        torch.testing.assert_close(getattr(scores, name).double(), expected[name], rtol=2e-6, atol=5e-6)
    ours, theirs = gradients(combined(scores), leaves), gradients(combined(expected), exact)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), other, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_autocast_does_not_round_the_logits():
    (hidden, weight, offset), labels = problem(7)
    plain = scores_from_hidden(hidden, labels, weight, offset)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = scores_from_hidden(hidden, labels, weight, offset)
    assert cast.target.equal(plain.target)


def test_ties_take_the_first_and_never_the_label():
    hidden, weight = torch.ones(1, 5, 2, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    labels = torch.tensor([[-100, 0, 1, 2, 3]])
    for tile in (1, 2, 3, 4):
        scores = scores_from_hidden(hidden, labels, weight, tile=tile)
        assert scores.runner_up.tolist() == [2.0] * 4
        grad = torch.autograd.grad(scores.runner_up.sum(), weight)[0]
        assert grad[:, 0].tolist() == [3.0, 1.0, 0.0, 0.0]  # token 1 only where 0 is the label


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_no_token_and_one_token(tokens, softcap):
    leaves, labels = problem(8, rows=1)
    labels[:] = -100
    labels[0, 3 : 3 + tokens] = 2
    scores = scores_from_hidden(leaves[0], labels, *leaves[1:], softcap=softcap, need=slow.EXTRAS)
    assert len(scores) == tokens
    hidden, weight, _ = gradients(combined(scores), leaves)
    assert int(hidden.abs().sum(dim=-1).count_nonzero()) == tokens
    assert bool(weight.any()) == bool(tokens)


def test_frozen_weights_get_no_gradient_and_no_grad_makes_no_graph():
    (hidden, weight, offset), labels = problem(9)
    scores = scores_from_hidden(hidden, labels, weight.detach(), offset.detach())
    scores.spread.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        quiet = scores_from_hidden(hidden, labels, weight, offset)
    assert not quiet.spread.requires_grad
    assert quiet.spread.equal(scores.spread)


def test_only_the_weight_may_be_trained():
    (hidden, weight, offset), labels = problem(10)
    both = torch.autograd.grad(combined(scores_from_hidden(hidden, labels, weight, offset, need=slow.EXTRAS)), weight)
    alone = scores_from_hidden(hidden.detach(), labels, weight, offset.detach(), need=slow.EXTRAS)
    torch.testing.assert_close(torch.autograd.grad(combined(alone), weight), both)


def test_not_a_number_is_passed_on():
    (hidden, weight, offset), labels = problem(11)
    with torch.no_grad():
        hidden[0, 0] = torch.nan
    scores = scores_from_hidden(hidden, labels, weight, offset)
    assert torch.isnan(scores.label_prob[0])
    assert torch.isfinite(scores.label_prob[scores.sequence == 1]).all()


def test_errors_say_what_to_do():
    (hidden, weight, _), labels = problem()
    with pytest.raises(InputError, match=r"outside the vocabulary of 5 tokens.*\n.*tokenizer"):
        scores_from_hidden(hidden, labels, weight[:5])
    with pytest.raises(InputError, match="tile=0 is not a number of vocabulary columns"):
        scores_from_hidden(hidden, labels, weight, tile=0)
    with pytest.raises(InputError, match="'median_logit' is not an optional score"):
        scores_from_hidden(hidden, labels, weight, need=("median_logit",))


# The model's own head -------------------------------------------------------------------------------------------------


def text(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, model.config.vocab_size, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[2, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels


def ihl(scores):
    return (1 + scores.label_prob - scores.runner_up_prob).mean()


def parameter_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def both_paths(model, head):
    """Return (scores, parameter gradients of IHL) by the plain path and from the hidden states."""
    batch, labels = text(model)
    plain = scores_from_logits(model(**batch, use_cache=False).logits, labels, need=slow.EXTRAS)
    plain_gradients = parameter_gradients(model, ihl(plain))
    fast = head.scores(last_hidden_state(model, batch, head), labels, need=slow.EXTRAS)
    return (plain, plain_gradients), (fast, parameter_gradients(model, ihl(fast)))


def assert_same(plain, fast):
    for name in slow.FIELDS:
        torch.testing.assert_close(getattr(fast[0], name), getattr(plain[0], name), rtol=1e-5, atol=1e-5)
    assert plain[1].keys() == fast[1].keys()
    scale = max(float(g.norm()) for g in plain[1].values())
    for name, gradient in plain[1].items():
        torch.testing.assert_close(
            fast[1][name], gradient, rtol=1e-4, atol=2e-6 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_with_all_weights_trained(architecture):
    model = tiny_model(architecture)
    head = lm_head_of(model)
    assert isinstance(head, HeadSpec)
    assert_same(*both_paths(model, head))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_with_lora_and_gradient_checkpointing(architecture):
    base = tiny_model(architecture)
    config = LoraConfig(
        r=2,
        target_modules="all-linear",
        init_lora_weights=False,
        fan_in_fan_out=architecture == "gpt2",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config).train()
    base.activation_checkpointing_enable()
    assert base.is_activation_checkpointing
    head = lm_head_of(model)
    assert isinstance(head, HeadSpec)
    assert model.training
    plain, fast = both_paths(model, head)
    assert fast[1]
    assert all("lora" in name for name in fast[1])
    assert_same(plain, fast)


def test_bias_and_softcap_are_found():
    phi = lm_head_of(tiny_model("phi"))
    assert phi.module.bias is not None
    model = tiny_model("gemma3_text", final_logit_softcapping=2.0)
    torch.nn.init.normal_(model.get_output_embeddings().weight)  # logits that the cap does bend
    head = lm_head_of(model)
    assert head.softcap == 2.0
    assert_same(*both_paths(model, head))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_checked_too(dtype):
    for architecture in ("llama", "phi", "gemma3_text"):
        model = tiny_model(architecture).to(dtype)
        head = lm_head_of(model)
        assert isinstance(head, HeadSpec)
        batch, _ = text(model)
        assert last_hidden_state(model, batch, head).dtype == dtype


def other(name, **settings):
    config = AutoConfig.for_model(
        name, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=1, **SMALL | settings
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "settings"), [("cohere", {"logit_scale": 0.9}), ("granite", {"logits_scaling": 8.0})])
def test_scaled_logits_fall_back(name, settings, dtype):
    reason = lm_head_of(other(name, **settings).to(dtype))
    assert reason == "its logits are not the output of its head (they are scaled or changed afterwards)"


def test_gemma2_declares_its_softcap():
    assert lm_head_of(other("gemma2", head_dim=8)).softcap == 30.0


def test_heads_that_are_not_plain_fall_back():
    class Quantised(torch.nn.Linear):
        pass

    model = tiny_model("llama")
    model.lm_head = Quantised(32, model.config.vocab_size, bias=False)
    assert "Quantised, not a plain linear layer" in lm_head_of(model)
    lora = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["lm_head"]))
    assert "not a plain linear layer" in lm_head_of(lora)
    assert lm_head_of(torch.nn.Linear(2, 2)) == "it has no output embeddings"
    meta = tiny_model("llama")
    meta.lm_head.to("meta")
    assert lm_head_of(meta) == "the weights of its head are moved in and out of memory"


def test_a_model_that_hides_its_softcap_or_its_head_falls_back():
    capped = tiny_model("gemma3_text", final_logit_softcapping=30.0)
    forward = capped.forward
    head = lm_head_of(capped)
    assert isinstance(head, HeadSpec)

    def changed(**arguments):
        output = forward(**arguments)
        output.logits = output.logits * 1.05
        return output

    capped.forward = changed
    assert "soft-capped at 30" in lm_head_of(capped)

    def failing(**arguments):
        raise ValueError("needs pixels")

    capped.forward = failing
    assert lm_head_of(capped) == "the check of its head failed (ValueError: needs pixels)"
    with pytest.raises(ValueError, match="needs pixels"):
        last_hidden_state(capped, text(capped)[0], head)
    assert not head.module._forward_pre_hooks


def test_the_check_leaves_the_model_and_the_random_numbers_alone():
    model = tiny_model("phi").train()
    model.get_output_embeddings().eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    lm_head_of(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.get_rng_state().equal(before)
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_head_that_is_called_twice_is_an_error():
    model = tiny_model("llama")
    head = lm_head_of(model)
    forward = model.forward

    def twice(**arguments):
        forward(**arguments)
        return forward(**arguments)

    model.forward = twice
    with pytest.raises(InputError, match="LlamaForCausalLM called its LM head 2 times"):
        last_hidden_state(model, text(model)[0], head)
