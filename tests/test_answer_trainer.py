"""Fine-tuning on packed rows equals transformers' own on padded ones: losses and weights, step by step, in float64."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

from builders import tiny_model
from loku.answer_trainer import AnswerTrainer
from loku.data.batching import pad_batch
from loku.data.encoding import IGNORE, Example
from loku.guarded_trainer import training_arguments

PAD = 0


def example(index, prompt, answer, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (prompt + answer,), generator=generator).tolist()
    return Example(index, ids, [IGNORE] * prompt + ids[prompt:], prompt, 0)


EXAMPLES = [example(i, 2 + i % 4, 1 + (7 * i) % 11, 40 + i) for i in range(10)]


def arguments(folder, **more):
    options = {
        "epochs": 2.0, "max_steps": -1, "batch_size": 3, "grad_accum": 2, "learning_rate": 1e-2, "warmup_steps": 0,
        "warmup_epochs": 0.0, "scheduler": "constant", "weight_decay": 0.01, "adam_beta2": 0.95, "max_grad_norm": 1.0,
        "activation_checkpointing": False, "save_steps": -1, "report_to": "none", "seed": 3, "device": "cpu",
    }  # fmt: skip
    return training_arguments(folder, 2, **(options | more))


class Losses(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.found.append((float(logs["loss"]), float(logs["grad_norm"])))


def answers(folder, batch_size):
    """Train on twelve rows, and write the losses: in one process, or as one of several."""
    rows = [*EXAMPLES, example(10, 3, 5, 60), example(11, 2, 9, 61)]
    losses = Losses()
    options = arguments(folder, batch_size=batch_size, grad_accum=1, epochs=3.0)
    AnswerTrainer(
        tiny_model(seed=1), options, examples=rows, pad_id=PAD, max_loss=1000.0, callbacks=[losses]
    ).train()  # fmt: skip
    if options.process_index == 0:
        (folder / "losses.json").write_text(json.dumps(losses.found))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neo", "gemma3_text"])
def test_losses_and_weights_are_those_of_the_plain_trainer(tmp_path, architecture):
    ours, theirs = tiny_model(architecture, seed=1).double(), tiny_model(architecture, seed=1).double()
    one, other = Losses(), Losses()
    trainer = AnswerTrainer(
        ours, arguments(tmp_path / "a"), examples=EXAMPLES, pad_id=PAD, max_loss=1000.0, callbacks=[one]
    )
    assert trainer.forward.layout.kind == "packed"
    trainer.train()
    Trainer(
        theirs, arguments(tmp_path / "b"), train_dataset=EXAMPLES, data_collator=lambda rows: pad_batch(rows, PAD),
        callbacks=[other],
    ).train()  # fmt: skip
    assert len(one.found) == len(other.found) == 4
    # The model's own loss is taken in float32, whatever the weights are.
    torch.testing.assert_close(torch.tensor(one.found), torch.tensor(other.found), rtol=2e-5, atol=1e-6)
    assert one.found[-1][0] < one.found[0][0]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_a_step_over_micro_batches_is_one_over_all_rows():
    model = tiny_model(seed=2).double()
    found = []
    for sizes in ((6,), (1, 2, 3)):
        trained = copy.deepcopy(model)
        trainer = AnswerTrainer(
            trained, arguments("unused"), examples=EXAMPLES, pad_id=PAD, max_loss=1000.0, callbacks=[]
        )
        rows, batches = iter(EXAMPLES), []
        for size in sizes:
            batches.append(trainer.data_collator([next(rows) for _ in range(size)]))
        items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
        assert int(items) == sum(label != IGNORE for row in EXAMPLES[:6] for label in row.labels[1:])
        losses = [trainer.compute_loss(trained, batch, num_items_in_batch=items) for batch in batches]
        sum(losses).backward()
        found.append((sum(losses).detach(), [p.grad for p in trained.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_two_processes_give_the_losses_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    answers(one, batch_size=6)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(Path(__file__).parent / "train_in_processes.py")]
    outcome = subprocess.run(
        [*command, str(two), "answers"], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    alone, together = (json.loads((folder / "losses.json").read_text()) for folder in (one, two))
    assert len(alone) == 6
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-4, atol=1e-5)


def test_a_model_without_a_plain_head_is_trained_on_padded_rows(tmp_path):
    model = tiny_model("llama", seed=1)
    original = model.forward

    def scaled(*args, **more):
        output = original(*args, **more)
        output.logits = output.logits * 0.5
        return output

    model.forward = scaled
    losses = Losses()
    trainer = AnswerTrainer(
        model, arguments(tmp_path), examples=EXAMPLES, pad_id=PAD, max_loss=1000.0, callbacks=[losses]
    )
    assert trainer.forward.head is None
    assert "scaled" in trainer.forward.padded_because
    trainer.train()
    assert losses.found[-1][0] < losses.found[0][0]
