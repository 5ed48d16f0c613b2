"""The trainer: equivalent runs give the same trajectory, resuming is bit-equal, divergence stops in time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

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
from loku.losses.preference import sequence_sums
from loku.losses.scores import scores_from_logits
from loku.losses.table import FORGET_LOSSES, RETAIN_LOSSES
from loku.objective import forget_term, retain_term
from loku.runs import MetricsLog
from loku.target_values import TargetValues
from loku.trainer import UnlearnTrainer, steps_per_epoch, training_arguments

PAD = byte_level_tokenizer().pad_token_id


def examples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(4, 12, (1,), generator=generator))
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        made.append(Example(index, ids, [IGNORE] * 2 + ids[2:], 2, 2))
    return made


def other_answers(rows, draws):
    """Examples of the same prompts with other answers, `draws` for each row."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for row in rows:
        made.append([])
        for _ in range(draws):
            ids = row.input_ids[:2] + torch.randint(3, 300, (4,), generator=generator).tolist()
            made[-1].append(Example(row.index, ids, [IGNORE] * 2 + ids[2:], 2, 2))
    return made


FORGET, RETAIN = examples(8, 0), examples(11, 1)
ALTERNATES = {"alternates": other_answers(FORGET, 3), "retain_alternates": other_answers(RETAIN, 2)}


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


PAIRS = [(name, "nll") for name in FORGET_LOSSES] + [("ihl", name) for name in RETAIN_LOSSES if name != "nll"]


@pytest.mark.parametrize(("loss", "retain_loss"), PAIRS)
def test_gradient_accumulation_changes_nothing_but_rounding(tmp_path, loss, retain_loss):
    curves = []
    for name, batch_size, grad_accum in (("whole", 8, 1), ("split", 2, 4), ("uneven", 3, 3)):
        options = {"batch_size": batch_size, "grad_accum": grad_accum, "epochs": 4.0, "learning_rate": 1e-3}
        losses = {"forget_loss": loss, "retain_loss": retain_loss}
        trainer(tmp_path / name, anchored(), options=options, **losses, **ALTERNATES).train()
        curves.append([row["loss"] for row in curve(tmp_path / name)])
    worst = max(abs(a - b) for other in curves[1:] for a, b in zip(curves[0], other, strict=True))
    assert worst < 2e-4 * max(map(abs, curves[0]))


