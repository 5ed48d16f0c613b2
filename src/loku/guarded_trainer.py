"""What both trainings share: a Trainer with a guard, its arguments from our options, and its progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from loku.errors import DivergenceError, InputError

KEPT = "Checkpoints from before are kept under `checkpoints`."


class GuardedTrainer(Trainer):
    """transformers' Trainer that stops when training blows up, before a bad checkpoint can replace a good one.

    Raises DivergenceError when a logged loss or gradient norm is not finite, when a loss exceeds `max_loss` in size,
    and when a weight is not finite as a checkpoint is about to be written.
    """

    def __init__(self, *args: Any, max_loss: float, callbacks: list[TrainerCallback], **more: Any) -> None:
        super().__init__(*args, callbacks=[_Guard(max_loss), *callbacks], **more)
        self.remove_callback(PrinterCallback)

    def train_from(self, checkpoint: Path | None) -> None:
        """Train, or go on from a checkpoint; from one of the last step nothing is left to train.

        (Within an epoch transformers' own `train` takes a step before it looks at max_steps.)
        """
        if checkpoint is not None and checkpoint_step(checkpoint) >= self.total_steps():
            self.load_weights(checkpoint)
        else:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def load_weights(self, checkpoint: str | Path) -> None:
        """Put a checkpoint's weights into the model, without training on."""
        self._load_from_checkpoint(str(checkpoint))

    def total_steps(self) -> int:
        """Return the optimiser steps that training makes in all."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        batches = len(self.get_train_dataloader())
        return math.ceil(
            self.args.num_train_epochs * max(math.ceil(batches / self.args.gradient_accumulation_steps), 1)
        )

    def over_processes(self, counts: Tensor) -> Tensor:
        """Return the sum over all processes of what each has counted in a step."""
        return self.accelerator.gather(counts.unsqueeze(0)).sum(0) if self.args.world_size > 1 else counts

    def _save_checkpoint(self, *args: Any, **more: Any) -> None:
        check_finite(self.model)
        super()._save_checkpoint(*args, **more)


def checkpoint_step(checkpoint: str | Path) -> int:
    """Return the optimiser step that a checkpoint folder is from."""
    return int(Path(checkpoint).name.rsplit("-", 1)[-1])


class _Guard(TrainerCallback):
    """Looks at every logged step; logs come before the step's checkpoint."""

    def __init__(self, max_loss: float) -> None:
        self.max_loss = max_loss

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        for name in ("forget_loss", "retain_loss", "loss", "grad_norm"):
            value = float((logs or {}).get(name, 0.0))
            too_large = name != "grad_norm" and abs(value) > self.max_loss
            if math.isfinite(value) and not too_large:
                continue
            kind = "is not finite" if not math.isfinite(value) else f"exceeds --max-loss {self.max_loss:g}"
            what = "gradient norm" if name == "grad_norm" else name.replace("_", " ")
            raise DivergenceError(
                f"The {what} {kind} at step {state.global_step}: {value:g}.",
                f"Lower --learning-rate (now {args.learning_rate:g}) or choose a bounded loss such as ihl, in a new "
                f"--output folder. {KEPT}",
            )


def check_finite(model: nn.Module) -> None:
    """Raise DivergenceError when a trainable weight is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise DivergenceError(
                f"The trained weight '{name}' is not finite.",
                f"Lower --learning-rate, in a new --output folder. {KEPT}",
            )


def training_arguments(folder: str | Path, steps_per_epoch: int, **options: Any) -> TrainingArguments:
    """Return transformers' TrainingArguments for a run of ours, from the options of `TrainingOptions`."""
    warmup = options["warmup_steps"]
    if warmup < 0:
        warmup = round(options["warmup_epochs"] * steps_per_epoch)
    save_steps = options["save_steps"]
    device = torch.device(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.index:
        raise InputError(
            f"--device {device} cannot be trained on: transformers takes the first visible GPU.",
            f"Make it the first: CUDA_VISIBLE_DEVICES={device.index} loku ... --device cuda.",
        )
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options["epochs"],
        max_steps=options["max_steps"],
        per_device_train_batch_size=options["batch_size"],
        gradient_accumulation_steps=options["grad_accum"],
        learning_rate=options["learning_rate"],
        warmup_steps=warmup,
        lr_scheduler_type=options["scheduler"],
        weight_decay=options["weight_decay"],
        adam_beta2=options["adam_beta2"],
        max_grad_norm=options["max_grad_norm"],
        activation_checkpointing=options["activation_checkpointing"],
        save_strategy={0: "epoch", -1: "no"}.get(save_steps, "steps"),
        save_steps=max(save_steps, 1),
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=options["report_to"],
        seed=options["seed"],
        data_seed=options["seed"],
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        label_names=[],
        disable_tqdm=True,
        average_tokens_across_devices=False,
    )
    # One process trains on one GPU: DataParallel, transformers' default with several, cannot split our batches.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def steps_per_epoch(examples: int, batch_size: int, grad_accum: int) -> int:
    """Return the optimiser steps of one pass on one process; the last one may hold fewer sequences."""
    return max(math.ceil(math.ceil(examples / batch_size) / grad_accum), 1)


class TrainingProgress(TrainerCallback):
    """Show steps and both losses while training."""

    def __init__(self, update: Callable[[int, int, str], None]) -> None:
        self.update = update

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Show the latest losses."""
        if logs and "loss" in logs:
            shown = [
                f"{name.split('_')[0]} {logs[name]:.3f}" for name in ("forget_loss", "retain_loss") if name in logs
            ]
            self.update(state.global_step, state.max_steps, "  ".join(shown) or f"loss {logs['loss']:.3f}")
