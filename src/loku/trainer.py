"""`UnlearnTrainer`: transformers' Trainer with a forget loss, a retain loss and the anchored adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from loku.adapters.anchor import restore, save_checkpoint, target_model
from loku.data.batching import PairedCollator, PairedDataset, pad_batch
from loku.data.encoding import Example
from loku.errors import DivergenceError, InputError, suggestion
from loku.losses.forget import FORGET_LOSSES, ForgetLoss
from loku.losses.positions import count_tokens, sequence_logprobs
from loku.losses.retain import RETAIN_LOSSES

Loss = Callable[..., Tensor]


class UnlearnTrainer(Trainer):
    """Minimise forget_weight * forget loss + retain_weight * retain loss over pairs of forget and retain rows.

    An epoch visits every forget example once; each is paired with a retain example, drawn cyclically so that all
    retain examples are used before any repeats. Losses are normalised over all micro-batches and processes of a step:
    splitting a batch changes nothing but rounding.

    `forget_loss` and `retain_loss` are names (`FORGET_LOSSES`, `RETAIN_LOSSES`) or functions of (logits, labels)
    that return a mean over supervised tokens. `reference` holds the target model's summed log-probability of every
    forget example, for losses that need it. Without `retain` (or with weight 0) there is no retain term.

    Checkpoints hold both adapters of an anchored model, and resuming restores both. The training stops with a
    DivergenceError as soon as a loss is not finite or its size exceeds `max_loss` (nats per item).
    """

    loss_is_scaled_for_ga = True  # by compute_loss, over the whole accumulated batch

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        forget: Sequence[Example],
        retain: Sequence[Example] | None,
        pad_id: int,
        forget_loss: str | Loss = "ihl",
        retain_loss: str | Loss = "nll",
        forget_weight: float = 1.0,
        retain_weight: float = 1.0,
        loss_options: dict[str, Any] | None = None,
        reference: Tensor | None = None,
        max_loss: float = 1000.0,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.forget_loss = named_forget_loss(forget_loss)
        self.retain_loss = named_retain_loss(retain_loss)
        self.weights = (forget_weight, retain_weight if retain is not None else 0.0)
        self.loss_options = {k: v for k, v in (loss_options or {}).items() if k in self.forget_loss.options}
        if self.forget_loss.needs_reference and reference is None:
            raise InputError(
                f"The forget loss '{forget_loss}' compares with the target model, but no reference was given.",
                "Pass reference=reference_logprobs(model, forget, pad_id=...), computed before training.",
            )
        self.reference = reference
        partners = list(retain) if retain is not None and self.weights[1] else None
        dataset = PairedDataset(list(forget), partners, seed=args.seed)
        self._sums = {
            "forget_loss": torch.zeros((), device=args.device),
            "retain_loss": torch.zeros((), device=args.device),
        }
        self._steps_logged = 0
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=PairedCollator(pad_id),
            callbacks=[_Epochs(dataset), _Guard(self, max_loss), *(callbacks or [])],
        )
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """Count what the two losses average over, in all micro-batches of the step and all processes."""
        counts = torch.zeros(2, dtype=torch.long)
        for batch in batch_samples:
            labels = batch["forget"]["labels"]
            counts[0] += len(labels) if self.forget_loss.unit == "sequence" else count_tokens(labels)
            if "retain" in batch:
                counts[1] += count_tokens(batch["retain"]["labels"])
        counts = counts.to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts.unsqueeze(0)).sum(0)
        return counts.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the weighted sum of both losses for one micro-batch, scaled to the whole step."""
        items = num_items_in_batch
        if items is None:
            items = self._get_num_items_in_batch([inputs], self.args.device)
        assert items is not None
        forget_weight, retain_weight = self.weights
        total = torch.zeros((), device=self.args.device)
        if forget_weight:
            forget = self._forget_term(model, inputs["forget"], items[0])
            self._sums["forget_loss"] += forget.detach()
            total = total + forget_weight * forget
        if retain_weight:
            batch = inputs["retain"]
            retain = self.retain_loss(_logits(model, batch), batch["labels"], num_items=items[1])
            self._sums["retain_loss"] += retain.detach()
            total = total + retain_weight * retain
        # Processes average their gradients, while the counts above are over all of them.
        loss = total * self.args.world_size
        return (loss, None) if return_outputs else loss

    def _forget_term(self, model: nn.Module, batch: dict[str, Tensor], items: Tensor) -> Tensor:
        arguments: list[Tensor] = [_logits(model, batch), batch["labels"]]
        if self.forget_loss.needs_reference:
            assert self.reference is not None
            arguments.append(self.reference.to(self.args.device)[batch["position"]])
        return self.forget_loss.function(*arguments, num_items=items, **self.loss_options)

    def total_steps(self) -> int:
        """Return the optimiser steps that `train` will make."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        batches = len(self.get_train_dataloader())
        return math.ceil(
            self.args.num_train_epochs * max(math.ceil(batches / self.args.gradient_accumulation_steps), 1)
        )

    def step_losses(self) -> dict[str, float]:
        """Return the mean forget and retain loss per optimiser step since the last call of `log`."""
        steps = max(self.state.global_step - self._steps_logged, 1)
        used = {"forget_loss": self.weights[0], "retain_loss": self.weights[1]}
        return {name: float(self._sums[name]) / steps for name, weight in used.items() if weight}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add both losses to what the Trainer logs."""
        if "loss" in logs:
            logs = {"loss": logs["loss"], **self.step_losses(), **{k: v for k, v in logs.items() if k != "loss"}}
            for value in self._sums.values():
                value.zero_()
            self._steps_logged = self.state.global_step
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            super()._save(output_dir, state_dict)
            return
        folder = output_dir or self.args.output_dir
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_checkpoint(model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.accelerator.unwrap_model(model or self.model)
        if isinstance(model, PeftModel):
            restore(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._steps_logged = int(resume_from_checkpoint.rstrip("/").rsplit("-", 1)[-1])


def named_forget_loss(loss: str | Loss) -> ForgetLoss:
    """Return a forget loss by name, or wrap a function of (logits, labels) that returns a mean over tokens."""
    if callable(loss):
        return ForgetLoss(_per_step(loss))
    if loss not in FORGET_LOSSES:
        raise InputError(f"'{loss}' is not a forget loss.", suggestion(loss, FORGET_LOSSES))
    return FORGET_LOSSES[loss]


def named_retain_loss(loss: str | Loss) -> Loss:
    """Return a retain loss by name, or wrap a function of (logits, labels) that returns a mean over tokens."""
    if callable(loss):
        return _per_step(loss)
    if loss not in RETAIN_LOSSES:
        raise InputError(f"'{loss}' is not a retain loss.", suggestion(loss, RETAIN_LOSSES))
    return RETAIN_LOSSES[loss]


def _per_step(loss: Loss) -> Loss:
    """Turn a mean over the tokens of one micro-batch into this micro-batch's part of the step's mean."""

    def scaled(logits: Tensor, labels: Tensor, *, num_items: Tensor) -> Tensor:
        return loss(logits, labels) * count_tokens(labels) / num_items

    return scaled


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits: Tensor = output.logits
    return logits


@torch.no_grad()
def reference_logprobs(model: nn.Module, examples: Sequence[Example], *, pad_id: int, batch_size: int = 8) -> Tensor:
    """Return the target model's summed log-probability (nats) of every example's supervised tokens.

    The adapters are off meanwhile, so no second copy of the model is needed.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums = []
    try:
        with target_model(model):
            for start in range(0, len(examples), batch_size):
                batch = pad_batch(examples[start : start + batch_size], pad_id)
                batch = {key: value.to(device) for key, value in batch.items()}
                sums.append(sequence_logprobs(_logits(model, batch), batch["labels"]))
    finally:
        model.train(was_training)
    return torch.cat(sums)


class _Epochs(TrainerCallback):
    """Tell the paired dataset which epoch it is, whatever samplers accelerate puts in between."""

    def __init__(self, dataset: PairedDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.dataset.set_epoch(math.floor(state.epoch or 0))


class _Guard(TrainerCallback):
    """Stop before a step's checkpoint is written when its losses are not finite, or absurd."""

    def __init__(self, trainer: UnlearnTrainer, max_loss: float) -> None:
        self.trainer = trainer
        self.max_loss = max_loss

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        for name, value in self.trainer.step_losses().items():
            if math.isfinite(value) and abs(value) <= self.max_loss:
                continue
            kind = "is not finite" if not math.isfinite(value) else f"exceeds --max-loss {self.max_loss:g}"
            raise DivergenceError(
                f"The {name.replace('_', ' ')} {kind} at step {state.global_step}: {value:g}.",
                f"Lower --learning-rate (now {args.learning_rate:g}) or choose a bounded loss such as ihl, in a new "
                "--output folder. The last good checkpoint is kept under `checkpoints`.",
            )


def training_arguments(folder: str | Path, steps_per_epoch: int, **options: Any) -> TrainingArguments:
    """Return transformers' TrainingArguments for a run of ours, from the options of `TrainingOptions`."""
    warmup = options["warmup_steps"]
    if warmup < 0:
        warmup = round(options["warmup_epochs"] * steps_per_epoch)
    save_steps = options["save_steps"]
    device = torch.device(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    return TrainingArguments(
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