@pytest.mark.parametrize(("loss", "retain_loss"), PAIRS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi"])
def test_the_fused_head_gives_the_plain_paths_trajectory(tmp_path, loss, retain_loss, architecture):
    curves = []
    for plain in (False, True):
        model = tiny_model(architecture)
        layers = target_layers(model)
        factors = initial_factors(layers, "lora", rank=4, scaling=2.0)
        run = trainer(
            tmp_path / str(plain), attach(model, layers, factors, rank=4, alpha=8.0), forget_loss=loss,
            retain_loss=retain_loss, plain_head=plain, options={"epochs": 2.0, "learning_rate": 1e-3}, **ALTERNATES,
        )  # fmt: skip
        assert (run.objective.forward.head is None) == plain
        run.train()
        curves.append([row["loss"] for row in curve(tmp_path / str(plain))])
    assert curves[0] == pytest.approx(curves[1], rel=2e-4, abs=2e-5)


# What must fall: the loss itself or, where its value is weighted by what it changes, the answers' likelihood.
WEIGHTED_BY_THEMSELVES = {"wga", "satimp", "ce_u", "undial"}


@pytest.mark.parametrize("loss", FORGET_LOSSES)
def test_every_forget_loss_trains_all_weights_too(tmp_path, loss):
    options = {"epochs": 10.0, "learning_rate": 1e-3, "save_steps": -1}
    chosen = {"beta1": 0.5} if loss == "satimp" else {}
    run = trainer(
        tmp_path, tiny_model(), retain=None, options=options, forget_loss=loss, forget_options=chosen, **ALTERNATES
    )
    copied = "reference_logits" in FORGET_LOSSES[loss].needs
    assert (run.objective.target.copy is not None) == copied  # a second model only where distributions are needed

    def likelihood():
        values = TargetValues(run.model, run.objective.forward, copies=False).token_logprobs(FORGET, pad_id=PAD)
        return torch.cat(values).mean()

    before = likelihood()
    run.train()
    log = curve(tmp_path)
    assert likelihood() < before if loss in WEIGHTED_BY_THEMSELVES else log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("model", [anchored, tiny_model], ids=["adapter", "all weights"])
@pytest.mark.parametrize("loss", ["kl", "hidden"])
def test_retain_losses_start_at_the_target_model(tmp_path, model, loss):
    run = trainer(tmp_path, model(), retain_loss=loss, options={"epochs": 5.0, "save_steps": -1})
    assert (run.objective.target.copy is not None) == (model is tiny_model)
    run.train()
    log = [row["retain_loss"] for row in curve(tmp_path)]
    assert log[0] == pytest.approx(0.0, abs=1e-5)
    assert max(log) > 1e-4


def test_answer_preservation_falls(tmp_path):
    options = {"epochs": 20.0, "save_steps": -1}
    trainer(tmp_path, retain_loss="ap", forget_weight=0.0, options=options, **ALTERNATES).train()
    log = [row["retain_loss"] for row in curve(tmp_path)]
    assert sum(log[-5:]) < sum(log[:5])


@pytest.mark.parametrize("combine", ["pcgrad", "gru"])
def test_combined_gradients_do_not_depend_on_micro_batches(tmp_path, combine):
    curves = []
    for name, batch_size, grad_accum in (("whole", 8, 1), ("split", 2, 4), ("uneven", 3, 3)):
        options = {"batch_size": batch_size, "grad_accum": grad_accum, "epochs": 6.0, "learning_rate": 3e-3}
        trainer(tmp_path / name, options=options, forget_loss="grad_ascent", combine=combine).train()
        curves.append([row["loss"] for row in curve(tmp_path / name)])
    worst = max(abs(a - b) for other in curves[1:] for a, b in zip(curves[0], other, strict=True))
    assert worst < 2e-4 * max(map(abs, curves[0]))


def test_a_combiner_that_adds_is_the_weighted_sum(tmp_path):
    settings = {"forget_weight": 0.5, "retain_weight": 2.0, "options": {"batch_size": 2, "grad_accum": 2}}
    trainer(tmp_path / "sum", **settings).train()
    trainer(tmp_path / "added", combine=lambda f, r: [a + b for a, b in zip(f, r, strict=True)], **settings).train()
    for one, other in zip(curve(tmp_path / "sum"), curve(tmp_path / "added"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_gru_keeps_the_retain_loss_lower_than_the_sum_does(tmp_path):
    options = {"epochs": 30.0, "learning_rate": 5e-3}
    last = {}
    for combine in ("sum", "gru"):
        trainer(tmp_path / combine, forget_loss="grad_ascent", options=options, combine=combine).train()
        last[combine] = curve(tmp_path / combine)[-1]["retain_loss"]
    assert last["gru"] < last["sum"]


def test_the_dual_weight_follows_the_constraint_and_survives_a_resume(tmp_path):
    settings = {"combine": "primal-dual", "retain_bound": 5.5, "dual_rate": 0.5, "options": {"save_steps": 1}}
    whole = trainer(tmp_path / "whole", **settings)
    whole.args.save_total_limit = None
    whole.train()
    log = curve(tmp_path / "whole")
    weight = 1.0
    for row in log:
        weight = max(0.0, weight + 0.5 * (row["retain_loss"] - 5.5))
        assert row["retain_weight"] == pytest.approx(weight, rel=1e-4)
    resumed = trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoints" / "checkpoint-3"))
    assert curve(tmp_path / "resumed") == log[3:]


def test_a_bound_and_its_use_belong_together(tmp_path):
    with pytest.raises(InputError, match=r"primal-dual needs a bound on the retain loss.\nGive --retain-bound"):
        trainer(tmp_path, combine="primal-dual")
    with pytest.raises(InputError, match=r"--retain-bound is of no use with --combine sum.\nAdd --combine"):
        trainer(tmp_path, retain_bound=1.0)
    with pytest.raises(InputError, match=r"--combine 'pcgard' is not known.\nDid you mean 'pcgrad'"):
        trainer(tmp_path, combine="pcgard")


@pytest.mark.parametrize("combine", ["sum", "gru", "primal-dual"])
def test_two_processes_give_the_trajectory_of_one(tmp_path, combine):
    options = {"batch_size": 4, "epochs": 3.0, "learning_rate": 3e-3, "save_steps": -1}
    bound = 5.5 if combine == "primal-dual" else None
    trainer(tmp_path / "one", options=options, forget_loss="grad_ascent", combine=combine, retain_bound=bound).train()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(Path(__file__).parent / "train_in_processes.py")]
    outcome = subprocess.run(
        [*command, str(tmp_path / "two"), combine], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert one["forget_loss"] == pytest.approx(two["forget_loss"], rel=1e-4)
        assert one["retain_loss"] == pytest.approx(two["retain_loss"], rel=1e-4)


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
    reference = run.objective.target.token_logprobs(FORGET, pad_id=PAD, batch_size=3)
    base = tiny_model()
    for example, values in zip(FORGET, reference, strict=True):
        with torch.no_grad():
            logits = base(torch.tensor([example.input_ids])).logits
        expected = sequence_sums(scores_from_logits(logits, torch.tensor([example.labels])))
        torch.testing.assert_close(values.sum(), expected[0], rtol=1e-5, atol=1e-4)


def test_losses_that_compare_answers_want_other_answers(tmp_path):
    with pytest.raises(InputError, match=r"'dpo' compares with other answers, but alternates is missing.\nPass"):
        trainer(tmp_path, forget_loss="dpo")
    with pytest.raises(InputError, match=r"'ap' compares with other answers, but retain_alternates is missing.\nPass"):
        trainer(tmp_path, retain_loss="ap")


@pytest.mark.parametrize("loss", ["ilh", "nil"])
def test_unknown_losses_are_refused(loss):
    with pytest.raises(InputError, match=rf"'{loss}' is not a forget loss\.\n"):
        forget_term(loss)
    with pytest.raises(InputError, match=rf"'{loss}' is not a retain loss\.\n"):
        retain_term(loss)


def test_unknown_options_of_a_loss_are_refused():
    with pytest.raises(InputError, match=r"'npo' has no option 'betta'.\nDid you mean 'beta'\?"):
        forget_term("npo", {"betta": 1.0})
    with pytest.raises(InputError, match=r"'grad_ascent' has no option 'beta'.\nIt has none."):
        forget_term("grad_ascent", {"beta": 1.0})
    with pytest.raises(InputError, match=r"The forget loss is a function, but has options \(beta\).\nBind them."):
        forget_term(inverted_hinge, {"beta": 1.0})


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


def test_no_checkpoint_of_a_run_that_blew_up_holds_nan(tmp_path):
    options = {"save_steps": 1, "learning_rate": 1e20, "epochs": 10.0}
    run = trainer(tmp_path, forget_loss="grad_ascent", options=options, max_loss=1e30)
    with pytest.raises(DivergenceError, match=r"(is not finite).*\nLower --learning-rate"):
        run.train()
    for file in (tmp_path / "checkpoints").rglob("*.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(file).values())


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


def test_a_second_gpu_is_refused_with_the_way_to_use_it(tmp_path):
    with pytest.raises(InputError, match=r"--device cuda:1 cannot be trained on.*\nMake it the first: CUDA_VISIBLE_DE"):
        training_arguments(tmp_path, 1, **UnlearnOptions().as_dict() | {"device": "cuda:1"})
