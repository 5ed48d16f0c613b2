"""The trainer: equivalent runs give the same trajectory, resuming is bit-equal, divergence stops in time."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import PeftModel

from builders import ARCHITECTURES, byte_level_tokenizer, tiny_model
from loku.adapters.anchor import ANCHOR, attach, lora_layers
from loku.adapters.export import portable_lora
from loku.adapters.importance import estimate_importance
from loku.adapters.initialisers import fila, initial_factors
from loku.adapters.layers import target_layers, weight
from loku.config import UnlearnOptions
from loku.data.encoding import IGNORE, Example
from loku.errors import DivergenceError, InputError
from loku.losses.hinge import inverted_hinge
from loku.losses.positions import sequence_logprobs
from loku.runs import MetricsLog
from loku.trainer import (
    UnlearnTrainer,
    named_forget_loss,
    named_retain_loss,
    reference_logprobs,
    steps_per_epoch,
    training_arguments,
)

PAD = byte_level_tokenizer().pad_token_id


def examples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(4, 12, (1,), generator=generator))
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        made.append(Example(index, ids, [IGNORE] * 2 + ids[2:], 2, 2))
    return made


FORGET, RETAIN = examples(8, 0), examples(11, 1)


def anchored():
    model = tiny_model()
    layers = target_layers(model)
    factors = {n: fila(weight(x), torch.ones(len(weight(x))), rank=4, scaling=2.0) for n, x in layers.items()}
    return attach(model, layers, factors, rank=4, alpha=8.0)


def trainer(folder, model=None, *, forget=FORGET, retain=RETAIN, options=None, callbacks=(), **settings):
    values = {"batch_size": 4, "grad_accum": 1, "epochs": 3.0, "learning_rate": 1e-2, "warmup_steps": 0}
    merged = UnlearnOptions(**(values | (options or {}))).as_dict()
    steps = steps_per_epoch(len(forget), merged["batch_size"], merged["grad_accum"])
    arguments = training_arguments(folder / "checkpoints", steps, **merged)
    log = MetricsLog(folder / "metrics.jsonl")
    return UnlearnTrainer(
        model or anchored(),
        arguments,
        forget=forget,
        retain=retain,
        pad_id=PAD,
        callbacks=[log, *callbacks],
        **settings,
    )


def curve(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def test_both_losses_fall_and_are_logged(tmp_path):
    run = trainer(tmp_path, options={"epochs": 10.0})
    run.train()
    log = curve(tmp_path)
    assert [row["step"] for row in log] == list(range(1, 21))
    assert log[-1]["retain_loss"] < log[0]["retain_loss"] - 0.1
    for row in log:
        assert row["loss"] == pytest.approx(row["forget_loss"] + row["retain_loss"], rel=1e-4)


@pytest.mark.parametrize("loss", ["ihl", "grad_ascent", "npo"])
def test_gradient_accumulation_changes_nothing_but_rounding(tmp_path, loss):
    curves = []
    for name, batch_size, grad_accum in (("whole", 8, 1), ("split", 2, 4), ("uneven", 3, 3)):
        folder = tmp_path / name
        model = anchored()
        reference = reference_logprobs(model, FORGET, pad_id=PAD)
        options = {"batch_size": batch_size, "grad_accum": grad_accum, "epochs": 4.0, "learning_rate": 1e-3}
        trainer(folder, model, options=options, forget_loss=loss, reference=reference).train()
        curves.append([row["loss"] for row in curve(folder)])
    worst = max(abs(a - b) for other in curves[1:] for a, b in zip(curves[0], other, strict=True))
    assert worst < 2e-4 * abs(curves[0][0])


def test_resuming_from_every_checkpoint_is_bit_equal(tmp_path):
    whole = trainer(tmp_path / "whole", options={"save_steps": 1})
    whole.args.save_total_limit = None
    whole.train()
    expected = weights(whole.model)
    for step in (1, 2, 3, 5):
        resumed = trainer(tmp_path / f"resumed{step}", options={"save_steps": 1})
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoints" / f"checkpoint-{step}"))
        found = weights(resumed.model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert curve(tmp_path / f"resumed{step}") == curve(tmp_path / "whole")[step:]
        anchor = [p for n, p in resumed.model.named_parameters() if f".{ANCHOR}." in n]
        assert anchor
        assert not any(p.requires_grad for p in anchor)
        assert all(len(layer.active_adapters) == 2 for layer in lora_layers(resumed.model).values())


def test_the_base_and_the_anchor_stay_as_they_were(tmp_path):
    run = trainer(tmp_path)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters() if ".default." not in n}
    run.train()
    after = dict(run.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_callable_of_logits_and_labels_works_as_well_as_a_name(tmp_path):
    trainer(tmp_path / "name", options={"batch_size": 2, "grad_accum": 2}, forget_loss="ihl").train()
    trainer(
        tmp_path / "callable",
        options={"batch_size": 2, "grad_accum": 2},
        forget_loss=inverted_hinge,
    ).train()
    for one, other in zip(curve(tmp_path / "name"), curve(tmp_path / "callable"), strict=True):
        assert one["forget_loss"] == pytest.approx(other["forget_loss"], rel=1e-4)


def test_without_retain_rows_only_the_forget_loss_is_there(tmp_path):
    trainer(tmp_path, retain=None, forget_loss="grad_ascent", options={"epochs": 1.0}).train()
    assert all("retain_loss" not in row for row in curve(tmp_path))


def test_every_retain_row_is_used_before_any_repeats(tmp_path):
    run = trainer(tmp_path)
    seen = []
    for epoch in range(3):
        run.train_dataset.set_epoch(epoch)
        seen += [run.train_dataset[i]["retain"].index for i in range(len(FORGET))]
    assert sorted(seen[: len(RETAIN)]) == list(range(len(RETAIN)))
    assert sorted(seen[len(RETAIN) : 2 * len(RETAIN)]) == list(range(len(RETAIN)))


def test_the_reference_is_the_target_model_with_adapters_off(tmp_path):
    model = anchored()
    run = trainer(tmp_path, model)
    run.train()
    reference = reference_logprobs(model, FORGET, pad_id=PAD, batch_size=3)
    base = tiny_model()
    for example, value in zip(FORGET, reference, strict=True):
        with torch.no_grad():
            logits = base(torch.tensor([example.input_ids])).logits
        expected = sequence_logprobs(logits, torch.tensor([example.labels]))
        torch.testing.assert_close(value, expected[0], rtol=1e-5, atol=1e-4)


def test_npo_without_a_reference_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"'npo' compares with the target model.*\nPass reference="):
        trainer(tmp_path, forget_loss="npo")


@pytest.mark.parametrize("loss", ["ilh", "nil"])
def test_unknown_losses_are_refused(loss):
    with pytest.raises(InputError, match=rf"'{loss}' is not a forget loss\.\n"):
        named_forget_loss(loss)
    with pytest.raises(InputError, match=rf"'{loss}' is not a retain loss\.\n"):
        named_retain_loss(loss)


def test_a_nan_loss_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    calls = 0

    def breaks_at_the_fifth_step(logits, labels):
        nonlocal calls
        calls += 1
        return inverted_hinge(logits, labels) * (math.nan if calls == 5 else 1.0)

    run = trainer(tmp_path, options={"save_steps": 2}, forget_loss=breaks_at_the_fifth_step)
    with pytest.raises(DivergenceError, match=r"The forget loss is not finite at step 5: nan\.\nLower --learning-rate"):
        run.train()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_an_exploding_loss_stops_the_run(tmp_path):
    options = {"learning_rate": 1e-2, "epochs": 30.0}
    run = trainer(tmp_path, retain=None, forget_loss="grad_ascent", max_loss=6.3, options=options)
    with pytest.raises(DivergenceError, match=r"exceeds --max-loss 6.3 at step \d+.*\n.*bounded loss such as ihl"):
        run.train()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_goes_from_importance_to_export(tmp_path, architecture):
    model = tiny_model(architecture)
    layers = target_layers(model)
    importance = estimate_importance(model, layers, FORGET, RETAIN, pad_id=PAD)
    factors = initial_factors(layers, "fila", rank=4, scaling=2.0, importance=importance)
    run = trainer(tmp_path, attach(model, layers, factors, rank=4, alpha=8.0), options={"epochs": 1.0})
    run.train()
    portable_lora(run.model).save(tmp_path / "adapter", base_model=None)
    plain = PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "adapter").eval()
    ids = torch.tensor([FORGET[0].input_ids])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, run.model.eval()(ids).logits, rtol=0, atol=2e-5)


def test_a_full_model_trains_without_adapters(tmp_path):
    model = tiny_model()
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer(tmp_path, model, options={"epochs": 1.0, "learning_rate": 1e-3}).train()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
