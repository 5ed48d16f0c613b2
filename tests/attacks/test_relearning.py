"""Relearning: it learns what it is given, by the plain recipe, and leaves no trace."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from attacks_builders import anchored
from builders import byte_level_tokenizer, tiny_model
from conftest import rows
from loku.adapters.export import merged_weights, portable_lora
from loku.adapters.layers import target_layers
from loku.attacks.relearning import fresh_lora, linear_layers, relearn, split_forget
from loku.data.batching import pad_batch
from loku.data.encoding import Encoder
from loku.data.prompts import TagTemplate
from loku.data.sources import load_records
from loku.errors import DivergenceError, InputError

ARCHITECTURES = ("llama", "gpt2", "phi", "gpt_neo")


def records(count=12, start=0):
    return load_records(rows(count, start))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, [
        (p.requires_grad, p.grad is None, p.data_ptr()) for p in model.parameters()
    ]


def same(before, after):
    return before[1] == after[1] and all(torch.equal(before[0][name], after[0][name]) for name in before[0])


def test_the_split_is_disjoint_whole_and_repeatable():
    given = records(40)
    learn, rest = split_forget(given, 0.25, seed=3)
    assert len(learn) == 10
    assert sorted(r.index for part in (learn, rest) for r in part) == list(range(40))
    again = split_forget(given, 0.25, seed=3)
    assert [r.index for r in again[0]] == [r.index for r in learn]
    assert again[0].sha256 == learn.sha256 != rest.sha256
    assert [r.index for r in split_forget(given, 0.25, seed=4)[0]] != [r.index for r in learn]


@pytest.mark.parametrize(("count", "share", "learned"), [(2, 0.01, 1), (2, 0.99, 1), (3, 0.5, 2), (5, 0.9, 4)])
def test_both_parts_always_have_a_row(count, share, learned):
    learn, rest = split_forget(records(count), share)
    assert (len(learn), len(rest)) == (learned, count - learned)


def test_what_cannot_be_split_is_refused():
    with pytest.raises(InputError, match="one row"):
        split_forget(records(1), 0.5)
    for share in (0, 1, -0.2, 1.5):
        with pytest.raises(InputError, match="between 0 and 1"):
            split_forget(records(4), share)


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("kind", ["plain", "anchored"])
def test_the_model_comes_back_bit_by_bit(tune, kind):
    model = tiny_model() if kind == "plain" else anchored(tiny_model())
    model.train()
    model.get_output_embeddings().eval()
    before, modes = state(model), [m.training for m in model.modules()]
    learn, rest = split_forget(records())
    relearn(model, byte_level_tokenizer(), learn=learn, probe={"rest": rest}, steps=2, tune=tune, max_new_tokens=4)
    assert same(before, state(model))
    assert modes == [m.training for m in model.modules()]

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relearn(
            model, byte_level_tokenizer(), learn=learn, probe={"rest": rest}, steps=2, tune=tune, max_new_tokens=4,
            progress=interrupt,
        )  # fmt: skip
    assert same(before, state(model))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_fresh_adapter_is_a_change_of_the_weights(architecture):
    model = tiny_model(architecture).double()
    ids = torch.arange(9).unsqueeze(0)
    plain = model(input_ids=ids).logits
    layers = linear_layers(model)
    assert len(layers) == len(target_layers(model))
    with torch.no_grad(), fresh_lora(model, 3, seed=1) as parameters:
        assert torch.equal(model(input_ids=ids).logits, plain)
        changes = []
        for A, B in zip(parameters[::2], parameters[1::2], strict=True):
            assert A.abs().max() <= A.shape[1] ** -0.5
            B.normal_(generator=torch.Generator().manual_seed(2))
            changes.append(2.0 * B.double() @ A.double())
        changed = model(input_ids=ids).logits
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for layer, change in zip(linear_layers(reference), changes, strict=True):
            layer.weight += change.T if architecture == "gpt2" else change
        expected = reference(input_ids=ids).logits
    assert (expected - plain).abs().max() > 0.1
    # the factors are float32, the model float64
    assert torch.allclose(changed, expected, atol=1e-4 * float(expected.abs().max()))


def test_full_tuning_is_the_plain_recipe():
    learn, rest = split_forget(records(), 0.5)
    found = relearn(
        tiny_model(), byte_level_tokenizer(), learn=learn, probe={"rest": rest}, tune="full", steps=4, batch_size=4,
        learning_rate=1e-3, max_new_tokens=2, seed=5,
    )  # fmt: skip
    model, losses = tiny_model(), []
    examples = Encoder(byte_level_tokenizer(), TagTemplate()).encode_records(learn).examples
    generator = torch.Generator().manual_seed(5)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    order = [int(i) for _ in range(3) for i in torch.randperm(6, generator=generator)]
    for start, stop in ((0, 4), (4, 6), (6, 10), (10, 12)):
        batch = pad_batch([examples[i] for i in order[start:stop]], byte_level_tokenizer().pad_token_id)
        loss = model(**batch).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
    assert found.losses == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]


def test_full_tuning_under_an_adapter_is_that_of_the_merged_model():
    learn, rest = split_forget(records(), 0.5)
    peft = anchored(tiny_model())
    merged = tiny_model()
    merged.load_state_dict(merged_weights(tiny_model(), portable_lora(peft)))
    curves = [
        relearn(
            model,
            byte_level_tokenizer(),
            learn=learn,
            probe={"rest": rest},
            tune="full",
            steps=3,
            max_new_tokens=2,
            learning_rate=1e-3,
        )
        for model in (peft, merged)
    ]
    assert curves[0].losses == pytest.approx(curves[1].losses, rel=1e-4)
    assert curves[0].means["rest"]["probability"] == pytest.approx(curves[1].means["rest"]["probability"], rel=1e-3)


@pytest.mark.parametrize(("tune", "rate", "gain"), [("lora", 1e-2, 0.001), ("full", 1e-2, 0.3)])
def test_it_learns_and_says_so_step_by_step(tune, rate, gain):
    learn, rest = split_forget(records(), 0.5)
    curve = relearn(
        tiny_model(), byte_level_tokenizer(), learn=learn, probe={"rest": rest, "learned": learn}, tune=tune, steps=25,
        learning_rate=rate, every=10, max_new_tokens=16,
    )  # fmt: skip
    assert curve.steps == [0, 10, 20, 25]
    assert len(curve.losses) == 25
    assert curve.gain("learned", "probability") > gain
    assert curve.last("learned", "exact_memorisation") > curve.means["learned"]["exact_memorisation"][0]
    value = json.loads(json.dumps(curve.to_json()))
    assert value["indices"]["rest"] == [record.index for record in rest]
    for name, part in (("rest", rest), ("learned", learn)):
        for figure, means in value["means"][name].items():
            lists = value["per_example"][name][figure]
            assert [len(found) for found in lists] == [len(part)] * 4
            assert means == pytest.approx([sum(found) / len(part) for found in lists])
    again = relearn(
        tiny_model(), byte_level_tokenizer(), learn=learn, probe={"rest": rest, "learned": learn}, tune=tune, steps=25,
        learning_rate=rate, every=10, max_new_tokens=16,
    )  # fmt: skip
    assert again == curve


def test_running_text_can_be_relearned():
    texts = load_records([{"text": f"Mira Voss counts {i} lighthouses at dusk, and then she rests."} for i in range(4)])
    learn, rest = split_forget(texts, 0.5)
    curve = relearn(
        tiny_model(), byte_level_tokenizer(), learn=learn, probe={"rest": rest}, steps=3, learning_rate=1e-2,
        tune="full",
    )  # fmt: skip
    assert curve.gain("rest", "probability") > 0


def test_settings_that_cannot_be_used_are_refused():
    learn, rest = split_forget(records(4))
    given = {"learn": learn, "probe": {"rest": rest}}
    with pytest.raises(InputError, match="tune 'half'"):
        relearn(tiny_model(), byte_level_tokenizer(), **given, tune="half")
    for name in ("steps", "every", "batch_size", "rank"):
        with pytest.raises(InputError, match=f"{name} 0"):
            relearn(tiny_model(), byte_level_tokenizer(), **given, **{name: 0})


def test_an_explosion_while_training_is_said_and_leaves_no_trace():
    model = tiny_model()
    before = state(model)
    learn, rest = split_forget(records(4))
    with pytest.raises(DivergenceError, match=r"Relearning blew up|is not finite"):
        relearn(
            model, byte_level_tokenizer(), learn=learn, probe={"rest": rest}, steps=4, every=4, tune="full",
            learning_rate=1e30, max_new_tokens=2,
        )  # fmt: skip
    assert same(before, state(model))


def test_an_explosion_is_said_and_leaves_no_trace():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    before = state(model)
    learn, rest = split_forget(records(4))
    with pytest.raises(DivergenceError, match="is not finite"):
        relearn(
            model, byte_level_tokenizer(), learn=learn, probe={"rest": rest}, steps=1, tune="full", max_new_tokens=2
        )
    assert same(before, state(model))
